"""LongNet's encoder: transformer blocks of dilated attention, for sequences of up to millions of tokens.

Source: Ding et al., arXiv 2307.02486, and torchscale's code, whose state-dict keys these are.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, final

import torch
import torch.nn.functional as F  # noqa: N812 - the name that PyTorch users know
from timm.layers.drop import DropPath
from timm.layers.weight_init import trunc_normal_
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from gigatome.core.errors import ConfigError
from gigatome.encoders.dilated import DilatedAttention, DilatedOptions
from gigatome.encoders.dilated_parallel import Share, shared_dilated_attention

_EPS = 1e-5
_HIDDEN = 2**25  # numbers that a feed-forward layer holds in its wide middle at once

Checkpointing = Literal["none", "selective", "block"]


@final
@dataclass(frozen=True)
class LongNetConfig:
    """What defines an encoder.

    Attributes:
        dim: width of a token.
        depth: number of blocks.
        ffn_dim: width of the middle of a feed-forward layer.
        attention: of every block.
        normalize_output: whether the tokens that leave go through a norm, as in GigaPath's slide encoder and not in
            LongViT.

    Raises:
        ConfigError: the heads do not divide ``dim``, or a number is not positive.
    """

    dim: int
    depth: int
    ffn_dim: int
    attention: DilatedOptions
    normalize_output: bool = False

    def __post_init__(self):
        if min(self.dim, self.depth, self.ffn_dim) < 1:
            raise ConfigError(f"dim {self.dim}, depth {self.depth} and ffn_dim {self.ffn_dim} must be positive")
        if self.dim % self.attention.heads:
            raise ConfigError(f"dim must be a multiple of heads, not {self.dim} of {self.attention.heads}")


@final
class LongNetEncoder(nn.Module):
    """Blocks with norms before the layers and inside them (SubLN).

    State-dict keys are torchscale's: ``layers.0.self_attn.q_proj.weight``, ``layers.0.self_attn.inner_attn_ln.weight``,
    ``layers.0.self_attn_layer_norm.weight``, ``layers.0.ffn.fc1.weight``, ``layers.0.ffn.ffn_layernorm.weight``,
    ``layers.0.final_layer_norm.weight``, …, and ``layer_norm.weight`` with ``normalize_output``.

    Args:
        config: what to make. Parameters are initialised by the global generator, weights with a truncated normal of
            standard deviation 0.02.
        drop_path: rate of stochastic depth in the last block, growing linearly from 0 in the first.
        checkpointing: what training keeps of a block for the gradient: ``"none"`` is everything, ``"selective"`` the
            attention's inputs and outputs alone, and ``"block"`` the block's input alone. The rest is computed again,
            as the middle of a feed-forward layer over very many tokens is in any case.

    Attributes:
        config: what it was made from.

    Source: torchscale's encoder; differs: no dropout.
    """

    def __init__(self, config: LongNetConfig, *, drop_path: float = 0.0, checkpointing: Checkpointing = "none"):
        super().__init__()
        self.config = config
        rates = [drop_path * index / max(1, config.depth - 1) for index in range(config.depth)]
        self.layers = nn.ModuleList(_Block(config, rate, checkpointing) for rate in rates)
        self.layer_norm = nn.LayerNorm(config.dim, eps=_EPS) if config.normalize_output else None
        self.apply(_initialise)

    def forward(self, x: Tensor, share: Share | None = None) -> Tensor:
        """Tokens [B, N, dim] of tokens [B, N, dim], float, of any number.

        With ``share`` these are this process's tokens of a sequence; each process of the sequence is given its own.
        Stochastic depth then drops the same in all if their global generators are in the same state.
        """
        for layer in self.layers:
            x = layer(x, share)
        return x if self.layer_norm is None else self.layer_norm(x)


@final
class _Block(nn.Module):
    def __init__(self, config: LongNetConfig, drop_path: float, checkpointing: Checkpointing):
        super().__init__()
        self.checkpointing = checkpointing
        self.self_attn = DilatedAttention(config.dim, config.attention)
        self.self_attn_layer_norm = nn.LayerNorm(config.dim, eps=_EPS)
        self.ffn = _FeedForward(config.dim, config.ffn_dim)
        self.final_layer_norm = nn.LayerNorm(config.dim, eps=_EPS)
        self.drop_path = DropPath(drop_path) if drop_path else nn.Identity()

    def forward(self, x: Tensor, share: Share | None) -> Tensor:
        if self.checkpointing == "block":
            return again(self._whole, x, share)
        return self._whole(x, share)

    def _whole(self, x: Tensor, share: Share | None) -> Tensor:
        run = again if self.checkpointing == "selective" else _run
        q, k, v = run(self._before, x)
        return run(self._after, x, shared_dilated_attention(q, k, v, self.self_attn.options, share))

    def _before(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return self.self_attn.project_in(self.self_attn_layer_norm(x))

    def _after(self, x: Tensor, attended: Tensor) -> Tensor:
        x = x + self.drop_path(self.self_attn.project_out(attended))
        return x + self.drop_path(self.ffn(x, self.final_layer_norm))


@final
class _FeedForward(nn.Module):
    """A norm, and two layers with another norm between them, for some tokens at a time."""

    def __init__(self, dim: int, hidden: int):
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(dim, hidden), nn.Linear(hidden, dim)
        self.ffn_layernorm = nn.LayerNorm(hidden, eps=_EPS)

    def forward(self, x: Tensor, norm: nn.LayerNorm) -> Tensor:
        tokens = tokens_at_once(len(x), self.fc1.out_features)
        if tokens >= x.shape[1]:
            return self._part(x, norm)
        return torch.cat([again(self._part, part, norm) for part in x.split(tokens, 1)], 1)

    def _part(self, x: Tensor, norm: nn.LayerNorm) -> Tensor:
        hidden = self.fc1(norm(x))
        exact = torch.promote_types(hidden.dtype, torch.float32)
        return self.fc2(self.ffn_layernorm(F.gelu(hidden.to(exact)).to(hidden.dtype)))


def tokens_at_once(batch: int, hidden: int) -> int:
    """Of each sequence of a batch, in the middle of a feed-forward layer."""
    return max(1, _HIDDEN // (batch * hidden))


def again(function: Callable[..., Any], *inputs: Any) -> Any:
    """The function's result, which is computed once more for the gradient and not kept."""
    if not torch.is_grad_enabled():
        return function(*inputs)
    return checkpoint(function, *inputs, use_reentrant=False)


def _run(function: Callable[..., Any], *inputs: Any) -> Any:
    return function(*inputs)


def _initialise(module: nn.Module) -> None:
    if isinstance(module, nn.Linear):
        trunc_normal_(module.weight, std=0.02)
        nn.init.zeros_(module.bias)
