"""SIMoE: sparse interpolated experts, M masks over one shared delta that are merged per prompt.

    theta(x) = theta_pre + sum_m a_m(x) (z_m * theta_delta)      a(x) = softmax(h(prompt of x))

`interpolate` replaces the linears and norms of a Hugging Face dense model, in place and without touching its
modelling code, by layers that add `c * theta_delta`. The masks of the whole model are ONE matrix Z [M, G], with
one gate per input column of every linear and one per element of every norm, so the coefficients of all layers
are one small product c = a Z, of which each layer takes its slice. Embeddings and LM head stay frozen.

    interpolated = interpolate(model)
    gates, router = Gates(method, interpolated.layout), PromptRouter(method, width)
    interpolated.set(router(prompts_SD) @ gates.evaluated(), documents)     # which tokens are whose
    model(...)

Two exact forms compute a linear: factored, y = x W^T + (c * x) W_delta, and merged, y = x (W + (c * W_delta)^T)^T
per sample. `chosen_form` says which is faster. Columns that are dead (c = 0 for all samples) are skipped.

Shapes: S samples (documents), N tokens, I inputs and O outputs of a linear, J live inputs, M experts, G gates,
D width.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedModel

from raymoe.data.packing import Documents
from raymoe.methods import SparseInterpolation
from raymoe.models.families import family_of
from raymoe.schema import InputError

Form = Literal["factored", "merged"]

KINDS = {
    "q_proj": "query", "k_proj": "key", "v_proj": "value", "o_proj": "out",
    "gate_proj": "gate", "up_proj": "up", "down_proj": "down",
}  # fmt: skip
"""Linears that get gates, and what the SIMoE paper's figures call them. Norms are `norm`."""

MERGE_FROM_TOKENS = {"cpu": 96, "cuda": 1500}
"""Tokens per sample from which the merged form is faster: merging costs per sample, whatever its length. Measured
on a CPU (benchmarks/simoe_step.py --sweep), of GPUs arithmetic: not measured yet."""
GATHER_BELOW = 0.8
"""Share of live columns below which dead ones are skipped; above, gathering costs more than it saves."""

# ---- gates


BETA, GAMMA, ZETA = 2 / 3, -0.1, 1.1
"""Temperature and stretch of the hard concrete distribution (Louizos et al. 2018, arXiv 1712.01312)."""
LOG_ALPHA_LIMIT = 4.605170185988092
"""log 100: log_alpha is kept within [-log 100, log 100]."""


def sampled_gates(log_alpha: Tensor, noise: Tensor) -> Tensor:
    """Hard concrete gates in [0, 1] of `log_alpha`, from uniform `noise` in (0, 1) of its shape."""
    s = torch.sigmoid((torch.logit(noise) + log_alpha) / BETA)
    return (s * (ZETA - GAMMA) + GAMMA).clamp(0, 1)


def evaluated_gates(log_alpha: Tensor) -> Tensor:
    """The gates without noise: what the trained model is."""
    return (torch.sigmoid(log_alpha) * (ZETA - GAMMA) + GAMMA).clamp(0, 1)


def open_probability(log_alpha: Tensor) -> Tensor:
    """P(z != 0) of sampled gates."""
    return torch.sigmoid(log_alpha - BETA * float(np.log(-GAMMA / ZETA)))


# ---- sparsity and orthogonality


def sparsity(gates_MG: Tensor, owned_G: Tensor, scope: str) -> Tensor:
    """Share of zeros of Z, every gate weighted by the parameters it owns.

    Returns:
        [1], of `per_expert` [M]. `union`: a gate counts as zero only if it is zero in all experts, which is the
        share of theta_delta that can be dropped; `mean`: over experts; `per_expert`: each expert's own.
    """
    zero_MG = (gates_MG == 0).to(owned_G)
    zero_KG = zero_MG.amin(0, keepdim=True) if scope == "union" else zero_MG
    share_K = zero_KG @ owned_G / owned_G.sum()
    return share_K if scope != "mean" else share_K.mean(0, keepdim=True)


