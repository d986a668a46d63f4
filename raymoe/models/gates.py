"""SIMoE's gates: hard concrete masks over a model's weights, their sparsity and overlap, and the prompt router.

The masks of the whole model are ONE matrix Z [M, G], with one gate per input column of every linear and one per
element of every norm. `gate_layout` says which columns of Z belong to which layer.

Shapes: S samples, M experts, G gates, D width, K rows of shares (1 or M).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedModel

from raymoe.methods import SparseInterpolation
from raymoe.schema import InputError

KINDS = {
    "q_proj": "query", "k_proj": "key", "v_proj": "value", "o_proj": "out",
    "gate_proj": "gate", "up_proj": "up", "down_proj": "down",
}  # fmt: skip
"""Linears that get gates, and their names in the SIMoE paper's figures. Norms are `norm`."""

GATHER_BELOW = 0.8
"""Fraction of live columns below which dead ones are skipped; above, gathering costs more than it saves."""

# ---- the hard concrete distribution

BETA, GAMMA, ZETA = 2 / 3, -0.1, 1.1
"""Temperature and stretch of the hard concrete distribution (Louizos et al. 2018, arXiv 1712.01312)."""
LOG_ALPHA_LIMIT = 4.605170185988092
"""log 100: log_alpha is kept within [-log 100, log 100]."""


def sampled_gates(log_alpha: Tensor, noise: Tensor) -> Tensor:
    """Sample hard concrete gates in [0, 1] from `log_alpha` and uniform `noise` in (0, 1), of the same shape."""
    s = torch.sigmoid((torch.logit(noise) + log_alpha) / BETA)
    return (s * (ZETA - GAMMA) + GAMMA).clamp(0, 1)


def evaluated_gates(log_alpha: Tensor) -> Tensor:
    """Return the gates without noise, as in the trained model."""
    return (torch.sigmoid(log_alpha) * (ZETA - GAMMA) + GAMMA).clamp(0, 1)


def open_probability(log_alpha: Tensor) -> Tensor:
    """Return P(z != 0) of sampled gates."""
    return torch.sigmoid(log_alpha - BETA * float(np.log(-GAMMA / ZETA)))


# ---- sparsity and orthogonality


def sparsity(gates_MG: Tensor, owned_G: Tensor, scope: str) -> Tensor:
    """Return the fraction of zeros in Z, each gate weighted by the parameters it owns.

    Returns:
        [1], or [M] for `per_expert`. `union`: a gate counts as zero only if it is zero in all experts, which gives
        the fraction of theta_delta that can be dropped; `mean`: over experts; `per_expert`: of each expert.
    """
    zero_MG = (gates_MG == 0).to(owned_G)
    zero_KG = zero_MG.amin(0, keepdim=True) if scope == "union" else zero_MG
    share_K = zero_KG @ owned_G / owned_G.sum()
    return share_K if scope != "mean" else share_K.mean(0, keepdim=True)


def expected_sparsity(log_alpha_MG: Tensor, owned_G: Tensor, scope: str) -> Tensor:
    """Return the expectation of `sparsity` over the gates' noise, [1] or [M]: what the constraint descends on.

    For `union`, the probability that all M gates of a column are zero is the product of theirs. Its M-th root is
    used instead: for a column that is open in all experts the product, and so its gradient, is ~1e-7. Both are 1
    if all probabilities are 1.
    """
    closed_MG = 1 - open_probability(log_alpha_MG)
    if scope == "union":
        closed_MG = closed_MG.clamp(min=1e-12).log().mean(0, keepdim=True).exp()
    share_K = closed_MG @ owned_G / owned_G.sum()
    return share_K if scope != "mean" else share_K.mean(0, keepdim=True)


def overlap(gates_MG: Tensor) -> Tensor:
    """Return Zn Zn^T [M, M], the cosines between the rows of Z; 0 for a row that is all zero."""
    rows_MG = F.normalize(gates_MG, dim=1)
    return rows_MG @ rows_MG.T


def mean_overlap(gates_MG: Tensor) -> Tensor:
    """Return the mean cosine of two different rows of Z, a scalar; 0 for a single expert."""
    ratios_MM, experts = overlap(gates_MG), len(gates_MG)
    return (ratios_MM.sum() - ratios_MM.diagonal().sum()) / max(1, experts * (experts - 1))


def orthogonality(gates_MG: Tensor) -> Tensor:
    """Return || Zn Zn^T - I ||_F, a scalar; 0 when no two experts share a parameter."""
    ratios_MM = overlap(gates_MG)
    norm: Tensor = (ratios_MM - torch.diag(ratios_MM.diagonal())).norm()
    return norm


# ---- the gate matrix's columns


@dataclass(frozen=True)
class GateSpan:
    """The gates of one linear or norm: columns [start, start + width) of Z."""

    name: str
    """Module name in the model, such as `model.layers.3.self_attn.q_proj`."""
    kind: str
    layer: int | None
    """Decoder layer; None for the norm after the last one."""
    start: int
    width: int
    owned: int
    """Parameters that one gate owns: the outputs of a linear, 1 for a norm."""


