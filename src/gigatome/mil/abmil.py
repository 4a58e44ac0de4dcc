"""Attention-based pooling of a bag: Ilse's, plain and gated, and its survival variant in MCAT's code."""

from dataclasses import dataclass
from typing import Any, Literal, Self, final

from torch import Tensor, nn

from gigatome.mil.attention import Attended, AttentionLayers, attention_pool, can_pool
from gigatome.mil.model import BagBatch, BagModel, BagOutput
from gigatome.mil.segments import segment_pool, segment_softmax


@final
class GatedAttention(nn.Module):
    """Scores of instances, (tanh(A h) ⊙ σ(B h)) C.

    State-dict keys are those of CLAM's ``Attn_Net_Gated``: ``attention_a.0``, ``attention_b.0``, ``attention_c``.

    Args:
        dim: size of an instance.
        width: size of the two branches.
        branches: K scores of an instance.
        dropout: on both branches.

    Source: arXiv 1802.04712, eq. 9; with the biases and the dropout of CLAM's code.
    """

    def __init__(self, dim: int, width: int, branches: int = 1, dropout: float = 0.0):
        super().__init__()
        self.attention_a = nn.Sequential(nn.Linear(dim, width), nn.Tanh(), nn.Dropout(dropout))
        self.attention_b = nn.Sequential(nn.Linear(dim, width), nn.Sigmoid(), nn.Dropout(dropout))
        self.attention_c = nn.Linear(width, branches)

    def forward(self, h: Tensor) -> Tensor:
        """Scores [T, K] of instances [T, D]."""
        return self.attention_c(self.attention_a(h) * self.attention_b(h))


def attention_network(dim: int, width: int, branches: int, *, gated: bool, dropout: float) -> nn.Module:
    """Scores [T, K] of instances [T, D], with or without the gate, by the keys of CLAM's code."""
    if gated:
        return GatedAttention(dim, width, branches, dropout)
    between = [nn.Dropout(dropout)] if dropout else []
    return nn.Sequential(nn.Linear(dim, width), nn.Tanh(), *between, nn.Linear(width, branches))


def embedded_attention(
    dim: int, hidden: int, width: int, branches: int = 1, *, gated: bool = True, dropout: float = 0.0
) -> nn.Sequential:
    """The layer h = ReLU(W x), its dropout, and the attention network on h, as CLAM's and MCAT's code number them."""
    return nn.Sequential(
        nn.Linear(dim, hidden),
        nn.ReLU(inplace=True),
        nn.Dropout(dropout),
        attention_network(hidden, width, branches, gated=gated, dropout=dropout),
    )


def layers_of(network: nn.Sequential) -> AttentionLayers:
    """The layers of an :func:`embedded_attention`, with its dropout if it is in training."""
    parts: list[Any] = list(network)
    embed, _, dropout, attention = parts
    if isinstance(attention, GatedAttention):
        branches: Any = (attention.attention_a[0], attention.attention_b[0])
        last = attention.attention_c
        inner: Any = attention.attention_a[2]
    else:
        branches, last = (attention[0],), attention[-1]
        inner = attention[2] if len(attention) == 4 else None
    rates = (dropout.p, inner.p if inner else 0.0) if network.training else (0.0, 0.0)
    return AttentionLayers(embed, branches, last, rates)


def attend(network: nn.Sequential, bags: BagBatch) -> Attended:
    """Pools each bag by an :func:`embedded_attention`; instances h and scores are given too."""
    if can_pool(layers := layers_of(network), bags.x):
        return attention_pool(layers, bags.x, bags)
    h, scores = embed_and_score(network, bags.x)
    return pool(h, scores, bags)


def pool(h: Tensor, scores: Tensor, bags: BagBatch) -> Attended:
    """Sums of instances h [T, H] by the softmax of their scores [T, K] over each bag."""
    attention = segment_softmax(scores, bags)
    return Attended(segment_pool(attention, h, bags), attention, scores.detach(), h)


def embed_and_score(network: nn.Sequential, x: Tensor) -> tuple[Tensor, Tensor]:
    """Instances h [T, hidden] and their scores [T, K] by an :func:`embedded_attention`."""
    linear, relu, dropout, attention = network
    h = dropout(relu(linear(x)))
    return h, attention(h)