def expected_sparsity(log_alpha_MG: Tensor, owned_G: Tensor, scope: str) -> Tensor:
    """What the constraint descends: the expectation of `sparsity` over the gates' noise, [1] or [M].

    For `union` the chance that all M gates of a column are zero is the product of their chances. Its M-th root
    is taken: the product is ~1e-7 of a column that is open in all experts, and so is its gradient. Both are 1
    where all chances are 1.
    """
    closed_MG = 1 - open_probability(log_alpha_MG)
    if scope == "union":
        closed_MG = closed_MG.clamp(min=1e-12).log().mean(0, keepdim=True).exp()
    share_K = closed_MG @ owned_G / owned_G.sum()
    return share_K if scope != "mean" else share_K.mean(0, keepdim=True)


def overlap(gates_MG: Tensor) -> Tensor:
    """Zn Zn^T [M, M]: cosines between the rows of Z; 0 with a row that is all zero."""
    rows_MG = F.normalize(gates_MG, dim=1)
    return rows_MG @ rows_MG.T


def mean_overlap(gates_MG: Tensor) -> Tensor:
    """Mean cosine of two different rows of Z, a scalar; 0 of a single expert."""
    ratios_MM, experts = overlap(gates_MG), len(gates_MG)
    return (ratios_MM.sum() - ratios_MM.diagonal().sum()) / max(1, experts * (experts - 1))


def orthogonality(gates_MG: Tensor) -> Tensor:
    """|| Zn Zn^T - I ||_F, a scalar; 0 when no two experts share a parameter."""
    ratios_MM = overlap(gates_MG)
    norm: Tensor = (ratios_MM - torch.diag(ratios_MM.diagonal())).norm()
    return norm


# ---- what is gated


@dataclass(frozen=True)
class GateSpan:
    """The gates of one layer: columns [start, start + width) of Z."""

    name: str
    """Of the module in the model, such as `model.layers.3.self_attn.q_proj`."""
    kind: str
    layer: int | None
    """None for the norm after the last layer."""
    start: int
    width: int
    owned: int
    """Parameters that one gate owns: the linear's outputs, 1 of a norm."""


@dataclass(frozen=True)
class GateLayout:
    """All gates of a model, in the order of Z's columns."""

    spans: tuple[GateSpan, ...]

    @property
    def size(self) -> int:
        """G."""
        return self.spans[-1].start + self.spans[-1].width

    @property
    def widths(self) -> list[int]:
        """Columns of each span."""
        return [span.width for span in self.spans]

    def owned(self, device: torch.device | str = "cpu") -> Tensor:
        """Parameters of theta_delta that each gate owns: fp32 [G]."""
        counts = torch.tensor([float(s.owned) for s in self.spans], device=device)
        return counts.repeat_interleave(torch.tensor(self.widths, device=device), output_size=self.size)

    @property
    def num_parameters(self) -> int:
        """Parameters of theta_delta."""
        return sum(s.width * s.owned for s in self.spans)


class Gates(nn.Module):
    """The gate matrix: `log_alpha` fp32 [M, G], and the hard concrete gates that it stands for."""

    def __init__(self, method: SparseInterpolation, layout: GateLayout, seed: int = 0) -> None:
        super().__init__()
        noise = torch.randn(method.num_experts, layout.size, generator=torch.Generator().manual_seed(seed))
        self.log_alpha = nn.Parameter(method.log_alpha_mean + method.log_alpha_std * noise)
        self.clamp_()

    def sampled(self, noise: Tensor) -> Tensor:
        """[M, G] for training."""
        return sampled_gates(self.log_alpha, noise)

    def evaluated(self) -> Tensor:
        """[M, G] for evaluation."""
        return evaluated_gates(self.log_alpha)

    @torch.no_grad()
    def clamp_(self) -> None:
        """Keep log_alpha where gates can still come back."""
        self.log_alpha.clamp_(-LOG_ALPHA_LIMIT, LOG_ALPHA_LIMIT)


class PromptRouter(nn.Module):
    """h: from a prompt's representation to the experts' weights."""

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
        """a [S, M], fp32, rows that add up to 1."""
        x = self.norm(prompts_SD.float())
        for i, layer in enumerate(self.layers):
            x = layer(F.silu(x) if i else x)
        a_SM: Tensor = x.softmax(-1)
        return a_SM


# ---- which coefficients hold for which tokens


