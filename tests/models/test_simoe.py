"""SIMoE's model against stock transformers with whole weight tensors, and against its formulas in loops."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from support.models import FAMILIES, pico_model
from torch import Tensor, nn
from torch.func import functional_call
from transformers import PreTrainedModel

from raymoe.methods import SparseInterpolation
from raymoe.models.gates import (
    GateLayout,
    Gates,
    PromptRouter,
    evaluated_gates,
    expected_sparsity,
    gate_layout,
    live_columns,
    open_probability,
    orthogonality,
    overlap,
    sampled_gates,
    sparsity,
)
from raymoe.models.interpolated import Form, kept_share
from raymoe.models.packed_attention import PACKED_ATTENTION
from raymoe.models.simoe import Interpolated, chosen_form, interpolate
from raymoe.schema import InputError

FORMS: tuple[Form, ...] = ("factored", "merged")
EXPERTS = 3
# Two rows of 24 tokens: the first ends with 4 of padding, the second with 3.
DOCUMENTS = ((0, 7), (7, 20), (24, 45))
TOKENS = 48


def seeded(seed: int = 1) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def turned(x: Tensor) -> Tensor:
    """From the shape of a delta to that of its weight, and back."""
    return x.T if x.dim() == 2 else x


def assert_near(actual: Tensor, expected: Tensor, tolerance: float = 1e-5) -> None:
    """The norm of the difference is within `tolerance` of the norm that is expected."""
    assert actual.shape == expected.shape
    assert (actual.double() - expected.double()).norm() <= tolerance * expected.double().norm()


# ---- the reference: transformers' own model with theta_pre + sum_m a_m (z_m * delta) written into it


def gated(model: PreTrainedModel) -> dict[str, Tensor]:
    """Weights of a dense model's linears and norms; embeddings, head and biases left out."""
    named = {name: p.detach() for name, p in model.named_parameters() if name.endswith(".weight")}
    return {name: w for name, w in named.items() if ".layers." in name or name == "model.norm.weight"}


def hard_concrete(log_alpha: Tensor, u: Tensor) -> Tensor:
    s = 1 / (1 + torch.exp(-(torch.log(u) - torch.log(1 - u) + log_alpha) / (2 / 3)))
    return torch.minimum(torch.ones(()), torch.maximum(torch.zeros(()), s * 1.2 - 0.1))


def whole_weights(
    dense: PreTrainedModel, deltas: Sequence[Tensor], a_M: Tensor, z_MG: Tensor
) -> dict[str, Tensor]:
    """theta(x) of one sample; `deltas` have the shapes of the weights."""
    weights, start = {}, 0
    for (name, weight), delta in zip(gated(dense).items(), deltas, strict=True):
        end = start + weight.shape[-1]
        weights[name] = weight + sum(a * (z[start:end] * delta) for a, z in zip(a_M, z_MG, strict=True))
        start = end
    return weights


def plain_logits(dense: PreTrainedModel, weights: dict[str, Tensor], ids: Tensor) -> Tensor:
    """[T, V] of one sequence by itself."""
    logits: Tensor = functional_call(dense, weights, (ids[None],), {"use_cache": False}).logits
    return logits[0]


# ---- what is tested