@final
@dataclass(frozen=True)
class AbmilOptions:
    """What makes an ABMIL.

    Attributes:
        hidden: size of an instance after the first layer; 0 leaves the layer out, and attends to the embeddings.
        attention: size of the attention network.
        gated: multiply its tanh branch by a sigmoid branch.
        branches: K weights of an instance; the K pooled vectors are put side by side.
        dropout: after each layer; the authors have none.
        rho: size of a further layer on the pooled vector; 0 leaves it out. Of MCAT's form only.
        form: whose layers and key names, "ilse" or "mcat".
    """

    hidden: int = 500
    attention: int = 128
    gated: bool = False
    branches: int = 1
    dropout: float = 0.0
    rho: int = 0
    form: Literal["ilse", "mcat"] = "ilse"

    @classmethod
    def mcat(cls) -> Self:
        """The "AMIL" of MCAT's and Patch-GCN's survival tables."""
        return cls(hidden=512, attention=256, gated=True, dropout=0.25, rho=256, form="mcat")


@final
class Abmil(BagModel):
    """Attention-based multiple-instance learning: a bag is the weighted mean of its instances.

    State-dict keys are the authors': ``feature_extractor_part2.0``, ``attention.{0,2}`` or ``attention_V.0``,
    ``attention_U.0`` and ``attention_w`` (``attention_weights`` in older files), and ``classifier.0``; in MCAT's form
    ``attention_net.{0,3}``, ``rho.0``, ``classifier``.

    Args:
        options: see there.
        dim: size D of an embedding.
        outputs: logits of a bag; the authors have one, with a sigmoid.

    Source: arXiv 1802.04712, eqs. 7–9, and the authors' code; MCAT's form from the code of arXiv 2108.02278.
    """

    def __init__(self, options: AbmilOptions, dim: int, outputs: int):
        super().__init__()
        self.form, self.gated = options.form, options.gated
        hidden, dropout, branches = options.hidden or dim, options.dropout, options.branches
        pooled = hidden * branches
        if options.form == "mcat":
            self.attention_net = embedded_attention(
                dim, hidden, options.attention, branches, gated=options.gated, dropout=dropout
            )
            if options.rho:
                self.rho = nn.Sequential(nn.Linear(pooled, options.rho), nn.ReLU(), nn.Dropout(dropout))
            self.classifier = nn.Linear(options.rho or pooled, outputs)
            return
        layer = [nn.Linear(dim, hidden), nn.ReLU(inplace=True), nn.Dropout(dropout)] if options.hidden else []
        self.feature_extractor_part2 = nn.Sequential(*layer)
        if options.gated:
            self.attention_V = nn.Sequential(nn.Linear(hidden, options.attention), nn.Tanh())
            self.attention_U = nn.Sequential(nn.Linear(hidden, options.attention), nn.Sigmoid())
            self.attention_w = nn.Linear(options.attention, branches)
        else:
            self.attention = nn.Sequential(
                nn.Linear(hidden, options.attention), nn.Tanh(), nn.Linear(options.attention, branches)
            )
        self.classifier = nn.Sequential(nn.Linear(pooled, outputs))
        self.register_load_state_dict_pre_hook(_old_names)

    def forward(self, bags: BagBatch) -> BagOutput:
        """Logits [B, outputs] and weights [T, branches]."""
        attended = attend(self.attention_net, bags) if self.form == "mcat" else self._attend(bags)
        pooled = attended.pooled.flatten(1)
        if hasattr(self, "rho"):
            pooled = self.rho(pooled)
        return BagOutput(self.classifier(pooled).float(), attended.attention)

    def _attend(self, bags: BagBatch) -> Attended:
        """With the layers of Ilse's names."""
        before: list[Any] = list(self.feature_extractor_part2)
        if before:
            branches: Any = (self.attention_V[0], self.attention_U[0]) if self.gated else (self.attention[0],)
            last: Any = self.attention_w if self.gated else self.attention[2]
            layers = AttentionLayers(before[0], branches, last, (before[2].p if self.training else 0.0, 0.0))
            if can_pool(layers, bags.x):
                return attention_pool(layers, bags.x, bags)
        h = self.feature_extractor_part2(bags.x)
        if self.gated:
            return pool(h, self.attention_w(self.attention_V(h) * self.attention_U(h)), bags)
        return pool(h, self.attention(h), bags)


def _old_names(module: nn.Module, state: dict[str, Any], prefix: str, *_: object) -> None:
    """Takes ``attention_weights`` for ``attention_w``."""
    for kind in ("weight", "bias"):
        old = f"{prefix}attention_weights.{kind}"
        if old in state:
            state[f"{prefix}attention_w.{kind}"] = state.pop(old)


def xavier_linear(module: nn.Module) -> None:
    """Fills every linear layer with Xavier-normal weights and zero biases, as CLAM's and HIPT's code do."""
    for layer in module.modules():
        if isinstance(layer, nn.Linear):
            nn.init.xavier_normal_(layer.weight)
            if layer.bias is not None:
                nn.init.zeros_(layer.bias)
