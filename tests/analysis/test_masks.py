"""Descriptions of masks against loops over parameters and against scikit-learn."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest
import torch
from scipy.cluster.hierarchy import fcluster
from sklearn.cluster import AgglomerativeClustering
from sklearn.metrics.pairwise import cosine_similarity
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, Qwen3Config, Qwen3ForCausalLM

from raymoe.analysis.masks import clustered, describe, headline
from raymoe.models.gates import GateLayout, gate_layout

SHAPE = {
    "vocab_size": 64, "hidden_size": 16, "intermediate_size": 40, "num_hidden_layers": 3,
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 6,
}  # fmt: skip
TASKS = ("sum", "loop", "sum", "story", "loop", "sum")
DOMAINS = ("math", "code", "math", "text", "code", "code")
KINDS = {
    "q_proj": "query", "k_proj": "key", "v_proj": "value", "o_proj": "out",
    "gate_proj": "gate", "up_proj": "up", "down_proj": "down",
}  # fmt: skip


@pytest.fixture(params=["llama", "qwen3"])
def model(request: pytest.FixtureRequest) -> Any:
    with torch.device("meta"):
        if request.param == "llama":
            return LlamaForCausalLM(LlamaConfig(**SHAPE))
        return Qwen3ForCausalLM(Qwen3Config(**SHAPE))  # its attention has norms of its own


def random_gates(experts: int, layout: GateLayout, closed: float = 0.7) -> Tensor:
    g = torch.Generator().manual_seed(experts)
    gates = torch.rand(experts, layout.size, generator=g)
    return gates * (torch.rand(experts, layout.size, generator=g) > closed)


def random_weights(experts: int, prompts: int = len(TASKS)) -> Tensor:
    return torch.randn(prompts, experts, generator=torch.Generator().manual_seed(1)).softmax(-1)


def described(model: Any, experts: int = 3, **more: Any) -> tuple[dict[str, Any], Tensor, GateLayout]:
    layout = gate_layout(model)
    gates = random_gates(experts, layout)
    return describe(gates, layout, random_weights(experts), TASKS, DOMAINS, **more), gates, layout


def masks_by_parameter(model: Any, gates: Tensor, layout: GateLayout) -> dict[str, Tensor]:
    """Return whole masks [M, *weight.shape]: each gate expanded over the parameters it owns."""
    return {
        span.name: gates[:, None, span.start : span.start + span.width]
        .expand(-1, model.get_submodule(span.name).weight.numel() // span.width, -1)
        .reshape(len(gates), *model.get_submodule(span.name).weight.shape)
        for span in layout.spans
    }


def kind_of(name: str) -> str:
    return next((kind for end, kind in KINDS.items() if name.endswith(end)), "norm")


def expected_shares(masks: list[Tensor]) -> dict[str, Any]:
    count = sum(m[0].numel() for m in masks)
    return {
        "parameters": count,
        "union": pytest.approx(sum(int((m != 0).any(0).sum()) for m in masks) / count, abs=1e-12),
        "mean": pytest.approx(sum(int((m != 0).sum()) for m in masks) / count / len(masks[0]), abs=1e-12),
    }


def test_where_the_masks_are_open_counted_over_whole_weights(model: Any) -> None:
    found, gates, layout = described(model)
    masks = masks_by_parameter(model, gates, layout)
    assert [row["kind"] for row in found["kinds"]] == [
        "norm", "query", "key", "value", "out", "gate", "up", "down",
    ]  # fmt: skip
    for row in found["kinds"]:
        own = [m for name, m in masks.items() if kind_of(name) == row["kind"]]
        assert {**row, "kind": ""} == {"kind": "", **expected_shares(own)}
    assert [row["layer"] for row in found["layers"]] == [0, 1, 2]
    for row in found["layers"]:
        own = [m for name, m in masks.items() if f".layers.{row['layer']}." in name]
        assert {**row, "layer": 0} == {"layer": 0, **expected_shares(own)}


def test_how_sparse_they_are_counted_over_whole_weights(model: Any) -> None:
    found, gates, layout = described(model)
    every = torch.cat([m.flatten(1) for m in masks_by_parameter(model, gates, layout).values()], 1)
    assert found["parameters"] == every.shape[1]
    assert found["live_parameters"] == int((every != 0).any(0).sum())
    assert (found["experts"], found["gates"]) == gates.shape
    assert found["live_gates"] == int((gates.sum(0) > 0).sum())
    zero = (every == 0).double()
    assert found["sparsity"]["union"] == pytest.approx([1 - found["live_parameters"] / every.shape[1]])
    assert found["sparsity"]["mean"] == pytest.approx([float(zero.mean())])
    assert found["sparsity"]["per_expert"] == pytest.approx(zero.mean(1).tolist())


def test_overlap_is_the_cosine_of_the_rows(model: Any) -> None:
    found, gates, _ = described(model, experts=4)
    expected = cosine_similarity(gates.double().numpy())
    np.testing.assert_allclose(found["overlap"]["ratios"], expected, atol=1e-12)
    pairs = [expected[i, j] for i in range(4) for j in range(i)]
    assert found["overlap"]["mean"] == pytest.approx(np.mean(pairs))


def test_weights_by_task_and_by_domain(model: Any) -> None:
    found, _, _ = described(model)
    weights = random_weights(3).double().numpy()
    rows = {("math", "sum"): [0, 2], ("code", "loop"): [1, 4], ("text", "story"): [3], ("code", "sum"): [5]}
    assert [(row["domain"], row["task"]) for row in found["tasks"]] == sorted(rows)
    for row in found["tasks"]:
        own = rows[row["domain"], row["task"]]
        assert row["prompts"] == len(own)
        np.testing.assert_allclose(row["weights"], sum(weights[i] for i in own) / len(own), atol=1e-12)
    assert {row["domain"]: row["prompts"] for row in found["domains"]} == {"code": 3, "math": 2, "text": 1}
    assert found["linkage"] == clustered(np.array([row["weights"] for row in found["tasks"]])).tolist()
    np.testing.assert_allclose(
        found["domains"][0]["weights"], (weights[1] + weights[4] + weights[5]) / 3, atol=1e-12
    )


def test_a_single_expert_and_a_closed_one(model: Any) -> None:
    layout = gate_layout(model)
    alone = describe(random_gates(1, layout), layout, torch.ones(2, 1), ("a", "a"), ("a", "a"))
    assert (alone["overlap"]["mean"], alone["linkage"]) == (0, [])
    assert alone["sparsity"]["union"] == alone["sparsity"]["mean"] == alone["sparsity"]["per_expert"]
    closed = describe(torch.zeros(2, layout.size), layout, torch.ones(1, 2) / 2, ("a",), ("a",))
    assert (closed["live_parameters"], closed["overlap"]["ratios"]) == (0, [[0, 0], [0, 0]])
    assert headline(closed)["masks/sparsity"] == 1
    assert not json.dumps(closed).count("NaN")


@pytest.mark.parametrize("scope", ["union", "mean", "per_expert"])
def test_the_headline_measures_what_was_constrained(model: Any, scope: str) -> None:
    found, gates, _ = described(model, scope=scope)
    metrics = headline(found)
    assert metrics["masks/sparsity"] == pytest.approx(np.mean(found["sparsity"][scope]))
    assert metrics["masks/sparsity_union"] == found["sparsity"]["union"][0] < metrics["masks/sparsity_mean"]
    assert metrics["masks/live_parameters"] == found["live_parameters"]
    assert {name for name in metrics if "nonzero" in name} == {
        f"masks/nonzero/{kind}" for kind in {"norm", *KINDS.values()}
    }
    assert metrics["masks/nonzero/key"] == found["kinds"][2]["union"]
    assert all(isinstance(value, float) for value in metrics.values())


def test_a_description_is_json(model: Any) -> None:
    found, _, _ = described(model)
    assert json.loads(json.dumps(found, allow_nan=False)) == found


@pytest.mark.parametrize("tasks", [30, 250])
@pytest.mark.parametrize("groups", [2, 3, 5])
def test_tasks_are_clustered_by_mean_distance(groups: int, tasks: int) -> None:
    weights = random_weights(6, prompts=tasks).double().numpy()
    own = fcluster(clustered(weights), groups, "maxclust")
    theirs = AgglomerativeClustering(groups, linkage="average").fit_predict(weights)
    np.testing.assert_array_equal(own[:, None] == own, theirs[:, None] == theirs)
