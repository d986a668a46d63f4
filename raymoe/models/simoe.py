"""SIMoE: sparse interpolated experts, M masks over one shared delta that are merged per prompt.

    theta(x) = theta_pre + sum_m a_m(x) (z_m * theta_delta)      a(x) = softmax(h(prompt of x))

`interpolate` replaces the linears and norms of a Hugging Face dense model, in place and without touching its
modelling code, by layers that add `c * theta_delta` (raymoe.models.interpolated). The coefficients of all layers
are one small product c = a Z of the router's weights and the gate matrix (raymoe.models.gates), of which each layer
takes its slice. Embeddings and LM head stay frozen.

    interpolated = interpolate(model)
    gates, router = Gates(method, interpolated.layout), PromptRouter(method, width)
    interpolated.set(router(prompts_SD) @ gates.evaluated(), documents)     # which tokens belong to which sample
    model(...)

Shapes: S samples (documents), I inputs of a linear, G gates.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from raymoe.data.packing import Documents
from raymoe.models.families import family_of
from raymoe.models.gates import GateLayout, gate_layout
from raymoe.models.interpolated import (
    Blend,
    Form,
    InterpolatedLayer,
    InterpolatedLinear,
    InterpolatedNorm,
)

MERGE_FROM_TOKENS = {"cpu": 96, "cuda": 1500}
"""Tokens per sample from which the merged form is faster: merging costs the same for a sample of any length. The
CPU's is measured (benchmarks/simoe_step.py --sweep), the GPU's computed, not measured yet."""


class Interpolated:
    """A dense model with interpolated linears and norms. Until `set` is called it behaves as the dense model."""

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
        """Apply `coefficients_SG` until the next call, as a backward pass needs them too.

        Args:
            coefficients_SG: c = a Z, one row per sample; gets a gradient if it has a graph.
            documents: (start, end) of each sample in the flattened batch; None: sample i is row i of the batch.
                Padding is treated as part of its neighbour, so no loss may depend on it.
            num_tokens: N of the flattened batch, padding included.
            live: result of `live_columns` for Z; None: all columns.
            form: by default the faster one.
        """
        if documents is not None and len(documents) != len(coefficients_SG):
            raise ValueError(f"coefficients of {len(coefficients_SG)} samples for {len(documents)} documents")
        if form == "merged" and not documents:
            raise ValueError("the merged form needs documents: rows of the batch are not merged one by one")
        device = coefficients_SG.device
        segments = _segments(documents, num_tokens) if documents else ()
        samples = _samples(segments, device) if segments else None
        if form is None and segments:
            form = chosen_form(device.type, self.model.dtype, num_tokens, len(segments))
        parts = torch.split(coefficients_SG, self.layout.widths, dim=1)
        self.blend = Blend(parts, samples, segments, tuple(live or [None] * len(parts)), form or "factored")

    def clear(self) -> None:
        """Behave as the dense model again, and release what `set` was given."""
        self.blend = None

    @contextmanager
    def applied(self, coefficients_SG: Tensor, *arguments: Any, **named: Any) -> Iterator[None]:
        """Apply `set` within the block, for forward passes without a backward."""
        self.set(coefficients_SG, *arguments, **named)
        try:
            yield
        finally:
            self.clear()

    @contextmanager
    def merged(self, coefficients_G: Tensor) -> Iterator[None]:
        """Merge the weights for one c within the block, so that decoding costs the same as the dense model's.

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
    """Return the faster form that loses no precision.

    Merging costs per sample, so it wins from MERGE_FROM_TOKENS tokens per sample on. In half precision it is never
    chosen: a merged weight can't represent small deltas (at |delta| / |W| = 1e-4 all but 4% are lost).
    """
    long = num_tokens >= MERGE_FROM_TOKENS.get(device, MERGE_FROM_TOKENS["cuda"]) * num_samples
    return "merged" if long and dtype == torch.float32 else "factored"


def _segments(documents: Documents, num_tokens: int) -> tuple[tuple[int, int], ...]:
    """Extend documents over the padding after them, so that they cover all tokens. Padding is in no loss."""
    starts = [0, *(start for start, _ in documents[1:])]
    return tuple(zip(starts, [*starts[1:], num_tokens], strict=True))


def _samples(segments: Sequence[tuple[int, int]], device: torch.device) -> Tensor:
    """Return the sample of each token [N]; the copy to a GPU is asynchronous."""
    lengths = torch.tensor([end - start for start, end in segments])
    samples = torch.arange(len(segments)).repeat_interleave(lengths)
    return samples.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else samples


def interpolate(model: PreTrainedModel, on_layer: Callable[[nn.Module], None] | None = None) -> Interpolated:
    """Replace every linear and norm of the dense `model`'s decoder in place; everything else is frozen.

    `on_layer` is called with each finished decoder layer before the next one is made (ZeRO-3 shards it).

    Raises:
        InputError: some modules with parameters are neither known linears nor norms; names all of them.
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
