"""MoCo v2 and v3: a query encoder learns to find, among many keys, that of another view of the same tile.

Source: arXiv 1911.05722 (MoCo), 2003.04297 (v2), 2104.02057 (v3); the defaults are those of their code. Giga-SSL's tile
encoder is a ResNet-18 trained so, of which the third layer is kept.
"""

import copy
import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal, TypeVar, cast, final

import torch
import torch.nn.functional as F  # noqa: N812 - the name that PyTorch users know
from torch import Tensor, nn

from gigatome.core.errors import ConfigError
from gigatome.core.seeding import torch_seed
from gigatome.distributed import gather, rank, world_size
from gigatome.encoders.resnet import ResNetEncoder, cut_resnet
from gigatome.encoders.vit import EncoderConfig, TileEncoder, build_encoder
from gigatome.encoders.zoo import save_encoder
from gigatome.selfsup.batch_norm import share_statistics
from gigatome.selfsup.contrastive import info_nce, info_nce_in_batch, spread
from gigatome.selfsup.levels import tile_views
from gigatome.selfsup.views import ViewOptions, check_patches
from gigatome.training.optim import update_average
from gigatome.training.schedules import Clock, cosine

_T = TypeVar("_T")


@dataclass(frozen=True)
class MocoOptions:
    """MoCo's own options; where None is the default, it stands for what the version's authors take.

    Theirs with the optimiser: v2 ResNet-50 SGD, lr 0.03 and batch 256, weight decay 1e-4; v3 ResNet-50 LARS, lr
    0.3 · batch / 256, weight decay 1.5e-6; v3 ViT AdamW, lr 1.5e-4 · batch / 256, weight decay 0.1, batch 4096.

    Attributes:
        version: ``"v2"``, one loss against a queue of keys of steps before, or ``"v3"``, a loss in both directions
            against the keys of the micro-batch on all processes, with a predictor behind the query encoder.
        views: crops and colours; :meth:`ViewOptions.moco_v2` or :meth:`ViewOptions.moco_v3`, with a ResNet with crops
            of at least 0.2 of the tile.
        temperature: of the softmax; 0.2, in v3 with a ResNet 1.
        momentum: share that the key encoder keeps of itself at a step; v2 0.999, v3 0.99.
        momentum_end: its value at the end of a cosine; v2 0.999, so that it is constant, v3 1.
        out_dim: size of the vectors that are compared; v2 128, v3 256.
        head_layers: linear layers of the head; 2, in v3 with a ViT 3. v2 with 1 layer has the head of MoCo v1.
        head_hidden_dim: width of head and predictor; v2 the encoder's, v3 4096.
        queue: keys in v2's queue, K; at least the batch.
        batch_norm: which tiles share statistics, as an encoder could tell from them which key is a query's. v2
            ``"shuffled"``: about ``norm_group`` tiles, with the keys in another order than the queries, over all
            processes; v3 ``"synced"``: the micro-batch on all processes. ``"local"``: that of each process.
        norm_group: tiles that share statistics in ``"shuffled"``; in the authors' runs the share of one GPU.
        freeze_patch_embed: a ViT's patch projection stays as it began; steadier. v3 only.
        sincos_position: position embeddings are fixed sines and cosines, and weights begin as v3's authors have them;
            v3 only, and only for a ViT that starts from nothing.
        export: the encoder to keep; the authors keep ``"query"``.
        export_layer: last layer of a ResNet to keep, 1 to 4; None for all, Giga-SSL keeps 3.
    """

    version: Literal["v2", "v3"] = "v2"
    views: ViewOptions | None = None
    temperature: float | None = None
    momentum: float | None = None
    momentum_end: float | None = None
    out_dim: int | None = None
    head_layers: int | None = None
    head_hidden_dim: int | None = None
    queue: int = 65536
    batch_norm: Literal["shuffled", "synced", "local"] | None = None
    norm_group: int = 32
    freeze_patch_embed: bool = True
    sincos_position: bool = True
    export: Literal["query", "key"] = "query"
    export_layer: int | None = None

    def __post_init__(self):
        if self.temperature is not None and self.temperature <= 0:
            raise ValueError("temperature must be positive")
        if not all(0 <= value <= 1 for value in (self.momentum, self.momentum_end) if value is not None):
            raise ValueError("momentum and momentum_end must lie within 0 to 1")
        sizes = (self.out_dim, self.head_layers, self.head_hidden_dim, self.queue)
        if min(size for size in sizes if size is not None) < 1:
            raise ValueError("out_dim, queue and the sizes of the head must be positive")
        if self.norm_group < 2:
            raise ValueError("norm_group must be at least 2")
        if self.export_layer is not None and not 1 <= self.export_layer <= 4:
            raise ValueError("export_layer must lie within 1 to 4")
        if self.views is not None and self.views.local_views:
            raise ValueError("MoCo compares two global views; views.local_views must be 0")


