"""Workers that come and go during a run, on a real cluster: nodes announce that they leave, are killed and added."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from itertools import groupby
from pathlib import Path

import pytest
from live_cluster import Cluster
from support.local_session import LocalSession, environment, free_port, small_run

from raymoe.config import Execution
from raymoe.methods import SparseUpcycling
from raymoe.tracking.metric_log import read_rows
from raymoe.train.spec import WorkerSpec
from raymoe.train.worker import train

pytestmark = pytest.mark.slow
ENDLESS = 50_000
"""More steps than any machine finishes before the nodes have come and gone."""
AGAIN = 20
"""Steps to wait for after workers were added."""
SNAPSHOT = "checkpoint_manager_snapshot.json"
"""Ray Train's list of checkpoints; a run can only resume from those in it."""
ROOT = Path(__file__).parents[2]


@pytest.fixture
def cluster(tmp_path: Path) -> Iterator[Cluster]:
    quick = {"PYTHONPATH": str(ROOT), "RAY_TRAIN_PREEMPTION_POLL_INTERVAL_S": "0.5"}
    with Cluster(tmp_path / "cluster", environment=quick) as cluster:
        yield cluster


def command(folder: Path, pico: Path, data: Path, *more: str) -> list[str]:
    words = ["--method", "su", "--model.name", str(pico), "--data.train", str(data), "--storage", str(folder)]
    words += ["--max-length", "128", "--batch-size", "8", "--micro-batch", "1"]
    words += ["--zero-stage", "1", "--no-gpu"]
    words += ["--max-steps", str(ENDLESS), "--num-epochs", str(ENDLESS), "--milestones", "1.0"]
    words += ["--generation-examples", "0", "--optimization.learning-rate", "1e-4"]
    words += ["--optimization.schedule", "constant", "--optimization.warmup-fraction", "0"]
    return [sys.executable, "-m", "raymoe.cli", "train", *words, *more]


class Watch:
    """Follows the logged steps of a run and the number of workers that took them."""

    def __init__(self, storage: Path, process: subprocess.Popen[str]) -> None:
        self.storage, self.process = storage, process
        self.seen: list[tuple[int, int]] = []

    def until(self, reached: Callable[[], bool], seconds: float = 300) -> None:
        deadline = time.monotonic() + seconds
        while not reached():
            assert self.process.poll() is None, self.process.communicate()[1][-4000:]
            assert time.monotonic() < deadline, self.seen[-3:]
            for file in self.storage.glob("checkpoints/*/metrics.jsonl"):
                rows = [r for r in read_rows(file) if "system/workers" in r["metrics"]]
                if (
                    rows
                    and (now := (rows[-1]["step"], int(rows[-1]["metrics"]["system/workers"])))
                    not in self.seen[-1:]
                ):
                    self.seen.append(now)
            time.sleep(0.05)

    def attempts(self) -> list[list[tuple[int, int]]]:
        """Return the steps grouped into stretches with the same number of workers."""
        return [list(some) for _, some in groupby(self.seen, key=lambda now: now[1])]


def test_a_run_goes_on_while_nodes_leave_and_come(
    cluster: Cluster, pico: Path, data_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cluster.add_node(num_cpus=1, resources={"first": 1})
    leaving = cluster.add_node(num_cpus=1, resources={"leaving": 1})
    storage = tmp_path / "elastic"
    elastic = ["--workers", "1", "2", "--cpus-per-worker", "1", "--resize-interval", "2"]
    run = subprocess.Popen(
        command(storage, pico, data_folder, *elastic, "--address", cluster.address),
        cwd=tmp_path,
        env=cluster.environment,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )
    watch = Watch(storage, run)
    try:
        watch.until(lambda: bool(watch.seen) and watch.seen[-1] >= (5, 2))
        announce(cluster, "leaving")
        watch.until(lambda: any(storage.glob(f"checkpoints/*/{SNAPSHOT}")))  # a checkpoint, and none was due
        leaving.kill()
        watch.until(lambda: watch.seen[-1][1] == 1)
        cluster.add_node(num_cpus=1)
        watch.until(lambda: len(watch.attempts()) == 3 and len(watch.attempts()[-1]) > AGAIN)
        logged = losses(storage)
    finally:
        run.kill()
    print([(a[0], a[-1]) for a in watch.attempts()])
    first, then, *_ = watch.attempts()
    assert {workers for _, workers in first} == {2} and then[0][0] > 5
    environment(monkeypatch.setenv, 0, 1, free_port())
    undisturbed = alone(pico, data_folder, storage, len(logged))
    apart = max(abs(undisturbed[step] - logged[step]) for step in logged)
    print(len(logged), apart)
    assert apart < 1e-4


def losses(storage: Path) -> dict[int, float]:
    """Return the logged losses by step."""
    (file,) = storage.glob("checkpoints/*/metrics.jsonl")
    rows = [r for r in read_rows(file) if "train/loss" in r["metrics"]]
    assert [r["step"] for r in rows] == list(range(1, len(rows) + 1))
    return {r["step"]: r["metrics"]["train/loss"] for r in rows}


def alone(pico: Path, data: Path, storage: Path, steps: int) -> dict[int, float]:
    """Return the losses of the first `steps` of the same run in one process, without Ray, undisturbed."""
    (encoded,), (recipe,) = (storage.glob(f"{stage}-*") for stage in ("instructions", "upcycle"))
    (out := storage / "alone").mkdir()
    constant = {"learning_rate": 1e-4, "schedule": "constant", "warmup_fraction": 0}
    run = small_run(
        pico, data, SparseUpcycling(), batch_size=8, max_steps=steps, num_epochs=ENDLESS, **constant
    )
    session = LocalSession()
    train(WorkerSpec(run, Execution(micro_batch=1), pico, recipe, encoded, out), session)
    return session.losses()


def announce(cluster: Cluster, resource: str) -> None:
    """Drain the node that has `resource` in 15 seconds, as Ray does on a cloud's notice."""
    find = f"""
import ray
ray.init(address={cluster.address!r}, log_to_driver=False)
print(*[n["NodeID"] for n in ray.nodes() if n["Resources"].get({resource!r})])
"""
    (node,) = ray_says(cluster, sys.executable, "-c", find).split()
    words = ["ray", "drain-node", "--address", cluster.address, "--node-id", node, "--reason-message", "spot"]
    words += ["--reason", "DRAIN_NODE_REASON_PREEMPTION", "--deadline-remaining-seconds", "15"]
    ray_says(cluster, *words)


def ray_says(cluster: Cluster, *words: str) -> str:
    done = subprocess.run(words, env=cluster.environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout
