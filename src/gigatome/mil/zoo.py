"""Slide-level models by name, and with weights that their authors trained."""

import importlib
import inspect
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any, final

import torch
from safetensors.torch import load_file
from torch import Tensor

from gigatome import config as configuration
from gigatome.core.errors import ConfigError, RunError, StoreError
from gigatome.core.seeding import torch_seed
from gigatome.encoders.weights import load_weights
from gigatome.mil.model import BagModel
from gigatome.mil.source import Graph

_VARIANT, _FUSION = "variant", "late_fusion"
_PARTS = ("state_dict", "model_state_dict", "model")
_NOT_WEIGHTS = ("instance_loss_fn.",)  # CLAM's files hold the labels of its instance loss


@final
@dataclass(frozen=True)
class ModelKind:
    """Where a model is found, which is imported when it is asked for.

    Attributes:
        module: of :mod:`gigatome.mil`.
        model: name of its class.
        options: name of the class of its options.
        start: options that this name sets.
    """

    module: str
    model: str
    options: str
    start: Mapping[str, Any] = field(default_factory=dict)

    def load(self) -> tuple[type[Any], type[BagModel]]:
        """The class of the options and that of the model."""
        module = importlib.import_module(f"gigatome.mil.{self.module}")
        return getattr(module, self.options), getattr(module, self.model)


MODELS: Mapping[str, ModelKind] = MappingProxyType(
    {
        "mean": ModelKind("pooling", "MeanPool", "MeanOptions"),
        "max": ModelKind("pooling", "MaxPool", "MaxOptions"),
        "deep_sets": ModelKind("pooling", "DeepSets", "DeepSetsOptions"),
        "abmil": ModelKind("abmil", "Abmil", "AbmilOptions"),
        "abmil_gated": ModelKind("abmil", "Abmil", "AbmilOptions", {"gated": True}),
        "clam_sb": ModelKind("clam", "Clam", "ClamOptions"),
        "clam_mb": ModelKind("clam", "Clam", "ClamOptions", {"multi_branch": True}),
        "ds_mil": ModelKind("ds_mil", "DsMil", "DsMilOptions"),
        "deep_attn_misl": ModelKind("deep_attn_misl", "DeepAttnMisl", "DeepAttnMislOptions"),
        "varmil": ModelKind("varmil", "VarMil", "VarMilOptions"),
        "transmil": ModelKind("transmil", "TransMil", "TransMilOptions"),
        "deep_graph_conv": ModelKind("graph", "DeepGraphConv", "DeepGraphConvOptions"),
        "patch_gcn": ModelKind("graph", "PatchGcn", "PatchGcnOptions"),
        "mcat": ModelKind("mcat", "Mcat", "McatOptions"),
        "hipt_lgp_fc": ModelKind("regions", "HiptLgpFc", "HiptOptions"),
        "hipt_none_fc": ModelKind("regions", "HiptNoneFc", "HiptNoneOptions"),
        "hipt_gp_fc": ModelKind("regions", "HiptGpFc", "HiptOptions"),
        "region_transformer": ModelKind("regions", "RegionTransformer", "RegionTransformerOptions"),
    }
)
"""The slide-level models by name."""


@final
@dataclass(frozen=True)
class ModelSpec:
    """All that decides the shape of a model.

    Attributes:
        name: in :data:`MODELS`.
        dim: size of an embedding.
        outputs: logits of a bag.
        options: every option of the model, as :func:`model_spec` gives them.
        late_fusion: options of :class:`~gigatome.mil.mcat.LateFusion` with omics; None without.
    """

    name: str
    dim: int
    outputs: int
    options: Mapping[str, Any]
    late_fusion: Mapping[str, Any] | None = None


def model_spec(name: str, dim: int, outputs: int, overrides: Mapping[str, Any] = MappingProxyType({})) -> ModelSpec:
    """The whole description of a model.

    Args:
        name: in :data:`MODELS`.
        dim: size of an embedding.
        outputs: logits of a bag.
        overrides: of options; ``variant`` names a published variant, such as ``"hipt"``, to start from, and
            ``late_fusion`` holds options of :class:`~gigatome.mil.mcat.LateFusion`, to add omics to the model.

    Raises:
        ConfigError: there is no such model, variant or option, or a value is not allowed.
    """
    if dim < 1 or outputs < 1:
        raise ConfigError(f"head {name}: dim and outputs are at least 1, not {dim} and {outputs}")
    given = dict(overrides)
    fusion = given.pop(_FUSION, None)
    if fusion is not None:
        fusion = configuration.to_dict(_fusion_options(name, fusion))
    return ModelSpec(name, dim, outputs, configuration.to_dict(model_options(name, given)), fusion)


def model_options(name: str, overrides: Mapping[str, Any] = MappingProxyType({})) -> Any:
    """The options of a model, a dataclass; as :func:`model_spec`."""
    kind = _kind(name)
    options, _ = kind.load()
    where = f"head {name}"
    return configuration.parse(options, from_variant(options, overrides, where, start=kind.start), source=where)