@dataclass(frozen=True)
class Blend:
    """What the layers of a model apply at the moment."""

    parts: tuple[Tensor, ...]
    """Coefficients c of every layer: [S, I] each."""
    samples: Tensor | None
    """[N] sample of every token; None: every row of the batch is one."""
    segments: tuple[tuple[int, int], ...]
    """(start, end) of every sample in the flattened tokens, padding behind it included; empty with rows."""
    live: tuple[Tensor | None, ...]
    """Live columns of every layer, rising; None: all are taken."""
    form: Form


class Interpolated:
    """A dense model whose linears and norms are interpolated. Until `set` is called it is the dense model."""

    def __init__(
        self, model: PreTrainedModel, layers: Sequence[InterpolatedLayer], layout: GateLayout
    ) -> None:
        self.model, self.layers, self.layout = model, tuple(layers), layout
        self.blend: Blend | None = None

    def set(
        self,
        coefficients_SG: Tensor,
        documents: Documents | None = None,
        num_tokens: int = 0,
        live: Sequence[Tensor | None] | None = None,
        form: Form | None = None,
    ) -> None:
        """Apply `coefficients_SG` from now on, until the next call: a backward pass needs them too.

        Args:
            coefficients_SG: c = a Z, one row per sample; its gradient is asked for if it has a graph.
            documents: (start, end) of each sample in the flattened batch; None: sample i is row i of the batch.
                Padding counts as its neighbour's, so no loss may depend on it.
            num_tokens: N of the flattened batch, padding included.
            live: what `live_columns` returned for Z; None: all.
            form: by default the faster one.
        """
        if documents is not None and len(documents) != len(coefficients_SG):
            raise ValueError(f"coefficients of {len(coefficients_SG)} samples for {len(documents)} documents")
        if form == "merged" and not documents:
            raise ValueError("samples that are rows of the batch are not merged one by one: give documents")
        device = coefficients_SG.device
        segments = _segments(documents, num_tokens) if documents else ()
        samples = None
        if segments:
            lengths = torch.tensor([end - start for start, end in segments])
            samples = torch.arange(len(segments)).repeat_interleave(lengths)
            samples = samples.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else samples
        if form is None:
            form = (
                chosen_form(device.type, self.model.dtype, num_tokens, len(segments))
                if segments
                else "factored"
            )
        parts = torch.split(coefficients_SG, self.layout.widths, dim=1)
        self.blend = Blend(parts, samples, segments, tuple(live or [None] * len(parts)), form)

    def clear(self) -> None:
        """Be the dense model again, and let go of what `set` was given."""
        self.blend = None

    @contextmanager
    def applied(self, coefficients_SG: Tensor, *arguments: Any, **named: Any) -> Iterator[None]:
        """`set` within the block, for passes without a backward."""
        self.set(coefficients_SG, *arguments, **named)
        try:
            yield
        finally:
            self.clear()

    @contextmanager
    def merged(self, coefficients_G: Tensor) -> Iterator[None]:
        """Within the block the model has the plain weights for one c: decoding costs what the dense model's does.

        Weights are merged in fp32 and rounded once, to the model's dtype.
        """
        try:
            with torch.no_grad():
                parts = torch.split(coefficients_G, self.layout.widths)
                for layer, c_I in zip(self.layers, parts, strict=True):
                    layer.merged = layer.merge(c_I)
            yield
        finally:
            for layer in self.layers:
                layer.merged = None


def chosen_form(device: str, dtype: torch.dtype, num_tokens: int, num_samples: int) -> Form:
    """The faster form that loses nothing.

    Merging costs per sample, so it wins from MERGE_FROM_TOKENS tokens a sample on. In half precision a merged
    weight has no room for small deltas (at |delta| / |W| = 1e-4 all but 4% are lost), so there it is never chosen.
    """
    long = num_tokens >= MERGE_FROM_TOKENS.get(device, MERGE_FROM_TOKENS["cuda"]) * num_samples
    return "merged" if long and dtype == torch.float32 else "factored"


def _segments(documents: Documents, num_tokens: int) -> tuple[tuple[int, int], ...]:
    """Documents stretched over the padding behind them: they cover all tokens. Padding takes part in no loss."""
    starts = [0, *(start for start, _ in documents[1:])]
    return tuple(zip(starts, [*starts[1:], num_tokens], strict=True))


