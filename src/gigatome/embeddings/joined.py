"""Mean embeddings of several encoders side by side, as HIPT's evaluation joins those of tiles and of regions."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from gigatome.core.errors import StoreError
from gigatome.core.job import TilesDir
from gigatome.embeddings.slide_store import Embeddings, SlideStore, open_store
from gigatome.embeddings.store import WEIGHTS, Bag, EmbeddingStore, read_header, write_bag

_OF_THE_FILE = ("name", "savetodir")


def join_means(stores: Sequence[Embeddings], job: str | Path) -> EmbeddingStore:
    """Writes, of each slide that all stores have, their mean embeddings one after the other, as a bag of one.

    So the slides of a patient count alike, whatever their tiles.

    Args:
        stores: at least two; the first one's tiling is stated.
        job: job directory to write to; files that are there are replaced, or removed if they are of other slides.

    Returns:
        The store, for probes. Its encoder is named after all of them, as is the hash of its weights.

    Raises:
        StoreError: no slide is in all stores, a file is damaged, or a file cannot be written.
    """
    common = sorted(set.intersection(*(set(store.names()) for store in stores)))
    vectors = [dict(zip(*store.slide_vectors(common), strict=True)) for store in stores]
    usable = [name for name in common if all(name in of for of in vectors)]
    if not usable:
        folders = " and ".join(str(store.folder) for store in stores)
        raise StoreError(f"{folders}: have usable embeddings of no slide in common; embed the slides with both")
    encoder = "+".join(store.encoder for store in stores)
    joined = EmbeddingStore(Path(job), TilesDir(Path(job) / stores[0].folder.parent.name), encoder)
    for name in set(joined.names()) - set(usable):
        joined.path(name).unlink(missing_ok=True)
    for name in usable:
        hashes = [of.weights if isinstance(of, SlideStore) else read_header(of.path(name)).weights for of in stores]
        attrs = {key: value for key, value in stores[0].attributes(name).items() if key not in _OF_THE_FILE}
        x = np.concatenate([of[name] for of in vectors])[None]
        encoding = {WEIGHTS: "+".join(hashes)} if all(hashes) else {}
        write_bag(joined.path(name), Bag(name, encoder, np.zeros((1, 2), np.int64), x, attrs, encoding))
    return joined


def open_embeddings(path: str | Path, job: str | Path) -> Embeddings:
    """The embeddings at ``path``, or, of "A + B", both joined; those are written to the job directory."""
    parts = [part.strip() for part in str(path).split(" + ")]
    if len(parts) == 1:
        return open_store(path)
    return join_means([open_store(part) for part in parts], job)
