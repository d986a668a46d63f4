"""The methods: the configuration type of each, and the one table of what each does at every step of the path.

To add a method: a type, its place in `Method`, a row in `SEAMS` (docs/extending.md).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from importlib import import_module
from typing import Annotated, Any, Literal

from pydantic import (
    Field,
    model_validator,
)

from raymoe.schema import Config


class MethodConfig(Config):
    """What every method answers, so that no one has to ask which method it is."""

    @property
    def ffns_per_layer(self) -> int:
        """FFNs of a layer that are stored: N experts, or the dense one."""
        return 1

    @property
    def ffns_per_token(self) -> int:
        """FFNs of a layer that a token passes through."""
        return 1

    @property
    def interpolates(self) -> bool:
        """True if every prompt has weights of its own, a mixture of the experts'."""
        return False

    @property
    def domains(self) -> tuple[str, ...]:
        """Domains that the data have to have, because each gets experts of its own."""
        return ()


class Dense(MethodConfig):
    """The baseline: the dense model itself, trained on the same tokens."""

    name: Literal["dense"] = "dense"


class Experts(MethodConfig):
    """What every sparse method shares."""

    num_experts: int = Field(2, ge=2)
    """Experts per layer (N), made from copies of the dense model's FFN."""
    top_k: int = Field(1, ge=1)
    """Experts that each token visits."""
    gating: Literal["straight_through", "renormalized", "softmax"] = "straight_through"
    """How expert outputs are weighted: `straight_through` and `renormalized` start equal to the dense model;
    `softmax` is eq. 2 of the RSU paper."""
    load_balance_alpha: float = Field(0.01, ge=0)
    """Weight of the load-balance loss (eq. 3 and 4); the loss is this weight when perfectly balanced."""

    @property
    def ffns_per_layer(self) -> int:
        """N."""
        return self.num_experts

    @property
    def ffns_per_token(self) -> int:
        """top_k."""
        return self.top_k

    @model_validator(mode="after")
    def _top_k_fits(self) -> Experts:
        if self.top_k > self.num_experts:
            raise ValueError(f"top_k {self.top_k} is larger than num_experts {self.num_experts}")
        return self


class SparseUpcycling(Experts):
    """SU (Komatsuzaki et al.): random routers."""

    name: Literal["su"] = "su"
    router_std: float = Field(0.02, gt=0)
    """Standard deviation of the routers' random rows."""


class Representations(Experts):
    """What TRSU and CRSU share: routers from centroids of the dense model's representations."""

    settings: Literal["raymoe", "paper"] = "raymoe"
    """`paper` switches to attention output, raw rows and softmax gating, unless they are given."""
    representation: Literal["ffn_input", "attention_output", "attention_residual"] = "ffn_input"
    """Where in each layer representations are taken."""
    router_rows: Literal["scaled", "raw"] = "scaled"
    """`scaled`: centred, unit length, scaled to `router_confidence`; `raw`: the centroids themselves."""
    router_confidence: float = Field(0.6, gt=0, lt=1)
    """Mean top-1 probability of the router on the clustered tokens (`scaled` rows only)."""
    spherical: bool = True
    """Cluster by direction, so that the router's argmax is the cluster."""
    max_tokens: int = Field(20_000, ge=2)
    """Token representations kept per layer: what bounds memory and disk, whatever the data's size."""
    kmeans_starts: int = Field(4, ge=1)
    """k-means++ starts, of which the one with the smallest inertia is kept."""

    @model_validator(mode="after")
    def _confidence_is_above_chance(self) -> Representations:
        if self.router_rows == "scaled" and self.router_confidence * self.num_experts <= 1:
            raise ValueError(
                f"router_confidence {self.router_confidence} must be above 1/num_experts, chance, "
                f"which is {1 / self.num_experts:.4g}"
            )
        return self

    @model_validator(mode="before")
    @classmethod
    def _paper_settings(cls, values: Any) -> Any:
        if isinstance(values, Mapping) and values.get("settings") == "paper":
            paper = {
                "representation": "attention_output",
                "router_rows": "raw",
                "gating": "softmax",
                "spherical": False,
            }
            return {**paper, **values}
        return values


class TaskRepresentations(Representations):
    """TRSU: every task gets `num_experts / len(tasks)` experts, from its own most perplexing examples."""

    name: Literal["trsu"] = "trsu"
    tasks: tuple[str, ...] = Field(("code", "math"), min_length=1)
    """Domains of the data that get experts of their own; the others share them (paper: text)."""
    perplexity_top_fraction: float = Field(0.05, gt=0, le=1)
    """Share of each task's examples kept, the most perplexing first."""

    @property
    def domains(self) -> tuple[str, ...]:
        """`tasks`."""
        return self.tasks

    @model_validator(mode="after")
    def _experts_divide(self) -> TaskRepresentations:
        if len(set(self.tasks)) < len(self.tasks):
            raise ValueError(f"tasks {list(self.tasks)} names one twice")
        if self.num_experts % len(self.tasks):
            raise ValueError(
                f"num_experts {self.num_experts} is not a multiple of the {len(self.tasks)} tasks"
            )
        return self


class ContextRepresentations(Representations):
    """CRSU: K-means over a random share of all tokens, one centroid per expert."""

    name: Literal["crsu"] = "crsu"
    token_fraction: float = Field(0.01, gt=0, le=1)
    """Share of all training tokens that is clustered (at most `max_tokens`)."""