def live_columns(gates_MG: Tensor, layout: GateLayout) -> list[Tensor | None]:
    """Of every layer the columns that any expert has open; None where skipping the others would not pay.

    Reads Z back to the host: once per optimizer step, not per layer or micro batch.
    """
    alive = np.flatnonzero((gates_MG != 0).any(0).cpu().numpy())
    bounds = np.searchsorted(alive, [*(s.start for s in layout.spans), layout.size])
    everything = torch.from_numpy(alive).to(gates_MG.device)
    live: list[Tensor | None] = []
    for span, first, last in zip(layout.spans, bounds[:-1], bounds[1:], strict=True):
        some = span.kind != "norm" and last - first < GATHER_BELOW * span.width
        live.append(everything[first:last] - span.start if some else None)
    return live


# ---- the layers


class InterpolatedLayer(nn.Module):
    """`weight` frozen, `delta` trained, and the coefficients that the model they belong to has at the moment."""

    weight: Tensor
    delta: nn.Parameter

    def __init__(self, owner: Callable[[], Blend | None], index: int) -> None:
        super().__init__()
        self.index = index
        self.merged: Tensor | None = None
        """The plain weight while the model is merged."""
        self._blend = owner

    def merge(self, c_I: Tensor) -> Tensor:
        """The plain weight for one sample's coefficients, in the weight's dtype: merged in fp32, rounded once."""
        return merged_weight(self.weight, self.delta, c_I).to(self.weight.dtype)


class InterpolatedLinear(InterpolatedLayer):
    """y = x W^T + (c * x) W_delta + b: `weight` [O, I], `delta` [I, O] so that a column's parameters are a row."""

    def __init__(self, linear: nn.Linear, owner: Callable[[], Blend | None], index: int) -> None:
        super().__init__(owner, index)
        self.weight, self.bias = linear.weight, linear.bias
        self.delta = nn.Parameter(torch.zeros_like(linear.weight.T, memory_format=torch.contiguous_format))
        self.columns: Tensor | None
        self.register_buffer("columns", None)

    def compact(self, rows_JO: Tensor, columns_J: Tensor) -> None:
        """Hold the rows of delta of these columns alone; the others count as zero. For evaluation."""
        self.delta, self.columns = nn.Parameter(rows_JO, requires_grad=False), columns_J

    def merge(self, c_I: Tensor) -> Tensor:
        """The plain weight [O, I]."""
        if self.columns is None:
            return super().merge(c_I)
        return merged_columns(self.weight, self.delta, self.columns, c_I[self.columns])

    def forward(self, x: Tensor) -> Tensor:
        """[..., I] -> [..., O]."""
        blend = self._blend()
        if self.merged is not None or blend is None:
            return F.linear(x, self.weight if self.merged is None else self.merged, self.bias)
        samples = blend.samples if blend.samples is not None else _rows(x)
        arguments = (
            x.flatten(0, -2),
            self.weight,
            self.bias,
            self.delta,
            blend.parts[self.index],
            blend.live[self.index] if self.columns is None else self.columns,
        )
        if blend.form == "merged":
            y: Tensor = _Merged.apply(*arguments, blend.segments)  # type: ignore[no-untyped-call]
        else:
            y = _Factored.apply(*arguments, samples)  # type: ignore[no-untyped-call]
        return y.view(*x.shape[:-1], -1)


class InterpolatedNorm(InterpolatedLayer):
    """A norm of the dense model's own class whose weight is w + c * delta: `weight` and `delta` [D].

    `scales_in_fp32`: that class rounds after it has scaled, not before (as OLMo-2's does).
    """

    def __init__(
        self,
        norm: nn.Module,
        owner: Callable[[], Blend | None],
        index: int,
        scales_in_fp32: bool = False,
    ) -> None:
        super().__init__(owner, index)
        self.scales_in_fp32 = scales_in_fp32
        self.weight = norm._parameters.pop("weight")  # type: ignore[assignment]
        self.delta = nn.Parameter(torch.zeros_like(self.weight))
        self._norm = (norm,)  # in a tuple: not a module of the model, its weight is handed to it

    def forward(self, x: Tensor) -> Tensor:
        """[..., D] -> [..., D]; the first two dimensions are sequences and tokens."""
        blend = self._blend()
        if self.merged is not None or blend is None:
            return self._normed(x, self.weight if self.merged is None else self.merged)
        samples = blend.samples if blend.samples is not None else _rows(x[..., 0, :] if x.dim() > 3 else x)
        n = self._normed(x.float() if self.scales_in_fp32 else x, 1.0)
        y: Tensor = _Scaled.apply(  # type: ignore[no-untyped-call]
            n.reshape(len(samples), -1, n.shape[-1]),
            self.weight,
            self.delta,
            blend.parts[self.index],
            samples,
        )
        return y.view(n.shape).to(x.dtype)

    def _normed(self, x: Tensor, weight: Tensor | float) -> Tensor:
        (norm,) = self._norm
        norm.__dict__["weight"] = weight
        try:
            y: Tensor = norm(x)
            return y
        finally:
            del norm.__dict__["weight"]


