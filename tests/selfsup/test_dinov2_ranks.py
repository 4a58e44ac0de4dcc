"""Two processes that share a batch get what one process gets from the whole of it."""

import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from gigatome.selfsup.losses import sinkhorn_knopp

sys.path.insert(0, str(Path(__file__).parent))
from tiny_dinov2 import CLOCK, SHARED, SINKHORN, make

OPTIONS = [replace(options, koleo_weight=0.0, kde_weight=0.0) for options in (SHARED, SINKHORN)]


def results(part: slice) -> dict[str, torch.Tensor]:
    """What a process computes of its part of the batch."""
    found = {}
    for number, options in enumerate(OPTIONS):
        method = make(options)
        tiles = torch.randint(256, (4, 40, 40, 3), generator=torch.Generator().manual_seed(0))
        views = method.views(tiles.byte(), torch.Generator().manual_seed(5), CLOCK)
        loss, facts = method.loss([view[part] for view in views], CLOCK)
        loss.backward()
        method.after_step(CLOCK, torch.tensor(True))
        found |= {f"{number}.{name}": value for name, value in {"loss": loss.detach(), **facts}.items()}
        found |= {f"{number}.center": method.center, f"{number}.patch_center": method.patch_center}
        found |= {f"{number}.grad": method.student.encoder.vit.norm.weight.grad}
    return found


def uneven(rank: int) -> torch.Tensor:
    logits = torch.randn(9, 6, generator=torch.Generator().manual_seed(0))
    return logits[:2] if rank == 0 else logits[2:]


@pytest.fixture(scope="module")
def ranks(tmp_path_factory) -> list[dict[str, torch.Tensor]]:
    folder = tmp_path_factory.mktemp("ranks")
    children = [subprocess.Popen([sys.executable, __file__, str(folder), str(rank)]) for rank in range(2)]
    assert [child.wait(120) for child in children] == [0, 0]
    return [torch.load(folder / f"{rank}.pt") for rank in range(2)]


def test_losses_and_gradients_average_to_those_of_the_batch(ranks):
    whole = results(slice(None))
    for name in whole:
        if not name.endswith(("center", "patch_entropy")):  # the latter is a mean over a part's own masked patches
            expected = (ranks[0][name] + ranks[1][name]) / 2
            torch.testing.assert_close(expected, whole[name], rtol=1e-4, atol=1e-5 * float(whole[name].abs().max() + 1))


def test_centres_are_those_of_the_batch_on_both(ranks):
    whole = results(slice(None))
    assert whole["0.patch_center"].ne(0).any()
    for name in (name for name in whole if "center" in name):
        assert torch.equal(ranks[0][name], ranks[1][name])
        torch.testing.assert_close(ranks[0][name], whole[name])


def test_sinkhorn_knopp_balances_over_parts_of_any_size(ranks):
    together = sinkhorn_knopp(torch.cat([uneven(0), uneven(1)]), 0.5)
    torch.testing.assert_close(torch.cat([ranks[0]["sinkhorn"], ranks[1]["sinkhorn"]]), together)


if __name__ == "__main__":
    folder, rank = Path(sys.argv[1]), int(sys.argv[2])
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=2)
    found = results(slice(2 * rank, 2 * rank + 2)) | {"sinkhorn": sinkhorn_knopp(uneven(rank), 0.5)}
    torch.save(found, folder / f"{rank}.pt")
    dist.destroy_process_group()