@dataclass
class Case:
    """A dense model, the same interpolated, and one random set of everything that is trained."""

    dense: PreTrainedModel
    interpolated: Interpolated
    gates: Gates
    noise: Tensor
    a_SM: Tensor
    ids: Tensor
    projection: Tensor
    """The loss is the sum of the documents' logits times it."""

    @property
    def model(self) -> PreTrainedModel:
        return self.interpolated.model

    def z(self) -> Tensor:
        return self.gates.sampled(self.noise)

    def deltas(self) -> list[Tensor]:
        """In the shapes of the dense model's weights."""
        return [turned(layer.delta.detach()).clone() for layer in self.interpolated.layers]

    def packed(self, ids: Tensor | None = None, **named: Any) -> Tensor:
        """Logits [N, V] of the packed batch."""
        positions = torch.zeros(TOKENS, dtype=torch.long)
        for start, end in DOCUMENTS:
            positions[start:end] = torch.arange(end - start)
        logits: Tensor = self.model(
            input_ids=(self.ids if ids is None else ids).view(2, -1),
            position_ids=positions.view(2, -1),
            documents=DOCUMENTS,
            use_cache=False,
            **named,
        ).logits
        return logits.flatten(0, 1)

    def set(self, form: Form, skip: bool = False, a_SM: Tensor | None = None) -> None:
        z_MG = self.z()
        live = live_columns(z_MG, self.interpolated.layout) if skip else None
        self.interpolated.set((self.a_SM if a_SM is None else a_SM) @ z_MG, DOCUMENTS, TOKENS, live, form)

    def loss(self, logits: Tensor) -> Tensor:
        return sum(  # type: ignore[return-value]
            (logits[start:end] * self.projection[start:end]).sum() for start, end in DOCUMENTS
        )

    def gradients(self) -> list[Tensor]:
        """Of delta (in the shapes of the weights), log_alpha and a; then forgets them."""
        deltas = [layer.delta for layer in self.interpolated.layers]
        found = [turned(p.grad).clone() for p in deltas if p.grad is not None]
        assert self.gates.log_alpha.grad is not None and self.a_SM.grad is not None
        found += [self.gates.log_alpha.grad.clone(), self.a_SM.grad.clone()]
        for parameter in (*deltas, self.gates.log_alpha, self.a_SM):
            parameter.grad = None
        return found


def make(family: str, dtype: torch.dtype = torch.float32, scale: float = 0.1) -> Case:
    """Half the gates are closed in all experts, so that dead columns are skipped."""
    generator = seeded()
    dense, model = pico_model(family).to(dtype), pico_model(family).to(dtype)
    model.set_attn_implementation(PACKED_ATTENTION)
    interpolated = interpolate(model)
    for layer in interpolated.layers:
        layer.delta.data.normal_(0, scale, generator=generator)
    gates = Gates(SparseInterpolation(num_experts=EXPERTS, log_alpha_mean=-2.0), interpolated.layout)
    return Case(
        dense=dense,
        interpolated=interpolated,
        gates=gates,
        noise=torch.rand(gates.log_alpha.shape, generator=generator),
        a_SM=torch.rand(len(DOCUMENTS), EXPERTS, generator=generator).softmax(-1).requires_grad_(),
        ids=torch.randint(0, 256, (TOKENS,), generator=generator),
        projection=torch.randn(TOKENS, 264, generator=generator),
    )


@pytest.fixture(scope="module")
def cases() -> dict[str, Case]:
    return {family: make(family) for family in FAMILIES}


@pytest.fixture(scope="module")
def references(cases: dict[str, Case]) -> dict[str, tuple[Tensor, list[Tensor]]]:
    """Logits of all documents, and gradients, by whole weight tensors."""
    found = {}
    for family, case in cases.items():
        deltas = [delta.requires_grad_() for delta in case.deltas()]
        log_alpha = case.gates.log_alpha.detach().clone().requires_grad_()
        a_SM = case.a_SM.detach().clone().requires_grad_()
        z_MG = hard_concrete(log_alpha, case.noise)
        logits = torch.zeros(TOKENS, 264)
        for a_M, (start, end) in zip(a_SM, DOCUMENTS, strict=True):
            weights = whole_weights(case.dense, deltas, a_M, z_MG)
            logits[start:end] = plain_logits(case.dense, weights, case.ids[start:end])
        gradients = torch.autograd.grad(case.loss(logits), [*deltas, log_alpha, a_SM])
        found[family] = (logits.detach(), list(gradients))
    return found


@pytest.mark.parametrize("skip", [False, True], ids=["all columns", "live columns"])
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("family", FAMILIES)
def test_both_forms_equal_the_formula_on_whole_weights(
    cases: dict[str, Case],
    references: dict[str, tuple[Tensor, list[Tensor]]],
    family: str,
    form: Form,
    skip: bool,
) -> None:
    case, (expected, expected_gradients) = cases[family], references[family]
    case.set(form, skip)
    assert case.interpolated.blend is not None
    assert any(columns is not None for columns in case.interpolated.blend.live) == skip
    logits = case.packed()
    case.loss(logits).backward()
    for start, end in DOCUMENTS:
        assert_near(logits[start:end], expected[start:end])
    gradients = case.gradients()
    assert len(gradients) == len(expected_gradients) == len(case.interpolated.layers) + 2
    for actual, wanted in zip(gradients, expected_gradients, strict=True):
        assert wanted.norm() > 0
        assert_near(actual, wanted)


@pytest.mark.parametrize("family", FAMILIES)
def test_rows_with_left_padding_and_a_cache_equal_each_prompt_alone(family: str) -> None:
    """Without documents every row of the batch is a sample: how generation runs."""
    case, new = make(family), 6
    case.model.set_attn_implementation("sdpa")
    prompts = [case.ids[start:end] for start, end in DOCUMENTS]
    width = max(map(len, prompts))
    ids = torch.full((len(prompts), width), 258)
    mask = torch.zeros_like(ids)
    for row, prompt in enumerate(prompts):
        ids[row, width - len(prompt) :], mask[row, width - len(prompt) :] = prompt, 1
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    case.model.generation_config.eos_token_id = None
    with torch.no_grad(), case.interpolated.applied(case.a_SM @ case.z()):
        logits = case.model(input_ids=ids, attention_mask=mask, position_ids=positions).logits
        out = case.model.generate(
            ids, attention_mask=mask, do_sample=False, max_new_tokens=new, pad_token_id=258
        )
    assert case.interpolated.blend is None
    z_MG = hard_concrete(case.gates.log_alpha, case.noise)
    for row, prompt in enumerate(prompts):
        with torch.no_grad():
            weights = whole_weights(case.dense, case.deltas(), case.a_SM[row], z_MG)
            assert_near(logits[row, width - len(prompt) :], plain_logits(case.dense, weights, prompt))
            for _ in range(new):  # greedy, without a cache
                best = plain_logits(case.dense, weights, prompt)[-1].argmax()
                prompt = torch.cat([prompt, best[None]])
        assert out[row, width:].tolist() == prompt[-new:].tolist()


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("family", FAMILIES)
def test_at_step_0_the_logits_are_exactly_the_dense_ones(family: str, dtype: torch.dtype, form: Form) -> None:
    case = make(family, dtype, scale=0.0)
    dense = Case(**{**vars(case), "interpolated": Interpolated(case.dense, (), case.interpolated.layout)})
    case.dense.set_attn_implementation(PACKED_ATTENTION)
    expected = dense.packed()
    assert torch.equal(case.packed(), expected)  # nothing set yet
    for skip in (False, True):
        case.set(form, skip)
        assert torch.equal(case.packed(), expected)


def test_delta_alone_is_trained(cases: dict[str, Case]) -> None:
    for case in cases.values():
        parameters = dict(case.model.named_parameters())
        trained = {name for name, p in parameters.items() if p.requires_grad}
        assert trained == {name.removesuffix("weight") + "delta" for name in gated(case.dense)}
        assert set(parameters) - trained == set(dict(case.dense.named_parameters()))
        assert all(torch.equal(parameters[n], p) for n, p in case.dense.named_parameters())


@pytest.mark.parametrize("form", FORMS)
def test_gradient_checkpointing_changes_no_gradient(form: Form) -> None:
    case = make("qwen3")
    found, calls = [], []
    case.model.model.layers[1].mlp.up_proj.register_forward_hook(lambda *_: calls.append(1))
    for checkpointing in (False, True):
        if checkpointing:
            case.model.train()
            case.model.activation_checkpointing_enable({"use_reentrant": False})
        case.set(form, skip=True)
        case.loss(case.packed()).backward()
        found.append(case.gradients())
    assert len(calls) == 1 + 2  # the second time it was computed again
    for plain, again in zip(*found, strict=True):
        assert_near(again, plain, 1e-6)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("family", ["mistral", "qwen3"])
def test_padding_neighbours_and_what_follows_have_no_part_in_a_token(
    cases: dict[str, Case], family: str, form: Form
) -> None:
    case, (start, end) = cases[family], DOCUMENTS[1]
    case.set(form)
    expected = case.packed()[start:end].detach()
    spoiled, a_SM = case.ids.clone(), case.a_SM.detach().clone()
    spoiled[: start + 5], spoiled[end - 3 :] = 3, 4  # neighbours and padding, and its own first and last
    spoiled[start : end - 3] = case.ids[start : end - 3]
    a_SM[[0, 2]] = torch.eye(EXPERTS)[:2]
    case.set(form, a_SM=a_SM)
    actual = case.packed(spoiled)[start:end].detach()
    assert_near(actual[:-3], expected[:-3], 1e-6)
    assert (actual[-3:] - expected[-3:]).abs().max() > 0.01
    coefficients_SG = (case.a_SM @ case.z()).detach().requires_grad_()
    case.interpolated.set(coefficients_SG, DOCUMENTS, TOKENS, None, form)
    (gradient_SG,) = torch.autograd.grad(case.packed()[start:end].square().sum(), coefficients_SG)
    assert gradient_SG[1].norm() > 0
    assert not gradient_SG[[0, 2]].any()


def test_merged_weights_are_those_of_each_sample_and_then_gone(cases: dict[str, Case]) -> None:
    for case in cases.values():
        case.set("factored")
        with torch.no_grad():
            factored, coefficients_SG = case.packed(), case.a_SM @ case.z()
            for c_G, (start, end) in zip(coefficients_SG, DOCUMENTS, strict=True):
                with case.interpolated.merged(c_G):
                    assert_near(case.packed()[start:end], factored[start:end])
            with pytest.raises(KeyError), case.interpolated.merged(coefficients_SG[0]):
                raise KeyError
            assert torch.equal(case.packed(), factored)
            case.interpolated.clear()
            case.dense.set_attn_implementation(PACKED_ATTENTION)
            dense = Case(
                **{**vars(case), "interpolated": Interpolated(case.dense, (), case.interpolated.layout)}
            )
            assert torch.equal(case.packed(), dense.packed())


@pytest.mark.parametrize("shape", [(12, 20), (20,)], ids=["linear", "norm"])
@pytest.mark.parametrize("scale", [1e-1, 1e-3, 1e-5])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_the_share_that_merging_keeps(shape: tuple[int, ...], scale: float, dtype: torch.dtype) -> None:
    weight = (1 + 0.1 * torch.randn(shape, generator=seeded(0))).to(dtype)
    delta = (scale * torch.randn(shape, generator=seeded(1))).to(dtype)  # in the weight's shape
    c = torch.rand(20, generator=seeded(2))
    kept, wanted = 0.0, 0.0
    for index in torch.cartesian_prod(*map(torch.arange, shape)).view(-1, len(shape)).tolist():
        w, change = float(weight[tuple(index)]), float(c[index[-1]]) * float(delta[tuple(index)])
        kept += (float(torch.tensor(w + change, dtype=dtype)) - w) * change
        wanted += change * change
    actual = kept_share(weight, turned(delta).contiguous(), c, dtype)
    assert actual[1] == pytest.approx(wanted, rel=1e-4)
    assert actual[0] / actual[1] == pytest.approx(kept / wanted, abs=0.02)
    if dtype == torch.float32 and scale > 1e-5:
        assert kept / wanted == pytest.approx(1, abs=0.02)
    if dtype == torch.bfloat16 and scale == 1e-5:
        assert actual[0] == 0  # near 1 bfloat16 has steps of 0.004: nothing is left


# ---- bfloat16


@pytest.mark.parametrize("family", FAMILIES)
def test_factored_in_bfloat16_is_as_close_to_float32_as_the_dense_model(family: str) -> None:
    half, full = make(family, torch.bfloat16), make(family)
    full.model.load_state_dict(half.model.state_dict())  # the rounded weights and deltas
    dense = [case.packed().detach().float() for case in (half, full)]
    both = []
    for case in (half, full):
        case.set("factored", skip=True)
        both.append(case.packed().float())
        case.loss(both[-1]).backward()
    assert_near(both[0], both[1], 1.5 * float((dense[0] - dense[1]).norm() / dense[1].norm()))
    for actual, wanted in zip(half.gradients(), full.gradients(), strict=True):
        assert_near(actual, wanted, 0.1)


def _kept(effect: Tensor, exact: Tensor) -> float:
    return float((effect.double() * exact.double()).sum() / exact.double().square().sum())


