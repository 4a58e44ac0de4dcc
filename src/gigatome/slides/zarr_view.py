"""A slide, or a whole cohort, as one read-only Zarr v3 hierarchy over the bytes of its files.

group = open_zarr(slide)            # OME-Zarr multiscales
group["0"][4096:4608, 8192:8704]    # uint8 [512, 512, 3] of level 0, rows first

Nothing is copied: the metadata are made when they are asked for, the chunks are those of the files, and a codec
decodes them. Source: arXiv 2404.15217, IV-B, where training reads all of TCGA in this way.
"""

import asyncio
from collections.abc import AsyncIterator, Callable, Iterable
from functools import partial
from itertools import islice
from typing import Any, NoReturn, final, get_args

from gigatome.core.errors import ConfigError, MissingExtraError, StoreError
from gigatome.slides.cohort import Cohort
from gigatome.slides.slide import Slide, open_slide

try:
    import zarr
    from zarr.abc.store import ByteRequest, OffsetByteRequest, RangeByteRequest, Store, SuffixByteRequest
    from zarr.core.buffer import Buffer, BufferPrototype
    from zarr.registry import register_codec

    from gigatome.slides.zarr_codec import NAME, ChunkCodec
    from gigatome.slides.zarr_tree import Axes, CohortTree, SlideTree, Tree
except ImportError as error:
    raise MissingExtraError("zarr", "zarr", "open slides as Zarr") from error

__all__ = ["Axes", "CohortStore", "SlideStore", "open_zarr"]

_KEYS_AT_ONCE = 4096


def open_zarr(source: Slide | Cohort, *, axes: Axes = "yxc") -> zarr.Group:
    """A slide or a cohort as a Zarr group.

    Args:
        source: a slide, which must stay open; or a cohort, whose slides are opened when they are asked for.
        axes: order of the arrays' axes. "yxc" gives [height, width, 3] like everything in gigatome; "cyx" gives
            [3, height, width], the order that OME-Zarr demands and its viewers insist on.

    Returns:
        For a slide: the OME-Zarr group, with the arrays "0", "1" and so on, one a level, uint8. For a cohort: a group
        with the group of each slide under its name; to go through its members opens every slide.

    Reading raises what reading the slide does: SlideError, DamagedSlideError, StoreError.
    """
    store = SlideStore(source, axes=axes) if isinstance(source, Slide) else CohortStore(source, axes=axes)
    return zarr.open_group(store, mode="r", zarr_format=3)


