"""``gigatome embed``."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer
from rich.console import Console

from gigatome.cli.options import SlideMpp, cohort_of
from gigatome.cli.progress import progress_bar

if TYPE_CHECKING:
    from gigatome.core.logs import Failure


def embed(
    context: typer.Context,
    slides: str = typer.Argument(help="Slide, folder, glob, bucket prefix or CSV; for level slide also a job."),
    encoder: str | None = typer.Option(
        None, help="Run folder, encoder folder, file of weights as FILE?model=NAME, timm:NAME."
    ),
    out: Path = typer.Option(..., "--out", "-o", help="Job directory; the same one goes on where it stopped."),
    level: str = typer.Option("tile", help="tile; region: grids of the embeddings of its tiles; or slide: a vector."),
    tile_size: int = typer.Option(256, help="Side of a tile in pixels."),
    mpp: float = typer.Option(0.5, help="Resolution of the tiles in µm per pixel; 0.5 is 20×."),
    min_tissue: float = typer.Option(0.4, help="Least share of a tile that is tissue."),
    overlap: int = typer.Option(0, help="Overlap of neighbouring tiles in pixels; of level tile."),
    slide_mpp: SlideMpp = None,
    region_encoder: str | None = typer.Option(
        None, help="Embed the regions too: run folder, its encoder folder, or HIPT's file of weights."
    ),
    region_tiles: int = typer.Option(16, help="Tiles along a region's side."),
    min_tiles: int | None = typer.Option(None, help="Tiles with tissue that a region must have; 1 in 16 by default."),
    background: str = typer.Option("mask", help="A region's other tiles: mask leaves them out, encode reads them."),
    device: str = typer.Option("cpu", help="Where the encoder runs, such as cuda."),
    precision: str = typer.Option("fp32", help="fp32, bf16 or fp16."),
    batch_size: int = typer.Option(64, help="Tiles that the encoder sees at once."),
    threads: int = typer.Option(4, help="Threads that read tiles."),
    half: bool = typer.Option(False, "--half", help="Write float16 files, half as large."),
    name: str | None = typer.Option(
        None, help="Name of the encoder, for level slide of the slide encoder, in file names."
    ),
    region_name: str | None = typer.Option(None, help="Name of tile and region encoder together, likewise."),
    augmentations: int | None = typer.Option(
        None, help="Embed so many draws of augmented tiles instead, in float16; the paper's number is 50."
    ),
    tiles: int | None = typer.Option(None, help="Tiles of a draw; 256 by default."),
    augmentation: str | None = typer.Option(None, help="shared by the tiles of a draw, the default, or each its own."),
    augment_as: str | None = typer.Option(None, help="paper, by default, or code, which neither flips nor turns."),
    slide_encoder: str | None = typer.Option(
        None,
        help="For level slide: run folder, its encoder folder, the weights of Giga-SSL's authors, or those of "
        "Prov-GigaPath's as FILE?model=gigapath.",
    ),
    pooling: str | None = typer.Option(None, help="For level slide, in place of a slide encoder: mean."),
    views: int | None = typer.Option(None, help="For level slide: views that are averaged, 50 by default."),
    view_tiles: int | None = typer.Option(None, help="Tiles of a view; as many as in training by default."),
    drawing: str | None = typer.Option(None, help="Of a view's tiles: partition, the default, replacement, or all."),
    seed: int | None = typer.Option(None, help="Of the draws; 0 by default."),
    shard: str = typer.Option("0/1", metavar="I/N", help="Take every N-th slide from the I-th, from 0."),
    overwrite: bool = typer.Option(False, "--overwrite", help="Replace embeddings by other weights of this name."),
) -> None:
    """Embed the tissue tiles, the regions or the whole of every slide, one .h5 a slide in TRIDENT's layout."""
    given = context.params
    _check_level(given)
    if level == "slide":
        _embed_slides(context)
        return
    arguments = _arguments(given)
    if level == "region":
        regions = {"tiles": region_tiles, "min_tiles": min_tiles, "background": background}
        _embed_regions(arguments, region_encoder, region_name, regions)
    elif augmentations is not None:
        draws = {key: given[key] for key in ("augmentations", "tiles", "augmentation", "seed")}
        _embed_augmented(arguments, overlap, draws, augment_as or "paper")
    else:
        _embed_tiles(arguments, overlap)


_ALIKE = ("out", "tile_size", "mpp", "min_tissue", "batch_size", "device", "precision", "threads", "name", "overwrite")
_DRAWS = ("augmentations", "tiles", "augmentation", "augment_as")
_SLIDE = ("slide_encoder", "pooling", "views", "view_tiles", "drawing")


