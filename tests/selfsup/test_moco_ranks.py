"""Two processes that share a batch get what one process gets from the whole of it."""

import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file

from gigatome.distributed import gather
from gigatome.training.loop import FitOptions, fit
from gigatome.training.schedules import Clock

sys.path.insert(0, str(Path(__file__).parent))
from test_moco import ENCODER, RESNET, V2, V3, TinyStream, make

CLOCK = Clock(step=2, steps=10, epoch_steps=2)
CASES = {
    "v2 in one order": (replace(V2, batch_norm="synced"), RESNET),
    "v2 shuffled": (V2, ENCODER),
    "v3 resnet": (V3, RESNET),
    "v3 vit": (V3, ENCODER),
}


def pictures() -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(8, 3, 32, 32, generator=generator) for _ in range(2)]


def results(part: slice) -> dict[str, torch.Tensor]:
    """What a process computes of its part of the batch."""
    found = {}
    for case, (options, encoder) in CASES.items():
        moco = make(options, encoder)
        loss, facts = moco.loss([view[part] for view in pictures()], CLOCK)
        loss.backward()
        moco.after_step(CLOCK, torch.tensor(True))
        gradients = [p.grad.flatten() for p in moco.student.parameters() if p.grad is not None]
        found |= {f"{case}.loss": loss.detach(), f"{case}.accuracy": facts["accuracy"]}
        found |= {f"{case}.grad": torch.cat(gradients)}
        found |= {f"{case}.state.{name}": value for name, value in moco.state_dict().items()}
    return found


def shuffled(part: slice) -> dict[str, torch.Tensor]:
    """Keys of a part of a batch that is shuffled over processes, and those of a whole batch that is not."""
    moco, view = make(V2).eval(), pictures()[1]
    found = {"own": moco.teacher([view])[0], "evaluation": moco._shuffled_keys(view[part], CLOCK)}
    return found | {"training": moco.train()._shuffled_keys(view[part], CLOCK)}


def runs(folder: Path, rank: int) -> dict[str, torch.Tensor]:
    """Weights after runs of two steps, as the first process exports them."""
    found = {}
    for parallel in ("ddp", "fsdp"):
        for case, (options, encoder) in CASES.items():
            out = folder / f"{parallel} {case}"
            rates = {"optimizer": "sgd", "lr": 0.1, "lr_scaling": "none"}  # AdamW makes much of little gradients
            fitting = FitOptions(steps=2, batch_size=4, epoch_images=12, parallel=parallel, save_every=1, **rates)
            fit(make(options, encoder), TinyStream(), fitting, out)
            if rank == 0:
                found |= {
                    f"{parallel}.{case}.{k}": v for k, v in load_file(out / "encoder/encoder.safetensors").items()
                }
    return found


@pytest.fixture(scope="module")
def ranks(tmp_path_factory) -> list[dict[str, torch.Tensor]]:
    folder = tmp_path_factory.mktemp("ranks")
    children = [subprocess.Popen([sys.executable, __file__, str(folder), str(rank)]) for rank in range(2)]
    assert [child.wait(120) for child in children] == [0, 0]
    return [torch.load(folder / f"{rank}.pt") for rank in range(2)]


@pytest.mark.parametrize("case", CASES)
def test_losses_and_gradients_average_to_those_of_the_batch(ranks, case):
    whole = results(slice(None))
    for name in (f"{case}.loss", f"{case}.accuracy", f"{case}.grad"):
        expected = (ranks[0][name] + ranks[1][name]) / 2
        torch.testing.assert_close(expected, whole[name], rtol=1e-3, atol=1e-4 * float(whole[name].abs().max()))


@pytest.mark.parametrize("case", CASES)
def test_encoders_statistics_and_queue_are_those_of_the_batch_on_both(ranks, case):
    whole = results(slice(None))
    names = [name for name in whole if name.startswith(f"{case}.state.")]
    assert (f"{case}.state.queue" in names) == case.startswith("v2")
    for name in names:
        assert torch.equal(ranks[0][name], ranks[1][name]), name
        torch.testing.assert_close(ranks[0][name], whole[name], rtol=1e-4, atol=1e-5)


def test_keys_are_shuffled_over_processes_and_come_back_in_their_place(ranks):
    own = shuffled(slice(None))["own"]
    torch.testing.assert_close(torch.cat([part["evaluation"] for part in ranks]), own)
    assert not torch.allclose(torch.cat([part["training"] for part in ranks]), own, atol=1e-2)


@pytest.mark.parametrize("case", CASES)
def test_runs_with_weights_in_parts_end_as_those_with_all_weights(ranks, case):
    """And no process disagrees with another on the way, as each save makes sure of that."""
    names = [name for name in ranks[0] if name.startswith(f"ddp.{case}.")]
    assert names
    for name in names:
        torch.testing.assert_close(ranks[0][name.replace("ddp.", "fsdp.")], ranks[0][name], rtol=1e-3, atol=1e-4)


if __name__ == "__main__":
    torch.set_num_threads(1)
    folder, number = Path(sys.argv[1]), int(sys.argv[2])
    dist.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=number, world_size=2)
    part = slice(number * 4, number * 4 + 4)
    found = results(part) | shuffled(part) | runs(folder, number)
    assert len(gather(torch.zeros(1))) == 2
    torch.save(found, folder / f"{number}.pt")
    dist.destroy_process_group()