def _rows(x: Tensor) -> Tensor:
    """[N] with each row of the batch [B, T, ...] a sample."""
    return torch.arange(x.shape[0], device=x.device).repeat_interleave(
        x.shape[1], output_size=x.shape[:2].numel()
    )


def _summed_by_sample(x_NI: Tensor, samples: Tensor, num_samples: int) -> Tensor:
    """Sums of the tokens of each sample: fp32 [S, I]. A product: adding by index is not deterministic on GPUs."""
    members_SN = (samples == torch.arange(num_samples, device=samples.device)[:, None]).to(x_NI.dtype)
    return (members_SN @ x_NI).float()


class _Scaled(torch.autograd.Function):
    """y = (w + c * delta) n of normalised n [N, H, D]; saves n alone, as a dense norm does.

    In fp32, rounded once: in bf16 w + c * delta would be w wherever the change is below 0.2%.
    """

    @staticmethod
    def forward(ctx: Any, n_NHD: Tensor, w_D: Tensor, d_D: Tensor, c_SD: Tensor, samples: Tensor) -> Tensor:
        ctx.save_for_backward(n_NHD, w_D, d_D, c_SD, samples)
        return (_token_weights(w_D, d_D, c_SD, samples) * n_NHD).to(n_NHD.dtype)

    @staticmethod
    def backward(ctx: Any, dy_NHD: Tensor) -> tuple[Tensor | None, ...]:
        n_NHD, w_D, d_D, c_SD, samples = ctx.saved_tensors
        dn_NHD = (_token_weights(w_D, d_D, c_SD, samples) * dy_NHD).to(dy_NHD.dtype)
        dw_ND = (dy_NHD.float() * n_NHD).sum(1)
        dw_SD = _summed_by_sample(dw_ND, samples, len(c_SD))
        return dn_NHD, None, (dw_SD * c_SD).sum(0).to(d_D.dtype), dw_SD * d_D.float(), None


def _token_weights(w_D: Tensor, d_D: Tensor, c_SD: Tensor, samples: Tensor) -> Tensor:
    """w + c * delta of every token: fp32 [N, 1, D]."""
    return (w_D.float() + c_SD.float() * d_D.float()).index_select(0, samples)[:, None]


def _taken(x: Tensor, dim: int, live_J: Tensor | None) -> Tensor:
    return x if live_J is None else x.index_select(dim, live_J)


def _rows_of(d_IO: Tensor, live_J: Tensor | None) -> Tensor:
    """The live rows of a delta, which may hold those alone already."""
    return d_IO if live_J is None or len(d_IO) == len(live_J) else d_IO.index_select(0, live_J)


def _put(x_J: Tensor, like: Tensor, dim: int, live_J: Tensor | None) -> Tensor:
    """`x_J` in its live columns of a tensor of zeros like `like`."""
    return x_J if live_J is None else torch.zeros_like(like).index_copy_(dim, live_J, x_J.to(like.dtype))


