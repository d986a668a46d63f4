"""Sizes from a configuration, against the models themselves."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from support.models import FAMILIES, SHAPE, pico_model
from transformers import AutoConfig, AutoModelForCausalLM, MixtralConfig, MixtralForCausalLM, PretrainedConfig

from raymoe.analysis.size import Counts, sizes, training_state
from raymoe.methods import SparseInterpolation, SparseUpcycling
from raymoe.models.gates import Gates, PromptRouter, gate_layout
from raymoe.models.moe import upcycle_model
from raymoe.models.simoe import interpolate

METHOD = SparseInterpolation(num_experts=3, sparsity_target=0.75, router_hidden_size=5)


def config_of(family: str) -> PretrainedConfig:
    return AutoConfig.for_model(family, **{**SHAPE, **FAMILIES[family]})


@pytest.mark.parametrize("family", FAMILIES)
def test_dense_is_the_model(family: str) -> None:
    expected = sum(p.numel() for p in pico_model(family).parameters())
    dense = sizes(config_of(family), METHOD)["dense"]
    assert (dense["total"], dense["active"]) == (expected, expected)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(("num_experts", "top_k"), [(4, 2), (3, 1)])
def test_upcycled_is_the_upcycled_model(family: str, num_experts: int, top_k: int) -> None:
    rows = torch.randn(2, num_experts, 32)
    method = SparseUpcycling(num_experts=num_experts, top_k=top_k)
    model = upcycle_model(pico_model(family), rows, method)
    total = sum(p.numel() for p in model.parameters())
    experts = sum(p.numel() for name, p in model.named_parameters() if ".experts." in name)
    upcycled = sizes(config_of(family), METHOD, num_experts=num_experts, top_k=top_k)["upcycled"]
    assert upcycled["total"] == total
    assert upcycled["active"] == total - experts * (num_experts - top_k) // num_experts


def test_upcycled_is_transformers_mixtral() -> None:
    config = MixtralConfig(**SHAPE, num_local_experts=4, num_experts_per_tok=2)
    expected = MixtralForCausalLM(config).num_parameters()
    assert sizes(config_of("llama"), METHOD)["upcycled"]["total"] == expected
    assert sizes(config_of("mistral"), METHOD)["upcycled"]["total"] == expected


def test_upcycled_is_transformers_qwen3_moe() -> None:
    shape: dict[str, Any] = {
        **SHAPE,
        **FAMILIES["qwen3"],
        "moe_intermediate_size": 48,
        "decoder_sparse_step": 1,
    }
    config = AutoConfig.for_model("qwen3_moe", **shape, num_experts=4, num_experts_per_tok=2)
    expected = AutoModelForCausalLM.from_config(config).num_parameters()
    assert sizes(config_of("qwen3"), METHOD)["upcycled"]["total"] == expected


@pytest.mark.parametrize("family", FAMILIES)
def test_simoe_is_the_interpolated_model(family: str) -> None:
    model = pico_model(family)
    dense = sum(p.numel() for p in model.parameters())
    interpolated = interpolate(model)
    delta = sum(layer.delta.numel() for layer in interpolated.layers)
    gates, router = Gates(METHOD, interpolated.layout), PromptRouter(METHOD, 32)
    masks = gates.log_alpha.numel() + sum(p.numel() for p in router.parameters())
    whole = sizes(config_of(family), METHOD, delta)["simoe"]
    assert whole["total"] == whole["active"] == dense + delta + masks
    assert whole["training_bytes"] == 16 * delta + 4 * dense + 16 * masks
    half = sizes(config_of(family), METHOD, delta, precision="bfloat16")["simoe"]
    assert half["training_bytes"] == 18 * delta + 2 * dense + 16 * masks


def test_simoe_without_its_dead_columns() -> None:
    layout = gate_layout(pico_model("llama"))
    gates_MG = torch.zeros(3, layout.size)
    gates_MG[1, ::5] = 0.5
    open_G = gates_MG.any(0)
    live, columns = int((layout.owned() * open_G).sum()), int(open_G.sum())
    dense = pico_model("llama").num_parameters()
    router = sum(p.numel() for p in PromptRouter(METHOD, 32).parameters())
    exact = sizes(config_of("llama"), METHOD, live, live_gates=columns)["simoe"]["total"]
    assert exact == dense + live + 3 * columns + router
    default = sizes(config_of("llama"), METHOD)["simoe"]["total"]
    assert default == dense + layout.num_parameters // 4 + 3 * layout.size // 4 + router


def test_the_model_of_a_config_is_not_changed() -> None:
    model = pico_model("llama")
    before = model.config.to_dict()
    sizes(model.config, METHOD)
    assert model.config.to_dict() == before
    assert {p.device.type for p in model.parameters()} == {"cpu"}


@pytest.mark.parametrize(
    ("stage", "expected"),
    [  # Figure 1 of the ZeRO paper (arXiv 1910.02054): 7.5e9 parameters, 64 GPUs
        (0, 120.0e9),
        (1, 31.4e9),
        (2, 16.6e9),
        (3, 1.9e9),
    ],
)
def test_zero_shards_the_state_as_in_its_paper(stage: int, expected: float) -> None:
    model = Counts(total=7_500_000_000, active=7_500_000_000, trained=7_500_000_000)
    state = training_state(model, "bfloat16", workers=64, zero_stage=stage)
    papers = {**state, "gradients": state["gradients"] / 2}  # 16 bits there, fp32 here
    assert sum(papers.values()) == pytest.approx(expected, rel=0.02)


def test_zero_replicates_masks_and_shards_frozen_weights_last() -> None:
    model = Counts(total=0, active=0, trained=800, frozen=400, masks=10)
    states = [training_state(model, "bfloat16", workers=8, zero_stage=stage) for stage in range(4)]
    assert [s["masks"] for s in states] == [160] * 4
    assert [s["frozen"] for s in states] == [800, 800, 800, 100]
    assert [s["gradients"] for s in states] == [3200, 3200, 400, 400]
