"""Count parameters, active parameters and training memory of a model from its configuration alone.

    sizes(AutoConfig.from_pretrained(folder), SparseInterpolation(sparsity_target=0.75))["simoe"]["total"]

Counts are exact and made on the meta device: nothing is allocated or downloaded. Activations are not included.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass

import torch
from transformers import AutoModelForCausalLM, PretrainedConfig, PreTrainedModel

from raymoe.methods import MethodConfig, SparseInterpolation, resolve, seam
from raymoe.models.gates import GateLayout, PromptRouter, gate_layout

WEIGHT_BYTES = {"float32": 4, "bfloat16": 2}
GRADIENT_BYTES = 4
"""Gradients are accumulated in fp32 (raymoe.train.engine)."""
OPTIMIZER_BYTES = {"float32": 8, "bfloat16": 12}
"""Bytes per trained parameter: Adam's two moments and, in bfloat16, the fp32 weights."""
MASK_BYTES = 16
"""Bytes per parameter of gates or router, fp32 whatever the model's precision: weight, gradient, the optimizer's
moments (one for gates), a step's sample (gates only)."""


@dataclass(frozen=True)
class Counts:
    """Parameter counts of one model: stored, active for a token, and trained."""

    total: int
    active: int
    trained: int
    """Held by the training engine, sharded by ZeRO."""
    frozen: int = 0
    masks: int = 0
    """Gates and prompt router: outside the engine, replicated on every worker."""


def sizes(
    config: PretrainedConfig,
    method: SparseInterpolation,
    live_parameters: int | None = None,
    *,
    live_gates: int | None = None,
    precision: str = "float32",
    num_experts: int = 4,
    top_k: int = 2,
    workers: int = 1,
    zero_stage: int = 0,
) -> dict[str, dict[str, int]]:
    """Count parameters and training state of a dense model, its sparse upcycling and its SIMoE.

    Args:
        config: the dense model's configuration.
        method: M, router and sparsity of SIMoE.
        live_parameters: parameters of theta_delta in columns that any expert has open; by default what
            `sparsity_target` leaves.
        live_gates: live columns of Z; by default in proportion to `live_parameters`.
        precision: `float32` or `bfloat16`.
        num_experts: experts of sparse upcycling.
        top_k: how many of them are active.
        workers: number of workers that ZeRO shards the state over.
        zero_stage: 1 shards the optimizer, 2 gradients too, 3 all weights too.

    Returns:
        For each of `dense`, `upcycled` and `simoe`: `total` parameters after training (SIMoE without its dead
        columns), those `active` for a token (SIMoE: all, as merging reads them), and `training_bytes` of one
        worker.
    """
    counts = _counts(config, method, live_parameters, live_gates, num_experts, top_k)
    return {
        name: {
            "total": each.total,
            "active": each.active,
            "training_bytes": sum(training_state(each, precision, workers, zero_stage).values()),
        }
        for name, each in counts.items()
    }


def training_state(counts: Counts, precision: str, workers: int = 1, zero_stage: int = 0) -> dict[str, int]:
    """Return the bytes that one worker holds in training, by purpose (ZeRO paper, section 3)."""
    weight = WEIGHT_BYTES[precision]
    optimizer, gradients, weights = (workers if zero_stage >= stage else 1 for stage in (1, 2, 3))
    return {
        "weights": -(-counts.trained * weight // weights),
        "gradients": -(-counts.trained * GRADIENT_BYTES // gradients),
        "optimizer": -(-counts.trained * OPTIMIZER_BYTES[precision] // optimizer),
        "frozen": -(-counts.frozen * weight // weights),
        "masks": counts.masks * MASK_BYTES,
    }


def _counts(
    config: PretrainedConfig,
    method: SparseInterpolation,
    live_parameters: int | None,
    live_gates: int | None,
    num_experts: int,
    top_k: int,
) -> dict[str, Counts]:
    model = on_meta(config)
    dense = model.num_parameters()
    return {
        "dense": Counts(dense, dense, dense),
        "upcycled": _upcycled(model, num_experts, top_k),
        "simoe": _interpolated(model, method, live_parameters, live_gates),
    }


def count(model: PreTrainedModel, method: MethodConfig) -> Counts:
    """Count the parameters that `method` makes of the dense `model`; SIMoE's total is that after training."""
    counts: Counts = resolve(seam(method).size)(model, method)
    return counts


def upcycled(model: PreTrainedModel, method: MethodConfig) -> Counts:
    """Count `model` with every FFN as often as `method` stores it, and a router where that is more than once."""
    if method.ffns_per_layer == 1:
        dense = model.num_parameters()
        return Counts(dense, dense, dense)
    return _upcycled(model, method.ffns_per_layer, method.ffns_per_token)


def interpolated(model: PreTrainedModel, method: SparseInterpolation) -> Counts:
    """Count `model` as a SIMoE with the sparsity that `method` asks for."""
    return _interpolated(model, method, None, None)


def on_meta(config: PretrainedConfig) -> PreTrainedModel:
    """Build the dense model of `config` on the meta device."""
    with torch.device("meta"):
        model: PreTrainedModel = AutoModelForCausalLM.from_config(copy.deepcopy(config))
    return model


def _upcycled(model: PreTrainedModel, num_experts: int, top_k: int) -> Counts:
    """Count every FFN `num_experts` times, plus a router [N, D] per layer."""
    layers, width = model.get_decoder().layers, model.config.hidden_size
    ffn = sum(p.numel() for layer in layers for p in layer.mlp.parameters())
    rest = model.num_parameters() - ffn + len(layers) * num_experts * width
    total = rest + num_experts * ffn
    return Counts(total, rest + top_k * ffn, trained=total)


def _interpolated(
    model: PreTrainedModel, method: SparseInterpolation, live_parameters: int | None, live_gates: int | None
) -> Counts:
    """Count the dense model, the live part of theta_delta, its gates in every expert, and the prompt router."""
    layout, dense = gate_layout(model), model.num_parameters()
    router = _router_size(model, method)
    live, gates = _live(layout, method, live_parameters, live_gates)
    total = dense + live + method.num_experts * gates + router
    masks = method.num_experts * layout.size + router
    return Counts(total, total, trained=layout.num_parameters, frozen=dense, masks=masks)


def _router_size(model: PreTrainedModel, method: SparseInterpolation) -> int:
    router = PromptRouter(method, model.config.hidden_size)
    return sum(p.numel() for p in router.parameters())


def _live(
    layout: GateLayout, method: SparseInterpolation, parameters: int | None, gates: int | None
) -> tuple[int, int]:
    """Return the live parameters of theta_delta and the live columns of Z."""
    whole = layout.num_parameters
    live = round((1 - method.sparsity_target) * whole) if parameters is None else parameters
    return live, round(layout.size * live / whole) if gates is None else gates
