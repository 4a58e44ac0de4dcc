"""Where the tissue is."""