def _arguments(given: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments that the functions for tiles and for regions share."""
    if given["encoder"] is None:
        raise typer.BadParameter("give the encoder of the tiles", param_hint="--encoder")
    return {key: given[key] for key in _ALIKE} | {
        "cohort": cohort_of(given["slides"], given["slide_mpp"]),
        "encoder": given["encoder"],
        "dtype": "float16" if given["half"] else "float32",
        "shard": _shard(given["shard"]),
    }


def _check_level(given: Mapping[str, Any]) -> None:
    """Refuses a level that there is not, and options of another one."""
    level = given["level"]
    if level not in ("tile", "region", "slide"):
        raise typer.BadParameter(f"there is no level {level}; there are tile, region, slide", param_hint="--level")
    if level == "region" and given["overlap"]:
        raise typer.BadParameter("regions are made of tiles side by side", param_hint="--overlap")
    draws = _DRAWS if level == "slide" else (*_DRAWS, "seed")
    for own, keys in (("tile", draws), ("region", ("region_encoder",)), ("slide", _SLIDE)):
        stated = [f"--{key.replace('_', '-')}" for key in keys if given[key] is not None]
        if stated and own != level:
            raise typer.BadParameter(f"is of --level {own}", param_hint=stated[0])
        if stated and own == "tile" and given["augmentations"] is None:
            raise typer.BadParameter("goes with --augmentations alone", param_hint=stated[0])
    if level == "slide" and (given["slide_encoder"] is None) == (given["pooling"] is None):
        raise typer.BadParameter("give --slide-encoder, or --pooling mean", param_hint="--level slide")
    if given["pooling"] not in (None, "mean"):
        raise typer.BadParameter(f"there is no {given['pooling']}; there is mean", param_hint="--pooling")


def _embed_slides(context: typer.Context) -> None:
    """Embeds the tiles that are missing, unless a job is given in place of slides, and then the slides."""
    from gigatome.embeddings.extract import embed as embed_tiles
    from gigatome.embeddings.slide_store import holds_embeddings
    from gigatome.embeddings.slide_vectors import SlideVectorOptions, embed_slide_vectors, tiles_for
    from gigatome.encoders.on_tiles import tile_encoder_of
    from gigatome.encoders.slide_zoo import open_any_slide_encoder

    given = dict(context.params)
    chosen = {"views": given["views"], "tiles": given["view_tiles"], "drawing": given["drawing"], "seed": given["seed"]}
    options = SlideVectorOptions(**{key: value for key, value in chosen.items() if value is not None})
    spec = given["slide_encoder"]
    upper = None if spec is None else open_any_slide_encoder(spec)
    with progress_bar() as progress:
        cohort = None
        if holds_embeddings(given["slides"]):
            store = tiles_for(given["slides"], None if upper is None else upper[1], given["encoder"])
        else:
            if upper is not None and spec is not None:
                given["encoder"] = given["encoder"] or tile_encoder_of(spec.partition("?")[0])
                for key in ("tile_size", "mpp"):
                    source = context.get_parameter_source(key)
                    if source is None or source.name != "COMMANDLINE":
                        given[key] = getattr(upper[1], key)
            arguments = _arguments(given) | {"name": None, "overwrite": False}
            cohort = arguments["cohort"]
            store = embed_tiles(**arguments, overlap=given["overlap"], progress=progress)
        keys = ("out", "device", "precision", "name", "overwrite")
        made = embed_slide_vectors(
            store, slide_encoder=upper, cohort=cohort, options=options, shard=_shard(given["shard"]), progress=progress,
            **{key: given[key] for key in keys},
        )  # fmt: skip
    _say([f"{made.folder}: embeddings of {len(made)} slides by {made.encoder}"], made.failures, len(made))


def _embed_tiles(arguments: dict[str, Any], overlap: int) -> None:
    from gigatome.embeddings.extract import embed as run_embed

    with progress_bar() as progress:
        store = run_embed(**arguments, overlap=overlap, progress=progress)
    _say([f"{store.folder}: embeddings of {len(store)} slides by {store.encoder}"], store.failures, len(store))


def _embed_augmented(arguments: dict[str, Any], overlap: int, draws: dict[str, Any], kind: str) -> None:
    from gigatome.selfsup.embed_augmented import embed_augmented
    from gigatome.selfsup.tile_augment import TileAugmentOptions

    presets = {"paper": TileAugmentOptions.paper, "code": TileAugmentOptions.code}
    if kind not in presets:
        raise typer.BadParameter(f"there is no {kind}; there are paper, code", param_hint="--augment-as")
    given = {key: value for key, value in draws.items() if value is not None}
    del arguments["dtype"]
    with progress_bar() as progress:
        store = embed_augmented(**arguments, **given, overlap=overlap, options=presets[kind](), progress=progress)
    slides = len(store.names())
    _say([f"{store.folder}: augmented tiles of {slides} slides by {store.encoder}"], store.failures, slides)


def _embed_regions(
    arguments: dict[str, Any], region_encoder: str | None, region_name: str | None, regions: dict[str, Any]
) -> None:
    from gigatome.embeddings.extract_regions import embed_regions
    from gigatome.tiles.regions import RegionOptions

    try:
        options = RegionOptions(**regions)
    except ValueError as error:
        raise typer.BadParameter(str(error)) from error
    with progress_bar() as progress:
        made = embed_regions(
            **arguments, region_encoder=region_encoder, region_name=region_name, regions=options, progress=progress
        )
    lines = [f"{made.grids.folder}: grids of {len(made.grids)} slides by {made.grids.encoder}"]
    if made.vectors:
        lines.append(f"{made.vectors.folder}: regions of {len(made.vectors)} slides by {made.vectors.encoder}")
    _say(lines, made.failures, len(made.vectors or made.grids))


def _say(lines: Sequence[str], failures: Sequence["Failure"], done: int) -> None:
    """Prints what was made and what was not, and exits accordingly."""
    console = Console(highlight=False)
    for line in (*lines, *(f"{failure.slide}: {failure.stage}: {failure.message}" for failure in failures)):
        console.print(line, soft_wrap=True, markup=False)
    if failures:
        raise typer.Exit(3 if done else 1)


def _shard(text: str) -> tuple[int, int]:
    index, _, count = text.partition("/")
    if not (index.isdecimal() and count.isdecimal() and int(index) < int(count)):
        raise typer.BadParameter("write it as I/N with I from 0 to N − 1, such as 0/4", param_hint="--shard")
    return int(index), int(count)
