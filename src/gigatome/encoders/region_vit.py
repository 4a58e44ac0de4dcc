"""The region encoder: a vision transformer whose patches are the embeddings of tiles."""

from dataclasses import dataclass
from typing import Any, cast, final

import torch
import torch.nn.functional as F  # noqa: N812 - the name that PyTorch users know
from timm.layers.drop import DropPath
from timm.layers.mlp import Mlp
from timm.layers.weight_init import trunc_normal_
from torch import Tensor, nn

from gigatome.encoders.weights import resize_grid

_EPS = 1e-6


@dataclass(frozen=True)
class RegionVitConfig:
    """What defines a region encoder; the defaults are those of HIPT's released ViT4096-256.

    Attributes:
        input_dim: size of a tile's embedding.
        dim: width of a token, and size of a region's embedding.
        depth: number of blocks. The paper says 4, the released weights have 6.
        heads: attention heads of a block.
        grid: side of the square grid of tiles that the position embedding is made for; it is interpolated to others.
        dropout: of the embeddings' projection.
    """

    input_dim: int = 384
    dim: int = 192
    depth: int = 6
    heads: int = 6
    grid: int = 14
    dropout: float = 0.0

    def __post_init__(self):
        if self.dim % self.heads:
            raise ValueError(f"dim must be a multiple of heads, not {self.dim} of {self.heads}")