@dataclass(frozen=True)
class GateLayout:
    """All gates of a model, in the order of Z's columns."""

    spans: tuple[GateSpan, ...]

    @property
    def size(self) -> int:
        """Number of gates, G."""
        return self.spans[-1].start + self.spans[-1].width

    @property
    def widths(self) -> list[int]:
        """Number of columns of each span."""
        return [span.width for span in self.spans]

    def owned(self, device: torch.device | str = "cpu") -> Tensor:
        """Return the number of parameters of theta_delta that each gate owns: fp32 [G]."""
        counts = torch.tensor([float(s.owned) for s in self.spans], device=device)
        return counts.repeat_interleave(torch.tensor(self.widths, device=device), output_size=self.size)

    @property
    def num_parameters(self) -> int:
        """Number of parameters of theta_delta."""
        return sum(s.width * s.owned for s in self.spans)


def gate_layout(model: PreTrainedModel) -> GateLayout:
    """Return the gates that `interpolate` would make, on any device, meta included.

    Raises:
        InputError: some modules are neither known linears nor norms; names all of them.
    """
    spans: list[GateSpan] = []
    unknown: list[str] = []
    start = 0
    decoder = model.get_decoder()
    prefix = next(name for name, module in model.named_modules() if module is decoder)
    for name, module in decoder.named_modules():
        if not module._parameters or module is model.get_input_embeddings():
            continue
        kind = _kind(name, module)
        if kind is None:
            unknown.append(f"{prefix}.{name} ({type(module).__name__})")
            continue
        weight: Any = module.weight
        width = weight.shape[-1]
        parts = name.split(".")
        layer = int(parts[1]) if parts[0] == "layers" else None
        spans.append(
            GateSpan(f"{prefix}.{name}", kind, layer, start, width, 1 if kind == "norm" else len(weight))
        )
        start += width
    if unknown:
        raise InputError(f"model: SIMoE doesn't know these layers: {', '.join(unknown)}")
    return GateLayout(tuple(spans))


def _kind(name: str, module: nn.Module) -> str | None:
    if isinstance(module, nn.Linear):
        return KINDS.get(name.rsplit(".", 1)[-1])
    is_norm = type(module).__name__.endswith("RMSNorm") and set(module._parameters) == {"weight"}
    return "norm" if is_norm else None


def live_columns(gates_MG: Tensor, layout: GateLayout) -> list[Tensor | None]:
    """Return, per layer, the columns that any expert has open; None if skipping the others would not pay.

    Reads Z back to the host, so call it once per optimizer step, not per layer or micro batch.
    """
    alive = np.flatnonzero((gates_MG != 0).any(0).cpu().numpy())
    bounds = np.searchsorted(alive, [*(s.start for s in layout.spans), layout.size])
    everything = torch.from_numpy(alive).to(gates_MG.device)
    live: list[Tensor | None] = []
    for span, first, last in zip(layout.spans, bounds[:-1], bounds[1:], strict=True):
        some = span.kind != "norm" and last - first < GATHER_BELOW * span.width
        live.append(everything[first:last] - span.start if some else None)
    return live


# ---- gate matrix and router


class Gates(nn.Module):
    """The gate matrix: `log_alpha` (fp32 [M, G]) and its hard concrete gates."""

    def __init__(self, method: SparseInterpolation, layout: GateLayout, seed: int = 0) -> None:
        super().__init__()
        noise = torch.randn(method.num_experts, layout.size, generator=torch.Generator().manual_seed(seed))
        self.log_alpha = nn.Parameter(method.log_alpha_mean + method.log_alpha_std * noise)
        self.clamp_()

    def sampled(self, noise: Tensor) -> Tensor:
        """Return the gates for training [M, G]."""
        return sampled_gates(self.log_alpha, noise)

    def evaluated(self) -> Tensor:
        """Return the gates for evaluation [M, G]."""
        return evaluated_gates(self.log_alpha)

    @torch.no_grad()
    def clamp_(self) -> None:
        """Clamp log_alpha to where closed gates can still reopen."""
        self.log_alpha.clamp_(-LOG_ALPHA_LIMIT, LOG_ALPHA_LIMIT)


class PromptRouter(nn.Module):
    """h: maps a prompt's representation to expert weights."""

    def __init__(self, method: SparseInterpolation, width: int, seed: int = 0) -> None:
        super().__init__()
        sizes = [
            width,
            *([method.router_hidden_size] if method.router_hidden_size else []),
            method.num_experts,
        ]
        self.norm = nn.LayerNorm(width)
        self.layers = nn.ModuleList(nn.Linear(i, o) for i, o in zip(sizes, sizes[1:], strict=False))
        generator = torch.Generator().manual_seed(seed)
        for layer in self.layers:
            nn.init.normal_(layer.weight, std=layer.in_features**-0.5, generator=generator)  # type: ignore[arg-type, operator]
            nn.init.zeros_(layer.bias)  # type: ignore[arg-type]

    def forward(self, prompts_SD: Tensor) -> Tensor:
        """Return a [S, M] in fp32; rows sum to 1."""
        x = self.norm(prompts_SD.float())
        for i, layer in enumerate(self.layers):
            x = layer(F.silu(x) if i else x)
        a_SM: Tensor = x.softmax(-1)
        return a_SM
