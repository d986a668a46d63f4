"""SIMoE's training against the paper's formulas written out, and against itself resumed and on two workers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from support.local_session import LENGTH, LocalSession, small_run, small_spec
from support.workers import Rows, rows_of_workers
from torch.nn import functional as F
from transformers import AutoModelForCausalLM

from raymoe.config import Run
from raymoe.data.instructions import Encoded
from raymoe.methods import SparseInterpolation
from raymoe.models.gates import Gates, PromptRouter, gate_layout
from raymoe.train.masks import MaskTrainer
from raymoe.train.order import Order, learning_rate
from raymoe.train.worker import Trainer, train

METHOD = SparseInterpolation(
    num_experts=3,
    sparsity_target=0.5,
    orthogonality=0.1,
    mask_learning_rate=0.1,
    delta_learning_rate=1e-2,
    router_learning_rate=3e-3,
    log_alpha_mean=-2.0,  # some columns are dead from the start, others die and come back
)


pytestmark = pytest.mark.usefixtures("one_process")


def _written_out(run: Run, pico: Path, encoded: Path, prompts: Path) -> list[dict[str, float]]:
    """Train likewise with torch and stock transformers alone, one example and one full theta(x) at a time."""
    method, o = run.method, run.optimization
    assert isinstance(method, SparseInterpolation)
    model = AutoModelForCausalLM.from_pretrained(pico, attn_implementation="eager")
    dense = {name: p.detach() for name, p in model.named_parameters()}
    layout = gate_layout(model)  # only for the order of columns, which is a convention
    delta = {
        s.name + ".weight": torch.zeros_like(dense[s.name + ".weight"], requires_grad=True)
        for s in layout.spans
    }
    log_alpha = Gates(method, layout, run.seed).log_alpha
    h = PromptRouter(method, model.config.hidden_size, run.seed)
    owned = torch.cat([torch.full((s.width,), float(s.owned)) for s in layout.spans])
    adamw = torch.optim.AdamW(
        delta.values(), lr=1, betas=(o.beta1, o.beta2), eps=o.epsilon, weight_decay=o.weight_decay
    )
    adam = torch.optim.Adam(h.parameters(), betas=(0.9, 0.95))
    momentum = squares = unit = None
    data, rows = Encoded.load(encoded / "train"), np.load(prompts / "train.npy")
    order = Order(data, LENGTH, o, run.seed)
    multiplier, told = 0.0, []
    reached = _share_dead(log_alpha, owned)
    for step in range(order.total_steps):
        number = int(np.random.default_rng([run.seed, step]).integers(2**62))
        u = torch.rand(log_alpha.shape, generator=torch.Generator().manual_seed(number))
        s = torch.sigmoid((u.log() - (1 - u).log() + log_alpha) / (2 / 3))
        z = (s * 1.2 - 0.1).clamp(0, 1)
        examples = [int(i) for sequence in order.sequences(step) for i in sequence]
        total = sum(len(data.completion(i)) for i in examples)
        nll = torch.zeros(())
        for i in examples:
            x = F.layer_norm(torch.tensor(rows[i]), (32,), h.norm.weight, h.norm.bias)
            a = (h.layers[0].weight @ x + h.layers[0].bias).softmax(-1)
            parts = (a @ z).split(layout.widths)
            theta = {
                n: dense[n] + c * delta[n] for (n, c) in zip(delta, parts, strict=True)
            }  # c: input columns
            ids = torch.tensor(data.example(i), dtype=torch.long)[None]
            labels = ids.clone()
            labels[:, : int(data.prompt_lengths[i])] = -100
            out: Any = torch.func.functional_call(model, theta, kwargs={"input_ids": ids, "labels": labels})
            nll = nll + out.loss * len(data.completion(i)) / total
        closed = 1 - torch.sigmoid(log_alpha - (2 / 3) * np.log(0.1 / 1.1))
        expected = (closed.prod(0) ** (1 / method.num_experts) * owned).sum() / owned.sum()
        tau = method.sparsity_target * min(1.0, (step + 1) / (method.sparsity_warmup * order.total_steps))
        rows_of_length_1 = z / z.norm(dim=1, keepdim=True)
        apart = (rows_of_length_1 @ rows_of_length_1.T - torch.eye(len(z))).norm()
        loss = nll + method.orthogonality * apart
        for p in (*delta.values(), log_alpha, *h.parameters()):
            p.grad = None
        loss.backward(retain_graph=True)
        torch.nn.utils.clip_grad_norm_(delta.values(), o.max_grad_norm)
        rate = learning_rate(step, order.total_steps, o)
        scheduled = rate / o.learning_rate
        adamw.param_groups[0]["lr"] = method.delta_learning_rate * scheduled
        adam.param_groups[0]["lr"] = method.router_learning_rate * scheduled
        adamw.step()
        adam.step()
        cheaper = torch.autograd.grad(expected, log_alpha)[0]
        ratio = log_alpha.grad.square().mean().sqrt() / cheaper.square().mean().sqrt()
        unit = ratio if unit is None else 0.9 * unit + 0.1 * ratio
        g = log_alpha.grad - unit * (multiplier + method.sparsity_penalty * (tau - reached)) * cheaper
        now = torch.stack([part.square().mean() for part in g.split(layout.widths, dim=1)])
        momentum = g if momentum is None else 0.5 * momentum + 0.5 * g
        squares = now if squares is None else 0.9 * squares + 0.1 * now
        scale = squares.sqrt().repeat_interleave(torch.tensor(layout.widths))
        move = (momentum / scale).clamp(-5, 5)
        log_alpha.data -= method.mask_learning_rate * scheduled**0.5 * move
        log_alpha.data.clamp_(-np.log(100), np.log(100))
        reached = _share_dead(log_alpha, owned)
        growth = method.sparsity_rate / order.total_steps * (tau - reached)
        multiplier = (0.0 if growth * multiplier < 0 else multiplier) + growth
        told.append(
            {"train/loss": float(nll.detach()), "masks/multiplier": multiplier, "masks/sparsity": reached}
        )
    return told


def _share_dead(log_alpha: torch.Tensor, owned: torch.Tensor) -> float:
    """Return the share of parameters whose gate is 0 in all experts."""
    dead = ((torch.sigmoid(log_alpha.detach()) * 1.2 - 0.1).clamp(0, 1) == 0).all(0)
    return float(owned[dead].sum() / owned.sum())


def _rows(session: LocalSession) -> list[dict[str, float]]:
    return [m for _, m in session.rows if "train/loss" in m]


@pytest.mark.parametrize("form", ["factored", "merged"])
def test_training_equals_the_formulas_written_out(
    pico: Path, data_folder: Path, encoded: Path, tmp_path: Path, form: str
) -> None:
    run = small_run(pico, data_folder, METHOD, epsilon=1e-5)  # gradients of 0 +- rounding stay near 0
    session = LocalSession()
    train(small_spec(run, pico, encoded, tmp_path / "out", simoe_form=form), session)
    expected = _written_out(run, pico, encoded, tmp_path / "out" / "prompts")
    assert len(expected) == 6
    for ours, theirs in zip(_rows(session), expected, strict=True):
        for name, value in theirs.items():
            assert ours[name] == pytest.approx(value, abs=1e-4, rel=1e-4), name
    assert (
        expected[-1]["train/loss"] < expected[0]["train/loss"] - 0.1
    )  # it learns, so equality means something
    assert 0 < expected[-1]["masks/sparsity"] < 1


def test_it_starts_as_the_dense_model_whose_weights_stay(
    pico: Path, data_folder: Path, encoded: Path, tmp_path: Path
) -> None:
    run = small_run(pico, data_folder, METHOD)
    session = LocalSession()
    trainer = Trainer(small_spec(run, pico, encoded, tmp_path / "out"), session)
    dense = LocalSession()
    train(small_spec(small_run(pico, data_folder), pico, encoded, tmp_path / "dense"), dense)
    trainer.milestone()
    assert session.rows[0][1]["eval/loss"] == pytest.approx(dense.rows[0][1]["eval/loss"], abs=1e-6)
    while trainer.state.step < 6:
        trainer.step()
    frozen = dict(AutoModelForCausalLM.from_pretrained(pico).named_parameters())
    trained = dict(trainer.engine.module.model.named_parameters())
    for name, value in frozen.items():
        assert torch.equal(trained[name], value), name
        assert trained[name].grad is None
    optimised = sum(p.numel() for group in trainer.engine.optimizer.param_groups for p in group["params"])
    assert optimised == sum(
        p.numel() for name, p in frozen.items() if "embed" not in name and "lm_head" not in name
    )


@pytest.mark.parametrize("zero_stage", [0, 1, 2, 3])
@pytest.mark.parametrize("scope", ["union", "per_expert"])
def test_a_resumed_run_has_the_identical_next_losses_and_multipliers(
    pico: Path, data_folder: Path, encoded: Path, tmp_path: Path, zero_stage: int, scope: str
) -> None:
    method = METHOD.model_copy(update={"sparsity_scope": scope, "mask_learning_rate": 5.0})
    run = small_run(pico, data_folder, method, warmup_fraction=0.0)
    options = {"zero_stage": zero_stage, "checkpoint_every": 2}
    whole = LocalSession()
    measured = train(small_spec(run, pico, encoded, tmp_path / "a", **options), whole)
    stopped = LocalSession(tmp_path / "checkpoint", stop_after=4)
    with pytest.raises(KeyboardInterrupt):
        train(small_spec(run, pico, encoded, tmp_path / "a", **options), stopped)
    resumed = LocalSession(tmp_path / "checkpoint", resume=True)
    again = train(small_spec(run, pico, encoded, tmp_path / "b", **options), resumed)
    assert [_timeless(e) for e in again] == [_timeless(e) for e in measured]
    assert measured[-1]["masks/saturated_early"] % 1 > 0
    later = [_timeless(m) for m in _rows(whole)[4:]]
    assert [_timeless(m) for m in _rows(resumed)] == later
    assert later[0]["masks/multiplier"] != 0
    written = [json.loads((tmp_path / name / "masks.json").read_text()) for name in "ab"]
    assert written[0] == written[1]


def _timeless(metrics: dict[str, float]) -> dict[str, float]:
    return {name: value for name, value in metrics.items() if not name.startswith("system/")}


def test_a_checkpoint_leaves_the_frozen_weights_out(
    pico: Path, data_folder: Path, encoded: Path, tmp_path: Path
) -> None:
    session = LocalSession(tmp_path / "checkpoint")
    train(
        small_spec(small_run(pico, data_folder, METHOD), pico, encoded, tmp_path / "out", zero_stage=1),
        session,
    )
    (file,) = (tmp_path / "checkpoint").rglob("mp_rank_00_model_states.pt")
    names = torch.load(file, map_location="cpu", weights_only=False)["module"].keys()
    assert [n for n in names if n.endswith(".delta")]
    assert not [n for n in names if n.endswith((".weight", ".bias"))]


@pytest.mark.parametrize(
    "setting",
    [
        {"micro_batch": 4},
        {"activation_checkpointing": True},
        {"zero_stage": 3},
        {"zero_stage": 3, "activation_checkpointing": True},
    ],
)
def test_execution_changes_nothing(
    pico: Path, data_folder: Path, encoded: Path, tmp_path: Path, setting: dict[str, Any]
) -> None:
    run = small_run(pico, data_folder, METHOD)
    sessions = LocalSession(), LocalSession()
    train(small_spec(run, pico, encoded, tmp_path / "a", micro_batch=1), sessions[0])
    train(small_spec(run, pico, encoded, tmp_path / "b", **{"micro_batch": 1, **setting}), sessions[1])
    one, other = (_rows(session) for session in sessions)
    for a, b in zip(one, other, strict=True):
        assert b["train/loss"] == pytest.approx(a["train/loss"], abs=1e-4)
        assert 0 < a["masks/sparsity"] < 1
        assert b["masks/sparsity"] == pytest.approx(a["masks/sparsity"], abs=5e-3)


def test_bfloat16_trains_with_gates_in_float32(
    pico: Path, data_folder: Path, encoded: Path, tmp_path: Path
) -> None:
    run = small_run(pico, data_folder, METHOD, learning_rate=1e-3)
    full, half = LocalSession(), LocalSession()
    train(small_spec(run, pico, encoded, tmp_path / "full"), full)
    spec = small_spec(run.model_copy(update={"precision": "bfloat16"}), pico, encoded, tmp_path / "half")
    trainer = Trainer(spec, LocalSession())
    masks = trainer.extension
    assert isinstance(masks, MaskTrainer)
    assert {p.dtype for p in [masks.gates.log_alpha, *masks.router.parameters()]} == {torch.float32}
    assert {p.dtype for p in trainer.engine.module.model.parameters()} == {torch.bfloat16}
    train(spec, half)
    page = small_spec(spec.run, pico, encoded, tmp_path / "page", zero_stage=3, activation_checkpointing=True)
    as_the_page = LocalSession()
    train(page, as_the_page)
    for ours, exact in zip(_rows(as_the_page), _rows(half), strict=True):
        assert ours["train/loss"] == pytest.approx(exact["train/loss"], rel=0.005)
    for ours, exact in zip(_rows(half), _rows(full), strict=True):
        assert ours["train/loss"] == pytest.approx(exact["train/loss"], rel=0.02)
        assert ours["masks/sparsity"] == pytest.approx(exact["masks/sparsity"], abs=0.05)


@pytest.mark.parametrize(
    ("target", "scope"), [(0.5, "union"), (0.9, "union"), (0.5, "mean"), (0.5, "per_expert")]
)
def test_the_sparsity_target_is_reached(
    pico: Path, data_folder: Path, encoded: Path, tmp_path: Path, target: float, scope: str
) -> None:
    method = SparseInterpolation(num_experts=3, sparsity_target=target, sparsity_scope=scope)
    run = small_run(pico, data_folder, method, max_steps=60, num_epochs=30, learning_rate=1e-3)
    evaluations = train(small_spec(run, pico, encoded, tmp_path / "out"), LocalSession())
    assert evaluations[-1]["masks/sparsity"] == pytest.approx(target, abs=0.02)  # of 640 gates
    description = json.loads((tmp_path / "out" / "masks.json").read_text())
    assert np.mean(description["sparsity"][scope]) == pytest.approx(evaluations[-1]["masks/sparsity"])


@pytest.fixture(scope="module")
def two_workers(
    pico: Path, data_folder: Path, encoded: Path, tmp_path_factory: pytest.TempPathFactory
) -> dict[int, Rows]:
    """By ZeRO stage, what the first of two workers logged."""
    root, run = tmp_path_factory.mktemp("two"), small_run(pico, data_folder, METHOD)
    specs = {z: small_spec(run, pico, encoded, root / str(z), zero_stage=z) for z in (1, 3)}
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TORCH_EXTENSIONS_DIR", str(root / "compiled"))
        rows = rows_of_workers([*specs.values()])
    assert not (root / "compiled").exists()  # DeepSpeed's collectives of its own take a minute of g++
    return dict(zip(specs, rows, strict=True))


@pytest.mark.slow
@pytest.mark.parametrize("zero_stage", [1, 3])
def test_two_workers_give_the_losses_of_one(
    pico: Path,
    data_folder: Path,
    encoded: Path,
    tmp_path: Path,
    zero_stage: int,
    two_workers: dict[int, Rows],
) -> None:
    run = small_run(pico, data_folder, METHOD)
    alone = LocalSession()
    train(small_spec(run, pico, encoded, tmp_path / "one", zero_stage=0), alone)
    rows = [m for _, m in two_workers[zero_stage] if "train/loss" in m]
    last = two_workers[zero_stage][-1][1]
    for ours, one in zip(rows, _rows(alone), strict=True):
        for name in ("train/loss", "masks/multiplier", "masks/sparsity", "masks/overlap"):
            assert ours[name] == pytest.approx(one[name], abs=5e-4), name
    for name in ("eval/loss", "eval/math/loss", "eval/math/exact_match"):
        assert last[name] == pytest.approx(alone.rows[-1][1][name], abs=1e-3), name


def test_a_mask_learning_rate_that_saturates_the_gates_is_told(
    pico: Path, data_folder: Path, encoded: Path, tmp_path: Path
) -> None:
    early = {}
    for rate in (0.01, 50.0):
        method = METHOD.model_copy(update={"mask_learning_rate": rate})
        run = small_run(pico, data_folder, method, warmup_fraction=0.0)
        evaluations = train(small_spec(run, pico, encoded, tmp_path / str(rate)), LocalSession())
        early[rate] = evaluations[-1]["masks/saturated_early"]
    assert early[0.01] < 0.1 and early[50.0] > 0.5