@pytest.mark.parametrize("ratio", [1e-2, 1e-3, 1e-4])
def test_factored_keeps_in_bfloat16_what_merging_loses(ratio: float) -> None:
    """Of outputs and of gradients of inputs, at a delta of `ratio` times the weights."""
    from raymoe.models.interpolated import _Factored, _Merged

    random = seeded(0)
    weight = torch.randn(256, 256, generator=random).bfloat16()
    delta = (ratio * torch.randn(256, 256, generator=random)).bfloat16()
    x = torch.randn(4096, 256, generator=random).bfloat16().requires_grad_()
    dy = torch.randn(4096, 256, generator=random).bfloat16()
    ones, samples = torch.ones(1, 256), torch.zeros(4096, dtype=torch.long)
    dense, dense_dx = (x @ weight.T).detach(), dy @ weight
    y = _Factored.apply(x, weight, None, delta, ones, None, samples)
    y.backward(dy)
    merged = _Merged.apply(x.detach(), weight, None, delta, ones, None, ((0, 4096),))
    exact, exact_dx = x.detach().double() @ delta.double(), dy.double() @ delta.double().T
    assert _kept(y.detach() - dense, exact) == pytest.approx(1, abs=0.15)
    assert _kept(x.grad - dense_dx, exact_dx) == pytest.approx(1, abs=0.15)
    if ratio < 1e-2:
        assert _kept(merged - dense, exact) < 0.6


@pytest.mark.parametrize("scale", [1e-2, 1e-3])
@pytest.mark.parametrize("name", ["input_layernorm", "self_attn.q_norm", "self_attn.q_proj", "mlp.down_proj"])
def test_small_deltas_are_not_rounded_away_in_bfloat16(name: str, scale: float) -> None:
    """The effect of delta on a layer's output, projected on what it is exactly."""
    case = make("qwen3", torch.bfloat16, scale)
    layer: Any = case.model.model.layers[0].get_submodule(name)
    shape = (1, 4000, 4, 16) if name.endswith("q_norm") else (1, 4000, layer.weight.shape[-1])
    x = torch.randn(shape, generator=seeded(3)).bfloat16()
    ones = torch.ones(1, case.interpolated.layout.size)
    with torch.no_grad():
        dense = layer(x).double()
        case.interpolated.set(ones)
        effect = layer(x).double() - dense
    delta = layer.delta.detach().double()
    if name.endswith("norm"):
        # a bfloat16 input has few values, and the rounding of their products does not average out entirely
        exact, tolerance = (
            x.double() * (x.double().square().mean(-1, keepdim=True) + 1e-6).rsqrt() * delta,
            0.3,
        )
    else:
        exact, tolerance = x.double() @ delta, 0.1
    assert float((effect * exact).sum() / exact.square().sum()) == pytest.approx(1, abs=tolerance)


def test_the_form_follows_from_shape_and_type() -> None:
    for device, tokens in (("cpu", 96), ("cuda", 1500)):
        assert chosen_form(device, torch.float32, 4 * tokens, 4) == "merged"
        assert chosen_form(device, torch.float32, 4 * tokens - 1, 4) == "factored"
        assert chosen_form(device, torch.bfloat16, 100 * tokens, 1) == "factored"


# ---- gates


def test_sampled_and_evaluated_gates_are_hard_concrete() -> None:
    log_alpha = 3 * torch.randn(4, 50, generator=seeded())
    noise = torch.rand(4, 50, generator=seeded(2))
    torch.testing.assert_close(
        sampled_gates(log_alpha, noise), hard_concrete(log_alpha, noise), atol=1e-6, rtol=0
    )
    for value in (-4.6, -2.4, -2.39, 0.0, 1.0, 2.39, 2.4, 4.6):
        wanted = min(1.0, max(0.0, 1.2 / (1 + math.exp(-value)) - 0.1))
        assert evaluated_gates(torch.tensor(value)).item() == pytest.approx(wanted, abs=1e-6)


def test_the_chance_of_an_open_gate_is_how_often_it_is_open() -> None:
    log_alpha, draws = torch.linspace(-4.6, 4.6, 11), 200_000
    z = sampled_gates(log_alpha, torch.rand(draws, 11, generator=seeded()))
    often = (z != 0).double().mean(0)
    chance = open_probability(log_alpha).double()
    deviation = (chance * (1 - chance) / draws).sqrt()
    assert ((often - chance).abs() < 4 * deviation).all()
    by_hand = [1 / (1 + math.exp(-(x - 2 / 3 * math.log(0.1 / 1.1)))) for x in log_alpha.tolist()]
    torch.testing.assert_close(chance, torch.tensor(by_hand, dtype=torch.float64), atol=1e-6, rtol=0)


