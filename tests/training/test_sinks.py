"""Where the lines of metrics.jsonl go besides: TensorBoard, Weights & Biases, and what happens when they fail."""

import json
import logging
import sys

import pytest

from gigatome.core.errors import MissingExtraError
from gigatome.training.record import MetricsFile
from gigatome.training.sinks import TensorBoard, WeightsAndBiases

LINES = [
    {"step": 2, "loss": 4.5, "rankme": None, "time": 100.0},
    {"step": 4, "loss": 4.0, "rankme": 7.5, "alarm": "all is lost", "time": 101.0},
]


class Listener:
    """Keeps what it is told; fails at the line of ``fails_at``."""

    def __init__(self, fails_at=None):
        self.heard, self.fails_at = [], fails_at

    def begin(self, step):
        self.heard.append(step)

    def write(self, line):
        if line["step"] == self.fails_at:
            raise ConnectionError("no network")
        self.heard.append(dict(line))

    def close(self):
        pass


def test_sinks_hear_every_line(tmp_path):
    listener = Listener()
    metrics = MetricsFile(tmp_path / "metrics.jsonl", 0, [listener])
    for line in LINES:
        metrics.write(line)
    assert listener.heard == [0, *LINES]
    assert [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()] == LINES
    again = Listener()
    MetricsFile(tmp_path / "metrics.jsonl", 2, [again])
    assert again.heard == [2]


def test_a_sink_that_fails_is_left_out_and_the_run_goes_on(tmp_path, caplog):
    bad, good = Listener(fails_at=2), Listener()
    metrics = MetricsFile(tmp_path / "metrics.jsonl", 0, [bad, good])
    with caplog.at_level(logging.WARNING, logger="gigatome"):
        for line in LINES:
            metrics.write(line)
    assert bad.heard == [0]
    assert good.heard == [0, *LINES]
    assert len(caplog.messages) == 1
    assert "Listener gets no more metrics: no network; metrics.jsonl has them all" in caplog.messages[0]
    assert len((tmp_path / "metrics.jsonl").read_text().splitlines()) == 2


@pytest.mark.parametrize(
    ("package", "make"), [("tensorboard", TensorBoard), ("wandb", lambda p: WeightsAndBiases("x", p))]
)
def test_a_missing_package_is_named_with_its_extra(tmp_path, monkeypatch, package, make):
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(MissingExtraError, match=rf"{package}.*gigatome\[watch\]"):
        make(tmp_path)


def test_a_folder_called_wandb_is_no_package(tmp_path, monkeypatch):
    (tmp_path / "wandb").mkdir()
    monkeypatch.setattr(sys, "path", [str(tmp_path)])
    monkeypatch.setitem(sys.modules, "wandb", None)  # so that the end of the test forgets what it imports
    monkeypatch.delitem(sys.modules, "wandb")
    with pytest.raises(MissingExtraError, match="wandb"):
        WeightsAndBiases("x", tmp_path)


def test_tensorboard_reads_what_was_written(tmp_path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    sink = TensorBoard(tmp_path)
    sink.begin(0)
    for line in LINES:
        sink.write(line)
    later = TensorBoard(tmp_path)  # the first was killed; the run goes on at step 2
    later.begin(2)
    later.write({"step": 4, "loss": 3.0, "time": 102.0})
    later.close()
    sink.close()
    found = EventAccumulator(str(tmp_path))
    found.Reload()
    assert [(event.step, event.value) for event in found.Scalars("loss")] == [(2, 4.5), (4, 3.0)]
    assert found.Scalars("rankme") == []  # it was of a step that was done again
    assert "alarm/text_summary" in found.Tags()["tensors"]
    assert found.Scalars("loss")[0].wall_time == 100.0


def test_wandb_goes_on_with_the_same_run(tmp_path, monkeypatch):
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_DATA_DIR", str(tmp_path / "data"))
    monkeypatch.setenv("WANDB_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setenv("WANDB_CONFIG_DIR", str(tmp_path / "config"))
    for step in (0, 2):
        sink = WeightsAndBiases("project", tmp_path / "run", name="tiny", config={"lr": 0.1})
        sink.begin(step)
        for line in LINES[step // 2 :]:
            sink.write(line)
        sink.close()
    run = (tmp_path / "run" / "wandb-id").read_text()
    folders = [path for path in (tmp_path / "run" / "wandb").glob("offline-run-*") if path.is_dir()]
    assert folders
    assert all(path.name.endswith(run) for path in folders)
    sink = WeightsAndBiases("project", tmp_path / "run")
    sink.begin(0)  # a new run in an old folder
    sink.close()
    assert (tmp_path / "run" / "wandb-id").read_text() != run