class _Factored(torch.autograd.Function):
    """y = x W^T + (c * x) W_delta; saves x alone, as a dense linear does.

    The delta's part comes first and the dense product is added to it before it is rounded: the other way round,
    what is small beside the dense part would be lost in half precision. With a bias (Qwen2's query, key and
    value) it is lost: the dense model rounds product and bias together, and step 0 must equal it.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x_NI: Tensor,
        w_OI: Tensor,
        b_O: Tensor | None,
        d_IO: Tensor,
        c_SI: Tensor,
        live_J: Tensor | None,
        samples: Tensor,
    ) -> Tensor:
        ctx.save_for_backward(x_NI, w_OI, d_IO, c_SI, live_J, samples)
        c_NJ = _taken(c_SI, 1, live_J).to(x_NI.dtype).index_select(0, samples)
        scaled_NJ = c_NJ.mul_(_taken(x_NI, 1, live_J))
        if b_O is not None:
            return F.linear(x_NI, w_OI, b_O).addmm_(scaled_NJ, _rows_of(d_IO, live_J))
        return (scaled_NJ @ _rows_of(d_IO, live_J)).addmm_(x_NI, w_OI.T)

    @staticmethod
    def backward(ctx: Any, dy_NO: Tensor) -> tuple[Tensor | None, ...]:
        x_NI, w_OI, d_IO, c_SI, live_J, samples = ctx.saved_tensors
        x_NJ = _taken(x_NI, 1, live_J)
        c_NJ = _taken(c_SI, 1, live_J).to(x_NI.dtype).index_select(0, samples)
        u_NJ = dy_NO @ _rows_of(d_IO, live_J).T  # gradient of c * x
        dx_NI = dc_SI = None
        if ctx.needs_input_grad[4]:
            dc_SJ = _summed_by_sample(x_NJ * u_NJ, samples, len(c_SI))
            dc_SI = _put(dc_SJ, c_SI, 1, live_J)
        if ctx.needs_input_grad[0]:
            dx_NI = _put(u_NJ.mul_(c_NJ), x_NI, 1, live_J).addmm_(dy_NO, w_OI)
        dd_JO = c_NJ.mul_(x_NJ).T @ dy_NO
        return dx_NI, None, None, _put(dd_JO, d_IO, 0, live_J), dc_SI, None, None


def merged_weight(weight: Tensor, delta: Tensor, c: Tensor) -> Tensor:
    """W + (c * delta)^T of a linear, w + c * delta of a norm, in fp32."""
    if weight.dim() == 1:
        return weight.float() + c.float() * delta.float()
    change_IO = c.float()[:, None] * delta.float()
    return change_IO.T.contiguous().add_(weight)  # a sum across strides takes ten times as long


def merged_columns(weight: Tensor, rows: Tensor, columns_J: Tensor, c_J: Tensor) -> Tensor:
    """`merged_weight` of a delta that holds its live `rows` alone, rounded to the weight's dtype."""
    live = merged_weight(weight.index_select(-1, columns_J), rows, c_J).to(weight.dtype)
    return weight.index_copy(-1, columns_J, live)


def kept_share(weight: Tensor, delta: Tensor, c: Tensor, dtype: torch.dtype) -> tuple[float, float]:
    """How much of c * delta survives rounding the merged weight to `dtype`.

    Returns:
        <round(W + d) - W, d> and <d, d>: their ratio is the share kept; add them up over layers first.
    """
    base = weight.double()
    wanted = merged_weight(torch.zeros_like(weight), delta, c).double()
    kept = merged_weight(weight, delta, c).to(dtype).double() - base
    return float((kept * wanted).sum()), float(wanted.square().sum())


class _Merge:
    """The merged weights of one layer, one sample after the other, in one buffer.

    They are [I, O], so that all passes go along the delta's rows: W is turned once, not at every sample (a sum
    across the strides takes as long as the sample's product). Computed in fp32, in W's dtype.
    """

    def __init__(self, w_OI: Tensor, d_IO: Tensor, c_SI: Tensor, live_J: Tensor | None) -> None:
        self.live_J, self.all_IO = live_J, w_OI.T.contiguous()
        self.w_JO, self.d_JO = _taken(self.all_IO, 0, live_J).float(), _rows_of(d_IO, live_J).float()
        self.c_SJ = _taken(c_SI, 1, live_J).float()
        self.merged_JO = torch.empty_like(self.w_JO)

    def weight(self, sample: int) -> Tensor:
        """[I, O], until the next call."""
        torch.addcmul(self.w_JO, self.c_SJ[sample, :, None], self.d_JO, out=self.merged_JO)
        rounded_JO = self.merged_JO.to(self.all_IO.dtype)
        return rounded_JO if self.live_J is None else self.all_IO.index_copy_(0, self.live_J, rounded_JO)


