"""Options that several commands share."""

from dataclasses import replace
from pathlib import Path
from typing import Annotated

import typer

from gigatome.slides.cohort import Cohort

SlideMpp = Annotated[
    float | None,
    typer.Option(
        "--slide-mpp", help="µm per level-0 pixel of slides for which the table states none; wins over the file's own."
    ),
]

SegmentSet = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY=VALUE", help="Change an option of the segmentation, such as stain=0.03."),
]
SlideThreads = Annotated[int, typer.Option("--threads", min=1, help="Slides worked on at a time.")]


def cohort_of(slides: str, slide_mpp: float | None, labels: str | Path | None = None) -> Cohort:
    """The cohort, with the resolution given for those slides for which its table states none."""
    cohort = Cohort.read(slides, labels=labels)
    if slide_mpp is None:
        return cohort
    return replace(cohort, slides=tuple(s if s.mpp is not None else replace(s, mpp=slide_mpp) for s in cohort))