def from_variant(
    options: type[Any], overrides: Mapping[str, Any], where: str, *, start: Mapping[str, Any] = MappingProxyType({})
) -> dict[str, Any]:
    """The values of the published variant that ``overrides`` name under ``variant``, and theirs above them.

    Args:
        options: a dataclass, whose variants are its class methods without arguments.
        overrides: values by name.
        where: for the message.
        start: values between the two.

    Raises:
        ConfigError: there is no such variant.
    """
    given = dict(overrides)
    variant = given.pop(_VARIANT, None)
    if variant is None:
        return {**start, **given}
    variants = _variants(options)
    if variant not in variants:
        known = f"there are {', '.join(variants)}" if variants else "it has none"
        raise ConfigError(f"{where}: there is no variant {variant}; {known}")
    return {**configuration.to_dict(getattr(options, variant)()), **start, **given}


def bag_model(
    name: str, dim: int, outputs: int, overrides: Mapping[str, Any] = MappingProxyType({}), *, seed: int = 0
) -> BagModel:
    """A model with random initial weights, on the CPU.

    Args:
        name: in :data:`MODELS`.
        dim: size of an embedding.
        outputs: logits of a bag.
        overrides: of options, as of :func:`model_spec`.
        seed: of the weights.

    Raises:
        ConfigError: as of :func:`model_spec`.
    """
    return build(model_spec(name, dim, outputs, overrides), seed=seed)


def build(spec: ModelSpec, *, seed: int = 0) -> BagModel:
    """The model that ``spec`` describes, as of :func:`bag_model`."""
    options, model = _kind(spec.name).load()
    made: Any = model  # whose class all share, but not the signature
    parsed = configuration.parse(options, spec.options, source=f"head {spec.name}")
    with torch.random.fork_rng([]):
        torch.manual_seed(torch_seed(seed, "mil", "weights"))
        if spec.late_fusion is None:
            return made(parsed, spec.dim, spec.outputs)
        fusion = _fusion_options(spec.name, spec.late_fusion)
        return _mcat().LateFusion(fusion, made(parsed, spec.dim, fusion.hidden), spec.outputs)


def needs_of(name: str) -> frozenset[str]:
    """What a model needs, :attr:`BagModel.needs`; raises :class:`ConfigError` if there is no such model."""
    return _kind(name).load()[1].needs


def graph_of(options: Any) -> Graph | None:
    """The graph that a model with these options wants of its source; None if it wants none."""
    if not (hasattr(options, "graph") and hasattr(options, "neighbours")):
        return None
    return Graph(options.graph, options.neighbours)


def load_authors(path: str | Path, model: BagModel) -> None:
    """Puts the weights of an author's checkpoint into a model of the same shape.

    The file is read without running any code in it. ``module.`` is stripped wherever ``DataParallel`` put it, as is
    ``model.`` where it stands before every key; keys that are not weights are passed over.

    Args:
        path: ``.pt``, ``.pth``, ``.ckpt`` or ``.safetensors``.
        model: of the variant that the authors trained.

    Raises:
        StoreError: there is no such file, or it cannot be read or holds more than weights.
        RunError: its weights do not fit the model; the message names keys.
    """
    state = authors_state(path)
    load_weights(model, state, source=str(path))


def authors_state(path: str | Path) -> dict[str, Tensor]:
    """The weights of an author's checkpoint with our keys, as :func:`load_authors` reads them."""
    path = Path(path)
    if not path.is_file():
        raise StoreError(f"{path}: there is no such file of weights")
    try:
        if path.suffix == ".safetensors":
            content: Any = load_file(path)
        else:
            content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # on bytes that are no weights, the unpickler stumbles in many ways
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise StoreError(f"{path}: cannot be read as weights: {reason}") from error
    while isinstance(content, Mapping):
        part = next((part for part in _PARTS if isinstance(content.get(part), Mapping)), None)
        if part is None:
            break
        content = content[part]
    if not isinstance(content, Mapping):
        raise RunError(f"{path}: holds no weights but a {type(content).__name__}")
    state = {
        ".".join(part for part in key.split(".") if part != "module"): value
        for key, value in content.items()
        if isinstance(value, Tensor) and not key.startswith(_NOT_WEIGHTS)
    }
    if not state:
        raise RunError(f"{path}: holds no weights")
    if all(key.startswith("model.") for key in state):
        state = {key.removeprefix("model."): value for key, value in state.items()}
    return state


def _kind(name: str) -> ModelKind:
    if name not in MODELS:
        raise ConfigError(f"there is no slide-level model {name}; there are {', '.join(MODELS)}")
    return MODELS[name]


def _mcat() -> Any:
    return importlib.import_module("gigatome.mil.mcat")


def _fusion_options(name: str, values: Mapping[str, Any]) -> Any:
    return configuration.parse(_mcat().LateFusionOptions, values, source=f"head {name}, {_FUSION}")


def _variants(options: type[Any]) -> list[str]:
    """Names of the class methods that need no argument."""
    found = []
    for name, value in vars(options).items():
        if isinstance(value, classmethod) and not name.startswith("_"):
            parameters = inspect.signature(getattr(options, name)).parameters.values()
            if all(parameter.default is not parameter.empty for parameter in parameters):
                found.append(name)
    return found
