"""Where tissue is on a slide: polygons in level-0 pixels, the exact share of any tile that they cover, and GeoJSON.

One file serves QuPath and TRIDENT: a FeatureCollection with one polygon a feature. Where QuPath crops a slide to its
scanned part (MIRAX and the like, without ``--no-crop``), its coordinates are level-0 minus the slide's bounds: such
outlines have to be shifted before they are read here.
"""

import json
import uuid
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from os import PathLike
from pathlib import Path
from typing import Any, final

import numpy as np
import shapely
from numpy.typing import ArrayLike, NDArray
from shapely import Polygon
from shapely.geometry import mapping, shape
from shapely.geometry.base import BaseGeometry, BaseMultipartGeometry

from gigatome.blob.store import write_atomic
from gigatome.core.errors import StoreError
from gigatome.tissue.area import AreaIndex

OVERLAP_TOLERANCE = 1e-9
"""By this much a share of tissue may miss the minimum: what floating point loses on a tile that just has it."""

_HEAD_BYTES = 4096  # of a file written here, in which all stands but the outlines
_CLASSIFICATION = {"name": "Tissue", "color": [0, 170, 80]}
_CRS = {"type": "name", "properties": {"name": "urn:ogc:def:crs:EPSG::3857"}}  # means nothing; TRIDENT writes it
_NOT_OUTLINES = ("detection", "cell", "tile")  # QuPath's objects that are measured, not drawn


@final
@dataclass(frozen=True)
class TissueMask:
    """The tissue of one slide.

    Attributes:
        polygons: outlines with holes in level-0 pixels; valid, disjoint, largest first. :meth:`of` makes them so.
        width: of the slide, level-0 pixels.
        height: of the slide, level-0 pixels.
        mpp: of the slide, µm per level-0 pixel; None if it is not known here.
        note: what else the file says of itself, such as how the outlines were made.
    """

    polygons: tuple[Polygon, ...]
    width: int
    height: int
    mpp: float | None = None
    note: Mapping[str, Any] = field(default_factory=dict, compare=False)

    @classmethod
    def of(
        cls,
        geometries: Iterable[BaseGeometry],
        width: int,
        height: int,
        *,
        mpp: float | None = None,
        note: Mapping[str, Any] | None = None,
    ) -> "TissueMask":
        """Mask of any geometries: repaired, merged where they overlap, cut at the edges of the slide."""
        repaired = [g if g.is_valid else shapely.make_valid(g) for g in geometries]
        merged = shapely.union_all([part for g in repaired for part in _polygons_in(g)])
        inside = shapely.intersection(merged, shapely.box(0, 0, width, height))
        polygons = sorted(map(shapely.normalize, _polygons_in(inside)), key=lambda p: (-p.area, p.bounds))
        return cls(tuple(polygons), width, height, mpp, note or {})

    @property
    def area(self) -> float:
        """Area of tissue in level-0 pixels."""
        return float(sum(polygon.area for polygon in self.polygons))

    @property
    def fraction(self) -> float:
        """Share of the slide that is tissue."""
        return self.area / (self.width * self.height)

    def overlap(self, x: ArrayLike, y: ArrayLike, side: float) -> NDArray[np.float64]:
        """Share of square tiles that is tissue; what lies outside the slide is not.

        Exact to about 1e-9. Takes some microseconds a tile, 30 for a single one.

        Args:
            x: left edges [N] in level-0 pixels.
            y: top edges [N] in level-0 pixels.
            side: of the tiles in level-0 pixels, > 0; need not be whole.

        Returns:
            float64 [N], 0 to 1.
        """
        if not side > 0:
            raise ValueError(f"a tile needs a positive side, not {side}")
        x0, y0 = np.broadcast_arrays(np.atleast_1d(np.asarray(x, float)), np.atleast_1d(np.asarray(y, float)))
        return self._index.area(x0, y0, x0 + side, y0 + side) / side**2

    @cached_property
    def _index(self) -> AreaIndex:
        return AreaIndex.of(self.polygons)

    def write(self, path: str | PathLike[str]) -> None:
        """Writes GeoJSON that QuPath and TRIDENT read; the same mask gives the same bytes."""
        document = {
            "type": "FeatureCollection",
            "crs": _CRS,
            "gigatome": {"width": self.width, "height": self.height, "mpp": self.mpp, "area": self.area, **self.note},
            "features": [_feature(index, polygon) for index, polygon in enumerate(self.polygons)],
        }
        write_atomic(path, json.dumps(document, separators=(",", ":")))

    @classmethod
    def read(cls, path: str | PathLike[str], *, width: int | None = None, height: int | None = None) -> "TissueMask":
        """Reads GeoJSON of gigatome, TRIDENT or QuPath.

        Polygons and multipolygons are taken, whatever their properties; QuPath's cells, detections and tiles are not.

        Args:
            path: the file.
            width: of the slide; None if the file states it, as those written here do.
            height: likewise.

        Raises:
            StoreError: it cannot be read, is no GeoJSON, or does not state the size of the slide and none is given.
        """
        try:
            document = json.loads(Path(path).read_text(encoding="utf-8"))
            note = dict(document.get("gigatome") or {}) if isinstance(document, dict) else {}
            geometries = [shape(geometry) for geometry in _geometries(document)]
        except OSError as error:
            raise StoreError(f"{path}: cannot be read ({error.strerror or error})") from error
        except (ValueError, TypeError, KeyError, AttributeError, IndexError, shapely.errors.ShapelyError) as error:
            raise StoreError(f"{path}: is not GeoJSON with polygons; remove it to have it made again") from error
        stated = note.pop("width", None), note.pop("height", None)
        note.pop("area", None)
        width, height = width or stated[0], height or stated[1]
        if not width or not height:
            raise StoreError(f"{path}: does not state the size of its slide; give width and height in level-0 pixels")
        return cls.of(geometries, width, height, mpp=note.pop("mpp", None), note=note)


