"""A sweep whose processes are killed one after the other on a real cluster: nothing is lost, no result differs."""

from __future__ import annotations

import json
import random
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import chaos
import pytest
from live_cluster import Cluster
from support.local_session import LocalSession, environment, free_port

from raymoe.config import Execution, Run
from raymoe.train.spec import WorkerSpec
from raymoe.train.worker import train

pytestmark = pytest.mark.slow
STEPS = 200
"""More than the trials take between two faults, however fast the machine."""
SWEEP = """
from raymoe.config import replace
from raymoe import Sweep

def run(base, point):
    return replace(base, {"method.name": point["method"]})

SWEEP = Sweep("tiny", "which one?", [{"method": "dense"}, {"method": "simoe"}], run)
"""


@pytest.fixture
def cluster(tmp_path: Path) -> Iterator[Cluster]:
    with Cluster(tmp_path / "cluster", environment={"PYTHONPATH": str(chaos.ROOT)}) as cluster:
        for _ in range(2):
            cluster.add_node(num_cpus=1)
        yield cluster


def settings(folder: Path, pico: Path, data: Path) -> list[str]:
    words = ["--model.name", str(pico), "--data.train", str(data), "--max-length", "128", "--batch-size", "8"]
    words += ["--max-steps", str(STEPS), "--num-epochs", "1000", "--milestones", "0.5", "1", "--no-gpu"]
    words += ["--generation-examples", "0", "--workers", "1", "--cpus-per-worker", "1", "--micro-batch", "1"]
    return [*words, "--checkpoint-every", "4", "--max-failures", "3", "--storage", str(folder / "runs")]


def undisturbed(
    storage: Path, row: Mapping[str, Any], monkeypatch: pytest.MonkeyPatch
) -> list[dict[str, float]]:
    """Return the evaluations of the same run in one process, without Ray."""
    environment(monkeypatch.setenv, 0, 1, free_port())
    trained = Path(row["model"]).parent
    run = Run.model_validate_json((trained / "run.json").read_text())
    (data,) = storage.glob("instructions-*")
    prompts = next(storage.glob("prompts-*")) if run.method.name == "simoe" else None
    out = storage / f"alone-{run.method.name}"
    out.mkdir()
    spec = WorkerSpec(run, Execution(micro_batch=1), Path(run.model.name), None, data, out, prompts)
    return train(spec, LocalSession())


def test_a_sweep_whose_parts_are_killed(
    cluster: Cluster, pico: Path, data_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sweep = tmp_path / "tiny.py"
    sweep.write_text(SWEEP)
    words = settings(tmp_path, pico, data_folder)
    database = f"sqlite:///{tmp_path / 'mlflow.db'}"
    sweeping = chaos.Sweeping(words, cluster, tmp_path / "rough", database, sweep)
    try:
        faults = chaos.Faults(cluster, None, sweeping, random.Random(0))
        kinds = ["worker", "trial_driver", "disk", "controller", "job", "head", "node"]
        hit = chaos.disturb(
            faults, kinds, lambda line: print(time.strftime("%X"), line, flush=True), pause=0.5
        )
        rows = chaos.finish(sweeping)
    finally:
        sweeping.process.kill()
    assert hit == kinds
    assert {name: row["status"] for name, row in rows.items()} == {"dense": "FINISHED", "simoe": "FINISHED"}
    assert chaos.gaps(database, STEPS, trials=2) == []
    for name, row in rows.items():
        reference = {"evaluations": undisturbed(tmp_path / "runs", row, monkeypatch)}
        assert chaos.differing({name: row}, {name: json.loads(json.dumps(reference))}) == []
