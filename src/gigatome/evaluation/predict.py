"""New slides, from pixels or embeddings to predictions."""

from collections import defaultdict
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from gigatome.core.errors import ConfigError, StoreError
from gigatome.core.logs import Failure, Progress, log, silent
from gigatome.embeddings.bags import check_bags
from gigatome.embeddings.regions import TILES
from gigatome.embeddings.slide_store import (
    Embeddings,
    SlideStore,
    holds_embeddings,
    open_store,
    slide_folders,
)
from gigatome.embeddings.slide_vectors import VIEW_TILES
from gigatome.embeddings.store import EmbeddingStore
from gigatome.evaluation.protocol import store_cohort
from gigatome.evaluation.saved import CARD, NewPrediction, SavedModel, load_model
from gigatome.evaluation.study_run import MODELS
from gigatome.evaluation.tables import read_labels
from gigatome.evaluation.unit_data import Origin, UnitData, tiling_of
from gigatome.slides.cohort import Cohort


def predict_slides(
    run: str | Path,
    slides: Cohort | Embeddings | str | Path,
    *,
    arm: str | None = None,
    encoder: str | None = None,
    job: str | Path | None = None,
    by_patient: bool = False,
    patients: str | Path | None = None,
    device: str = "cpu",
    progress: Progress = silent,
) -> tuple[SavedModel, list[NewPrediction], tuple[Failure, ...]]:
    """Predicts slides that no head has seen.

    Args:
        run: folder of a study, or of the heads of one arm.
        slides: embeddings, or a job directory that holds them; or slides, as :meth:`Cohort.read` takes them.
        arm: name of the folder of the heads, where the study has several.
        encoder: what embeds slides, as :func:`gigatome.embed` takes it; with the tiles that the heads learnt from.
        job: job directory for those embeddings.
        by_patient: predict patients from all their slides; the default does as the study did.
        patients: table of slides and their patients, where neither the cohort nor a TCGA barcode tells whose they are.
        device: where the encoder runs.
        progress: called as slides are embedded.

    Returns:
        The heads, their predictions, and the slides that could not be predicted.

    Raises:
        StoreError: there are no such heads, or no embeddings.
        ConfigError: slides are given and no encoder, or several arms are there to choose from.
        EvaluationError: the embeddings are by another encoder, or of other tiles, than those the heads learnt from.
    """
    model = load_model(heads_folder(run, arm))
    store, cohort, failures = _embedded(model, slides, encoder, job, device, progress)
    cohort = cohort if patients is None else read_labels(patients, cohort)
    there = set(store.names())
    names = [slide.name for slide in cohort if slide.name in there]
    unusable = check_bags(store, names)
    lost = {name: reason for reason, members in unusable.items() for name in members}
    failures += tuple(Failure(name, "predict", "unusable", reason) for name, reason in lost.items())
    usable = set(names) - set(lost)
    members: dict[str, list[str]] = defaultdict(list)
    together = by_patient or model.card["level"] == "patient"
    for slide in cohort:
        if slide.name in usable:
            key = slide.patient if together else slide.name
            if slide.name not in members[key]:
                members[key].append(slide.name)
    lone = sum(name == slides[0] for name, slides in members.items())
    if together and lone:
        log.warning("%d slides count as a patient each: nothing says whose they are; give a table of patients", lone)
    if not members:
        raise StoreError(f"{store.folder}: no slide has usable embeddings")
    data = UnitData(store, list(members), list(members.values()))
    model.origin.refuse_other(data.origin, store.folder)
    return replace(model, level="patient" if together else "slide"), model.predict(data), failures


def heads_folder(run: str | Path, arm: str | None = None) -> Path:
    """The folder of heads that ``run`` is, or that of its one arm, or of ``arm``; raises as :func:`predict_slides`."""
    run = Path(run)
    if (run / CARD).is_file():
        return run
    found = sorted(path.parent for path in (run / MODELS).glob(f"*/{CARD}"))
    named = [folder for folder in found if arm in (None, folder.name)]
    if not found:
        raise StoreError(f"{run}: holds no heads; gigatome evaluate … -o FOLDER writes them")
    if len(named) != 1:
        raise ConfigError(f"{run}: name one of its arms: {', '.join(folder.name for folder in found)}")
    return named[0]


def _embedded(
    model: SavedModel,
    slides: Cohort | Embeddings | str | Path,
    encoder: str | None,
    job: str | Path | None,
    device: str,
    progress: Progress,
) -> tuple[Embeddings, Cohort, tuple[Failure, ...]]:
    if isinstance(slides, EmbeddingStore | SlideStore):
        return slides, store_cohort(slides), ()
    if not isinstance(slides, Cohort) and holds_embeddings(slides):
        store = _store(Path(slides), model)
        return store, store_cohort(store), ()
    origin = model.origin
    if encoder is None or job is None:
        raise ConfigError(
            f"to embed slides, give the encoder that the heads learnt from ({origin.encoder}) and a job directory"
        )
    if "patch_size" not in origin.tiling or not {"target_mpp", "target_magnification"} & set(origin.tiling):
        raise ConfigError("the heads' card does not say which tiles they learnt from; embed the slides first")
    level = "region" if TILES in origin.tiling else "slide" if VIEW_TILES in origin.tiling else ""
    if level:
        raise ConfigError(
            f"the heads learnt from {level}s; embed the slides with gigatome embed … --level {level}, and give the job "
            "directory in place of the slides"
        )
    from gigatome.embeddings.extract import embed

    store = embed(
        slides, encoder=encoder, out=job, device=device, progress=progress,
        tile_size=int(origin.tiling["patch_size"]), mpp=_mpp(origin.tiling),
    )  # fmt: skip
    cohort = Cohort.read(slides) if not isinstance(slides, Cohort) else slides
    return replace(store, failures=()), cohort, tuple(store.failures)


def _store(path: Path, model: SavedModel) -> Embeddings:
    """The only embeddings, or, where there are several, those by the card's encoder of the card's tiles."""
    found, origin = EmbeddingStore.find(path), model.origin
    of_slides = {folder.name.removeprefix("slide_features_") for folder in slide_folders(path.absolute())}
    if not found or origin.encoder in of_slides:
        return open_store(path, encoder=origin.encoder if origin.encoder in of_slides else None)
    if len(found) > 1:
        found = [store for store in found if store.encoder == origin.encoder] or found
    if len(found) > 1:
        found = [store for store in found if _tiled_alike(store, origin)] or found
    return found[0] if len(found) == 1 else EmbeddingStore.open(path, encoder=origin.encoder)


def _tiled_alike(store: EmbeddingStore, origin: Origin) -> bool:
    names = store.names()[:1]
    return bool(names) and tiling_of(store, names[0]) == dict(origin.tiling)


def _mpp(tiling: Mapping[str, float]) -> float:
    return tiling["target_mpp"] if "target_mpp" in tiling else 10 / tiling["target_magnification"]
