"""A study, as its file states it: encoders × heads on one outcome and one set of splits."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from gigatome.evaluation.protocol import FOLDS, Target
from gigatome.evaluation.splits import SplitOptions
from gigatome.evaluation.units import ClassTarget, SurvivalTarget


@dataclass(frozen=True)
class Reported:
    """A value that a paper reports.

    Attributes:
        head: the head it belongs to.
        value: mean over folds.
        embeddings: of the study's, spelt as there; the first that the head runs on by default.
        sd: standard deviation over folds, if the paper prints it.
        source: paper, table and row.
    """

    head: str
    value: float
    embeddings: str = ""
    sd: float | None = None
    source: str = ""


@dataclass(frozen=True)
class External:
    """Another cohort, to be tested by heads that learn from all of the first.

    Attributes:
        embeddings: folders, one for each of the study's and in their order.
        labels: table of slides, patients and outcomes, with the same columns.
    """

    embeddings: tuple[str, ...]
    labels: str


@dataclass(frozen=True)
class StudyOptions:
    """A study, as its file states it.

    Attributes:
        embeddings: of tiles, regions or slides, as :func:`~gigatome.embeddings.slide_store.open_store` takes them;
            "A + B" joins the mean embeddings of two, for probes.
        labels: table of slides, patients and outcomes.
        target: column of classes; or
        survival: columns of a survival. Exactly one of both.
        heads: names of heads.
        options: of heads, by name: those of a probe, or of a model of bags, nested as in
            :class:`~gigatome.evaluation.bag_head.BagHead`. A head with ``model`` may have any name, so that one model
            can be there several times.
        fit: of the training of all models of bags, where ``options`` do not say it.
        only: of heads, by name, the numbers of the ``embeddings`` that they run on, from 0; by default they run on all,
            and on ``null_embeddings``.
        level: ``"slide"`` or ``"patient"``; patients for survival and slides for classes by default.
        label_map: another name for classes, many to one; slides of other classes are left out.
        splits: how to split.
        split_file: published splits, a table or a folder, in place of ``splits``, of which ``train_fraction``,
            ``train_units`` and ``train_draw`` count then.
        leaks: ``"error"`` or ``"warn"`` about patients on both sides of published splits.
        site: column of the site, for splits by site; by default it is read off TCGA barcodes.
        external: another cohort to test on too.
        omics: table of omics, for heads that take them and for the fusion of the others with them; MCAT's form.
        signatures: table of the genes of each group; needed with ``omics``.
        shuffled: add a row whose heads learnt from shuffled outcomes: the first head on the first embeddings.
        null_embeddings: embeddings by an encoder with random weights, for null rows with the same heads.
        compare: test the arms against the first.
        few_shot: numbers of training units, for learning curves.
        repeats: of each point of a learning curve, with other units.
        tiles: of the first arm with attention, how many of the most and of the least attended tiles to show.
        resamples: of bootstraps.
        seed: of splits, training, sampling and resampling.
        reproduces: values of a paper, to stand beside ours.
        paper: where the study comes from, if from a paper.
        notes: deviations from it, one sentence each.
    """

    embeddings: tuple[str, ...]
    labels: str
    target: str | None = None
    survival: SurvivalTarget | None = None
    heads: tuple[str, ...] = ("linear",)
    options: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    fit: Mapping[str, Any] = field(default_factory=dict)
    only: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    level: Literal["slide", "patient"] | None = None
    label_map: Mapping[str, str] | None = None
    splits: SplitOptions = field(default_factory=lambda: SplitOptions(folds=FOLDS))
    split_file: str | None = None
    leaks: Literal["error", "warn"] = "error"
    site: str | None = None
    external: External | None = None
    omics: str | None = None
    signatures: str | None = None
    shuffled: bool = True
    null_embeddings: tuple[str, ...] = ()
    compare: bool = True
    few_shot: tuple[int, ...] = ()
    repeats: int = 5
    tiles: int = 8
    resamples: int = 2000
    seed: int = 0
    reproduces: tuple[Reported, ...] = ()
    paper: str = ""
    notes: tuple[str, ...] = ()

    def __post_init__(self):
        if (self.target is None) == (self.survival is None):
            raise ValueError("give either target, a column of classes, or survival with its columns")
        if not self.embeddings or not self.heads:
            raise ValueError("a study needs at least one of embeddings and one of heads")
        if self.repeats < 1 or self.tiles < 0 or any(count < 1 for count in self.few_shot):
            raise ValueError("repeats and few_shot must be at least 1, and tiles not negative")
        if self.external and len(self.external.embeddings) != len(self.embeddings):
            raise ValueError("external.embeddings must name one folder for each of embeddings, in their order")
        if (self.omics is None) != (self.signatures is None):
            raise ValueError("omics and signatures go together: the values, and the genes of each group")
        for what, named in (("options of", self.options), ("embeddings for", self.only)):
            unknown = set(named) - set(self.heads)
            if unknown:
                raise ValueError(f"there are {what} {min(unknown)}, which is none of the heads {', '.join(self.heads)}")
        for reported in self.reproduces:
            if reported.embeddings and reported.embeddings not in self.embeddings:
                raise ValueError(f"reproduces names {reported.embeddings}, which is none of embeddings")
        for head, numbers in self.only.items():
            if not numbers or any(not 0 <= number < len(self.embeddings) for number in numbers):
                raise ValueError(f"only.{head} must be numbers of embeddings, 0 to {len(self.embeddings) - 1}")

    def on(self, head: str) -> tuple[int, ...]:
        """Numbers of the embeddings that a head runs on; those of null rows come after the others."""
        return self.only.get(head, tuple(range(len(self.embeddings) + len(self.null_embeddings))))

    @property
    def outcome(self) -> Target:
        """What is predicted."""
        return self.survival or ClassTarget(self.target or "")
