"""The codec by which zarr decodes the chunks of a slide as its file holds them."""

import asyncio
import base64
from dataclasses import asdict, dataclass
from functools import lru_cache
from typing import Any, NoReturn, Self, final

import numpy as np
from zarr.abc.codec import ArrayBytesCodec
from zarr.core.array_spec import ArraySpec
from zarr.core.buffer import Buffer, NDBuffer

from gigatome.core.errors import DamagedSlideError, StoreError
from gigatome.slides.decode import ChunkError, chunk_format
from gigatome.slides.index import Coding

NAME = "gigatome.chunk"
"""Name of the codec in a ``zarr.json``."""

PIXELS = b"gigatome.pixels\0"
"""Stands before a chunk that is given as pixels, uint8 [height, width, 3], because the file leaves it out."""

_format = lru_cache(maxsize=256)(chunk_format)


@final
@dataclass(frozen=True)
class ChunkCodec(ArrayBytesCodec):
    """Compressed chunk of a TIFF page to uint8 [height, width, 3]; decodes only.

    Attributes:
        slide: name of the slide, for messages; without user, password and query.
        level: which level of it, for messages.
        coding: how its chunks are compressed.
    """

    is_fixed_size = False

    slide: str
    level: int
    coding: Coding

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> Self:
        """The codec of the configuration in a ``zarr.json``."""
        stated = dict(data["configuration"])
        slide, level = stated.pop("slide"), stated.pop("level")
        coding: dict[str, Any] = {
            key: base64.b64decode(item) if isinstance(item, str) else item for key, item in stated.items()
        }
        return cls(slide, level, Coding(**coding))

    def to_dict(self) -> dict[str, Any]:
        """Name and configuration as they stand in a ``zarr.json``; bytes in base64."""
        coding = asdict(self.coding).items()
        stated = {key: base64.b64encode(item).decode() if isinstance(item, bytes) else item for key, item in coding}
        return {"name": NAME, "configuration": {"slide": self.slide, "level": self.level, **stated}}

    def _decode_sync(self, chunk_data: Buffer, chunk_spec: ArraySpec) -> NDBuffer:
        height, width, components = chunk_spec.shape
        data = chunk_data.to_bytes()
        if data.startswith(PIXELS) and len(data) == len(PIXELS) + height * width * components:
            pixels = np.frombuffer(data, np.uint8, offset=len(PIXELS)).reshape(chunk_spec.shape)
        else:
            pixels = self._pixels(data, width, height)
        return chunk_spec.prototype.nd_buffer.from_numpy_array(pixels)

    def _pixels(self, data: bytes, width: int, height: int) -> np.ndarray:
        try:
            return _format(self.coding, width, height).decode(data)
        except ChunkError as error:
            where = f"a chunk of level {self.level}"
            raise DamagedSlideError(self.slide, f"{where}: {error}; copy the file again or leave it out") from error

    async def _decode_single(self, chunk_data: Buffer, chunk_spec: ArraySpec) -> NDBuffer:
        return await asyncio.to_thread(self._decode_sync, chunk_data, chunk_spec)

    async def _encode_single(self, chunk_data: NDBuffer, chunk_spec: ArraySpec) -> NoReturn:
        raise StoreError(f"{self.slide}: the Zarr view of a slide is read-only; write to an array of your own")

    def compute_encoded_size(self, input_byte_length: int, chunk_spec: ArraySpec) -> int:
        """Raises NotImplementedError, as zarr asks of a codec whose chunks differ in length."""
        raise NotImplementedError