@final
@dataclass(frozen=True)
class TissueSize:
    """How large a slide and its tissue are.

    Attributes:
        width: of the slide, level-0 pixels.
        height: of the slide, level-0 pixels.
        mpp: of the slide, µm per level-0 pixel; None if it is not known here.
        area: of the tissue, level-0 pixels.
    """

    width: int
    height: int
    mpp: float | None
    area: float

    @classmethod
    def of(cls, mask: TissueMask) -> "TissueSize":
        """Of a mask."""
        return cls(mask.width, mask.height, mask.mpp, mask.area)

    @classmethod
    def peek(cls, path: str | PathLike[str]) -> "TissueSize | None":
        """What a file of :meth:`TissueMask.write` states before its outlines, which are not read; takes 30 µs.

        Returns:
            None if it does not, as a file of another tool; then :meth:`TissueMask.read` tells.

        Raises:
            StoreError: it cannot be read.
        """
        try:
            with Path(path).open("rb") as file:
                head, features, _ = file.read(_HEAD_BYTES).partition(b',"features":')
        except OSError as error:
            raise StoreError(f"{path}: cannot be read ({error.strerror or error})") from error
        try:
            stated = json.loads(head + b"}")["gigatome"] if features else {}
            mpp = stated["mpp"]
            area = float(stated["area"])
            return cls(int(stated["width"]), int(stated["height"]), None if mpp is None else float(mpp), area)
        except (ValueError, TypeError, KeyError):
            return None


def _feature(index: int, polygon: Polygon) -> dict[str, Any]:
    return {
        "type": "Feature",
        "id": str(uuid.uuid5(uuid.NAMESPACE_OID, f"{index} {polygon.wkb_hex}")),
        "geometry": {"type": "Polygon", "coordinates": _plain(mapping(polygon)["coordinates"])},
        "properties": {
            "objectType": "annotation",
            "name": f"Tissue {index + 1}",
            "classification": _CLASSIFICATION,
            "isLocked": False,
            "tissue_id": index,
        },
    }


def _plain(rings: Any) -> list[list[list[float]]]:
    """Coordinates as lists, whole numbers without a decimal point."""
    return [[[int(v) if v == int(v) else v for v in point] for point in ring] for ring in rings]


def _geometries(document: Any) -> list[dict[str, Any]]:
    """GeoJSON geometries in a collection, a feature, a bare geometry or a list of these."""
    if isinstance(document, list):
        return [geometry for item in document for geometry in _geometries(item)]
    kind = document["type"]
    if kind == "FeatureCollection":
        return _geometries(document["features"])
    if kind == "GeometryCollection":
        return _geometries(document["geometries"])
    if kind != "Feature":
        return [document] if kind in ("Polygon", "MultiPolygon") else []
    drawn = (document.get("properties") or {}).get("objectType", "annotation") not in _NOT_OUTLINES
    return _geometries(document["geometry"]) if drawn and document.get("geometry") else []


def _polygons_in(geometry: BaseGeometry) -> list[Polygon]:
    if isinstance(geometry, Polygon):
        return [] if geometry.is_empty or geometry.area == 0 else [geometry]
    if isinstance(geometry, BaseMultipartGeometry):
        return [polygon for part in geometry.geoms for polygon in _polygons_in(part)]
    return []
