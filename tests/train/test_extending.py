"""docs/extending.md: its method, added to a copy of the package as described, trains, resumes and exports."""

from __future__ import annotations

import json
import math
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

ROOT = Path(__file__).parents[2]
BLOCK = re.compile(r"`([\w/]+\.py)`:\n\n```(python|diff)\n(.*?)```", re.DOTALL)
STEPS, HALF, Z_LOSS = 6, 3, 10.0
SCRIPT = f"""
import json, os, sys
from contextlib import suppress
from pathlib import Path

import torch
from support.local_session import LocalSession, environment, free_port, small_spec, small_run
from torch import multiprocessing as mp

from raymoe.config import Run, replace, validate
from raymoe.data.instructions import prepare
from raymoe.train import worker

pico, data, out = map(Path, sys.argv[1:])


def run(z_loss):
    given = {{"name": "tempered", "num_experts": 4, "z_loss": z_loss, "gating": "softmax"}}
    method = validate(Run, {{"method": given}}).method
    return replace(small_run(pico, data, method, max_steps={STEPS}), {{"evaluation.milestones": [0.5, 1.0]}})


def train(name, z_loss, rank=0, world=1, checkpoint=None, resume=False, stop_after=None, **execution):
    session = LocalSession(checkpoint, resume, stop_after)
    session.rank, session.world_size = rank, world
    spec = small_spec(run(z_loss), pico, out / "data", out / name, **execution)
    trainer = worker.Trainer(spec, session)
    trainer.restore()
    with suppress(KeyboardInterrupt):
        while trainer.state.step < trainer.order.total_steps:
            trainer.milestone()
            trainer.step()
        trainer.milestone()
        trainer.finish()
    if rank == 0:
        (out / (name + ".json")).write_text(json.dumps(session.rows))
    return trainer


def two(rank, port):
    environment(os.environ.__setitem__, rank, 2, port)
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", rank=rank, world_size=2)
    for name, resume, stop in (("zero3-first", False, {HALF}), ("zero3", True, None)):
        train(name, {Z_LOSS}, rank, 2, out / "zero3-checkpoint", resume, stop, zero_stage=3)
        torch.distributed.barrier()


if __name__ == "__main__":
    torch.set_num_threads(1)
    environment(os.environ.__setitem__, 0, 1, free_port())
    prepare(run(0).data, pico, out / "data", corpus=None, seed=0)
    free = train("free", 0.0)
    whole = train("whole", {Z_LOSS})
    model = whole.engine.module.model
    scales = [float(p) for name, p in model.named_parameters() if name.endswith("log_scale")]
    ids = torch.arange(40)[None]
    model.set_attn_implementation("sdpa")
    with torch.no_grad():
        logits = model.eval()(ids).logits
    torch.save({{"scales": scales, "logits": logits}}, out / "whole.pt")
    train("first", {Z_LOSS}, checkpoint=out / "checkpoint", stop_after={HALF})
    train("resumed", {Z_LOSS}, checkpoint=out / "checkpoint", resume=True)
    mp.spawn(two, (free_port(),), nprocs=2)
"""


def with_hunks(text: str, diff: str) -> str:
    """Return `text` patched with a diff without line numbers, of which each hunk fits in exactly one place."""
    for hunk in diff.split("@@\n"):
        lines = [line or " " for line in hunk.splitlines()]
        old, new = ("".join(f"{x[1:]}\n" for x in lines if x[0] in kept) for kept in (" -", " +"))
        assert text.count(old) == 1, f"the page's hunk does not fit:\n{old}"
        text = text.replace(old, new)
    return text


