"""Interpolated layers: linears and norms of a dense model that add `c * theta_delta`, with c per sample.

Two exact forms compute a linear: factored, y = x W^T + (c * x) W_delta, and merged, y = x (W + (c * W_delta)^T)^T
per sample. Columns that are dead (c = 0 for all samples) are skipped.

Shapes: S samples (documents), N tokens, I inputs and O outputs of a linear, J live inputs, H heads, D width.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

Form = Literal["factored", "merged"]


@dataclass(frozen=True)
class Blend:
    """What the layers of a model currently apply."""

    parts: tuple[Tensor, ...]
    """Coefficients c of each layer: [S, I]."""
    samples: Tensor | None
    """[N] sample of each token; None: each row of the batch is a sample."""
    segments: tuple[tuple[int, int], ...]
    """(start, end) of each sample in the flattened tokens, padding after it included; empty if samples are rows."""
    live: tuple[Tensor | None, ...]
    """Live columns of each layer, ascending; None: all columns."""
    form: Form


class InterpolatedLayer(nn.Module):
    """A frozen `weight`, a trained `delta`, and the current coefficients of the model they belong to."""

    weight: Tensor
    delta: nn.Parameter

    def __init__(self, owner: Callable[[], Blend | None], index: int) -> None:
        super().__init__()
        self.index = index
        self.merged: Tensor | None = None
        """The merged weight, while the model is merged."""
        self._blend = owner

    def merge(self, c_I: Tensor) -> Tensor:
        """Return the merged weight for one sample's coefficients, merged in fp32, rounded to its dtype."""
        return merged_weight(self.weight, self.delta, c_I).to(self.weight.dtype)


class InterpolatedLinear(InterpolatedLayer):
    """y = x W^T + (c * x) W_delta + b, with `weight` [O, I] and `delta` [I, O]: a column's parameters are a row."""

    def __init__(self, linear: nn.Linear, owner: Callable[[], Blend | None], index: int) -> None:
        super().__init__(owner, index)
        self.weight, self.bias = linear.weight, linear.bias
        self.delta = nn.Parameter(torch.zeros_like(linear.weight.T, memory_format=torch.contiguous_format))
        self.columns: Tensor | None
        self.register_buffer("columns", None)

    def compact(self, rows_JO: Tensor, columns_J: Tensor) -> None:
        """Keep only the rows of delta of these columns; the others count as zero. For evaluation."""
        self.delta, self.columns = nn.Parameter(rows_JO, requires_grad=False), columns_J

    def merge(self, c_I: Tensor) -> Tensor:
        """Return the merged weight [O, I]."""
        if self.columns is None:
            return super().merge(c_I)
        return merged_columns(self.weight, self.delta, self.columns, c_I[self.columns])

    def forward(self, x: Tensor) -> Tensor:
        """Map [..., I] to [..., O]."""
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
    """A norm of the dense model's own class with weight w + c * delta; `weight` and `delta` are [D].

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
        self._norm = (norm,)  # in a tuple, so that it is not a submodule: its weight is passed to it

    def forward(self, x: Tensor) -> Tensor:
        """Map [..., D] to [..., D]; the first two dimensions are sequences and tokens."""
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
    """Return the sample of each token [N], each row of the batch [B, T, ...] being a sample."""
    return torch.arange(x.shape[0], device=x.device).repeat_interleave(
        x.shape[1], output_size=x.shape[:2].numel()
    )


def _summed_by_sample(x_NI: Tensor, samples: Tensor, num_samples: int) -> Tensor:
    """Sum the tokens of each sample: fp32 [S, I]. A matmul, as adding by index is not deterministic on GPUs."""
    members_SN = (samples == torch.arange(num_samples, device=samples.device)[:, None]).to(x_NI.dtype)
    return (members_SN @ x_NI).float()


class _Scaled(torch.autograd.Function):
    """y = (w + c * delta) n for normalised n [N, H, D]; saves only n, as a dense norm does.

    In fp32, rounded once: in bf16, w + c * delta would equal w wherever the change is below 0.2%.
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
    """Return w + c * delta of every token: fp32 [N, 1, D]."""
    return (w_D.float() + c_SD.float() * d_D.float()).index_select(0, samples)[:, None]


