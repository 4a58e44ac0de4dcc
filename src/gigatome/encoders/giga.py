"""The slide encoder of Giga-SSL: from the embeddings of a slide's tiles and where they lie to one embedding.

Source: Lazard et al., "Giga-SSL: Self-Supervised Learning for Gigapixel Images", CVPR Workshops 2023, and the code
released with it; the residual MLP is of the same authors' "Democratizing computational pathology" (2024).
"""

import itertools
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, final

import torch
import torch.nn.functional as F  # noqa: N812 - the name that PyTorch users know
from torch import Tensor, nn

from gigatome.core.errors import RunError
from gigatome.encoders.sparse import Cells, Pairs, convolve, halve, map_cells, segment_mean, window_sum
from gigatome.encoders.weights import encoder_weights, load_weights, read_weights

_WIDTH = 512  # channels inside layer 4 of every ResNet
_BLOCKS = {"resnet18": 2, "resnet34": 3, "resnet50": 3}
_AUTHORS_KEY = re.compile(r"(?:^|.*\.)(\d+)\.(conv1|conv2|convd|norm1|norm2|normd)\.(\w+)$")
_AUTHORS_NAMES = {"convd": "downsample.0", "normd": "downsample.1", "norm1": "bn1", "norm2": "bn2"}


@dataclass(frozen=True)
class GigaConfig:
    """What defines a slide encoder.

    Attributes:
        pooling: ``"sparse_conv"``, layer 4 of a ResNet on the map of tiles and the mean over its active cells, the
            paper's; ``"mlp"``, a residual MLP of each tile and the mean over tiles, which knows no places; or
            ``"transformer"``, a class token that attends to the tiles and their places.
        input_dim: size of a tile's embedding. Layer 4 of a ResNet-18 or -34 was made for 256, of a ResNet-50 for 1024;
            its published weights fit these only.
        network: whose layer 4 ``"sparse_conv"`` is.
        shortcut: what skips the strided convolution. ``"average"``, the authors', sums its 3 × 3 window, divides by 9
            however many cells are active, and projects. ``"strided"``, ResNet's own, projects the cell in the middle of
            the window. On a thin map that cell is mostly empty, and three of four lone tiles have no shortcut at all;
            with the average every tile has one.
        edges: ``"open"``: maps end at x = 0 and y = 0 only, and a slide's embedding is its own. ``"batch"``, the
            authors': they also end where the farthest tile of the whole batch lies, rounded up, so that a slide's
            last column and row depend on the others.
        dim: size of the embedding that ``"mlp"`` and ``"transformer"`` give.
        depth: their number of blocks.
        heads: attention heads of the transformer.
        dropout: inside their blocks.
    """

    pooling: Literal["sparse_conv", "mlp", "transformer"] = "sparse_conv"
    input_dim: int = 256
    network: Literal["resnet18", "resnet34", "resnet50"] = "resnet18"
    shortcut: Literal["average", "strided"] = "average"
    edges: Literal["open", "batch"] = "open"
    dim: int = 512
    depth: int = 2
    heads: int = 8
    dropout: float = 0.0

    def __post_init__(self):
        if min(self.input_dim, self.dim, self.depth, self.heads) < 1:
            raise ValueError("input_dim, dim, depth and heads must be at least 1")
        if self.pooling == "transformer" and (self.dim % 4 or self.dim % self.heads):
            raise ValueError(f"dim must be a multiple of 4 and of heads, not {self.dim} of {self.heads}")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout must lie within 0 to 1, not {self.dropout}")


@final
class GigaEncoder(nn.Module):
    """Maps slides to embeddings, several at once, each with any number of tiles from 1.

    The state dict is that of ``network``: of ``"sparse_conv"`` it has the keys and shapes of ``layer4`` of timm and
    torchvision, ``network.0.conv1.weight``, …, ``network.1.bn2.running_var``, the rows of a kernel running along y and
    its columns along x. Batch norm sees active cells (or tiles) alone, all those of the batch.

    Args:
        config: what to make. Parameters are initialised by the global generator, as :func:`build_giga` seeds it.

    Attributes:
        config: what it was made from.
        dim: size of an embedding.
    """

    def __init__(self, config: GigaConfig):
        super().__init__()
        self.config = config
        if config.pooling == "sparse_conv":
            self.network = SparseLayer4(config)
        else:
            self.network = (_ResidualMlp if config.pooling == "mlp" else _Transformer)(config)
        self.dim: int = self.network.dim

    def forward(self, x: Tensor, locations: Tensor, bounds: Tensor) -> Tensor:
        """Embeddings of slides.

        Args:
            x: float [T, input_dim], embeddings of the tiles of one slide after those of another.
            locations: int64 [T, 2], the (x, y) of each tile in steps of one tile, from any origin: the least of each
                slide is subtracted. Tiles at one location are averaged for ``"sparse_conv"``.
            bounds: int64 [B + 1]; slide b has the tiles ``bounds[b]`` to ``bounds[b + 1]``.

        Returns:
            float [B, dim].

        Raises:
            ValueError: shapes or types are wrong, a slide has no tiles, or spans too many cells; the message names the
                slide. In training mode too if the whole batch has one active cell, which has no variance.
        """
        _check(x, locations, bounds, self.config.input_dim)
        x = x.to(next(self.parameters()).dtype)
        return self.network(x, locations.long(), bounds.to(x.device))