class _TreeStore(Store):
    """Zarr's interface to a :class:`Tree`; everything that may read or decode runs in a thread."""

    def __init__(self, tree: Tree, make: Callable[..., Store], arguments: tuple[Any, ...]):
        super().__init__(read_only=True)
        register_codec(NAME, ChunkCodec)
        self._tree, self._make, self._arguments = tree, make, arguments

    @property
    def supports_writes(self) -> bool:
        """No."""
        return False

    @property
    def supports_deletes(self) -> bool:
        """No."""
        return False

    @property
    def supports_listing(self) -> bool:
        """Yes."""
        return True

    @property
    def supports_consolidated_metadata(self) -> bool:
        """No: that of a cohort would need every slide opened."""
        return False

    async def get(self, key: str, prototype: BufferPrototype, byte_range: ByteRequest | None = None) -> Buffer | None:
        """The value of a key, or the part of it that ``byte_range`` names; None if there is no such key."""
        data = await asyncio.to_thread(self._tree.read, key, partial(_span, byte_range))
        return None if data is None else prototype.buffer.from_bytes(data)

    async def get_partial_values(
        self, prototype: BufferPrototype, key_ranges: Iterable[tuple[str, ByteRequest | None]]
    ) -> list[Buffer | None]:
        """:meth:`get` for many keys at once."""
        return await asyncio.gather(*(self.get(key, prototype, byte_range) for key, byte_range in key_ranges))

    async def exists(self, key: str) -> bool:
        """Whether a key has a value; nothing is read for it but the slide's headers."""
        return await asyncio.to_thread(self._tree.size, key) is not None

    async def getsize(self, key: str) -> int:
        """Length of a value in bytes; raises FileNotFoundError if there is no such key."""
        size = await asyncio.to_thread(self._tree.size, key)
        if size is None:
            raise FileNotFoundError(key)
        return size

    async def list(self) -> AsyncIterator[str]:
        """All keys; of a cohort this opens every slide."""
        async for key in self.list_prefix(""):
            yield key

    async def list_prefix(self, prefix: str) -> AsyncIterator[str]:
        """All keys that begin with ``prefix``."""
        keys = self._tree.keys(prefix)
        while some := await asyncio.to_thread(lambda: [*islice(keys, _KEYS_AT_ONCE)]):
            for key in some:
                yield key

    async def list_dir(self, prefix: str) -> AsyncIterator[str]:
        """Names directly under a path; of a cohort's root without opening a slide."""
        for name in await asyncio.to_thread(lambda: [*self._tree.children(prefix.rstrip("/"))]):
            yield name

    async def set(self, key: str, value: Buffer) -> NoReturn:
        """Refused."""
        self._refuse()

    async def delete(self, key: str) -> NoReturn:
        """Refused."""
        self._refuse()

    async def delete_dir(self, prefix: str) -> NoReturn:
        """Refused."""
        self._refuse()

    async def clear(self) -> NoReturn:
        """Refused."""
        self._refuse()

    def _refuse(self) -> NoReturn:
        raise StoreError(f"{self._tree.label}: its Zarr view is read-only; write to a store of your own")

    def __eq__(self, other: object) -> bool:
        return type(other) is type(self) and other._arguments == self._arguments  # pyright: ignore

    def __str__(self) -> str:
        return self._tree.label

    def __repr__(self) -> str:
        return f"<{type(self).__name__} {self._tree.label}>"

    def __reduce__(self):
        return self._make, self._arguments


@final
class SlideStore(_TreeStore):
    """Store of one slide, for ``zarr.open_group(store, mode="r")`` and ``xarray.open_zarr(store)``.

    A pickled store opens the slide anew where it is unpickled.

    Args:
        slide: must stay open.
        axes: as for :func:`open_zarr`.
    """

    def __init__(self, slide: Slide, axes: Axes = "yxc"):
        mpp = slide.mpp if slide.has_mpp else None
        super().__init__(SlideTree(slide, _checked(axes)), _reopened, (slide.uri, mpp, slide.reader, axes))


@final
class CohortStore(_TreeStore):
    """Store of a cohort; a slide is opened when something in its group is asked for.

    Args:
        cohort: the slides, told apart by their names.
        axes: as for :func:`open_zarr`.
        open_slides: how many slides to keep open, those last used.
    """

    def __init__(self, cohort: Cohort, axes: Axes = "yxc", open_slides: int = 64):
        tree = CohortTree(cohort, _checked(axes), open_slides)
        super().__init__(tree, CohortStore, (cohort, axes, open_slides))
        self._close_slides = tree.close

    def close(self) -> None:
        """Closes the slides; what is read later opens them again."""
        super().close()
        self._close_slides()


def _reopened(uri: str, mpp: float | None, reader: str, axes: Axes) -> SlideStore:
    return SlideStore(open_slide(uri, mpp=mpp, reader=reader), axes)


def _checked(axes: Axes) -> Axes:
    if axes not in get_args(Axes):
        raise ConfigError(f"axes is one of {', '.join(get_args(Axes))}, not {axes!r}")
    return axes


def _span(request: ByteRequest | None, size: int) -> tuple[int, int]:
    """Start and stop of a request within a value of ``size`` bytes."""
    match request:
        case None:
            return 0, size
        case RangeByteRequest(start, end):
            return min(start, size), min(end, size)
        case OffsetByteRequest(offset):
            return min(offset, size), size
        case SuffixByteRequest(suffix):
            return max(0, size - suffix), size
    raise TypeError(f"{request!r} is no request for bytes")
