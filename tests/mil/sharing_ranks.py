"""Two processes over gloo that train on and predict the same slides, each with half of their rows; prints errors.

Run as a script in a process of its own, in which nothing but imports has happened before another is forked.
"""

import json
import os
import socket
import sys
from datetime import timedelta
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist

from gigatome.distributed import mean_over_ranks, sequence_group
from gigatome.encoders.dilated_parallel import Share
from gigatome.encoders.longvit import LongVitConfig
from gigatome.encoders.slide_vit import SlideVitCard, new_slide_vit
from gigatome.mil.end_to_end import EndToEnd, predict_slides
from gigatome.mil.losses import cross_entropy
from gigatome.mil.model import Targets
from gigatome.tiles.slide_image_stream import Order
from gigatome.tiles.slide_images import SlideImageOptions
from gigatome.training.schedules import Clock

SIDE, PATCH = 20, 4  # 5 rows of patches, of which one process has 2 and the other 3
CONFIG = LongVitConfig(
    segments=(8, 25), ratios=(1, 2), patch_size=PATCH, dim=16, depth=2, heads=2, ffn_dim=32, grid=4, norm="finetune"
)
CARD = SlideVitCard("toy", CONFIG, SlideImageOptions(image_size=SIDE), "subtype", "slide", ("a", "b", "c"))
PIXELS = np.random.default_rng(0).integers(0, 256, (4, SIDE, SIDE, 3)).astype(np.uint8)


def learnt(share: Share | None, rows: slice) -> tuple[torch.Tensor, list[torch.Tensor], np.ndarray]:
    """Loss, gradients and logits of images of which this process has some rows."""
    method = EndToEnd(
        new_slide_vit(CONFIG, 3, None, drop_path=0.5, seed=1), Targets(torch.arange(6) % 3), cross_entropy(),
        Order(6, 4, 0), CARD, share=share,
    )  # fmt: skip
    torch.manual_seed(3)
    views = method.views(torch.from_numpy(PIXELS[:, rows].copy()), torch.Generator(), Clock(0, 1, 1))
    loss, _ = method.loss(views, Clock(0, 1, 1))
    loss.backward()
    gradients = [parameter.grad for parameter in method.parameters() if parameter.grad is not None]
    return loss.detach(), gradients, predict_slides(method.model, PIXELS[:, rows], share=share)


def process(number: int, port: int, out: Path) -> None:
    """What one of the two processes finds different from a process that has all rows."""
    store = dist.TCPStore("127.0.0.1", port, 2, is_master=number == 0, timeout=timedelta(seconds=60))
    dist.init_process_group("gloo", store=store, rank=number, world_size=2, timeout=timedelta(seconds=60))
    share = Share(sequence_group(2), SIDE // PATCH)
    loss, gradients, logits = learnt(share, slice(share.own.start * PATCH, share.own.stop * PATCH))
    wanted_loss, wanted, wanted_logits = learnt(None, slice(None))
    scale = max(float(gradient.abs().max()) for gradient in wanted)
    errors = [float((mean_over_ranks(a) - b).abs().max()) / scale for a, b in zip(gradients, wanted, strict=True)]
    found = {"loss": abs(float(loss - wanted_loss)), "gradients": max(errors), "parameters": len(errors)}
    found["logits"] = float(np.abs(logits - wanted_logits).max())
    (out / f"{number}.json").write_text(json.dumps(found))
    dist.barrier()


if __name__ == "__main__":
    torch.set_num_threads(1)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        at = free.getsockname()[1]
    child = os.fork()
    process(int(child == 0), at, Path(sys.argv[1]))
    if child:
        os.waitpid(child, 0)
