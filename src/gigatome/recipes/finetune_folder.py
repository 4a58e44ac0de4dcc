"""The folder of a fine-tuning: whose it is."""

from collections.abc import Mapping
from pathlib import Path

import yaml

from gigatome import config
from gigatome.blob.store import write_atomic
from gigatome.core.errors import RunError
from gigatome.evaluation.split_tables import write_splits
from gigatome.recipes.differences import differences
from gigatome.recipes.finetune_data import FinetuneData
from gigatome.recipes.finetune_schema import FinetuneRecipe

_FOREIGN = ("checkpoints", "metrics.jsonl", "encoder", "study.json")  # of other runs


def claim(out: Path, recipe: FinetuneRecipe, data: FinetuneData, mine: Mapping[str, str], *, anew: bool) -> None:
    """Takes a folder for this run, or makes sure that it is this run's already; one without a fold may be taken anew.

    Args:
        out: the folder.
        recipe: of the run.
        data: that it learns from.
        mine: hashes by which the run is known: "identity" of the recipe, "cohort" and "weights".
        anew: whether the run is to begin here.

    Raises:
        RunError: the folder holds something else, or this run although it is to begin.
    """
    record = out / "run.yaml"
    if record.is_file() and any(out.glob("fold_*")):
        _check_claimed(out, recipe, data, mine)
        if anew:
            raise RunError(f"{out} holds this run already; pass --resume to go on with it, or choose another folder")
        return
    if there := [name for name in _FOREIGN if (out / name).exists()]:
        raise RunError(f"{out} holds {there[0]} of something else; choose another folder")
    write_atomic(out / "recipe.yaml", config.to_yaml(recipe))
    write_splits(out / "splits.tsv", data.units, data.splits)
    unreadable = sorted({failure.slide for failure in data.failures})
    write_atomic(record, config.to_yaml({**mine, "unreadable": unreadable}))


def _check_claimed(out: Path, recipe: FinetuneRecipe, data: FinetuneData, mine: Mapping[str, str]) -> None:
    """Raises :class:`RunError` if the run in a folder is another one."""
    theirs = yaml.safe_load((out / "run.yaml").read_text(encoding="utf-8"))
    if theirs.get("identity") != mine["identity"]:
        raise RunError(
            f"{out} holds a run of another recipe ({differences(out, recipe.decisive())}); choose another folder"
        )
    if theirs.get("weights") != mine["weights"]:
        raise RunError(
            f"{out} holds a run that started from other weights than those at {recipe.weights}; give the same"
        )
    if theirs.get("cohort") != mine["cohort"]:
        for failure in data.failures:
            if failure.slide not in theirs.get("unreadable", ()):
                raise RunError(
                    f"{out}: slide {failure.slide} could be opened when this run began, and cannot now "
                    f"({failure.message}); see to it, then --resume"
                )
        raise RunError(f"{out} holds a run of other slides, outcomes or splits; choose another folder")
