"""The methods: each one's configuration type, and one table of what it does at every step of the path.

To add a method, add a type, its place in `Method` and a row in `SEAMS` (docs/extending.md).
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
    """Base of all methods: properties that save callers from asking which method it is."""

    @property
    def ffns_per_layer(self) -> int:
        """Number of FFNs stored per layer: N experts, or the dense one."""
        return 1

    @property
    def ffns_per_token(self) -> int:
        """Number of FFNs per layer that a token passes through."""
        return 1

    @property
    def interpolates(self) -> bool:
        """True if every prompt has its own weights, a mixture of the experts'."""
        return False

    @property
    def domains(self) -> tuple[str, ...]:
        """Domains that the data must have, because each gets its own experts."""
        return ()


class Dense(MethodConfig):
    """The baseline: the dense model itself, trained on the same tokens."""

    name: Literal["dense"] = "dense"


class Experts(MethodConfig):
    """Fields that all sparse methods share."""

    num_experts: int = Field(2, ge=2)
    """Experts per layer (N), made from copies of the dense model's FFN."""
    top_k: int = Field(1, ge=1)
    """Number of experts each token visits."""
    gating: Literal["straight_through", "renormalized", "softmax"] = "straight_through"
    """How expert outputs are weighted: with `straight_through` and `renormalized` the model starts equal to the dense
    one; `softmax` is eq. 2 of the RSU paper."""
    load_balance_alpha: float = Field(0.01, ge=0)
    """Weight of the load-balance loss (eq. 3 and 4), which is 1 before weighting when perfectly balanced."""

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
    """Fields that TRSU and CRSU share: routers from centroids of the dense model's representations."""

    settings: Literal["raymoe", "paper"] = "raymoe"
    """`paper` changes the defaults to attention output, raw rows, softmax gating and Euclidean clustering."""
    representation: Literal["ffn_input", "attention_output", "attention_residual"] = "ffn_input"
    """Where in each layer the representations are read."""
    router_rows: Literal["scaled", "raw"] = "scaled"
    """`scaled`: centroids centred, normalised and scaled to `router_confidence`; `raw`: the centroids themselves."""
    router_confidence: float = Field(0.6, gt=0, lt=1)
    """Mean top-1 probability of the router on the clustered tokens (`scaled` rows only)."""
    spherical: bool = True
    """Cluster by direction (cosine), so that the router's argmax is the cluster."""
    max_tokens: int = Field(20_000, ge=2)
    """Token representations kept per layer; bounds memory and disk, whatever the size of the data."""
    kmeans_starts: int = Field(4, ge=1)
    """Number of k-means++ starts; the result with the smallest inertia is kept."""

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
    """Share of each task's examples that is kept, by highest perplexity."""

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
    """CRSU: K-means over a random sample of all tokens, one centroid per expert."""

    name: Literal["crsu"] = "crsu"
    token_fraction: float = Field(0.01, gt=0, le=1)
    """Share of all training tokens that is clustered (at most `max_tokens`)."""