def _check(x: Tensor, locations: Tensor, bounds: Tensor, dim: int) -> None:
    if x.ndim != 2 or x.shape[1] != dim or not x.is_floating_point():
        raise ValueError(f"need float embeddings [T, {dim}], got {x.dtype} {list(x.shape)}")
    if locations.shape != (len(x), 2) or locations.is_floating_point() or locations.dtype == torch.bool:
        raise ValueError(f"need integer locations [{len(x)}, 2], got {locations.dtype} {list(locations.shape)}")
    places = bounds.tolist() if bounds.ndim == 1 and not bounds.is_floating_point() else []
    if len(places) < 2 or (places[0], places[-1]) != (0, len(x)):
        raise ValueError(f"need integer bounds [B + 1] from 0 to {len(x)}, got {bounds.dtype} {bounds.tolist()}")
    for slide, (start, end) in enumerate(itertools.pairwise(places)):
        if end <= start:
            raise ValueError(f"slide {slide} of the batch has no tiles; leave it out")


@final
class SparseLayer4(nn.ModuleList):
    """Layer 4 of a ResNet on sparse maps, and the mean over the cells that are active after it.

    The first convolution has a stride of 2, no padding, and an output wherever it sees an active cell; those that
    follow leave the set of active cells as it is. ResNet's own pads by 1.
    """

    def __init__(self, config: GigaConfig):
        block = _Bottleneck if config.network == "resnet50" else _BasicBlock
        channels = [config.input_dim] + [block.expansion * _WIDTH] * _BLOCKS[config.network]
        super().__init__(
            block(ins, outs, config.shortcut if number == 0 else None)
            for number, (ins, outs) in enumerate(itertools.pairwise(channels))
        )
        self.dim = channels[-1]
        self.edges = config.edges

    def forward(self, x: Tensor, locations: Tensor, bounds: Tensor) -> Tensor:
        """As :meth:`GigaEncoder.forward`."""
        cells, rows = map_cells(locations, bounds)
        rows, order = rows.sort(stable=True)
        values = segment_mean(x, order, torch.searchsorted(rows, torch.arange(len(cells), device=rows.device)))
        return self.pool(values, cells, None if self.edges == "open" else _authors_size(cells))

    def pool(self, values: Tensor, cells: Cells, size: tuple[int, int] | None = None) -> Tensor:
        """Embeddings [B, dim] of maps with values [N, input_dim] at their active cells.

        Args:
            values: float.
            cells: of the maps.
            size: columns and rows of every map, as of :func:`~gigatome.encoders.sparse.halve`.
        """
        halved, pairs = halve(cells, size)
        for number, block in enumerate(self):
            values = block(values, halved.neighbours if number else pairs, halved.neighbours)
        exact = values.to(torch.promote_types(values.dtype, torch.float32))
        return segment_mean(exact, torch.arange(len(halved), device=exact.device), halved.starts)


def _authors_size(cells: Cells) -> tuple[int, int]:
    """Columns and rows that the authors give the maps of a batch: at least 5, odd, and odd again when halved."""
    most = cells.places.amax(0).tolist()
    odd = (max(5, side + 1) | 1 for side in most)
    columns, rows = (side if side // 2 % 2 else side + 2 for side in odd)
    return columns, rows


class _Kernel(nn.Module):
    """The weight [O, I, side, side] of a convolution without bias."""

    def __init__(self, ins: int, outs: int, side: int):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(outs, ins, side, side, memory_format=torch.channels_last))
        nn.init.kaiming_normal_(self.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, values: Tensor, pairs: Pairs | None = None) -> Tensor:
        """3 × 3 over the joints of ``pairs``, or 1 × 1."""
        return F.linear(values, self.weight.flatten(1)) if pairs is None else convolve(values, self.weight, pairs)


class _Shortcut(nn.ModuleList):
    def __init__(self, ins: int, outs: int, kind: Literal["average", "strided"]):
        super().__init__([_Kernel(ins, outs, 1), nn.BatchNorm1d(outs)])
        self.kind = kind

    def forward(self, values: Tensor, pairs: Pairs) -> Tensor:
        project, norm = self
        if self.kind == "average":
            return norm(project(window_sum(values, pairs) / 9))
        return norm(project(window_sum(values, pairs.centre)))


