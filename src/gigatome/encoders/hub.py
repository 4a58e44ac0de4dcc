"""Fetching weights from the Hugging Face hub into its own cache."""

from pathlib import Path

import huggingface_hub
from huggingface_hub.errors import EntryNotFoundError, GatedRepoError, LocalEntryNotFoundError, RepositoryNotFoundError

from gigatome.core.errors import StoreError

HUB = "hf-hub:"
"""What the address of a repository on the hub begins with, as timm writes it: ``hf-hub:OWNER/NAME``."""

WEIGHTS = ("model.safetensors", "pytorch_model.bin")
"""Names that a repository's weights go by, the safer format first."""


def fetch(repository: str, names: tuple[str, ...] = WEIGHTS) -> Path:
    """The first of the named files that ``OWNER/NAME`` on the hub has, fetched once and then taken from the cache.

    Raises:
        StoreError: there is no such repository, its terms are not accepted, it has none of the files, or it is neither
            in the cache nor in reach.
    """
    page = f"https://huggingface.co/{repository}"
    unreachable: Exception | None = None
    for name in names:
        try:
            return Path(huggingface_hub.hf_hub_download(repository, name))
        except GatedRepoError as error:
            raise StoreError(
                f"{HUB}{repository}: its authors ask you to accept their terms at {page}; do that, then log in by "
                "`hf auth login` or set HF_TOKEN, or give the file of weights if you have it"
            ) from error
        except RepositoryNotFoundError as error:
            raise StoreError(
                f"{HUB}{repository}: there is no such repository, or it is closed to you; see {page}"
            ) from error
        except LocalEntryNotFoundError as error:  # offline, and not in the cache; another name may be
            unreachable = error
        except EntryNotFoundError:
            continue
        except (OSError, ValueError) as error:
            unreachable = error
    if unreachable is None:
        raise StoreError(f"{HUB}{repository}: has no {' or '.join(names)}; give the file of weights itself")
    reason = (str(unreachable).strip().splitlines() or [type(unreachable).__name__])[0]
    raise StoreError(
        f"{HUB}{repository}: not in the cache and cannot be fetched ({reason}); "
        "fetch it on another machine and give the file of weights"
    ) from unreachable