def _taken(x: Tensor, dim: int, live_J: Tensor | None) -> Tensor:
    return x if live_J is None else x.index_select(dim, live_J)


def _rows_of(d_IO: Tensor, live_J: Tensor | None) -> Tensor:
    """Return the live rows of a delta, which may already hold only those."""
    return d_IO if live_J is None or len(d_IO) == len(live_J) else d_IO.index_select(0, live_J)


def _put(x_J: Tensor, like: Tensor, dim: int, live_J: Tensor | None) -> Tensor:
    """Scatter `x_J` to its live columns in zeros shaped like `like`."""
    return x_J if live_J is None else torch.zeros_like(like).index_copy_(dim, live_J, x_J.to(like.dtype))


class _Factored(torch.autograd.Function):
    """y = x W^T + (c * x) W_delta; saves only x, as a dense linear does.

    The delta's part is computed first and the dense product added before rounding; the other way round, parts
    small relative to the dense one would be lost in half precision. With a bias (Qwen2's query, key and value)
    they are lost: the dense model rounds product and bias together, and step 0 must equal it.
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
    """Return W + (c * delta)^T for a linear, w + c * delta for a norm, in fp32."""
    if weight.dim() == 1:
        return weight.float() + c.float() * delta.float()
    change_IO = c.float()[:, None] * delta.float()
    return change_IO.T.contiguous().add_(weight)  # adding across strides takes ten times as long


def merged_columns(weight: Tensor, rows: Tensor, columns_J: Tensor, c_J: Tensor) -> Tensor:
    """Return `merged_weight` for a delta that holds only its live `rows`, rounded to the weight's dtype."""
    live = merged_weight(weight.index_select(-1, columns_J), rows, c_J).to(weight.dtype)
    return weight.index_copy(-1, columns_J, live)


def kept_share(weight: Tensor, delta: Tensor, c: Tensor, dtype: torch.dtype) -> tuple[float, float]:
    """Measure how much of c * delta survives rounding the merged weight to `dtype`.

    Returns:
        <round(W + d) - W, d> and <d, d>; sum both over layers, then their ratio is the share kept.
    """
    base = weight.double()
    wanted = merged_weight(torch.zeros_like(weight), delta, c).double()
    kept = merged_weight(weight, delta, c).to(dtype).double() - base
    return float((kept * wanted).sum()), float(wanted.square().sum())


class _Merge:
    """The merged weights of one layer, one sample at a time, in one buffer.

    They are [I, O], so that all passes run along the delta's rows: W is transposed once, not for every sample
    (adding across strides takes as long as the sample's matmul). Computed in fp32, returned in W's dtype.
    """

    def __init__(self, w_OI: Tensor, d_IO: Tensor, c_SI: Tensor, live_J: Tensor | None) -> None:
        self.live_J, self.all_IO = live_J, w_OI.T.contiguous()
        self.w_JO, self.d_JO = _taken(self.all_IO, 0, live_J).float(), _rows_of(d_IO, live_J).float()
        self.c_SJ = _taken(c_SI, 1, live_J).float()
        self.merged_JO = torch.empty_like(self.w_JO)

    def weight(self, sample: int) -> Tensor:
        """Return the merged weight [I, O], valid until the next call."""
        torch.addcmul(self.w_JO, self.c_SJ[sample, :, None], self.d_JO, out=self.merged_JO)
        rounded_JO = self.merged_JO.to(self.all_IO.dtype)
        return rounded_JO if self.live_J is None else self.all_IO.index_copy_(0, self.live_J, rounded_JO)


class _Merged(torch.autograd.Function):
    """y_s = x_s (W + (c_s * W_delta)^T)^T for every sample s; merges again in the backward pass."""

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
