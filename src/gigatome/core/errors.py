"""The errors that gigatome raises.

Everything raised on purpose derives from one class, so that ``except GigatomeError`` is enough::

    GigatomeError
    ├── SlideError            one slide cannot be used; names it
    │   ├── NotASlideError    the file is no slide that any installed reader knows
    │   ├── DamagedSlideError the file is truncated or its contents contradict each other
    │   ├── MissingMppError   the slide states no resolution, and none was given
    │   └── NoTissueError     nothing on the slide counts as tissue
    ├── CohortError           the table of slides and labels is wrong
    ├── ConfigError           a recipe or an option is wrong
    ├── StoreError            a file or object cannot be found, read or written
    ├── RunError              a run folder or a checkpoint does not fit what was asked
    ├── EvaluationError       the labels or splits do not allow the evaluation
    └── MissingExtraError     an optional dependency is needed and not installed

A message says what is wrong, which slide or key, and what to do about it.
"""


class GigatomeError(Exception):
    """Base of every error that gigatome raises on purpose."""


class SlideError(GigatomeError):
    """One slide cannot be used; a batch records it and goes on.

    Args:
        slide: path or URI of the slide.
        message: what is wrong and how to fix it, as one sentence.
    """

    def __init__(self, slide: str, message: str):
        super().__init__(f"{slide}: {message}")
        self.slide = slide
        self.message = message

    def __reduce__(self):
        return type(self), (self.slide, self.message)


class NotASlideError(SlideError):
    """The file is not a slide, or none of the installed readers knows its format."""


class DamagedSlideError(SlideError):
    """The file is truncated, or its contents contradict each other."""


class MissingMppError(SlideError):
    """The slide states no resolution and none was given; gigatome never guesses one."""


class NoTissueError(SlideError):
    """The tissue segmenter found nothing on the slide."""


class CohortError(GigatomeError):
    """The table of slides and labels is empty, incomplete or contradicts itself."""


class ConfigError(GigatomeError):
    """A recipe, an option or a ``--set`` assignment is wrong."""


class StoreError(GigatomeError):
    """A file or an object in a bucket cannot be found, read or written."""


class RunError(GigatomeError):
    """A run folder or a checkpoint does not fit what was asked of it."""


class EvaluationError(GigatomeError):
    """The labels, patients or splits do not allow the evaluation that was asked for."""


class MissingExtraError(GigatomeError):
    """An optional dependency is needed and not installed.

    Args:
        package: what could not be imported.
        extra: the extra of gigatome that installs it.
        purpose: what it is needed for, completing "… is needed to …".
    """

    def __init__(self, package: str, extra: str, purpose: str):
        super().__init__(f"{package} is needed to {purpose}: pip install 'gigatome[{extra}]'")
        self.package, self.extra, self.purpose = package, extra, purpose

    def __reduce__(self):
        return type(self), (self.package, self.extra, self.purpose)
