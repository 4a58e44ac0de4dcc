"""The C extension, where it could be built. Without it the same pixels come from libraries, more slowly."""

import importlib
import os
from typing import Any


def _load() -> Any:
    if os.environ.get("GIGATOME_NATIVE", "1") == "0":
        return None
    try:
        return importlib.import_module("gigatome._native")
    except ImportError:
        return None


NATIVE: Any = _load()
"""The module ``gigatome._native``; None if it is not there, or ``GIGATOME_NATIVE`` is 0."""
