import contextlib
import json
import resource
from pathlib import Path

import pytest
import torch

from gigatome.core.errors import RunError
from gigatome.training import checkpoint
from gigatome.training.checkpoint import (
    check_fits,
    latest_checkpoint,
    read_checkpoint,
    save_checkpoint,
    sweep,
)


def groups(value: float, size: int = 100) -> dict[str, dict[str, torch.Tensor]]:
    return {"model": {"a/b": torch.full((size,), value), "c": torch.arange(6).view(2, 3).T}, "optimizer": {}}


def save(folder: Path, step: int, keep: int = 2, **arguments) -> Path:
    return save_checkpoint(folder, step, groups(step, **arguments), identity="me", keep=keep)


def test_what_is_saved_comes_back(tmp_path):
    path = save(tmp_path / "checkpoints", 100)
    assert path == tmp_path / "checkpoints" / "step-000100"
    last = latest_checkpoint(tmp_path / "checkpoints")
    assert last is not None
    assert (last.path, last.step, last.identity, last.torch) == (path, 100, "me", torch.__version__)
    model = last.tensors("model")
    assert torch.equal(model["a/b"], torch.full((100,), 100.0))
    assert torch.equal(model["c"], torch.arange(6).view(2, 3).T)
    assert last.tensors("optimizer") == {}
    assert sorted(file.name for file in path.iterdir()) == ["model.safetensors", "optimizer.safetensors", "state.json"]


def test_the_last_ones_are_kept_in_the_order_of_steps(tmp_path):
    for step in (8, 9, 10, 1_000_000):
        save(tmp_path, step, keep=2)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-000010", "step-1000000"]
    assert latest_checkpoint(tmp_path).step == 1_000_000


def test_none_is_found_where_there_is_none(tmp_path):
    assert latest_checkpoint(tmp_path / "nothing") is None
    (tmp_path / "step-best").mkdir()
    assert latest_checkpoint(tmp_path) is None


def test_unfinished_ones_are_not_seen_and_are_swept(tmp_path):
    save(tmp_path, 1)
    (tmp_path / ".tmp-step-000002").mkdir()
    (tmp_path / ".tmp-step-000002" / "model.safetensors").write_bytes(b"half")
    assert latest_checkpoint(tmp_path).step == 1
    sweep(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["step-000001"]


@pytest.mark.parametrize("damage", ["cut", "flip", "gone"])
def test_a_damaged_file_is_refused_by_name(tmp_path, damage):
    file = save(tmp_path, 3) / "model.safetensors"
    content = bytearray(file.read_bytes())
    content[-10] ^= 1
    if damage == "gone":
        file.unlink()
    else:
        file.write_bytes(content if damage == "flip" else content[:-20])
    with pytest.raises(RunError, match=r"model\.safetensors.*remove step-000003 to resume"):
        latest_checkpoint(tmp_path).tensors("model")


@pytest.mark.parametrize("content", ["", "{", "[]", '{"step": 3}'])
def test_a_damaged_state_is_refused(tmp_path, content):
    (save(tmp_path, 3) / "state.json").write_text(content)
    with pytest.raises(RunError, match=r"state\.json: cannot be read"):
        latest_checkpoint(tmp_path)


def test_another_runs_checkpoint_is_refused_by_name(tmp_path):
    save(tmp_path, 3)
    with pytest.raises(RunError, match=r"another recipe.*\(me, not you\)"):
        check_fits(latest_checkpoint(tmp_path), "you", 1)
    check_fits(latest_checkpoint(tmp_path), "me", 1)


def test_another_pytorch_is_warned_of(tmp_path, caplog):
    state = save(tmp_path, 3) / "state.json"
    state.write_text(json.dumps(json.loads(state.read_text()) | {"torch": "1.0.0"}))
    with caplog.at_level("WARNING", "gigatome"):
        check_fits(latest_checkpoint(tmp_path), "me", 1)
    assert "PyTorch 1.0.0" in caplog.text
    assert "bit for bit" in caplog.text


def test_a_full_disk_leaves_the_last_one(tmp_path):
    save(tmp_path, 1, keep=1)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1_000_000, before[1]))
    try:
        with pytest.raises(RunError, match=r"cannot be written.*step-000001 stands"):
            save(tmp_path, 2, keep=1, size=1_000_000)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert [path.name for path in tmp_path.iterdir()] == ["step-000001"]
    assert torch.equal(latest_checkpoint(tmp_path).tensors("model")["a/b"], torch.full((100,), 1.0))


def test_whichever_call_fails_there_is_a_whole_checkpoint(tmp_path, monkeypatch):
    """Each write, flush and rename in turn fails: the old checkpoint stands, or the new one, and never neither."""
    calls = {"count": 0, "fail": 0}

    def failing(function):
        def call(*arguments, **options):
            calls["count"] += 1
            if calls["count"] == calls["fail"]:
                raise OSError(5, "Input/output error")
            return function(*arguments, **options)

        return call

    monkeypatch.setattr(checkpoint, "save_file", failing(checkpoint.save_file))
    monkeypatch.setattr(checkpoint, "_sync", failing(checkpoint._sync))
    monkeypatch.setattr(checkpoint, "_fingerprint", failing(checkpoint._fingerprint))
    for name in ("rename", "write_text", "mkdir"):
        monkeypatch.setattr(Path, name, failing(getattr(Path, name)))
    for fail in range(1, 100):
        folder = tmp_path / str(fail)
        calls["fail"] = 0
        save(folder, 1, keep=1)
        calls.update(count=0, fail=fail)
        with contextlib.suppress(RunError):
            save(folder, 2, keep=1)
        failed = calls["count"] >= fail
        calls["fail"] = 0
        last = latest_checkpoint(folder)
        assert torch.equal(last.tensors("model")["a/b"], torch.full((100,), float(last.step)))
        assert not any(folder.glob(".tmp-*"))
        if not failed:
            break
    assert 12 < fail < 99
    assert last.step == 2


def test_a_folder_that_is_no_checkpoint_is_refused(tmp_path):
    with pytest.raises(RunError):
        read_checkpoint(tmp_path)
