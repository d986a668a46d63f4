"""A sweep as a user runs it: real Ray, real DeepSpeed, real MLflow, on tiny models and data."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
from mlflow import MlflowClient
from transformers import AutoModelForCausalLM

from raymoe.config import Execution, Run, replace
from raymoe.metrics import find
from raymoe.stages import training
from raymoe.storage.store import Store
from raymoe.sweep.run import train_trial
from raymoe.tracking.metric_log import read_rows

pytestmark = pytest.mark.slow

SWEEP = """
from raymoe.config import replace
from raymoe import Sweep, main

def run(base, point):
    changes = {"method.name": point["method"], "optimization.learning_rate": point["learning_rate"]}
    return replace(base, changes)

SWEEP = Sweep("tiny", "which one?", [
    {"method": "dense", "learning_rate": 0.01},
    {"method": "su", "learning_rate": 1e30},
    {"method": "trsu", "learning_rate": 0.01},
    {"method": "simoe", "learning_rate": 0.01},
], run)

if __name__ == "__main__":
    main(SWEEP)
"""


@pytest.fixture
def user(tmp_path: Path, pico: Path, data_folder: Path) -> Iterator[User]:
    with tempfile.TemporaryDirectory(prefix="u") as short:
        yield User(tmp_path, Path(short), pico, data_folder)


class User:
    """Somebody at a terminal in an empty folder."""

    def __init__(self, folder: Path, home: Path, pico: Path, data: Path) -> None:
        self.folder = folder
        (folder / "tiny.py").write_text(SWEEP)
        (folder / "model").symlink_to(pico)  # relative paths: trials have other working folders
        (folder / "data").symlink_to(data)
        self.command = [sys.executable, "tiny.py", "--model.name", "model", "--data.train", "data"]
        self.command += ["--max-length", "128", "--batch-size", "4", "--max-steps", "6", "--num-epochs", "3"]
        self.command += [
            "--milestones",
            "0",
            "0.5",
            "1",
            "--max-new-tokens",
            "4",
            "--generation-examples",
            "2",
        ]
        self.command += ["--schedule", "constant", "--warmup-fraction", "0.9"]
        self.command += ["--checkpoint-every", "2"]
        root = str(Path(__file__).parents[1])
        self.environment = {**os.environ, "HOME": str(home), "RAY_TMPDIR": str(home), "PYTHONPATH": root}
        for name in ("RAY_ADDRESS", "MLFLOW_TRACKING_URI", "RAYMOE_STORAGE"):
            self.environment.pop(name, None)

    def start(self, *more: str) -> subprocess.Popen[str]:
        return subprocess.Popen(
            [*self.command, *more],
            cwd=self.folder,
            env=self.environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def runs(self) -> dict[str, Any]:
        client = MlflowClient(f"sqlite:///{self.folder / 'mlflow.db'}")
        experiment = client.get_experiment_by_name("raymoe")
        return {run.info.run_name: run for run in client.search_runs([experiment.experiment_id])}

    def history(self, name: str, metric: str) -> list[int]:
        client = MlflowClient(f"sqlite:///{self.folder / 'mlflow.db'}")
        return [m.step for m in client.get_metric_history(self.runs()[name].info.run_id, metric)]


def test_a_sweep_with_a_failing_trial_interrupted_and_run_again(user: User) -> None:
    first = user.start("--json")
    wait_for_step(user.folder / "runs", 1)
    first.send_signal(signal.SIGINT)
    _, stderr = first.communicate(timeout=200)
    assert first.returncode == 130, stderr
    assert "Traceback" not in stderr

    second = user.start("--json")
    stdout, stderr = second.communicate(timeout=500)
    assert second.returncode == 1, stderr
    rows = {row["trial"]: row for row in json.loads(stdout)}
    assert {name.split("-")[0]: row["status"] for name, row in rows.items()} == {
        "dense": "FINISHED",
        "su": "FAILED",
        "trsu": "FINISHED",
        "simoe": "FINISHED",
    }
    failed = rows["su-1e+30"]
    assert "loss is" in failed["error"] and "at step" in failed["error"]
    check_mlflow(user, rows)

    third = user.start()
    stdout, stderr = third.communicate(timeout=200)
    assert "4 trials, 3 of them already in" in stderr
    assert "dense-0.01: started" not in stderr
    assert "FAILED" in stdout and "FINISHED" in stdout
    assert user.history("dense-0.01", "train/loss") == [1, 2, 3, 4, 5, 6]
    check_export(user, rows["simoe-0.01"])


def check_export(user: User, row: dict[str, Any]) -> None:
    """What SIMoE was trained to is a plain model for a domain; an unknown domain is told the known ones."""
    settings = [word for word in user.command[2:] if word != "0.9"]
    settings[settings.index("--warmup-fraction")] = "--warmup-fraction=0.9"
    command = [sys.executable, "-m", "raymoe.cli", "export", *settings, "--method", "simoe"]
    command += ["--optimization.learning-rate", "0.01", "--out", "plain", "--merge-domain"]
    told = [
        subprocess.run(
            [*command, domain], cwd=user.folder, env=user.environment, capture_output=True, text=True
        )
        for domain in ("sql", "math")
    ]
    assert told[0].returncode == 2 and "code, math, text" in told[0].stderr
    assert told[1].returncode == 0, told[1].stderr
    assert type(AutoModelForCausalLM.from_pretrained(user.folder / "plain")).__name__ == "LlamaForCausalLM"
    assert row["evaluations"][-1]["masks/sparsity"] >= 0


def check_mlflow(user: User, rows: dict[str, Any]) -> None:
    """One parent, a child per trial under its true status, every step exactly once, and usable models."""
    runs = user.runs()
    (parent,) = [run for name, run in runs.items() if name.startswith("tiny-")]
    assert parent.info.status == "FAILED"
    assert set(runs) - {parent.info.run_name} == set(rows)
    for name, row in rows.items():
        run = runs[name]
        assert run.info.status == row["status"]
        assert run.data.tags["mlflow.parentRunId"] == parent.info.run_id
        assert set(run.data.params) == {"method", "learning_rate"}
        assert [metric for metric in run.data.metrics if find(metric) is None] == []
    for name in ("dense-0.01", "trsu-0.01"):
        assert user.history(name, "train/loss") == [1, 2, 3, 4, 5, 6]
        assert user.history(name, "eval/loss") == [0, 3, 6]
        final = rows[name]["evaluations"][-1]["eval/loss"]
        assert runs[name].data.metrics["final/loss"] == pytest.approx(final)
    simoe = runs["simoe-0.01"]
    assert (
        simoe.data.metrics["final/masks/sparsity"] == rows["simoe-0.01"]["evaluations"][-1]["masks/sparsity"]
    )
    client = MlflowClient(f"sqlite:///{user.folder / 'mlflow.db'}")
    figures = {Path(f.path).name for f in client.list_artifacts(simoe.info.run_id, "figures")}
    assert figures == {"overlap.png", "where.png", "activation.png", "constraint.png", "size.png"}
    assert user.history("simoe-0.01", "masks/multiplier") == [1, 2, 3, 4, 5, 6]
    kinds = {
        n: type(AutoModelForCausalLM.from_pretrained(rows[n]["model"])).__name__
        for n in rows
        if rows[n]["model"] and n != "simoe-0.01"
    }
    assert kinds == {"dense-0.01": "LlamaForCausalLM", "trsu-0.01": "MixtralForCausalLM"}


def wait_for_step(storage: Path, step: int, seconds: float = 400) -> Path:
    """The metric log that first reaches `step`."""
    deadline = time.time() + seconds
    while time.time() < deadline:
        for log in storage.glob("checkpoints/*/metrics.jsonl"):
            if any(row["step"] >= step for row in read_rows(log)):
                return log
        time.sleep(0.05)
    raise AssertionError(f"no training reached step {step} in {seconds} s")


def test_a_killed_worker_goes_on_with_the_identical_losses(
    local_ray: None, pico: Path, data_folder: Path, tmp_path: Path
) -> None:
    base = Run(
        model={"name": str(pico)},  # type: ignore[arg-type]
        data={"train": str(data_folder), "max_length": 128},  # type: ignore[arg-type]
        optimization={"batch_size": 4, "max_steps": 100, "num_epochs": 50},  # type: ignore[arg-type]
        evaluation={"milestones": (1.0,), "generation_examples": 0},  # type: ignore[arg-type]
    )
    run = replace(base, {"method.num_experts": 4})
    options = Execution(workers=2, cpus_per_worker=1, checkpoint_every=2, zero_stage=2).model_dump()
    losses = {}
    for name, kill in (("calm", False), ("killed", True)):
        root = tmp_path / name
        payload = {"key": run.model_dump(mode="json")}
        victims: list[int] = []
        killer = threading.Thread(target=kill_a_worker, args=(root, 5, victims))
        if kill:
            killer.start()
        train_trial({"key": "key"}, payload, options, str(root))
        if kill:
            killer.join()
            assert len(victims) == 1
        output = Store(root).at(training(run).path(Store(root)))
        assert output is not None
        losses[name] = [
            (row["step"], row["metrics"]["train/loss"])
            for row in read_rows(output.fetch() / "metrics.jsonl")
            if "train/loss" in row["metrics"]
        ]
    assert [step for step, _ in losses["killed"]] == list(range(1, 101))
    assert losses["killed"] == losses["calm"]


def kill_a_worker(storage: Path, step: int, victims: list[int]) -> None:
    """kill -9 one of this Ray's two training workers as soon as training reached `step`; note its id."""
    wait_for_step(storage, step)
    workers = [
        process
        for process in psutil.Process().children(recursive=True)
        if any("RayTrainWorker" in part for part in process.cmdline())
    ]
    if len(workers) == 2:
        os.kill(workers[0].pid, signal.SIGKILL)
        victims.append(workers[0].pid)
