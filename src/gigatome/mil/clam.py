"""CLAM, single- and multi-branch: attention pooling whose most and least attended instances learn a class as well."""

from dataclasses import dataclass
from typing import Any, Literal, Self, final

import torch
import torch.nn.functional as F  # noqa: N812 - the name that PyTorch users know
from torch import Tensor, nn

from gigatome.mil.abmil import attend, embedded_attention, xavier_linear
from gigatome.mil.model import BagBatch, BagModel, BagOutput, Criterion, Targets
from gigatome.mil.segments import segment_extremes


@final
@dataclass(frozen=True)
class ClamOptions:
    """What makes a CLAM.

    Attributes:
        multi_branch: CLAM-MB, an attention branch and a linear layer for each class; otherwise CLAM-SB.
        hidden: size of the first layer; 0 for the size of an embedding.
        attention: size of the attention network.
        gated: multiply its tanh branch by a sigmoid branch.
        dropout: after the first layer and in the attention network.
        instance_weight: share of the instance loss in the whole; 0 leaves it out.
        instance_loss: "svm", the smooth top-1 SVM loss (arXiv 1802.07595) with margin and temperature 1, or
            "cross_entropy".
        samples: how many of the most, and how many of the least attended instances of a bag it takes.
        subtyping: the classes exclude each other: the most attended instances are negative for the other classes.
    """

    multi_branch: bool = False
    hidden: int = 512
    attention: int = 256
    gated: bool = True
    dropout: float = 0.25
    instance_weight: float = 0.3
    instance_loss: Literal["svm", "cross_entropy"] = "svm"
    samples: int = 8
    subtyping: bool = False

    @classmethod
    def multi(cls) -> Self:
        """CLAM-MB at the published sizes."""
        return cls(multi_branch=True)

    @classmethod
    def big(cls, *, multi_branch: bool = False) -> Self:
        """The authors' ``--model_size big``."""
        return cls(multi_branch=multi_branch, attention=384)

    @classmethod
    def hipt(cls) -> Self:
        """CLAM-SB as in HIPT's tables, on embeddings of 384."""
        return cls(hidden=0)


@final
class Clam(BagModel):
    """Clustering-constrained attention multiple-instance learning.

    State-dict keys are the authors': ``attention_net.{0,3}``, ``classifiers`` (``classifiers.<c>`` of CLAM-MB),
    ``instance_classifiers.<c>``. Their older files, with the attention network at ``attention_net.2`` or with
    ``instance_loss_fn.labels``, load too.

    Args:
        options: see there.
        dim: size D of an embedding.
        outputs: C logits of a bag.

    Source: arXiv 2004.09666 and the authors' code. Differs: the instance loss is the mean over the bags of a batch; a
    bag of n instances with n < 2 · samples gives the upper half and the lower half, none of them twice (theirs stops
    below ``samples``, and lets the two overlap); with survival targets there is no instance loss.
    """

    def __init__(self, options: ClamOptions, dim: int, outputs: int):
        super().__init__()
        self.options = options
        hidden, branches = options.hidden or dim, outputs if options.multi_branch else 1
        self.attention_net = embedded_attention(
            dim, hidden, options.attention, branches, gated=options.gated, dropout=options.dropout
        )
        self.classifiers = (
            nn.ModuleList([nn.Linear(hidden, 1) for _ in range(outputs)])
            if options.multi_branch
            else nn.Linear(hidden, outputs)
        )
        self.instance_classifiers = nn.ModuleList([nn.Linear(hidden, 2) for _ in range(outputs)])
        xavier_linear(self)
        self.register_load_state_dict_pre_hook(_old_names)

    def forward(self, bags: BagBatch) -> BagOutput:
        """Logits [B, C]; weights [T, 1], or [T, C] of CLAM-MB; and what the instance loss needs.

        That is float [B, C, 2 · samples, 3]: of each bag and class, the two logits of its most attended, then of its
        least attended instances, and 1 or, where the bag has too few instances, 0.
        """
        pooled, attention, scores, h = attend(self.attention_net, bags)
        if isinstance(self.classifiers, nn.ModuleList):
            logits = torch.cat([layer(pooled[:, c]) for c, layer in enumerate(self.classifiers)], 1)
        else:
            logits = self.classifiers(pooled.squeeze(1))
        instances = self._instances(h, scores, bags) if self.options.instance_weight else None
        return BagOutput(logits.float(), attention, instances)

    def _instances(self, h: Tensor, scores: Tensor, bags: BagBatch) -> Tensor:
        samples = self.options.samples
        high, low = segment_extremes(scores, bags, samples)
        chosen = h[torch.cat([high, low], 2)]  # [B, 1 or C, 2 samples, hidden]
        parts = chosen.expand(-1, len(self.instance_classifiers), -1, -1).unbind(1)
        layers = zip(self.instance_classifiers, parts, strict=True)
        logits = torch.stack([layer(part) for layer, part in layers], 1).float()
        place = torch.arange(samples, device=h.device)
        counts = torch.stack([(bags.sizes + 1) // 2, bags.sizes // 2], 1)
        valid = (place < counts[:, :, None]).flatten(1).to(logits.dtype)  # [B, 2 samples]
        return torch.cat([logits, valid[:, None, :, None].expand(-1, logits.shape[1], -1, 1)], 3)

    def loss(self, output: BagOutput, targets: Targets, criterion: Criterion) -> Tensor:
        """(1 − w) · criterion + w · instance loss, of w = ``instance_weight``."""
        bag_loss, weight = criterion(output.logits, targets), self.options.instance_weight
        if output.instances is None or targets.event is not None:
            return bag_loss
        return (1 - weight) * bag_loss + weight * self.instance_loss(output.instances, targets.y)

    def instance_loss(self, instances: Tensor, y: Tensor) -> Tensor:
        """Scalar mean over the bags.

        Args:
            instances: as of :meth:`forward`.
            y: int64 [B], classes of the bags.
        """
        classes, samples = instances.shape[1], instances.shape[2] // 2
        own = F.one_hot(y, classes).bool()[:, :, None]  # [B, C, 1]
        logits, valid = instances[..., :2], instances[..., 2]
        first = torch.arange(2 * samples, device=y.device) < samples
        losses = self._losses(logits, (own & first).long())
        # the bag's own class: highest against lowest; with subtyping the others too: the highest are negative
        used = valid * (own | first if self.options.subtyping else own)
        means = (losses * used).sum(2) / used.sum(2).clamp(min=1)
        return means.sum(1).mean() / (classes if self.options.subtyping else 1)

    def _losses(self, logits: Tensor, labels: Tensor) -> Tensor:
        if self.options.instance_loss == "svm":
            logits = logits + (1 - F.one_hot(labels, 2))
        return F.cross_entropy(logits.flatten(0, -2), labels.flatten(), reduction="none").view_as(labels)


def _old_names(module: nn.Module, state: dict[str, Any], prefix: str, *_: object) -> None:
    """Takes the keys of older files for the present ones."""
    state.pop(f"{prefix}instance_loss_fn.labels", None)
    old = f"{prefix}attention_net.2."
    for key in [key for key in state if key.startswith(old)]:
        state[f"{prefix}attention_net.3.{key.removeprefix(old)}"] = state.pop(key)