def test_noise_of_exactly_0_gives_a_closed_gate_and_no_nan() -> None:
    log_alpha = torch.zeros(3, requires_grad=True)
    z = sampled_gates(log_alpha, torch.tensor([0.0, 0.5, 1 - 2**-24]))
    z.sum().backward()
    assert z.tolist() == [0.0, pytest.approx(0.5), 1.0]
    assert log_alpha.grad is not None and log_alpha.grad.tolist() == [0.0, pytest.approx(1.2 * 0.25 * 1.5), 0]


def test_gates_start_where_they_are_told_and_stay_within_their_limits(cases: dict[str, Case]) -> None:
    layout = cases["qwen3"].interpolated.layout
    method = SparseInterpolation(num_experts=8, log_alpha_mean=1.5, log_alpha_std=0.25)
    gates = Gates(method, layout, seed=3)
    assert gates.log_alpha.shape == (8, layout.size) and gates.log_alpha.dtype == torch.float32
    n = gates.log_alpha.numel()
    assert gates.log_alpha.mean().item() == pytest.approx(1.5, abs=4 * 0.25 / n**0.5)
    assert gates.log_alpha.std().item() == pytest.approx(0.25, abs=4 * 0.25 / (2 * n) ** 0.5)
    assert torch.equal(gates.log_alpha, Gates(method, layout, seed=3).log_alpha)
    assert not torch.equal(gates.log_alpha, Gates(method, layout, seed=4).log_alpha)
    with torch.no_grad():
        gates.log_alpha[0, :2] = torch.tensor([-9.0, 9.0])
    gates.clamp_()
    limits = (gates.log_alpha.min().item(), gates.log_alpha.max().item())
    assert limits == pytest.approx((math.log(0.01), math.log(100)))


# ---- sparsity and orthogonality


def random_gates() -> tuple[Tensor, Tensor]:
    """log_alpha [3, 40] and the parameters [40] that each gate owns."""
    log_alpha = 2 * torch.randn(3, 40, generator=seeded()) - 1
    return log_alpha, torch.randint(1, 60, (40,), generator=seeded(2)).float()


def looped_sparsity(z_MG: Tensor, owned_G: Tensor, scope: str) -> list[float]:
    z, owned = z_MG.tolist(), owned_G.tolist()
    if scope == "union":
        zeros = [sum(n for g, n in enumerate(owned) if all(row[g] == 0 for row in z))]
    else:
        zeros = [sum(n for g, n in enumerate(owned) if row[g] == 0) for row in z]
    shares = [count / sum(owned) for count in zeros]
    return [sum(shares) / len(shares)] if scope == "mean" else shares


@pytest.mark.parametrize("scope", ["union", "mean", "per_expert"])
def test_sparsity_counts_parameters(scope: str) -> None:
    log_alpha, owned = random_gates()
    z = sampled_gates(log_alpha, torch.rand(3, 40, generator=seeded(5)))
    for gates in (z, torch.zeros(3, 40), torch.ones(3, 40)):
        assert sparsity(gates, owned, scope).tolist() == pytest.approx(looped_sparsity(gates, owned, scope))
    assert 0 < sparsity(z, owned, scope).min() < 1


@pytest.mark.parametrize("scope", ["mean", "per_expert"])
def test_expected_sparsity_is_the_mean_over_many_draws(scope: str) -> None:
    log_alpha, owned = random_gates()
    generator = seeded(4)
    draws = torch.stack(
        [
            sparsity(sampled_gates(log_alpha, torch.rand(3, 40, generator=generator)), owned, scope)
            for _ in range(4000)
        ]
    )
    deviation = draws.std(0) / len(draws) ** 0.5
    assert ((draws.mean(0) - expected_sparsity(log_alpha, owned, scope)).abs() < 4 * deviation).all()


def test_expected_union_sparsity_takes_the_root_over_experts() -> None:
    log_alpha, owned = random_gates()
    total = 0.0
    for g in range(40):
        chances = [1 - 1 / (1 + math.exp(-(x + 2 / 3 * math.log(11)))) for x in log_alpha[:, g].tolist()]
        total += float(owned[g]) * math.prod(chances) ** (1 / 3)
    actual = expected_sparsity(log_alpha, owned, "union")
    assert actual.tolist() == [pytest.approx(total / float(owned.sum()), abs=1e-5)]
    one = expected_sparsity(log_alpha[:1], owned, "union")  # of one expert it is the expectation itself
    assert_near(one, expected_sparsity(log_alpha[:1], owned, "mean"))


