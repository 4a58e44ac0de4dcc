"""Where bytes lie: paths and URIs, and how they are written in messages."""

import os
from pathlib import Path
from urllib.parse import unquote, urlsplit

from gigatome.core.errors import StoreError

_SCHEMES = ("s3", "s3a", "gs", "az", "azure", "abfs", "abfss", "http", "https")
WEB = ("http", "https")


def is_remote(uri: str | os.PathLike[str]) -> bool:
    """Whether ``uri`` names an object in a bucket or on a web server rather than a local file."""
    scheme, separator, _ = os.fspath(uri).partition("://")
    return bool(separator) and scheme.lower() in _SCHEMES


def local_path(uri: str | os.PathLike[str]) -> Path:
    """Local path of a path or a ``file://`` URI; raises :class:`StoreError` for a scheme that nobody knows."""
    text = os.fspath(uri)
    scheme, separator, rest = text.partition("://")
    if not separator:
        return Path(text)
    if scheme.lower() != "file":
        raise StoreError(f"{redact(text)}: {scheme}:// is not supported; use a path, s3, gs, az, http or https")
    return Path(unquote(rest if rest.startswith("/") else "/" + rest.partition("/")[2]))


def redact(uri: str | os.PathLike[str]) -> str:
    """``uri`` without user, password, query and fragment, for messages; a local path stays as it is."""
    text = os.fspath(uri)
    if not is_remote(text):
        return text
    parts = urlsplit(text)
    before, _, host = parts.netloc.rpartition("@")
    container = bool(before) and ":" not in before and parts.scheme not in WEB  # abfss://container@account…
    return f"{parts.scheme}://{parts.netloc if container else host}{parts.path}"
