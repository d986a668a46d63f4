"""The training loop against a bare PyTorch loop, and against itself resumed and on other numbers of workers."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path

import pytest
import torch
from support.local_session import LENGTH, LocalSession, small_run, small_spec
from support.workers import Rows, rows_of_workers
from transformers import AutoModelForCausalLM

from raymoe.config import Run
from raymoe.data.instructions import Encoded
from raymoe.data.packing import collate
from raymoe.evaluate.folder import evaluate_folder
from raymoe.methods import Dense, SparseUpcycling
from raymoe.train.order import Order, learning_rate
from raymoe.train.spec import TrainingFailed
from raymoe.train.worker import Trainer, train

pytestmark = pytest.mark.usefixtures("one_process")


def _bare_loop(run: Run, pico: Path, encoded: Path) -> list[float]:
    """Train likewise with torch and stock transformers alone, one example at a time; return the losses."""
    model = AutoModelForCausalLM.from_pretrained(pico, attn_implementation="eager")
    o = run.optimization
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=1, betas=(o.beta1, o.beta2), eps=o.epsilon, weight_decay=o.weight_decay
    )
    data = Encoded.load(encoded / "train")
    order = Order(data, LENGTH, o, run.seed)
    losses = []
    for step in range(order.total_steps):
        examples = [int(i) for sequence in order.sequences(step) for i in sequence]
        total = sum(len(data.completion(i)) for i in examples)
        loss = torch.zeros(())
        for i in examples:
            ids = torch.tensor(data.example(i), dtype=torch.long)[None]
            labels = ids.clone()
            labels[:, : int(data.prompt_lengths[i])] = -100
            count = len(data.completion(i))
            loss = loss + model(input_ids=ids, labels=labels).loss * count / total
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), o.max_grad_norm)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, order.total_steps, o)
        optimizer.step()
        losses.append(float(loss))
    return losses


@pytest.mark.parametrize("zero_stage", [0, 1])
def test_dense_training_equals_a_bare_pytorch_loop(
    pico: Path, data_folder: Path, encoded: Path, tmp_path: Path, zero_stage: int
) -> None:
    run = small_run(pico, data_folder, weight_decay=0.1)
    session = LocalSession()
    train(small_spec(run, pico, encoded, tmp_path / "out", zero_stage=zero_stage), session)
    expected = _bare_loop(run, pico, encoded)
    assert len(expected) == 6
    assert list(session.losses().values()) == pytest.approx(expected, abs=2e-4)
    assert expected[-1] < expected[0] - 0.1  # it learns, so equality means something


def test_a_sparse_run_starts_where_the_dense_one_does(
    pico: Path, data_folder: Path, encoded: Path, tmp_path: Path
) -> None:
    first = {}
    for method in (Dense(), SparseUpcycling(num_experts=4, load_balance_alpha=0.0)):
        session = LocalSession()
        train(
            small_spec(small_run(pico, data_folder, method), pico, encoded, tmp_path / method.name), session
        )
        first[method.name] = session.rows
    dense, sparse = first["dense"], first["su"]
    assert sparse[0][1]["eval/loss"] == pytest.approx(dense[0][1]["eval/loss"], abs=1e-5)
    assert sparse[1][1]["train/loss"] == pytest.approx(dense[1][1]["train/loss"], abs=1e-5)
    assert sparse[-1][1]["eval/loss"] != pytest.approx(dense[-1][1]["eval/loss"], abs=1e-5)


def test_load_balance_weight_lowers_the_load_balance_loss(
    pico: Path, data_folder: Path, encoded: Path, tmp_path: Path
) -> None:
    last = {}
    for alpha in (0.0, 10.0):
        session = LocalSession()
        method = SparseUpcycling(num_experts=4, load_balance_alpha=alpha, router_std=1.0)
        train(small_spec(small_run(pico, data_folder, method), pico, encoded, tmp_path / str(alpha)), session)
        last[alpha] = [m["train/load_balance_loss"] for _, m in session.rows if "train/loss" in m]
    assert last[0.0][0] == pytest.approx(last[10.0][0], abs=1e-5)  # the same start
    assert last[10.0][-1] < last[0.0][-1] - 0.01


@pytest.mark.parametrize("zero_stage", [0, 1, 2, 3])
def test_a_resumed_run_has_the_identical_next_losses(
    pico: Path, data_folder: Path, encoded: Path, tmp_path: Path, zero_stage: int
) -> None:
    run = small_run(pico, data_folder, SparseUpcycling(num_experts=4))
    spec = small_spec(run, pico, encoded, tmp_path / "a", zero_stage=zero_stage, checkpoint_every=2)
    whole = LocalSession()
    train(spec, whole)
    stopped = LocalSession(tmp_path / "checkpoint", stop_after=4)
    with pytest.raises(KeyboardInterrupt):
        train(spec, stopped)
    resumed = LocalSession(tmp_path / "checkpoint", resume=True)
    again = small_spec(run, pico, encoded, tmp_path / "b", zero_stage=zero_stage, checkpoint_every=2)
    evaluations = train(again, resumed)
    assert resumed.resumed_at == 4
    assert resumed.losses() == {step: loss for step, loss in whole.losses().items() if step > 4}
    assert [e["step"] for e in evaluations] == [0, 3, 6]
    assert evaluations == json.loads((tmp_path / "a" / "evaluations.json").read_text()) or _equal_but_time(
        evaluations, json.loads((tmp_path / "a" / "evaluations.json").read_text())
    )


def _equal_but_time(a: list[dict[str, float]], b: list[dict[str, float]]) -> bool:
    return all(x[k] == y[k] for x, y in zip(a, b, strict=True) for k in x if not k.startswith("system/"))


def test_the_exported_folder_measures_in_stock_transformers_as_in_training(
    pico: Path, data_folder: Path, encoded: Path, tmp_path: Path
) -> None:
    run = small_run(pico, data_folder, SparseUpcycling(num_experts=4))
    evaluations = train(small_spec(run, pico, encoded, tmp_path / "out"), LocalSession())
    measured = evaluate_folder(tmp_path / "out" / "model", encoded, run)
    for name, value in measured.items():
        assert value == pytest.approx(evaluations[-1][name], abs=1e-5), name
    model, loading = AutoModelForCausalLM.from_pretrained(
        tmp_path / "out" / "model", output_loading_info=True
    )
    assert type(model).__name__ == "MixtralForCausalLM"
    assert not any(loading[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))


def test_a_loss_that_is_no_number_stops_with_the_step_and_keeps_the_checkpoint(
    pico: Path, data_folder: Path, encoded: Path, tmp_path: Path
) -> None:
    run = small_run(pico, data_folder, learning_rate=1e30, warmup_fraction=0.9, schedule="constant")
    session = LocalSession(tmp_path / "checkpoint")
    with pytest.raises(TrainingFailed, match=r"loss is (nan|inf) at step \d"):
        train(small_spec(run, pico, encoded, tmp_path / "out", checkpoint_every=1), session)
    bad = min(step for step, loss in session.losses().items() if not math.isfinite(loss))
    kept = Trainer(
        small_spec(run, pico, encoded, tmp_path / "again"), LocalSession(tmp_path / "checkpoint", True)
    )
    kept.restore()
    assert kept.state.step == bad - 1


def test_bfloat16_keeps_rotary_frequencies_and_learns_what_float32_learns(
    pico: Path, data_folder: Path, encoded: Path, tmp_path: Path
) -> None:
    run = small_run(pico, data_folder, SparseUpcycling(num_experts=4), learning_rate=1e-3)
    full, half = LocalSession(), LocalSession()
    train(small_spec(run, pico, encoded, tmp_path / "full"), full)
    spec = small_spec(run.model_copy(update={"precision": "bfloat16"}), pico, encoded, tmp_path / "half")
    trainer = Trainer(spec, LocalSession())
    rotary = trainer.engine.module.model.model.rotary_emb
    reference = AutoModelForCausalLM.from_pretrained(pico).model.rotary_emb
    assert torch.equal(rotary.inv_freq, reference.inv_freq)
    assert trainer.engine.module.model.lm_head.weight.dtype is torch.bfloat16
    train(spec, half)
    assert list(half.losses().values()) == pytest.approx(list(full.losses().values()), rel=0.02)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "half" / "model")
    assert model.dtype is torch.bfloat16


def test_activation_checkpointing_changes_nothing(
    pico: Path, data_folder: Path, encoded: Path, tmp_path: Path
) -> None:
    run = small_run(pico, data_folder, SparseUpcycling(num_experts=4))
    losses = []
    for on in (False, True):
        session = LocalSession()
        train(small_spec(run, pico, encoded, tmp_path / str(on), activation_checkpointing=on), session)
        losses.append(list(session.losses().values()))
    assert losses[0] == pytest.approx(losses[1], abs=1e-6)


@pytest.fixture(scope="module")
def two_workers(
    pico: Path, data_folder: Path, encoded: Path, tmp_path_factory: pytest.TempPathFactory
) -> dict[int, tuple[Rows, Path]]:
    """By ZeRO stage, what the first of two workers logged, and the model that they wrote."""
    method = SparseUpcycling(num_experts=4, load_balance_alpha=0.1)
    root, run = tmp_path_factory.mktemp("two"), small_run(pico, data_folder, method)
    specs = {z: small_spec(run, pico, encoded, root / str(z), zero_stage=z) for z in (1, 2, 3)}
    rows = rows_of_workers([*specs.values()])
    return {z: (own, root / str(z) / "model") for z, own in zip(specs, rows, strict=True)}


@pytest.mark.slow
@pytest.mark.parametrize("zero_stage", [1, 2, 3])
def test_two_workers_give_the_losses_of_one(
    pico: Path,
    data_folder: Path,
    encoded: Path,
    tmp_path: Path,
    zero_stage: int,
    two_workers: dict[int, tuple[Rows, Path]],
) -> None:
    run = small_run(pico, data_folder, SparseUpcycling(num_experts=4, load_balance_alpha=0.1))
    alone = LocalSession()
    train(small_spec(run, pico, encoded, tmp_path / "one", zero_stage=0), alone)
    rows, model = two_workers[zero_stage]
    losses, last = [m["train/loss"] for _, m in rows if "train/loss" in m], rows[-1][1]
    assert losses == pytest.approx(list(alone.losses().values()), abs=1e-4)
    for name in ("eval/loss", "eval/math/loss", "eval/math/exact_match", "routing/math/load/0"):
        assert last[name] == pytest.approx(alone.rows[-1][1][name], abs=1e-3), name
    one, two = (
        AutoModelForCausalLM.from_pretrained(m).state_dict() for m in (tmp_path / "one" / "model", model)
    )
    assert one.keys() == two.keys()
    for name in one:
        torch.testing.assert_close(two[name], one[name], atol=2e-3, rtol=0, msg=name)


def test_padding_does_not_reach_the_loss(encoded: Path, pico: Path) -> None:
    """Examples have the same loss in packed sequences of any length."""
    from raymoe.models.causal_loss import CausalLoss
    from raymoe.models.packed_attention import PACKED_ATTENTION

    data = Encoded.load(encoded / "train")
    model = CausalLoss(AutoModelForCausalLM.from_pretrained(pico, attn_implementation=PACKED_ATTENTION))
    import numpy as np

    together = collate(data, [np.array([0, 1])], LENGTH * 4)
    apart = collate(data, [np.array([0]), np.array([1])], LENGTH * 2)
    torch.testing.assert_close(model(together)[0], model(apart)[0], atol=1e-5, rtol=0)


def test_parameters_that_overflow_in_the_last_step_are_not_published(
    pico: Path, data_folder: Path, encoded: Path, tmp_path: Path
) -> None:
    run = small_run(
        pico, data_folder, learning_rate=1e38, max_steps=1, schedule="constant", warmup_fraction=0
    )
    session = LocalSession(tmp_path / "checkpoint")
    with pytest.raises(TrainingFailed, match=r"loss is nan|not finite after step 1"):
        train(small_spec(run, pico, encoded, tmp_path / "out"), session)
    assert not (tmp_path / "out" / "model").exists()
    assert not (tmp_path / "checkpoint").exists()


def test_a_checkpoint_goes_on_at_another_zero_stage_only_where_deepspeed_can_read_it(
    pico: Path, data_folder: Path, encoded: Path, tmp_path: Path
) -> None:
    run, checkpoint = small_run(pico, data_folder), tmp_path / "checkpoint"
    whole = LocalSession()
    train(small_spec(run, pico, encoded, tmp_path / "whole"), whole)
    with pytest.raises(KeyboardInterrupt):
        train(
            small_spec(run, pico, encoded, tmp_path / "a", zero_stage=1),
            LocalSession(checkpoint, stop_after=3),
        )
    with pytest.raises(
        TrainingFailed, match=r"written with execution.zero_stage 1, this run has 3: resume with 1"
    ):
        train(
            small_spec(run, pico, encoded, tmp_path / "b", zero_stage=3),
            LocalSession(checkpoint, resume=True),
        )
    resumed = LocalSession(checkpoint, resume=True)
    train(small_spec(run, pico, encoded, tmp_path / "c", zero_stage=2), resumed)
    assert list(resumed.losses().values()) == pytest.approx(list(whole.losses().values())[3:], abs=1e-6)


def test_a_checkpoint_of_another_run_or_model_is_refused_in_one_line(
    pico: Path, data_folder: Path, encoded: Path, tmp_path: Path
) -> None:
    run, checkpoint = small_run(pico, data_folder), tmp_path / "checkpoint"
    with pytest.raises(KeyboardInterrupt):
        train(small_spec(run, pico, encoded, tmp_path / "a"), LocalSession(checkpoint, stop_after=3))
    other = shutil.copytree(pico, tmp_path / "other")
    config = json.loads((other / "config.json").read_text())
    (other / "config.json").write_text(json.dumps({**config, "rms_norm_eps": 0.1}))
    for name, run_, dense in (
        ("rate", small_run(pico, data_folder, learning_rate=1e-3), pico),
        ("model", run, other),
    ):
        with pytest.raises(
            TrainingFailed, match=r"^the checkpoint .* belongs to another run or another model"
        ):
            train(small_spec(run_, dense, encoded, tmp_path / name), LocalSession(checkpoint, resume=True))


def test_bfloat16_does_not_depend_on_the_micro_batch(
    pico: Path, data_folder: Path, encoded: Path, tmp_path: Path
) -> None:
    run = small_run(pico, data_folder, learning_rate=1e-3).model_copy(update={"precision": "bfloat16"})
    norms = []
    for micro_batch in (1, 4):
        session = LocalSession()
        train(small_spec(run, pico, encoded, tmp_path / str(micro_batch), micro_batch=micro_batch), session)
        norms.append([m["train/grad_norm"] for _, m in session.rows if "train/grad_norm" in m])
    assert norms[0] == pytest.approx(norms[1], rel=5e-3)


def test_a_run_that_is_given_up_ends_at_its_next_milestone(
    pico: Path, data_folder: Path, encoded: Path, tmp_path: Path
) -> None:
    class GivenUp(LocalSession):
        def stop_requested(self) -> bool:
            return len(self.losses()) > 0

    session = GivenUp()
    with pytest.raises(TrainingFailed, match=r"^stopped early$"):
        train(small_spec(small_run(pico, data_folder), pico, encoded, tmp_path / "out"), session)
    assert list(session.losses()) == [1, 2, 3]
    assert not (tmp_path / "out" / "model").exists()
