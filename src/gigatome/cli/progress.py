"""Progress bars on stderr for the callbacks of the library."""

from collections.abc import Iterator
from contextlib import contextmanager

import rich.progress
from rich.console import Console

from gigatome.core.logs import Progress


@contextmanager
def progress_bar() -> Iterator[Progress]:
    """Context that gives a :class:`~gigatome.core.logs.Progress` drawing one bar a stage.

    Where stderr is no terminal, a line is printed when a stage begins and when it ends.
    """
    console = Console(stderr=True)
    if not console.is_terminal:
        yield _plain(console)
        return
    columns = (
        rich.progress.TextColumn("{task.description:<22}"),
        rich.progress.BarColumn(),
        rich.progress.MofNCompleteColumn(),
        rich.progress.TimeRemainingColumn(elapsed_when_finished=True),
    )
    with rich.progress.Progress(*columns, console=console) as bars:
        tasks: dict[str, rich.progress.TaskID] = {}

        def show(stage: str, done: int, total: int) -> None:
            if stage not in tasks:
                tasks[stage] = bars.add_task(stage, total=total)
            bars.update(tasks[stage], completed=done, total=total)

        yield show


def _plain(console: Console) -> Progress:
    begun: set[str] = set()

    def show(stage: str, done: int, total: int) -> None:
        if stage not in begun:
            begun.add(stage)
            console.print(f"{stage} …", highlight=False)
        if done >= total:
            console.print(f"{stage}: {done} of {total}", highlight=False)

    return show
