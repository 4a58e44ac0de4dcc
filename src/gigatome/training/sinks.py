"""TensorBoard and Weights & Biases, which get every line of ``metrics.jsonl``; both packages are optional."""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, final

from gigatome.core.errors import MissingExtraError
from gigatome.core.extras import require


@final
class TensorBoard:
    """Event files in a folder; ``tensorboard --logdir FOLDER`` shows them.

    Args:
        folder: for the files.

    Raises:
        MissingExtraError: tensorboard is not installed.
    """

    def __init__(self, folder: str | Path):
        require("tensorboard", "watch", "write files for TensorBoard")
        self._folder = Path(folder)
        self._writer: Any = None

    def begin(self, step: int) -> None:
        """Starts a file; what an earlier one holds of later steps is not shown any more."""
        from torch.utils.tensorboard import SummaryWriter

        self._writer = SummaryWriter(str(self._folder), purge_step=step + 1 if step else None)

    def write(self, line: Mapping[str, Any]) -> None:
        """Numbers become curves, text becomes text."""
        step, time = line["step"], line.get("time")
        for name, value in line.items():
            if isinstance(value, str):
                self._writer.add_text(name, value, step, walltime=time)
            elif name not in ("step", "time") and _finite(value):
                self._writer.add_scalar(name, value, step, walltime=time)
        self._writer.flush()

    def close(self) -> None:
        """Ends the file."""
        if self._writer is not None:
            self._writer.close()


@final
class WeightsAndBiases:
    """A run at Weights & Biases; resumed there when the run is resumed.

    Where there is no network, ``WANDB_MODE=offline`` keeps everything in the folder, for ``wandb sync``.

    Args:
        project: name of the project there.
        folder: for its files, and the run's id.
        name: of the run there.
        config: options of the run, to be shown there.

    Raises:
        MissingExtraError: wandb is not installed.
    """

    def __init__(self, project: str, folder: str | Path, *, name: str = "", config: Mapping[str, Any] | None = None):
        self._wandb: Any = require("wandb", "watch", "write to Weights & Biases")
        if not hasattr(self._wandb, "init"):  # a folder of that name, where wandb keeps files, passes for a package
            raise MissingExtraError("wandb", "watch", "write to Weights & Biases")
        self._folder, self._arguments = Path(folder), {"project": project, "name": name or None, "config": config}
        self._run: Any = None

    def begin(self, step: int) -> None:
        """Starts the run, or goes on with the one whose id is in the folder."""
        self._folder.mkdir(parents=True, exist_ok=True)
        known = self._folder / "wandb-id"
        self._run = self._wandb.init(
            **self._arguments,
            dir=str(self._folder),
            id=known.read_text(encoding="utf-8").strip() if step and known.is_file() else None,
            resume="allow",
            settings=self._wandb.Settings(silent=True, console="off"),
        )
        known.write_text(self._run.id, encoding="utf-8")
        self._run.define_metric("*", step_metric="step")  # its own steps never go back, as ours may at a resume

    def write(self, line: Mapping[str, Any]) -> None:
        """Numbers become curves; an ``alarm`` becomes an alert, which it sends by mail to those who want it."""
        self._run.log({name: value for name, value in line.items() if _finite(value)})
        if "alarm" in line:
            self._run.alert(title="collapse", text=line["alarm"])

    def close(self) -> None:
        """Ends the run there."""
        if self._run is not None:
            self._run.finish()


def _finite(value: Any) -> bool:
    return isinstance(value, int | float) and math.isfinite(value)
