"""Optional dependencies, imported where they are used."""

import importlib
from types import ModuleType

from gigatome.core.errors import MissingExtraError


def require(package: str, extra: str, purpose: str) -> ModuleType:
    """Imports and returns an optional ``package``.

    Args:
        package: module to import, such as ``"openslide"``.
        extra: the extra of gigatome that installs it.
        purpose: what it is needed for, completing "… is needed to …".

    Raises:
        MissingExtraError: it is not installed; the message names the extra.
    """
    try:
        return importlib.import_module(package)
    except ImportError as error:
        raise MissingExtraError(package, extra, purpose) from error
