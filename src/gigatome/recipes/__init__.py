"""Complete, named training set-ups and how to run them."""