@pytest.fixture(scope="module")
def extended(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with a copy of the package to which the page's method was added, in two files."""
    root = tmp_path_factory.mktemp("extended")
    shutil.copytree(ROOT / "raymoe", root / "raymoe", ignore=shutil.ignore_patterns("__pycache__"))
    blocks = BLOCK.findall((ROOT / "docs" / "extending.md").read_text())
    assert [(file, kind) for file, kind, _ in blocks] == [
        ("raymoe/methods.py", "diff"),
        ("raymoe/train/tempered.py", "python"),
    ]
    for name, kind, content in blocks:
        file = root / name
        file.write_text(with_hunks(file.read_text(), content) if kind == "diff" else content)
    return root


def run(extended: Path, *arguments: str) -> str:
    environment = {**os.environ, "PYTHONPATH": f"{extended}:{ROOT / 'tests'}"}
    command = [sys.executable, *arguments]
    done = subprocess.run(command, env=environment, cwd=extended, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def trained(extended: Path, pico: Path, data_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the results of the page's method: `free` (no z-loss), `whole`, `first`, `resumed`; also with ZeRO-3."""
    out = tmp_path_factory.mktemp("trained")
    (extended / "script.py").write_text(SCRIPT)
    run(extended, "script.py", str(pico), str(data_folder), str(out))
    return out


def steps(trained: Path, name: str) -> dict[int, dict[str, float]]:
    """Return the metrics of every training step."""
    rows: list[tuple[int, dict[str, float]]] = json.loads((trained / f"{name}.json").read_text())
    return {step: metrics for step, metrics in rows if "train/loss" in metrics}


@pytest.mark.slow
def test_its_loss_is_the_formula_and_holds_the_logits_down(trained: Path) -> None:
    """With small random rows and four experts the initial logits are near 0, so the z-loss is near (log 4)^2."""
    whole, free = steps(trained, "whole"), steps(trained, "free")
    assert whole[1]["train/router_z_loss"] == pytest.approx(math.log(4) ** 2, rel=0.1)
    assert whole[1]["train/router_z_loss"] == pytest.approx(free[1]["train/router_z_loss"], rel=1e-6)
    assert whole[STEPS]["train/router_z_loss"] < free[STEPS]["train/router_z_loss"]
    assert "train/load_balance_loss" in whole[1]


@pytest.mark.slow
def test_its_parameters_are_trained_and_end_in_a_stock_model(trained: Path) -> None:
    result: dict[str, Any] = torch.load(trained / "whole.pt", weights_only=True)
    assert len(result["scales"]) == 2 and all(abs(scale) > 1e-4 for scale in result["scales"])
    stock = AutoModelForCausalLM.from_pretrained(trained / "whole" / "model").eval()
    assert type(stock).__name__ == "Qwen2MoeForCausalLM"
    with torch.no_grad():
        logits = stock(torch.arange(40)[None]).logits
    torch.testing.assert_close(logits, result["logits"], atol=1e-4, rtol=1e-4)


@pytest.mark.slow
def test_it_goes_on_where_it_was_interrupted(trained: Path) -> None:
    whole, resumed = steps(trained, "whole"), steps(trained, "resumed")
    assert list(resumed) == list(range(HALF + 1, STEPS + 1))
    for step, metrics in resumed.items():
        for name in ("train/loss", "train/router_z_loss", "train/grad_norm"):
            assert metrics[name] == whole[step][name], (step, name)


@pytest.mark.slow
def test_two_workers_under_zero_3_do_the_same_interrupted_or_not(trained: Path) -> None:
    whole, both = steps(trained, "whole"), steps(trained, "zero3-first") | steps(trained, "zero3")
    assert list(both) == list(whole)
    for step, metrics in both.items():
        for name in ("train/loss", "train/router_z_loss"):
            assert metrics[name] == pytest.approx(whole[step][name], abs=1e-4), (step, name)
    one, two = (
        AutoModelForCausalLM.from_pretrained(trained / n / "model").state_dict() for n in ("whole", "zero3")
    )
    for name, tensor in one.items():
        torch.testing.assert_close(two[name], tensor, atol=2e-3, rtol=0, msg=name)


def test_the_command_line_knows_it(extended: Path, pico: Path, data_folder: Path) -> None:
    given = ["--method", "tempered", "--z-loss", "0.3", "--model.name", str(pico), "--dry-run"]
    out = run(extended, "-m", "raymoe.cli", "train", "--data.train", str(data_folder), *given)
    assert "tempered-2" in out
    assert "--method.z-loss" in run(extended, "-m", "raymoe.cli", "train", "--help")
