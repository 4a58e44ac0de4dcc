"""Scores on the terminal."""

import math
from typing import TYPE_CHECKING

from rich.console import Console
from rich.table import Table

if TYPE_CHECKING:
    from gigatome.evaluation.study import Study


def show_study(study: "Study", console: Console) -> None:
    """Prints the arms of a study, their comparisons, and who was left out."""
    from gigatome.evaluation.study_files import headline, spread

    table = Table(title=study.title, title_justify="left")
    first = headline(study.arms[0].result)
    for column in ("", f"{first.metric}, folds", "pooled", "95 % interval", "reported"):
        table.add_column(column, justify="left" if column == "" else "right")
    for arm in study.arms:
        score = headline(arm.result)
        folds = spread(score.mean, score.sd)
        reported = "" if arm.reported is None else f"{arm.reported:.3f}"
        label = f"{arm.label} (null)" if arm.null else arm.label
        table.add_row(label, folds, f"{score.pooled:.3f}", interval(score.ci), reported)
    console.print(table)
    for test in study.comparisons:
        span = f" ({interval(test.ci)})" if all(map(math.isfinite, test.ci)) else ""
        console.print(
            f"{test.first} − {test.second}: {test.metric} {test.value:+.3f}{span}, {test.test} p {test.p:.3g}, "
            f"{test.p_adjusted:.3g} after Holm",
            soft_wrap=True,
        )
    for reason, names in study.excluded.items():
        console.print(f"{len(names)} left out: {reason}")


def interval(bounds: tuple[float, float]) -> str:
    """An interval in words."""
    return f"{bounds[0]:.3f} – {bounds[1]:.3f}" if all(map(math.isfinite, bounds)) else "too few patients"
