"""The planner's activations of every family against what autograd keeps for the backward pass."""

from __future__ import annotations

import pytest
import torch
from support.models import FAMILIES, SHAPE
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM

from raymoe.methods import Dense, SparseUpcycling
from raymoe.models.moe import upcycle_model
from raymoe.models.packed_attention import PACKED_ATTENTION
from raymoe.plan.memory import activations

TOKENS = 512
LARGER = {"hidden_size": 128, "intermediate_size": 352, "head_dim": 32, "sliding_window": None}


def kept(family: str, method: Dense | SparseUpcycling, dtype: torch.dtype, layers: int) -> tuple[int, int]:
    """Bytes that one forward pass keeps beside the parameters: counted, and as the planner has it."""
    config = AutoConfig.for_model(
        family, **{**SHAPE, **FAMILIES[family], **LARGER, "num_hidden_layers": layers}
    )
    model = AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation=PACKED_ATTENTION)
    if isinstance(method, SparseUpcycling):
        upcycle_model(model, torch.randn(layers, method.num_experts, 128), method)
    parameters = {p.untyped_storage().data_ptr() for p in model.parameters()}
    found: dict[int, Tensor] = {}

    def keep(tensor: Tensor) -> Tensor:
        if tensor.untyped_storage().data_ptr() not in parameters:
            found[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        model.train().base_model(
            input_ids=torch.arange(TOKENS)[None] % 256,
            position_ids=torch.arange(TOKENS)[None],
            attention_mask=None,
            use_cache=False,
            documents=((0, TOKENS),),
        )
    precision = "float32" if dtype == torch.float32 else "bfloat16"
    counted = sum(tensor.untyped_storage().nbytes() for tensor in found.values())
    return counted, activations(model, method, precision, TOKENS).kept


@pytest.mark.parametrize("method", [Dense(), SparseUpcycling(num_experts=4, top_k=2)], ids=["dense", "su"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_layer_keeps_what_the_planner_says(
    family: str, dtype: torch.dtype, method: Dense | SparseUpcycling
) -> None:
    """Of a third layer, so that embedding, rotary positions and last norm fall out."""
    (two, planned_two), (three, planned_three) = (kept(family, method, dtype, layers) for layers in (2, 3))
    assert planned_three - planned_two == pytest.approx(three - two, rel=0.06)