class SparseInterpolation(MethodConfig):
    """SIMoE: frozen weights plus one trained delta, of which every expert is a learnt structured mask."""

    name: Literal["simoe"] = "simoe"
    num_experts: int = Field(8, ge=1)
    """Masks over the shared delta (M); every prompt gets its own mixture of them."""
    sparsity_target: float = Field(0.75, ge=0, lt=1)
    """Share of the delta's parameters whose gates are to be zero at the end of training."""
    sparsity_scope: Literal["union", "mean", "per_expert"] = "union"
    """A gate counts as zero: `union`: if it is zero in all experts, so that its column can be dropped; `mean`:
    in each expert by itself, averaged over them; `per_expert`: likewise, and each expert meets the target."""
    sparsity_warmup: float = Field(0.5, ge=0, le=1)
    """Share of training over which the target rises to `sparsity_target`."""
    sparsity_rate: float = Field(150.0, gt=0)
    """What the constraint's multiplier would grow by over the whole training if the target were missed by 1. In
    units in which 1 moves the gates as strongly as the loss does."""
    sparsity_penalty: float = Field(8.0, ge=0)
    """Weight of the constraint's quadratic term, in the same units; it keeps the multiplier from overshooting."""
    orthogonality: float = Field(0.01, ge=0)
    """Weight of the loss on what experts have in common."""
    delta_learning_rate: float | None = Field(None, gt=0)
    """AdamW's learning rate of the delta; by default 8 times `optimization.learning_rate`, since
    gates and router shrink its steps."""
    mask_learning_rate: float | None = Field(None, gt=0)
    """Learning rate of the gates (of their log_alpha, within [-4.6, 4.6]); by default 22 / steps, which takes
    them across that range well before the end."""
    router_learning_rate: float | None = Field(None, gt=0)
    """Adam's learning rate of the prompt router; by default 8 / (steps * width)."""
    router_hidden_size: int | None = Field(None, ge=1)
    """Width of the router's hidden layer; by default it has none."""
    log_alpha_mean: float = Field(0.0, ge=-4.6, le=4.6)
    """Where gates start: 0 is half open, 4 open. The further open, the less experts come to differ."""
    log_alpha_std: float = Field(1.0, ge=0)
    """How far apart they start; gates that start alike sink together and stay barely open."""
    prompt_representation: Literal["last_hidden", "embedding"] = "last_hidden"
    """What the router sees of a prompt, averaged over its tokens: the dense model's last hidden state, computed
    once per data set, or the token embeddings."""

    @property
    def interpolates(self) -> bool:
        """Always."""
        return True


class DropUpcycling(Experts):
    """Drop-Upcycling (Nakamura et al., ICLR 2025): random routers, and experts that each forget a part of the FFN."""

    name: Literal["drop"] = "drop"
    router_std: float = Field(0.02, gt=0)
    """Standard deviation of the routers' random rows."""
    drop_ratio: float = Field(0.5, gt=0, le=1)
    """Share r of the FFN's columns that every expert draws anew."""
    variant: Literal["paper", "official"] = "paper"
    """`paper`: the same columns of all three matrices are drawn anew; `official`: as the authors' code does it,
    every matrix draws its own columns, after the columns of each expert are permuted."""


Method = Annotated[
    Dense
    | SparseUpcycling
    | TaskRepresentations
    | ContextRepresentations
    | DropUpcycling
    | SparseInterpolation,
    Field(discriminator="name"),
]


@dataclass(frozen=True)
class Seam:
    """What a method does at each step of the path: its row in `SEAMS`.

    Functions and classes are named as `module:name`; the step that needs one imports it (`resolve`).
    """

    stages: tuple[str, ...] = ()
    """Stages that its training reads, besides the dense model and the instructions."""
    router: str | None = None
    """Makes the router rows [L, N, D] that training starts from (`raymoe.upcycle.router`); None: has no routers."""
    expert: str | None = None
    """Makes one expert from the dense FFN (`raymoe.upcycle.expert_start`); None: experts are copies."""
    size: str = "raymoe.analysis.size:upcycled"
    """Counts the parameters of a dense model under it (`raymoe.analysis.size.count`)."""
    extension: str = "raymoe.train.extension:Extension"
    """What it adds to the training step, and how its result is measured and written."""


SEAMS: dict[type[MethodConfig], Seam] = {
    Dense: Seam(),
    SparseUpcycling: Seam(
        stages=("upcycle",),
        router="raymoe.upcycle.sparse:router",
        extension="raymoe.train.experts:SparseExperts",
    ),
    TaskRepresentations: Seam(
        stages=("perplexity", "representations", "clusters", "upcycle"),
        router="raymoe.upcycle.representation:router",
        extension="raymoe.train.experts:SparseExperts",
    ),
    ContextRepresentations: Seam(
        stages=("representations", "clusters", "upcycle"),
        router="raymoe.upcycle.representation:router",
        extension="raymoe.train.experts:SparseExperts",
    ),
    DropUpcycling: Seam(
        stages=("upcycle",),
        router="raymoe.upcycle.sparse:router",
        expert="raymoe.upcycle.drop:expert",
        extension="raymoe.train.experts:SparseExperts",
    ),
    SparseInterpolation: Seam(
        stages=("prompts",),
        size="raymoe.analysis.size:interpolated",
        extension="raymoe.train.masks:MaskTrainer",
    ),
}
"""The table of methods, in the order in which they are listed."""

METHODS: dict[str, type[MethodConfig]] = {kind.model_fields["name"].default: kind for kind in SEAMS}
"""Configuration type of every `method.name`."""


def seam(method: MethodConfig) -> Seam:
    """Row of `method` in the table."""
    return SEAMS[type(method)]


def methods_with(stage: str) -> str:
    """Names of the methods whose training reads `stage`, for error messages: `trsu, crsu`."""
    return ", ".join(name for name, kind in METHODS.items() if stage in SEAMS[kind].stages)


def resolve(reference: str) -> Any:
    """Import what a `Seam` names as `module:name`."""
    module, _, name = reference.partition(":")
    return getattr(import_module(module), name)
