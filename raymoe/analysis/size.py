"""How large a model is, how much of it a token uses and what training keeps of it, from its configuration alone.

    sizes(AutoConfig.from_pretrained(folder), SparseInterpolation(sparsity_target=0.75))["simoe"]["total"]

Exact counts, made on the meta device: nothing is allocated or downloaded. Activations are not in it.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass

import torch
from transformers import AutoModelForCausalLM, PretrainedConfig, PreTrainedModel

from raymoe.methods import Dense, Experts, SparseInterpolation
from raymoe.models.simoe import GateLayout, PromptRouter, gate_layout

WEIGHT_BYTES = {"float32": 4, "bfloat16": 2}
GRADIENT_BYTES = 4
"""Gradients are accumulated in fp32 (raymoe.train.engine)."""
OPTIMIZER_BYTES = {"float32": 8, "bfloat16": 12}
"""Of one trained parameter: Adam's two moments, in bfloat16 the fp32 weights too."""
MASK_BYTES = 16
"""Of one parameter of gates or router, fp32 whatever the model's precision: weight, gradient, the optimizer's
moments (of gates one), a step's sample (of gates)."""


@dataclass(frozen=True)
class Counts:
    """Numbers of parameters of one model: as it is kept, as a token meets it, as it is trained."""

    total: int
    active: int
    trained: int
    """In the training engine, which ZeRO spreads."""
    frozen: int = 0
    masks: int = 0
    """Gates and prompt router: beside the engine, whole on every worker."""


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
    """Parameters and training state of a dense model, of its sparse upcycling and of its SIMoE.

    Args:
        config: of the dense model.
        method: M, router and sparsity of SIMoE.
        live_parameters: of theta_delta, in columns that any expert has open; by default what
            `sparsity_target` leaves of them.
        live_gates: such columns of Z; by default in proportion to `live_parameters`.
        precision: `float32` or `bfloat16`.
        num_experts: of sparse upcycling; `top_k` of them are active.
        top_k: see `num_experts`.
        workers: over which ZeRO of `zero_stage` spreads the state.
        zero_stage: 1: optimizer, 2: gradients too, 3: all weights too.

    Returns:
        For `dense`, `upcycled` and `simoe` the `total` number of parameters after training (SIMoE without its dead
        columns), how many are `active` for a token (SIMoE: all, merging reads them), and `training_bytes` of
        one worker.
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
    """Bytes that one worker keeps while it trains, by what they are for (ZeRO paper, section 3)."""
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


def count(model: PreTrainedModel, method: Dense | Experts | SparseInterpolation) -> Counts:
    """Parameters of what `method` makes of the dense `model`; SIMoE's total is that after training."""
    if isinstance(method, Experts):
        return _upcycled(model, method.num_experts, method.top_k)
    if isinstance(method, SparseInterpolation):
        return _interpolated(model, method, None, None)
    dense = model.num_parameters()
    return Counts(dense, dense, dense)


def on_meta(config: PretrainedConfig) -> PreTrainedModel:
    """The dense model of `config` without memory for its parameters."""
    with torch.device("meta"):
        model: PreTrainedModel = AutoModelForCausalLM.from_config(copy.deepcopy(config))
    return model


def _upcycled(model: PreTrainedModel, num_experts: int, top_k: int) -> Counts:
    """Every FFN `num_experts` times, and a router [N, D] in its layer."""
    layers, width = model.get_decoder().layers, model.config.hidden_size
    ffn = sum(p.numel() for layer in layers for p in layer.mlp.parameters())
    rest = model.num_parameters() - ffn + len(layers) * num_experts * width
    total = rest + num_experts * ffn
    return Counts(total, rest + top_k * ffn, trained=total)


def _interpolated(
    model: PreTrainedModel, method: SparseInterpolation, live_parameters: int | None, live_gates: int | None
) -> Counts:
    """The dense model, what is alive of theta_delta, its gates in every expert, the prompt router."""
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
    """Live parameters of theta_delta and live columns of Z."""
    whole = layout.num_parameters
    live = round((1 - method.sparsity_target) * whole) if parameters is None else parameters
    return live, round(layout.size * live / whole) if gates is None else gates