@pytest.mark.parametrize("scope", ["union", "mean", "per_expert"])
def test_the_constraint_closes_open_gates(scope: str) -> None:
    """Its gradient reaches gates that are open in all experts, and is a number at the limits."""
    log_alpha = torch.tensor([[2.0, 4.6, -4.6], [2.0, 4.6, 4.6]], requires_grad=True)
    expected_sparsity(log_alpha, torch.ones(3), scope).sum().backward()
    assert log_alpha.grad is not None
    assert (log_alpha.grad < 0).all()  # a larger log_alpha is less sparse
    assert (log_alpha.grad[:, 0] < -1e-3).all()


def test_overlap_and_orthogonality_are_those_of_unit_rows() -> None:
    z = torch.rand(4, 30, generator=seeded()) * (torch.rand(4, 30, generator=seeded(2)) < 0.5)
    rows = z.tolist()
    cosines = [
        [sum(x * y for x, y in zip(p, q, strict=True)) / math.hypot(*p) / math.hypot(*q) for q in rows]
        for p in rows
    ]
    torch.testing.assert_close(overlap(z), torch.tensor(cosines), atol=1e-6, rtol=0)
    squares = [cosines[i][j] ** 2 for i in range(4) for j in range(4) if i != j]
    assert orthogonality(z).item() == pytest.approx(math.sqrt(sum(squares)), abs=1e-6)
    disjoint = torch.block_diag(*[torch.rand(1, 5, generator=seeded(i)) + 0.1 for i in range(4)])
    assert orthogonality(disjoint).item() == 0


@pytest.mark.parametrize(
    "z", [[[0.3, 0.0, 0.5]], [[0.3, 0.1], [0.0, 0.0]]], ids=["one expert", "a dead expert"]
)
def test_orthogonality_without_a_pair_is_0_with_a_gradient(z: list[list[float]]) -> None:
    gates = torch.tensor(z, requires_grad=True)
    value = orthogonality(gates)
    value.backward()
    assert value.item() == 0
    assert gates.grad is not None and gates.grad.isfinite().all()


# ---- layout


@pytest.mark.parametrize("device", ["cpu", "meta"])
@pytest.mark.parametrize("family", FAMILIES)
def test_the_layout_counts_the_dense_models_parameters(family: str, device: str) -> None:
    model = pico_model(family)
    layout, weights = gate_layout(model.to(device)), gated(model)
    assert [f"{span.name}.weight" for span in layout.spans] == list(weights)
    assert layout.widths == [w.shape[-1] for w in weights.values()]
    assert [s.start for s in layout.spans] == [sum(layout.widths[:i]) for i in range(len(layout.spans))]
    assert layout.size == sum(layout.widths)
    linears = [m for m in model.model.layers.modules() if isinstance(m, nn.Linear)]
    assert len(linears) == 14
    total = sum(p.numel() for p in model.parameters()) - sum(
        p.numel() for n, p in model.named_parameters() if "embed" in n or "lm_head" in n or "bias" in n
    )
    assert layout.num_parameters == total == int(layout.owned().sum())
    per_layer: dict[str, list[int]] = {
        "query": [32],
        "key": [32],
        "value": [32],
        "out": [model.model.layers[0].self_attn.o_proj.in_features],
        "gate": [32],
        "up": [32],
        "down": [48],
        "norm": {"qwen3": [16, 16, 32, 32], "olmo2": [16, 32, 32, 32]}.get(family, [32, 32]),
    }
    for i in (0, 1):
        for kind, widths in per_layer.items():
            assert sorted(s.width for s in layout.spans if (s.layer, s.kind) == (i, kind)) == widths
    assert [(s.kind, s.layer) for s in layout.spans][-1] == ("norm", None)
    down = next(s for s in layout.spans if s.kind == "down")
    assert layout.owned()[down.start : down.start + 48].tolist() == [32.0] * 48


