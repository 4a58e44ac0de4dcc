"""Batch norm for contrastive learning, where it must be said which images share statistics."""

from typing import Literal, cast, final

import torch
import torch.nn.functional as F  # noqa: N812 - the name that PyTorch users know
from torch import Tensor, nn

from gigatome.distributed import gather_with_gradient, world_size

Sharing = Literal["group", "ranks"]


@final
class SharedBatchNorm(nn.BatchNorm1d):
    """Batch norm over groups of a batch or over all processes, for [B, C] and [B, C, H, W]; PyTorch's state dict.

    PyTorch's own ``SyncBatchNorm`` works on GPUs alone. The running statistics move by the mean of the groups.

    Args:
        norm: the layer to replace; weight, bias and running statistics become this one's.
        sharing: which images share a mean and a variance: ``"ranks"``, those of the micro-batch on all processes, or
            ``"group"``, about ``group_size`` of one process.
        group_size: the number of groups is the greatest that divides the batch and leaves no group with less.
    """

    def __init__(self, norm: nn.BatchNorm1d | nn.BatchNorm2d, sharing: Sharing, group_size: int):
        super().__init__(norm.num_features, norm.eps, norm.momentum, norm.affine)
        self.sharing, self.group_size = sharing, group_size
        self.rate = 0.1 if norm.momentum is None else norm.momentum
        self.weight, self.bias = norm.weight, norm.bias
        for name in ("running_mean", "running_var", "num_batches_tracked"):
            setattr(self, name, getattr(norm, name))

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002 - as the base class names it
        """Normalises; in training mode by the statistics of ``input``, which then move the running ones."""
        if not self.training:
            mean, variance = self._running()
            return F.batch_norm(input, mean, variance, self.weight, self.bias, False, 0.0, self.eps)
        cast(Tensor, self.num_batches_tracked).add_(1)
        if self.sharing == "ranks" and world_size() > 1:
            return self._over_ranks(input)
        return self._in_groups(input, self._groups(len(input)) if self.sharing == "group" else 1)

    def _running(self) -> tuple[Tensor, Tensor]:
        return cast(Tensor, self.running_mean), cast(Tensor, self.running_var)

    def _groups(self, batch: int) -> int:
        most = max(1, batch // self.group_size)
        return next(groups for groups in range(most, 0, -1) if batch % groups == 0)

    def _in_groups(self, x: Tensor, groups: int) -> Tensor:
        """Rows whose numbers leave one remainder make a group; its channels stand beside those of the others."""
        shape = x.shape
        x = x.reshape(len(x) // groups, groups * shape[1], *shape[2:])
        weight, bias = (None if value is None else value.repeat(groups) for value in (self.weight, self.bias))
        running = self._running()
        mean, variance = (value.repeat(groups) for value in running)
        y = F.batch_norm(x, mean, variance, weight, bias, True, self.rate, self.eps)
        for value, of_groups in zip(running, (mean, variance), strict=True):
            value.copy_(of_groups.view(groups, -1).mean(0))
        return y.reshape(shape)

    def _over_ranks(self, x: Tensor) -> Tensor:
        with torch.autocast(x.device.type, enabled=False):
            x32 = x.float()
            variance, mean = torch.var_mean(x32, [0, *range(2, x.ndim)], correction=0)
            count = torch.full_like(mean, x.numel() // len(mean))
            means, variances, counts = gather_with_gradient(torch.stack([mean, variance, count])[None]).unbind(1)
            count = counts.sum(0)
            shares = counts / count  # processes may have other numbers of rows, as sparse maps do
            mean = (means * shares).sum(0)
            variance = ((variances + (means - mean).square()) * shares).sum(0)
            seen = mean.detach(), variance.detach() * (count / (count - 1).clamp(min=1))
            for value, of_all in zip(self._running(), seen, strict=True):
                value.lerp_(of_all, self.rate)
            scale = (variance + self.eps).rsqrt() * (1 if self.weight is None else self.weight)
            shift = (0 if self.bias is None else self.bias) - mean * scale
            wide = (-1, *[1] * (x.ndim - 2))
            return torch.addcmul(shift.view(wide), x32, scale.view(wide)).to(x.dtype)


def share_statistics(module: nn.Module, sharing: Sharing, group_size: int = 32) -> int:
    """Puts a :class:`SharedBatchNorm` in the place of each batch norm within ``module``, and counts them."""
    count = 0
    for name, child in module.named_children():
        if isinstance(child, nn.BatchNorm1d | nn.BatchNorm2d):
            setattr(module, name, SharedBatchNorm(child, sharing, group_size))
            count += 1
        else:
            count += share_statistics(child, sharing, group_size)
    return count