@final
class Moco(nn.Module):
    """Query encoder, key encoder and, in v2, queue; a :class:`gigatome.training.loop.Method`.

    Attributes:
        student: the query encoder with head and, in v3, predictor; learns.
        teacher: the key encoder with head, the moving average of the student's; without gradient. It is in training
            mode, too, so that its batch norms see the batch.
        queue: v2 only: unit vectors float32 [K, out_dim], keys of steps before; random at first.

    Args:
        encoder: of the tile encoder.
        options: of the method.
        seed: of the initial weights and of the order of keys in ``"shuffled"`` batch norm.
        name: the encoder's name on its card; by default its timm name.
        mpp: resolutions that it is trained at, for its card.

    Raises:
        ConfigError: the views do not divide into patches, ``export_layer`` for what is no ResNet or ends before, or the
            encoder cannot be made.

    Source: as the module; differs: the key encoder moves at the end of a step and not at the start of the next, so that
    the momentum is one step behind the authors'.
    """

    queue: Tensor

    def __init__(
        self,
        encoder: EncoderConfig,
        options: MocoOptions = MocoOptions(),
        *,
        seed: int = 0,
        name: str | None = None,
        mpp: tuple[float, ...] = (),
    ):
        super().__init__()
        self.options, self.mpp, self.seed = options, mpp, seed
        tiles = build_encoder(encoder, seed=torch_seed(seed, "encoder"), name=name)
        resnet, v3 = isinstance(tiles, ResNetEncoder), options.version == "v3"
        self._v3 = v3
        self.temperature = _or(options.temperature, 1.0 if v3 and resnet else 0.2)
        self._momenta = _or(options.momentum, 0.99 if v3 else 0.999), _or(options.momentum_end, 1.0 if v3 else 0.999)
        self.view_options = options.views or default_views(options.version, resnet=resnet)
        self._check(tiles)
        if v3 and not resnet:
            _prepare_vit(tiles, options, torch.Generator().manual_seed(torch_seed(seed, "vit")))

        out_dim = _or(options.out_dim, 256 if v3 else 128)
        width = _or(options.head_hidden_dim, 4096 if v3 else tiles.dim)
        layers = _or(options.head_layers, 3 if v3 and not resnet else 2)
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(torch_seed(seed, "head"))
            head = _mlp([tiles.dim, *[width] * (layers - 1), out_dim], norms=v3, last_norm=v3)
            predictor = _mlp([out_dim, width, out_dim], norms=True, last_norm=not resnet) if v3 else None
            queue = F.normalize(torch.randn(options.queue, out_dim), dim=-1) if not v3 else None
        self.teacher = _Branch(copy.deepcopy(tiles), copy.deepcopy(head), None).requires_grad_(False)
        self.student = _Branch(tiles, head, predictor)
        if queue is not None:
            self.register_buffer("queue", queue)
        self._share_statistics(_or(options.batch_norm, "synced" if v3 else "shuffled"))
        self._new_keys: list[Tensor] = []  # of the step, one tensor of each micro-batch

    def trained(self) -> nn.Module:
        """The student; the loop spreads it over processes."""
        return self.student

    def lr_scales(self) -> dict[str, float]:
        """All parameters learn at one rate."""
        return {}

    def views(self, images: Tensor, generator: torch.Generator, clock: Clock) -> list[Tensor]:
        """Two normalised views [B, 3, size, size] of tiles uint8 [B, H, W, 3]."""
        encoder = self.teacher.encoder
        return tile_views(encoder, images, self.view_options, generator)

    def loss(self, views: Sequence[Tensor], clock: Clock) -> tuple[Tensor, dict[str, Tensor]]:
        """Loss of a micro-batch of two views, and what shows a collapse.

        Returns:
            The loss, and ``accuracy``, the share of queries that find their key, and ``spread`` of the keys over the
            sphere, from 1 to 0 when all are alike. A spread near 0 is a collapse.

        Raises:
            ConfigError: the batch does not fit into v2's queue, or there is nothing to compare a tile with in v3.
        """
        return self._loss_v3(views) if self._v3 else self._loss_v2(views, clock)

    def after_backward(self, clock: Clock) -> None:
        """Leaves the gradients as they are."""

    def after_step(self, clock: Clock, finite: Tensor) -> None:
        """Moves key encoder and queue, unless the step was not ``finite`` (bool scalar)."""
        # the predictor, which the key encoder lacks, comes last
        pairs = list(zip(self.teacher.parameters(), self.student.parameters(), strict=False))
        update_average([key for key, _ in pairs], [query for _, query in pairs], self._momentum(clock), finite)
        if not self._v3:
            keys = gather(torch.cat(self._new_keys))
            self._new_keys.clear()
            first = clock.step * len(keys)
            places = torch.arange(first, first + len(keys), device=keys.device) % len(self.queue)
            self.queue[places] = torch.where(finite, keys, self.queue[places])

    def schedule(self, clock: Clock) -> dict[str, float]:
        """What changes with the step, for the log."""
        return {"momentum": self._momentum(clock)}

    def export(self, folder: Path) -> None:
        """Writes the encoder that ``options.export`` names, with its card."""
        branch = self.student if self.options.export == "query" else self.teacher
        encoder, layer = branch.encoder, self.options.export_layer
        if layer is not None and isinstance(encoder, ResNetEncoder):
            encoder = cut_resnet(encoder, layer)
        save_encoder(encoder, folder, source=f"gigatome, MoCo {self.options.version}", mpp=self.mpp)

    def _loss_v2(self, views: Sequence[Tensor], clock: Clock) -> tuple[Tensor, dict[str, Tensor]]:
        batch = (sum(map(len, self._new_keys)) + len(views[0])) * world_size()
        if batch > len(self.queue):
            raise ConfigError(f"a batch of {batch} or more tiles does not fit into moco.queue {len(self.queue)}")
        (query,) = self.student(views[:1])
        with torch.no_grad():
            key = self._shuffled_keys(views[1], clock) if self._shuffles else self.teacher(views[1:])[0]
        self._new_keys.append(key)
        loss, accuracy = info_nce(query, key, self.queue, self.temperature)
        return loss, {"accuracy": accuracy, "spread": spread(key)}

    def _loss_v3(self, views: Sequence[Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        batch = len(views[0])
        if batch * world_size() < 2:
            raise ConfigError("MoCo v3 compares the tiles of a micro-batch with each other; make it 2 or more")
        with torch.no_grad():
            keys = [gather(key) for key in self.teacher(views)]
        parts = [
            info_nce_in_batch(query, key, self.temperature, first=rank() * batch)
            for query, key in zip(self.student(views), reversed(keys), strict=True)
        ]
        loss = 2 * self.temperature * (parts[0][0] + parts[1][0])
        return loss, {"accuracy": (parts[0][1] + parts[1][1]) / 2, "spread": spread(keys[0])}

    def _shuffled_keys(self, view: Tensor, clock: Clock) -> Tensor:
        """Keys of a view [B, …], made in company that the queries did not have."""
        seed = torch_seed(self.seed, "shuffle", clock.step, len(self._new_keys))
        order = torch.randperm(len(view) * world_size(), generator=torch.Generator().manual_seed(seed))
        there, back = (part.chunk(world_size())[rank()].to(view.device) for part in (order, order.argsort()))
        (keys,) = self.teacher([gather(view)[there]])
        return gather(keys)[back]

    def _share_statistics(self, how: Literal["shuffled", "synced", "local"]) -> None:
        group = self.options.norm_group if how == "shuffled" else 2**62
        norms = share_statistics(self, "ranks" if how == "synced" else "group", group)
        self._shuffles = how == "shuffled" and norms > 0

    def _check(self, encoder: TileEncoder) -> None:
        check_patches({"views.global_size": self.view_options.global_size}, encoder.patch_size)
        layer = self.options.export_layer
        if layer is None:
            return
        if not isinstance(encoder, ResNetEncoder):
            raise ConfigError(f"moco.export_layer is for ResNets; {encoder.config.model} is none")
        cut_resnet(encoder, layer)  # refuses a layer that is not there

    def _momentum(self, clock: Clock) -> float:
        return cosine(clock, *self._momenta)


class _Branch(nn.Module):
    """An encoder with its head and, in v3's student, a predictor."""

    def __init__(self, encoder: TileEncoder, head: nn.Sequential, predictor: nn.Sequential | None):
        super().__init__()
        self.encoder, self.head, self.predictor = encoder, head, predictor

    def forward(self, views: Sequence[Tensor]) -> list[Tensor]:
        """Unit vectors float32 [B, out_dim] of each view [B, 3, size, size]; views share no statistics."""
        vectors = [self.head(self.encoder(view)) for view in views]
        if self.predictor is not None:
            vectors = [self.predictor(vector) for vector in vectors]
        return [F.normalize(vector.float(), dim=-1) for vector in vectors]


def _or(given: _T | None, default: _T) -> _T:
    return default if given is None else given


def default_views(version: Literal["v2", "v3"], *, resnet: bool = False) -> ViewOptions:
    """What the authors of a version take, for a ViT or a ResNet."""
    if version == "v2":
        return ViewOptions.moco_v2()
    return replace(ViewOptions.moco_v3(), global_scale=(0.2, 1.0)) if resnet else ViewOptions.moco_v3()


def _mlp(widths: list[int], *, norms: bool, last_norm: bool) -> nn.Sequential:
    """Linear layers with ReLU between them, and batch norm before it; a norm at the end has no weights."""
    modules: list[nn.Module] = []
    for before, after in itertools.pairwise(widths):
        modules += [nn.Linear(before, after, bias=not norms)]
        modules += [nn.BatchNorm1d(after)] if norms else []
        modules += [nn.ReLU()]
    modules = modules[: -2 if norms else -1]
    return nn.Sequential(*modules, *([nn.BatchNorm1d(widths[-1], affine=False)] if last_norm else []))


@torch.no_grad()
def _prepare_vit(encoder: TileEncoder, options: MocoOptions, generator: torch.Generator) -> None:
    """What v3 does to a ViT: fixed positions and other first weights, if it has none yet, and a fixed projection."""
    vit, config = encoder.vit, encoder.config
    if options.sincos_position and config.weights is None and not config.pretrained:
        for name, module in vit.blocks.named_modules():
            if isinstance(module, nn.Linear):
                outputs = module.out_features // (3 if name.endswith("qkv") else 1)
                _uniform(module, module.in_features + outputs, generator)
        projection = vit.patch_embed.proj
        _uniform(projection, math.prod(projection.weight.shape[1:]) + encoder.dim, generator)
        position = cast(Tensor, vit.pos_embed)
        rows, columns = vit.patch_embed.grid_size
        position.zero_()
        position[:, -rows * columns :] = _sines(rows, columns, encoder.dim)
        position.requires_grad_(False)
    if options.freeze_patch_embed:
        vit.patch_embed.requires_grad_(False)


def _uniform(layer: nn.Module, fans: int, generator: torch.Generator) -> None:
    """Weights uniform within √(6 / fans), biases 0."""
    limit = math.sqrt(6 / fans)
    for name, parameter in layer.named_parameters():
        if name == "weight":
            nn.init.uniform_(parameter, -limit, limit, generator=generator)
        else:
            nn.init.zeros_(parameter)


def _sines(rows: int, columns: int, dim: int) -> Tensor:
    """Position embeddings [rows · columns, dim]: sines and cosines of the column, then of the row."""
    if dim % 4:
        raise ConfigError(f"sines and cosines need an encoder.dim that is a multiple of 4, not {dim}")
    rates = 10000 ** (-torch.arange(dim // 4) / (dim // 4))
    y, x = torch.meshgrid(torch.arange(rows), torch.arange(columns), indexing="ij")
    angles = [place.reshape(-1, 1) * rates for place in (x, y)]
    return torch.cat([wave for angle in angles for wave in (angle.sin(), angle.cos())], 1)
