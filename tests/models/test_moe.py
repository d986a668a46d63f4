from __future__ import annotations

from pathlib import Path

import pytest
import torch
from support.models import FAMILIES
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func

from raymoe.methods import SparseUpcycling
from raymoe.models.moe import (
    load_balancing_loss,
    routing_entropy,
    sparse_layers,
    tokens_per_expert,
    upcycle_model,
)
from raymoe.schema import InputError


def dense_model(folder: Path) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def rows(num_experts: int, std: float = 1.0) -> Tensor:
    return torch.randn(2, num_experts, 32, generator=torch.Generator().manual_seed(1)) * std


def upcycled(
    folder: Path, gating: str, top_k: int = 1, num_experts: int = 4, implementation: str = "grouped_mm"
) -> PreTrainedModel:
    method = SparseUpcycling(num_experts=num_experts, top_k=top_k, gating=gating)
    return upcycle_model(dense_model(folder), rows(num_experts), method, implementation)


def tokens(seed: int = 0, shape: tuple[int, int] = (3, 17)) -> Tensor:
    return torch.randint(0, 256, shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("top_k", [1, 2])
@pytest.mark.parametrize("gating", ["straight_through", "renormalized"])
@pytest.mark.parametrize("family", FAMILIES)
def test_starts_equal_to_the_dense_model(
    dense_models: dict[str, Path], family: str, gating: str, top_k: int
) -> None:
    with torch.no_grad():
        expected = dense_model(dense_models[family])(tokens()).logits
        actual = upcycled(dense_models[family], gating, top_k)(tokens()).logits
    assert expected.std() > 0.1
    torch.testing.assert_close(actual, expected, atol=1e-5, rtol=0)


def test_softmax_gating_scales_by_the_probabilities(pico: Path) -> None:
    x = torch.randn(1, 5, 32, generator=torch.Generator().manual_seed(2))
    dense, sparse = dense_model(pico), upcycled(pico, "softmax", top_k=2)
    layer = sparse_layers(sparse)[0]
    p = (x @ rows(4)[0].T).softmax(-1).topk(2).values.sum(-1, keepdim=True)
    torch.testing.assert_close(layer(x), p * dense.model.layers[0].mlp(x))


@pytest.mark.parametrize("implementation", ["grouped_mm", "eager", "batched_mm"])
@pytest.mark.parametrize("gating", ["straight_through", "renormalized", "softmax"])
def test_experts_equal_a_loop_over_experts(pico: Path, gating: str, implementation: str) -> None:
    layer = sparse_layers(upcycled(pico, gating, top_k=2, implementation=implementation))[0]
    torch.manual_seed(3)
    for parameter in layer.experts.parameters():
        parameter.data.normal_(0, 0.3)
    x = torch.randn(2, 7, 32)
    expected = torch.zeros(2, 7, 32)
    for w in range(2):
        for t in range(7):
            p = (layer.gate.weight @ x[w, t]).softmax(-1)
            chosen = p.argsort(descending=True)[:2].tolist()
            total = 1.0 if gating == "softmax" else sum(p[i] for i in chosen)
            for i in chosen:
                gate, up = (layer.experts.gate_up_proj[i] @ x[w, t]).chunk(2)
                hidden = torch.nn.functional.silu(gate) * up
                expected[w, t] += p[i] / total * (layer.experts.down_proj[i] @ hidden)
    torch.testing.assert_close(layer(x), expected, atol=1e-5, rtol=1e-5)


def router_gradient(model: PreTrainedModel) -> float:
    ids = tokens()
    model(ids, labels=ids).loss.backward()
    return max(float(layer.gate.weight.grad.abs().max()) for layer in sparse_layers(model))


def test_only_straight_through_and_softmax_train_a_top_1_router(pico: Path) -> None:
    gradients = {
        g: router_gradient(upcycled(pico, g)) for g in ("straight_through", "softmax", "renormalized")
    }
    assert gradients["straight_through"] > 1e-3
    assert gradients["softmax"] > 1e-3
    assert gradients["renormalized"] < 1e-7


@pytest.mark.parametrize("gating", ["straight_through", "renormalized", "softmax"])
def test_a_norm_after_the_experts_hides_the_scale_of_their_sum(
    dense_models: dict[str, Path], gating: str
) -> None:
    """OLMo-2: top-1 gates are a scale, so no gating has a gradient; two different experts have one.

    As the scale has no effect, softmax gating too starts equal to the dense model.
    """
    one, two = (upcycled(dense_models["olmo2"], gating, top_k) for top_k in (1, 2))
    with torch.no_grad():
        expected = dense_model(dense_models["olmo2"])(tokens()).logits
        torch.testing.assert_close(one(tokens()).logits, expected, atol=1e-3, rtol=0)
    for layer in sparse_layers(two):
        layer.experts.down_proj.data.normal_(0, 0.3, generator=torch.Generator().manual_seed(6))
    assert router_gradient(one) < 1e-5
    assert router_gradient(two) > 1e-3


def test_straight_through_has_the_gradient_of_a_constant_denominator(pico: Path) -> None:
    """Top-2: the value is p_i / s, the gradient that of p_i / s with s held fixed at its value."""
    layer = sparse_layers(upcycled(pico, "straight_through", top_k=2))[0]
    x = torch.randn(9, 32, generator=torch.Generator().manual_seed(4))
    weight = layer.gate.weight.detach().clone().requires_grad_()
    p = (x @ weight.T).softmax(-1).topk(2).values
    s = p.sum(-1, keepdim=True).tolist()
    _, gates, _ = layer.gate(x)
    direction = torch.randn(9, 2, generator=torch.Generator().manual_seed(5))
    (gates * direction).sum().backward()
    (p / torch.tensor(s) * direction).sum().backward()
    torch.testing.assert_close(layer.gate.weight.grad, weight.grad)


def loss_by_the_formula(logits: Tensor, mask: Tensor, top_k: int) -> float:
    """Equations 3 and 4, per layer and sequence, sequences weighted by tokens."""
    num_layers, num_sequences, length, num_experts = logits.shape
    total = 0.0
    for layer in range(num_layers):
        for w in range(num_sequences):
            f, p, count = [0.0] * num_experts, [0.0] * num_experts, 0
            for t in range(length):
                if mask[w, t]:
                    probabilities = logits[layer, w, t].softmax(-1).tolist()
                    ranked = sorted(range(num_experts), key=lambda i: -probabilities[i])  # noqa: B023
                    count += 1
                    for i in range(num_experts):
                        p[i] += probabilities[i]
                        f[i] += (i in ranked[:top_k]) / top_k
            if count:
                balance = num_experts * sum(f[i] / count * p[i] / count for i in range(num_experts))
                total += balance * count
    return total / int(mask.sum()) / num_layers


def random_logits(top_k: int = 1) -> tuple[Tensor, Tensor]:
    logits = torch.randn(3, 4, 11, 5, generator=torch.Generator().manual_seed(top_k)) * 2
    mask = torch.arange(11) < torch.tensor([[11], [3], [0], [7]])
    return logits, mask


@pytest.mark.parametrize("top_k", [1, 2])
def test_load_balancing_loss_is_the_formula(top_k: int) -> None:
    logits, mask = random_logits(top_k)
    expected = loss_by_the_formula(logits, mask, top_k)
    assert float(load_balancing_loss(logits, mask, top_k)) == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("top_k", [1, 2])
def test_load_balancing_loss_of_one_layer_and_sequence_is_transformers(top_k: int) -> None:
    logits, mask = random_logits(top_k)
    mine = logits[:1, 3:].clone().requires_grad_()
    theirs = logits[0, 3].clone().requires_grad_()
    expected = (
        load_balancing_loss_func((theirs,), 5, top_k, mask[3:]) / top_k
    )  # theirs is top_k when balanced
    actual = load_balancing_loss(mine, mask[3:], top_k)
    torch.testing.assert_close(actual, expected)
    actual.backward()
    expected.backward()
    torch.testing.assert_close(mine.grad[0, 0], theirs.grad)


def test_layers_collapsed_onto_different_experts_are_not_balanced() -> None:
    collapsed = torch.zeros(2, 3, 8, 4)
    collapsed[0, ..., 1] = 50.0
    collapsed[1, ..., 3] = 50.0
    assert float(load_balancing_loss(collapsed, torch.ones(3, 8), 1)) == pytest.approx(4.0)


def test_balanced_routing_scores_one() -> None:
    balanced = 50.0 * torch.eye(4).repeat(2, 1)[None, None]
    assert float(load_balancing_loss(balanced, torch.ones(1, 8), 1)) == pytest.approx(1.0)


def test_load_balancing_loss_does_not_depend_on_the_micro_batch() -> None:
    logits, mask = random_logits()
    parts = [
        float(load_balancing_loss(logits[:, w : w + 1], mask[w : w + 1], 1)) * int(mask[w].sum())
        for w in range(4)
    ]
    whole = float(load_balancing_loss(logits, mask, 1))
    assert sum(parts) / int(mask.sum()) == pytest.approx(whole, rel=1e-5)


def test_padding_has_no_effect() -> None:
    logits, mask = random_logits()
    ids = logits.topk(2).indices
    noise = torch.where(mask[..., None], logits, torch.full_like(logits, 7.0).cumsum(-1))
    cut, cut_mask = logits[:, :, :9][:, [1, 3]], mask[:, :9][[1, 3]]
    assert float(load_balancing_loss(noise, mask, 1)) == pytest.approx(
        float(load_balancing_loss(logits, mask, 1))
    )
    assert float(load_balancing_loss(cut, cut_mask, 1)) == pytest.approx(
        float(load_balancing_loss(logits[:, [1, 3]], mask[[1, 3]], 1))
    )
    torch.testing.assert_close(routing_entropy(noise, mask), routing_entropy(logits, mask))
    torch.testing.assert_close(
        tokens_per_expert(noise.topk(2).indices, mask, 5), tokens_per_expert(ids, mask, 5)
    )


def test_statistics_are_those_of_a_count_and_torchs_categorical() -> None:
    logits, mask = random_logits()
    ids = logits.topk(2).indices
    expected = torch.stack([torch.bincount(ids[layer][mask].flatten(), minlength=5) for layer in range(3)])
    torch.testing.assert_close(tokens_per_expert(ids, mask, 5), expected)
    entropy = torch.distributions.Categorical(logits=logits).entropy()
    torch.testing.assert_close(routing_entropy(logits, mask), entropy[:, mask].mean(1))


def losses_and_gradients(model: PreTrainedModel) -> tuple[Tensor, list[Tensor]]:
    ids = tokens()
    loss = model(ids, labels=ids).loss
    routing = [layer.take_routing() for layer in sparse_layers(model)]
    logits = torch.stack([r.logits for r in routing]).unflatten(1, ids.shape)
    losses = torch.stack([loss, load_balancing_loss(logits, torch.ones_like(ids), 1)])
    losses.sum().backward()
    return losses.detach(), [p.grad for p in model.parameters() if p.grad is not None]


def test_gradient_checkpointing_changes_nothing_and_keeps_no_graph(pico: Path) -> None:
    plain, checkpointed = (upcycled(pico, "straight_through").train() for _ in range(2))
    checkpointed.gradient_checkpointing_enable({"use_reentrant": False})
    for _ in range(2):
        expected_losses, expected = losses_and_gradients(plain)
        actual_losses, actual = losses_and_gradients(checkpointed)
        torch.testing.assert_close(actual_losses, expected_losses)
        torch.testing.assert_close(actual, expected)
    assert all(layer.routing is None for layer in sparse_layers(checkpointed))


def test_routing_is_taken_once(pico: Path) -> None:
    model = upcycled(pico, "renormalized", top_k=2)
    model(tokens())
    layer = sparse_layers(model)[1]
    logits, expert_ids = layer.take_routing()
    assert logits.shape == (51, 4)
    torch.testing.assert_close(expert_ids, logits.topk(2).indices)
    with pytest.raises(RuntimeError, match="no forward pass"):
        layer.take_routing()


def test_every_layer_is_shown_before_the_next_is_made(pico: Path) -> None:
    model = dense_model(pico)
    seen = []
    upcycle_model(
        model,
        rows(2),
        SparseUpcycling(),
        on_layer=lambda layer: seen.append((layer, len(sparse_layers(model)))),
    )
    assert seen == [(layer, i + 1) for i, layer in enumerate(sparse_layers(model))]


def test_keeps_the_dense_dtype(pico: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(pico, dtype=torch.bfloat16)
    upcycle_model(model, rows(2), SparseUpcycling())
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    assert torch.isfinite(model(tokens()).logits).all()


def test_refuses_routers_that_do_not_fit(pico: Path) -> None:
    with pytest.raises(InputError, match=r"\(2, 3, 32\) do not fit .* \(2, 2, 32\)"):
        upcycle_model(dense_model(pico), rows(3), SparseUpcycling())