class _BasicBlock(nn.Module):
    """Two 3 × 3 convolutions; ``shortcut`` is None where the stride is 1."""

    expansion = 1

    def __init__(self, ins: int, outs: int, shortcut: Literal["average", "strided"] | None):
        super().__init__()
        self.conv1, self.bn1 = _Kernel(ins, outs, 3), nn.BatchNorm1d(outs)
        self.conv2, self.bn2 = _Kernel(outs, outs, 3), nn.BatchNorm1d(outs)
        self.downsample = None if shortcut is None else _Shortcut(ins, outs, shortcut)

    def forward(self, values: Tensor, pairs: Pairs, neighbours: Pairs) -> Tensor:
        inner = F.relu(self.bn1(self.conv1(values, pairs)))
        inner = self.bn2(self.conv2(inner, neighbours))
        return F.relu(inner + (values if self.downsample is None else self.downsample(values, pairs)))


class _Bottleneck(nn.Module):
    """A 3 × 3 convolution, the strided one if any, between two of 1 × 1."""

    expansion = 4

    def __init__(self, ins: int, outs: int, shortcut: Literal["average", "strided"] | None):
        super().__init__()
        width = outs // self.expansion
        self.conv1, self.bn1 = _Kernel(ins, width, 1), nn.BatchNorm1d(width)
        self.conv2, self.bn2 = _Kernel(width, width, 3), nn.BatchNorm1d(width)
        self.conv3, self.bn3 = _Kernel(width, outs, 1), nn.BatchNorm1d(outs)
        self.downsample = None if shortcut is None else _Shortcut(ins, outs, shortcut)

    def forward(self, values: Tensor, pairs: Pairs, neighbours: Pairs) -> Tensor:
        inner = F.relu(self.bn1(self.conv1(values)))
        inner = F.relu(self.bn2(self.conv2(inner, pairs)))
        inner = self.bn3(self.conv3(inner))
        return F.relu(inner + (values if self.downsample is None else self.downsample(values, pairs)))


class _ResidualMlp(nn.Module):
    """Residual blocks of each tile, Linear – ReLU – batch norm – Linear – batch norm, and the mean over tiles."""

    def __init__(self, config: GigaConfig):
        super().__init__()
        self.dim = config.dim
        widths = [config.input_dim] + [config.dim] * config.depth
        self.blocks = nn.ModuleList(
            _MlpBlock(ins, outs, config.dropout, project=number == 0)
            for number, (ins, outs) in enumerate(itertools.pairwise(widths))
        )

    def forward(self, x: Tensor, locations: Tensor, bounds: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        exact = x.to(torch.promote_types(x.dtype, torch.float32))
        return segment_mean(exact, torch.arange(len(exact), device=exact.device), bounds[:-1])


class _MlpBlock(nn.Module):
    def __init__(self, ins: int, outs: int, dropout: float, *, project: bool):
        super().__init__()
        first = nn.Linear(ins, outs), nn.ReLU(), nn.Dropout(dropout), nn.BatchNorm1d(outs)
        second = nn.Linear(outs, outs), nn.Dropout(dropout), nn.BatchNorm1d(outs)
        self.layers = nn.Sequential(*first, *second)
        self.shortcut = nn.Sequential(nn.Linear(ins, outs), nn.BatchNorm1d(outs)) if project else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.layers(x) + self.shortcut(x))


class _Transformer(nn.Module):
    """Blocks with pre-norm over a class token and the tiles, with sines and cosines of their places added."""

    def __init__(self, config: GigaConfig):
        super().__init__()
        dim = self.dim = config.dim
        self.project = nn.Linear(config.input_dim, dim)
        self.cls_token = nn.Parameter(torch.zeros(dim))
        self.blocks = nn.ModuleList(
            nn.TransformerEncoderLayer(
                dim, config.heads, 4 * dim, config.dropout, "gelu", batch_first=True, norm_first=True
            )
            for _ in range(config.depth)
        )
        self.norm = nn.LayerNorm(dim)
        nn.init.trunc_normal_(self.cls_token, std=0.02)

    def forward(self, x: Tensor, locations: Tensor, bounds: Tensor) -> Tensor:
        sizes = bounds.diff()
        place = torch.arange(int(sizes.max()), device=x.device)
        there = place < sizes[:, None]
        tile = (bounds[:-1, None] + place).where(there, bounds[:-1, None])  # a slide's first tile fills it up
        cells = locations[tile]
        tokens = self.project(x)
        tokens = tokens[tile] + _waves(cells - cells.amin(1, keepdim=True), self.dim, tokens.dtype)
        tokens = torch.cat([self.cls_token.to(tokens.dtype).expand(len(sizes), 1, -1), tokens], 1)
        absent = None if bool(there.all()) else F.pad(~there, (1, 0), value=False)
        for block in self.blocks:
            tokens = block(tokens, src_key_padding_mask=absent)
        return self.norm(tokens[:, 0])