class SparseInterpolation(MethodConfig):
    """SIMoE: frozen weights plus one trained delta; every expert is a learnt structured mask on it."""

    name: Literal["simoe"] = "simoe"
    num_experts: int = Field(8, ge=1)
    """Number of masks on the shared delta (M); every prompt gets its own mixture of them."""
    sparsity_target: float = Field(0.75, ge=0, lt=1)
    """Share of the delta's parameters whose gates should be zero at the end of training."""
    sparsity_scope: Literal["union", "mean", "per_expert"] = "union"
    """Which gates count as zero. `union`: those that are zero in all experts, so that their columns can be dropped;
    `mean`: those of each expert, averaged over experts; `per_expert`: each expert meets the target by itself."""
    sparsity_warmup: float = Field(0.5, ge=0, le=1)
    """Share of training over which the target rises to `sparsity_target`."""
    sparsity_rate: float = Field(150.0, gt=0)
    """Growth of the constraint's multiplier over the whole training if the target were missed by 1. The unit is such
    that a multiplier of 1 moves the gates as strongly as the loss does."""
    sparsity_penalty: float = Field(8.0, ge=0)
    """Weight of the constraint's quadratic term, in the same unit; it keeps the multiplier from overshooting."""
    orthogonality: float = Field(0.01, ge=0)
    """Weight of the orthogonality loss, which penalises overlap between experts."""
    delta_learning_rate: float | None = Field(None, gt=0)
    """AdamW's learning rate for the delta; by default 8 times `optimization.learning_rate`, because gates and router
    shrink its steps."""
    mask_learning_rate: float | None = Field(None, gt=0)
    """Learning rate of the gates' log_alpha, which stays within [-4.6, 4.6]; by default 22 / steps, enough to cross
    that range well before the end."""
    router_learning_rate: float | None = Field(None, gt=0)
    """Adam's learning rate for the prompt router; by default 8 / (steps * width)."""
    router_hidden_size: int | None = Field(None, ge=1)
    """Width of the prompt router's hidden layer; by default it has none."""
    log_alpha_mean: float = Field(0.0, ge=-4.6, le=4.6)
    """Mean of the gates' initial log_alpha: 0 is half open, 4 open. The more open, the less experts will differ."""
    log_alpha_std: float = Field(1.0, ge=0)
    """Standard deviation of the initial log_alpha; gates that start alike sink together and stay barely open."""
    prompt_representation: Literal["last_hidden", "embedding"] = "last_hidden"
    """The router's input, averaged over the prompt's tokens: the dense model's last hidden states, computed once per
    data set, or its token embeddings."""

    @property
    def interpolates(self) -> bool:
        """Always."""
        return True


class DropUpcycling(Experts):
    """Drop-Upcycling (Nakamura et al., ICLR 2025): random routers; every expert re-initialises part of the FFN."""

    name: Literal["drop"] = "drop"
    router_std: float = Field(0.02, gt=0)
    """Standard deviation of the routers' random rows."""
    drop_ratio: float = Field(0.5, gt=0, le=1)
    """Share r of the FFN's columns that every expert re-initialises."""
    variant: Literal["paper", "official"] = "paper"
    """`paper`: the same columns are re-initialised in all three matrices; `official`: as in the authors' code, each
    matrix chooses its own columns, after the columns of each expert are permuted."""


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
    """Row of a method in `SEAMS`: its part in each step of the path.

    Functions and classes are given as `module:name`; the step that needs one imports it (`resolve`).
    """

    stages: tuple[str, ...] = ()
    """Stages that its training reads, besides the dense model and the instructions."""
    router: str | None = None
    """Makes the router rows [L, N, D] that training starts from (`raymoe.upcycle.router`); None: no routers."""
    expert: str | None = None
    """Makes one expert from the dense FFN (`raymoe.upcycle.expert_start`); None: experts are copies."""
    size: str = "raymoe.analysis.size:upcycled"
    """Counts the parameters of a dense model under this method (`raymoe.analysis.size.count`)."""
    extension: str = "raymoe.train.extension:Extension"
    """Extends the training step, and measures and writes the result (`raymoe.train.extension`)."""


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
"""The table of methods, in listing order."""

METHODS: dict[str, type[MethodConfig]] = {kind.model_fields["name"].default: kind for kind in SEAMS}
"""`method.name` -> its configuration type."""


def seam(method: MethodConfig) -> Seam:
    """Return the row of `method` in the table."""
    return SEAMS[type(method)]


def methods_with(stage: str) -> str:
    """List the methods whose training reads `stage`, for error messages: `trsu, crsu`."""
    return ", ".join(name for name, kind in METHODS.items() if stage in SEAMS[kind].stages)


def resolve(reference: str) -> Any:
    """Import the object that a `Seam` gives as `module:name`."""
    module, _, name = reference.partition(":")
    return getattr(import_module(module), name)
