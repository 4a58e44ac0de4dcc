"""The embeddings of units, slides or patients, in the forms that heads learn from."""

from collections.abc import Sequence
from typing import final

import numpy as np
from numpy.typing import NDArray

from gigatome.core.errors import EvaluationError
from gigatome.embeddings.bags import BagReader
from gigatome.embeddings.store import EmbeddingStore


@final
class UnitData:
    """The embeddings of units; a unit of several slides has the tiles of all of them.

    Args:
        store: the embeddings.
        names: of the units.
        slides: names of each unit's slides, at least one.
        omics: groups of further values of each unit, float [N, n_k] each, for heads that take them.

    Attributes:
        store: the embeddings.
        names: of the units.
        slides: of each unit.
        omics: of each unit.
        reader: of all slides, one after another.

    Raises:
        StoreError: a slide has no embeddings or no tiles, or a file is damaged.
    """

    def __init__(
        self,
        store: EmbeddingStore,
        names: Sequence[str],
        slides: Sequence[Sequence[str]],
        omics: tuple[NDArray[np.float64], ...] = (),
    ):
        self.store, self.names, self.omics = store, tuple(names), omics
        self.slides = tuple(tuple(members) for members in slides)
        self.reader = BagReader(store, list(dict.fromkeys(slide for members in slides for slide in members)))
        self._vectors: NDArray[np.float32] | None = None

    def __len__(self) -> int:
        return len(self.names)

    @property
    def vectors(self) -> NDArray[np.float32]:
        """float32 [N, D], the mean embedding of each unit's tiles.

        Raises:
            EvaluationError: a slide has embeddings that are not finite.
            StoreError: a file is missing or damaged.
        """
        if self._vectors is None:
            found, means = self.store.slide_vectors(self.reader.names)
            lost = set(self.reader.names) - set(found)
            if lost:
                raise EvaluationError(f"{min(lost)}: has no usable embeddings in {self.store.folder}; embed it again")
            row = {name: k for k, name in enumerate(found)}
            rows = [[row[slide] for slide in members] for members in self.slides]
            sizes = self.reader.sizes
            self._vectors = np.stack(
                [
                    means[members[0]] if len(members) == 1 else np.average(means[members], 0, sizes[members])
                    for members in rows
                ]
            ).astype(np.float32)
        return self._vectors

    def select(self, indices: NDArray[np.int64]) -> "UnitData":
        """Some of the units; what has been read is shared."""
        part = UnitData.__new__(UnitData)
        part.store, part.reader = self.store, self.reader
        part.names, part.slides = tuple(self.names[i] for i in indices), tuple(self.slides[i] for i in indices)
        part.omics = tuple(group[indices] for group in self.omics)
        part._vectors = None if self._vectors is None else self._vectors[indices]
        return part