def test_layers_that_are_not_known_are_named_and_nothing_is_changed() -> None:
    model = pico_model("llama")
    model.model.layers[0].mlp.extra = nn.Linear(32, 32)
    model.model.layers[1].second = nn.LayerNorm(32)
    model.model.layers[1].mlp.gain = nn.Parameter(torch.ones(3))
    named = (
        r"model\.layers\.0\.mlp\.extra \(Linear\), model\.layers\.1\.mlp \(LlamaMLP\), "
        r"model\.layers\.1\.second \(LayerNorm\)$"
    )
    names = [name for name, _ in model.named_parameters()]
    with pytest.raises(InputError, match=named):
        interpolate(model)
    assert [name for name, _ in model.named_parameters()] == names
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_layers_are_handed_over_one_after_the_other() -> None:
    model, seen = pico_model("qwen3"), []

    def see(module: nn.Module) -> None:
        seen.append((module, sum(name.endswith("delta") for name, _ in model.named_parameters())))

    interpolate(model, see)
    assert [module for module, _ in seen] == [*model.model.layers, model.model.norm]
    assert [count for _, count in seen] == [11, 22, 23]


def test_live_columns_are_those_open_in_any_expert(cases: dict[str, Case]) -> None:
    layout: GateLayout = cases["qwen3"].interpolated.layout
    z = cases["qwen3"].z().detach()
    z[:, layout.spans[0].start : layout.spans[0].start + layout.spans[0].width] = 0  # a whole linear is dead
    for span, columns in zip(layout.spans, live_columns(z, layout), strict=True):
        wanted = [i for i in range(span.width) if any(float(row[span.start + i]) != 0 for row in z)]
        if columns is None:
            assert span.kind == "norm" or len(wanted) >= 0.8 * span.width
        else:
            assert columns.tolist() == wanted
    assert live_columns(torch.ones_like(z), layout) == [None] * len(layout.spans)


def test_a_layer_all_of_whose_columns_are_dead_is_the_dense_one(cases: dict[str, Case]) -> None:
    case = cases["llama"]
    case.interpolated.clear()
    expected = case.packed()
    z = torch.zeros(EXPERTS, case.interpolated.layout.size, requires_grad=True)
    live = live_columns(z, case.interpolated.layout)
    for form in FORMS:
        case.interpolated.set(case.a_SM @ z, DOCUMENTS, TOKENS, live, form)
        logits = case.packed()
        assert torch.equal(logits, expected)
        case.loss(logits).backward()
        deltas = [layer.delta for layer in case.interpolated.layers]
        assert all(delta.grad is not None and not delta.grad.any() for delta in deltas)
        for parameter in (*deltas, case.a_SM):
            parameter.grad = None


# ---- router


@pytest.mark.parametrize("hidden", [None, 12])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_the_router_is_a_softmax_over_a_normalised_prompt(hidden: int | None, dtype: torch.dtype) -> None:
    router = PromptRouter(SparseInterpolation(num_experts=5, router_hidden_size=hidden), 32, seed=1)
    with torch.no_grad():
        for parameter in router.parameters():
            parameter.add_(0.3 * torch.randn(parameter.shape, generator=seeded()))
    prompts = (5 * torch.randn(7, 32, generator=seeded(2)) + 2).to(dtype)
    actual = router(prompts)
    assert actual.dtype == torch.float32
    torch.testing.assert_close(actual.sum(1), torch.ones(7), atol=1e-6, rtol=0)
    p = {name: parameter.detach() for name, parameter in router.named_parameters()}
    x = prompts.float()
    x = (x - x.mean(1, keepdim=True)) / (x.var(1, unbiased=False, keepdim=True) + 1e-5).sqrt()
    x = x * p["norm.weight"] + p["norm.bias"]
    x = x @ p["layers.0.weight"].T + p["layers.0.bias"]
    if hidden:
        x = x * torch.sigmoid(x) @ p["layers.1.weight"].T + p["layers.1.bias"]
    torch.testing.assert_close(actual, x.exp() / x.exp().sum(1, keepdim=True), atol=1e-5, rtol=1e-4)
    same = PromptRouter(SparseInterpolation(num_experts=5, router_hidden_size=hidden), 32, seed=1)
    assert (
        F.cosine_similarity(same(prompts), same(3 * prompts + 1)).min() > 0.999
    )  # scale and offset are gone