class _Merged(torch.autograd.Function):
    """y_s = x_s (W + (c_s * W_delta)^T)^T for every sample; merges again in the backward pass."""

    @staticmethod
    def forward(
        ctx: Any,
        x_NI: Tensor,
        w_OI: Tensor,
        b_O: Tensor | None,
        d_IO: Tensor,
        c_SI: Tensor,
        live_J: Tensor | None,
        segments: Any,
    ) -> Tensor:
        ctx.save_for_backward(x_NI, w_OI, d_IO, c_SI, live_J)
        ctx.segments = segments
        merge = _Merge(w_OI, d_IO, c_SI, live_J)
        y_NO = x_NI.new_empty(len(x_NI), len(w_OI))
        for s, (start, end) in enumerate(segments):
            x, w_IO, y = x_NI[start:end], merge.weight(s), y_NO[start:end]
            torch.mm(x, w_IO, out=y) if b_O is None else torch.addmm(b_O, x, w_IO, out=y)
        return y_NO

    @staticmethod
    def backward(ctx: Any, dy_NO: Tensor) -> tuple[Tensor | None, ...]:
        x_NI, w_OI, d_IO, c_SI, live_J = ctx.saved_tensors
        merge, x_NJ = _Merge(w_OI, d_IO, c_SI, live_J), _taken(x_NI, 1, live_J)
        dx_NI = torch.empty_like(x_NI) if ctx.needs_input_grad[0] else None
        dd_JO, dc_SJ = torch.zeros_like(merge.d_JO), torch.empty_like(merge.c_SJ)
        g_JO = x_NI.new_empty(dd_JO.shape)  # gradient of one sample's merged columns
        for s, (start, end) in enumerate(ctx.segments):
            dy = dy_NO[start:end]
            if dx_NI is not None:
                torch.mm(dy, merge.weight(s).T, out=dx_NI[start:end])
            torch.mm(x_NJ[start:end].T, dy, out=g_JO)
            exact_JO = g_JO.float()
            dd_JO.addcmul_(exact_JO, merge.c_SJ[s, :, None])
            torch.sum(exact_JO.mul_(merge.d_JO), 1, out=dc_SJ[s])
        dc_SI = _put(dc_SJ, c_SI, 1, live_J) if ctx.needs_input_grad[4] else None
        return dx_NI, None, None, _put(dd_JO.to(d_IO.dtype), d_IO, 0, live_J), dc_SI, None, None


# ---- from the dense model


def interpolate(model: PreTrainedModel, on_layer: Callable[[nn.Module], None] | None = None) -> Interpolated:
    """Replace every linear and norm of the dense `model`'s decoder, in place; all else is frozen.

    `on_layer` sees each decoder layer once it is done, before the next one is made (ZeRO-3 spreads it).

    Raises:
        InputError: a module with parameters that is neither a known linear nor a norm; names all of them.
    """
    scales_in_fp32, layout = family_of(model.config).norms_scale_in_fp32, gate_layout(model)
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    layers: list[InterpolatedLayer] = []
    interpolated = Interpolated(model, layers, layout)

    def blend() -> Blend | None:
        return interpolated.blend

    for index, span in enumerate(layout.spans):
        dense = model.get_submodule(span.name)
        if span.kind == "norm":
            made: InterpolatedLayer = InterpolatedNorm(dense, blend, index, scales_in_fp32)
        else:
            made = InterpolatedLinear(dense, blend, index)
        model.set_submodule(span.name, made)
        layers.append(made)
        last = index + 1 == len(layout.spans) or layout.spans[index + 1].layer != span.layer
        if on_layer is not None and last:
            on_layer(made if span.layer is None else model.get_decoder().layers[span.layer])
    interpolated.layers = tuple(layers)
    return interpolated


def gate_layout(model: PreTrainedModel) -> GateLayout:
    """What `interpolate` gates, on any device, meta included.

    Raises:
        InputError: a module that is neither a known linear nor a norm; names all of them.
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
        raise InputError(f"model: SIMoE can't tell what these layers are: {', '.join(unknown)}")
    return GateLayout(tuple(spans))


def _kind(name: str, module: nn.Module) -> str | None:
    if isinstance(module, nn.Linear):
        return KINDS.get(name.rsplit(".", 1)[-1])
    is_norm = type(module).__name__.endswith("RMSNorm") and set(module._parameters) == {"weight"}
    return "norm" if is_norm else None
