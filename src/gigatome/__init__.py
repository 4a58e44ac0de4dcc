"""Learn from gigapixel whole-slide images where they lie.

The names below are loaded when they are first used, so that ``import gigatome`` costs nothing and needs no PyTorch.
"""

import importlib
from typing import TYPE_CHECKING, Any

from gigatome.core.version import __version__ as __version__

if TYPE_CHECKING:
    from gigatome.core.errors import GigatomeError
    from gigatome.core.geometry import Box
    from gigatome.embeddings.extract import embed
    from gigatome.embeddings.extract_regions import embed_regions
    from gigatome.embeddings.slide_store import SlideStore
    from gigatome.embeddings.slide_vectors import embed_slide_vectors
    from gigatome.embeddings.store import EmbeddingStore
    from gigatome.encoders.zoo import load_encoder
    from gigatome.evaluation.predict import predict_slides
    from gigatome.evaluation.protocol import evaluate
    from gigatome.evaluation.study_options import StudyOptions
    from gigatome.evaluation.study_run import run_study
    from gigatome.evaluation.units import SurvivalTarget
    from gigatome.heatmaps.run import heatmap, hierarchical_heatmap
    from gigatome.recipes.run import train
    from gigatome.recipes.schema import load_recipe
    from gigatome.selfsup.embed_augmented import embed_augmented
    from gigatome.slides.check import check_cohort
    from gigatome.slides.cohort import Cohort
    from gigatome.slides.slide import Slide, open_slide
    from gigatome.slides.zarr_view import open_zarr
    from gigatome.tiles.grid import make_grid
    from gigatome.tiles.stream import TileStream
    from gigatome.tissue.mask import TissueMask
    from gigatome.tissue.segment import segment

__all__ = [
    "Box",
    "Cohort",
    "EmbeddingStore",
    "GigatomeError",
    "Slide",
    "SlideStore",
    "StudyOptions",
    "SurvivalTarget",
    "TileStream",
    "TissueMask",
    "check_cohort",
    "embed",
    "embed_augmented",
    "embed_regions",
    "embed_slide_vectors",
    "evaluate",
    "heatmap",
    "hierarchical_heatmap",
    "load_encoder",
    "load_recipe",
    "make_grid",
    "open_slide",
    "open_zarr",
    "predict_slides",
    "run_study",
    "segment",
    "train",
]

_HOMES = {
    "Box": "core.geometry",
    "Cohort": "slides.cohort",
    "EmbeddingStore": "embeddings.store",
    "GigatomeError": "core.errors",
    "Slide": "slides.slide",
    "SlideStore": "embeddings.slide_store",
    "StudyOptions": "evaluation.study_options",
    "SurvivalTarget": "evaluation.units",
    "TileStream": "tiles.stream",
    "TissueMask": "tissue.mask",
    "check_cohort": "slides.check",
    "embed": "embeddings.extract",
    "embed_augmented": "selfsup.embed_augmented",
    "embed_regions": "embeddings.extract_regions",
    "embed_slide_vectors": "embeddings.slide_vectors",
    "evaluate": "evaluation.protocol",
    "heatmap": "heatmaps.run",
    "hierarchical_heatmap": "heatmaps.run",
    "load_encoder": "encoders.zoo",
    "load_recipe": "recipes.schema",
    "make_grid": "tiles.grid",
    "open_slide": "slides.slide",
    "open_zarr": "slides.zarr_view",
    "predict_slides": "evaluation.predict",
    "run_study": "evaluation.study_run",
    "segment": "tissue.segment",
    "train": "recipes.run",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'gigatome' has no attribute {name!r}")
    try:
        module = importlib.import_module(f"gigatome.{_HOMES[name]}")
    except ModuleNotFoundError as error:
        from gigatome.core.errors import MissingExtraError

        if error.name in {"torch", "timm", "safetensors", "sklearn"}:
            raise MissingExtraError(error.name, "learn", f"use gigatome.{name}") from error
        raise
    value = getattr(module, name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