def _waves(cells: Tensor, dim: int, dtype: torch.dtype) -> Tensor:
    """Sines and cosines [..., dim] of places [..., 2], of wavelengths from 2π to about 20,000π cells."""
    rates = 10_000.0 ** -(torch.arange(dim // 4, device=cells.device) / (dim // 4))
    angles = (cells[..., None] * rates).flatten(-2)
    return torch.cat([angles.sin(), angles.cos()], -1).to(dtype)


def build_giga(config: GigaConfig, seed: int) -> GigaEncoder:
    """Makes a slide encoder with random weights, in training mode, on the CPU.

    Args:
        config: what to make.
        seed: of the initialisation; the global generators are left as they are.
    """
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        return GigaEncoder(config)


def from_resnet(
    weights: Mapping[str, Tensor], config: GigaConfig | None = None, *, source: str, transposed: bool = False
) -> GigaEncoder:
    """Makes a slide encoder of layer 4 of a ResNet, as Giga-SSL's training starts, in training mode, on the CPU.

    Args:
        weights: of timm's or torchvision's ResNet, or of its layer 4 alone (``0.conv1.weight``, …); they are copied.
        config: what to make, with ``"sparse_conv"``; by default a ResNet-18's.
        source: where the weights come from, for messages.
        transposed: the rows of a kernel run along x and its columns along y, as the authors have it: their network
            sees slides mirrored at the diagonal, other than the images that the kernels were trained on.

    Raises:
        RunError: the weights are of another network, or ``config`` is of another pooling.
    """
    prefix = "layer4." if any(key.startswith("layer4.") for key in weights) else ""
    own = {key.removeprefix(prefix): value for key, value in weights.items() if key.startswith(prefix)}
    if transposed:
        own = {key: value.mT if value.ndim == 4 else value for key, value in own.items()}
    return _restored(config or GigaConfig(), own, source)


def load_gigassl(weights: str | Path | Mapping[str, Any], *, edges: Literal["open", "batch"] = "open") -> GigaEncoder:
    """The slide encoder of Giga-SSL from the authors' weights, in evaluation mode, on the CPU.

    Its locations are in cells of 224 px at a quarter of the level-0 resolution, and its tiles' embeddings are those of
    the authors' ResNet-18 up to its third layer.

    Args:
        weights: a checkpoint of the authors' training or the content of such a file; the keys of the slide network may
            have any prefix, and may be there twice.
        edges: as of :class:`GigaConfig`; ``"batch"`` gives the authors' numbers to the last column and row.

    Raises:
        StoreError: the file cannot be read.
        RunError: it holds no weights of the slide network, or those of another.
    """
    given = isinstance(weights, Mapping)
    source = "Giga-SSL weights" if given else str(weights)
    state = encoder_weights(weights, source=source) if given else read_weights(weights)
    own: dict[str, Tensor] = {}
    for key, value in state.items():
        match = _AUTHORS_KEY.match(key)
        if match and (not match[2].startswith("conv") or len(value) in (1, 9)):  # places first: no dense kernel
            block, name, part = match.groups()
            mine = f"{block}.{_AUTHORS_NAMES.get(name, name)}.{part}"
            value = _dense(value) if name.startswith("conv") else value
            if mine in own and not torch.equal(own[mine], value):
                raise RunError(f"{source}: holds several slide networks with {mine}; keep one of them")
            own[mine] = value
    if not own:
        raise RunError(f"{source}: holds no weights of Giga-SSL's slide network, such as 0.conv1.weight")
    return _restored(GigaConfig(edges=edges), own, source).eval()


def _dense(kernel: Tensor) -> Tensor:
    """A kernel [O, I, side, side] of SparseConvNet's [side², 1, I, O], whose places run through y first."""
    side = round(kernel.shape[0] ** 0.5)
    return kernel.reshape(side, side, *kernel.shape[-2:]).permute(3, 2, 1, 0)


def _restored(config: GigaConfig, weights: Mapping[str, Tensor], source: str) -> GigaEncoder:
    """An encoder of weights with the keys of layer 4; its counters of batches may be missing."""
    if config.pooling != "sparse_conv":
        raise RunError(f"{source}: the weights of a ResNet fit the pooling sparse_conv, not {config.pooling}")
    with torch.device("meta"):  # no memory and no random numbers for what is replaced at once
        encoder = GigaEncoder(config)
    counters = {key: torch.tensor(0) for key in encoder.network.state_dict() if key.endswith("num_batches_tracked")}
    load_weights(encoder.network, {**counters, **weights}, source=source)
    return encoder.to(memory_format=torch.channels_last)