@final
class RegionVit(nn.Module):
    """Maps grids of tile embeddings to region embeddings.

    State-dict keys are those of the authors' ``VisionTransformer4K``: ``cls_token``, ``pos_embed``, ``phi.0.weight``,
    ``blocks.0.norm1.weight``, ``blocks.0.attn.qkv.weight``, …, ``norm.weight``.

    Args:
        config: what to make. Parameters are initialised by the global generator, as DINO does it.
        drop_path: rate of stochastic depth in the last block, growing linearly from 0 in the first.

    Attributes:
        config: what it was made from.
        dim: size of an embedding.

    Source: Chen et al., CVPR 2022 (HIPT), §3.2, and the authors' code.
    """

    def __init__(self, config: RegionVitConfig, *, drop_path: float = 0.0):
        super().__init__()
        self.config = config
        dim = self.dim = config.dim
        self.phi = nn.Sequential(nn.Linear(config.input_dim, dim), nn.GELU(), nn.Dropout(config.dropout))
        self.cls_token = nn.Parameter(torch.zeros(1, 1, dim))
        self.pos_embed = nn.Parameter(torch.zeros(1, config.grid**2 + 1, dim))
        rates = [drop_path * index / max(1, config.depth - 1) for index in range(config.depth)]
        self.blocks = nn.ModuleList(_Block(dim, config.heads, rate) for rate in rates)
        self.norm = nn.LayerNorm(dim, eps=_EPS)
        trunc_normal_(self.cls_token, std=0.02)
        trunc_normal_(self.pos_embed, std=0.02)
        self.apply(_initialise)

    def forward(self, grids: Tensor, mask: Tensor | None = None) -> Tensor:
        """Embeddings [B, dim] of regions: the class token after the last norm.

        Args:
            grids: float [B, input_dim, rows, columns], embeddings of a region's tiles, of any number of rows and
                columns.
            mask: bool [B, rows, columns], tiles that are there: no token attends to the others, such as those that
                fill a region up at the edge of a slide. All by default, as the authors have it.
        """
        return self.forward_tokens(grids, mask)[0]

    def forward_tokens(self, grids: Tensor, mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Class token [B, dim] and tile tokens [B, rows × columns, dim], row-major, after the last norm."""
        x, keys = self._embed(grids, mask)
        for block in self.blocks:
            x = block(x, keys)
        x = self.norm(x)
        return x[:, 0], x[:, 1:]

    def attention(self, grids: Tensor, mask: Tensor | None = None) -> Tensor:
        """How the class token of the last block attends to the tiles.

        Args:
            grids: as in :meth:`forward`.
            mask: likewise.

        Returns:
            float32 [B, heads, rows, columns]. A head's values are its softmax over all tokens, so they sum to 1 minus
            what it gives to the class token.
        """
        x, keys = self._embed(grids, mask)
        for block in list(self.blocks)[:-1]:
            x = block(x, keys)
        last = cast(_Block, self.blocks[-1])
        weights = last.attn.weights(last.norm1(x), keys)
        return weights[..., 1:].unflatten(2, grids.shape[2:])

    def _embed(self, grids: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """Tokens [B, 1 + tiles, dim] that enter the first block, and which of them may be seen, bool [B, 1 + tiles]."""
        if grids.ndim != 4 or grids.shape[1] != self.config.input_dim:
            raise ValueError(f"need grids [B, {self.config.input_dim}, rows, columns], got {list(grids.shape)}")
        tokens = self.phi(grids.flatten(2).mT)
        x = torch.cat([self.cls_token.expand(len(tokens), -1, -1).to(tokens.dtype), tokens], 1)
        x = x + self._position(*grids.shape[2:])
        if mask is None:
            return x, None
        return x, F.pad(mask.flatten(1), (1, 0), value=True)

    def _position(self, rows: int, columns: int) -> Tensor:
        """Position embedding [1, 1 + rows × columns, dim]."""
        side = self.config.grid
        if (rows, columns) == (side, side):
            return self.pos_embed
        grid = resize_grid(self.pos_embed[:, 1:].unflatten(1, (side, side)), rows, columns, how="dino")
        return torch.cat([self.pos_embed[:, :1], grid.flatten(1, 2)], 1)


class _Attention(nn.Module):
    """Multi-head self-attention."""

    def __init__(self, dim: int, heads: int):
        super().__init__()
        self.heads = heads
        self.fused_attn = True  # timm's name, see gigatome.encoders.vit.unfuse_attention
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x: Tensor, keys: Tensor | None) -> Tensor:
        q, k, v = self._project(x)
        seen = None if keys is None else keys[:, None, None]
        if self.fused_attn:
            out = F.scaled_dot_product_attention(q, k, v, attn_mask=seen)
        else:
            logits = q * q.shape[-1] ** -0.5 @ k.mT
            logits = logits if seen is None else logits.masked_fill(~seen, float("-inf"))
            out = logits.softmax(-1).to(v.dtype) @ v
        return self.proj(out.transpose(1, 2).flatten(2))

    def weights(self, x: Tensor, keys: Tensor | None) -> Tensor:
        """Softmax float32 [B, heads, N] of the first token's attention."""
        q, k, _ = self._project(x)
        with torch.autocast(x.device.type, enabled=False):
            logits = (q[:, :, :1].float() @ k.float().mT)[:, :, 0] * q.shape[-1] ** -0.5
        if keys is not None:
            logits = logits.masked_fill(~keys[:, None], float("-inf"))
        return logits.softmax(-1)

    def _project(self, x: Tensor) -> tuple[Any, ...]:
        """Queries, keys and values [B, heads, N, d]."""
        return self.qkv(x).unflatten(2, (3, self.heads, -1)).permute(2, 0, 3, 1, 4).unbind(0)


class _Block(nn.Module):
    def __init__(self, dim: int, heads: int, drop_path: float):
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, eps=_EPS)
        self.attn = _Attention(dim, heads)
        self.norm2 = nn.LayerNorm(dim, eps=_EPS)
        self.mlp = Mlp(dim, 4 * dim)
        self.drop_path = DropPath(drop_path) if drop_path else nn.Identity()

    def forward(self, x: Tensor, keys: Tensor | None) -> Tensor:
        x = x + self.drop_path(self.attn(self.norm1(x), keys))
        return x + self.drop_path(self.mlp(self.norm2(x)))


def _initialise(module: nn.Module) -> None:
    if isinstance(module, nn.Linear):
        trunc_normal_(module.weight, std=0.02)
        nn.init.zeros_(module.bias)
