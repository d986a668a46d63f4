"""A sweep on a real cluster whose parts are killed at random moments, against the same sweep undisturbed.

    python benchmarks/chaos.py [--faults 30] [--seed 0] [--folder chaos]

Two nodes of one CPU train four trials, two at a time. At random moments one of these is ended by SIGKILL: a
training worker, a trial's driver, the controller of its workers, a node, the sweep's own process, Ray's head with
everything on it; or a worker's writes to disk start to fail; or the MLflow server is down for up to 75 seconds. Then
the benchmark does what a user would: it replaces the node, restarts the server, runs the same command again. If a
sweep ends before all faults are injected, one with the next seed follows.

Prints a line per fault, and at the end a figure: trials without a result, trials whose evaluations differ in any bit
from the undisturbed ones, and MLflow runs with a step missing or repeated.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import psutil
from harness import commit
from live_cluster import Cluster, Node, answers, free_ports

from raymoe.config import Run, replace
from raymoe.sweep.definition import Sweep

ROOT = Path(__file__).parents[1]
METHODS = ("dense", "su", "crsu", "simoe")
STEPS = 1500


def _run(base: Run, point: Any) -> Run:
    return replace(base, {"method.name": point["method"]})


SWEEP = Sweep("chaos", "does it end with the same result?", [{"method": m} for m in METHODS], _run)


def settings(steps: int, seed: int, storage: Path) -> list[str]:
    """Return the sweep's command line: an untrained two-layer Llama on the local corpus, in small steps."""
    shape = (
        ("vocab-size", 512),
        ("hidden-size", 32),
        ("intermediate-size", 64),
        ("num-layers", 2),
        ("num-heads", 2),
    )
    words = [word for key, value in shape for word in (f"--model.local.{key}", str(value))]
    words += ["--model.name", "initial", "--data.train", "local", "--max-length", "512", "--batch-size", "2"]
    words += ["--max-steps", str(steps), "--num-epochs", "1000", "--seed", str(seed)]
    words += ["--milestones", "0.5", "1", "--generation-examples", "0", "--max-examples", "200"]
    words += [
        "--workers",
        "1",
        "--cpus-per-worker",
        "1",
        "--no-gpu",
        "--checkpoint-every",
        str(max(1, steps // 60)),
    ]
    return [*words, "--max-failures", "-1", "--storage", str(storage)]


class Sweeping:
    """The sweep as a user's process, restarted whenever it ends."""

    def __init__(
        self,
        words: Sequence[str],
        cluster: Cluster,
        folder: Path,
        tracking: str,
        sweep: Path = Path(__file__),
    ) -> None:
        self.command = [sys.executable, "-m", "raymoe.cli", "sweep", str(sweep), *words, "--json"]
        self.command += ["--address", cluster.address]
        self.environment = {**cluster.environment, "MLFLOW_TRACKING_URI": tracking}
        self.folder, self.starts = folder, 0
        folder.mkdir(parents=True, exist_ok=True)
        self.start()

    def start(self) -> None:
        """Run the command."""
        self.starts += 1
        self.out, self.errors = (self.folder / f"{self.starts}.{kind}" for kind in ("out", "err"))
        with self.out.open("wb") as out, self.errors.open("wb") as errors:
            self.process = subprocess.Popen(
                self.command, cwd=self.folder, env=self.environment, stdout=out, stderr=errors
            )

    def rows(self) -> dict[str, Any]:
        """Return the trials of the last start, by name."""
        text = self.out.read_text()
        return {row["trial"]: row for row in json.loads(text)} if text else {}


class MLflow:
    """A tracking server on this machine."""

    def __init__(self, folder: Path) -> None:
        self.folder, (self.port,) = folder, free_ports(1)
        self.uri = f"http://127.0.0.1:{self.port}"
        folder.mkdir(parents=True, exist_ok=True)

    def start(self) -> None:
        """Start it and wait until it answers."""
        words = [sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1", "--port", str(self.port)]
        words += ["--workers", "1", "--backend-store-uri", f"sqlite:///{self.folder / 'mlflow.db'}"]
        words += ["--artifacts-destination", str(self.folder / "artifacts")]
        with (self.folder / "server.log").open("ab") as log:
            self.process = subprocess.Popen(words, stdout=log, stderr=log, start_new_session=True)
        deadline = time.monotonic() + 120
        while not answers("127.0.0.1", self.port):
            if time.monotonic() > deadline or self.process.poll() is not None:
                raise RuntimeError((self.folder / "server.log").read_text()[-2000:])
            time.sleep(0.2)

    def kill(self) -> None:
        """Kill the server and its workers."""
        os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()


class Faults:
    """Faults to inject into a running sweep; each returns what it hit, or None if there was nothing to hit."""

    def __init__(
        self, cluster: Cluster, mlflow: MLflow | None, sweeping: Sweeping, chance: random.Random
    ) -> None:
        self.cluster, self.mlflow, self.sweeping, self.chance = cluster, mlflow, sweeping, chance

    def worker(self) -> str | None:
        """Kill a training worker."""
        return self._kill(r"RayTrainWorker")

    def trial_driver(self) -> str | None:
        """Kill the driver of a trial."""
        return self._kill("ImplicitFunc.train")

    def controller(self) -> str | None:
        """Kill the controller of a trial's workers."""
        return self._kill("TrainController")

    def node(self) -> str | None:
        """Kill a node, one that trains if there is any; another joins."""
        nodes = self.cluster.nodes
        node = self.chance.choice([n for n in nodes if _running("RayTrainWorker", [n])] or nodes)
        node.kill()
        self.cluster.nodes.remove(node)
        self.cluster.add_node(num_cpus=1)
        return f"node {node.pid}"

    def job(self) -> str | None:
        """Kill the sweep's process; the same command runs again."""
        pid = self.sweeping.process.pid
        self.sweeping.process.kill()
        self.sweeping.process.wait()
        self.sweeping.start()
        return f"sweep {pid}"

    def head(self) -> str | None:
        """Kill Ray's head with the sweep; a new cluster starts, and the same command runs again."""
        self.sweeping.process.kill()
        self.sweeping.process.wait()
        self.cluster.restart_head()
        for _ in range(2):
            self.cluster.add_node(num_cpus=1)
        self.sweeping.start()
        return "head"

    def tracking(self) -> str | None:
        """Take the MLflow server down for a while."""
        assert self.mlflow is not None
        self.mlflow.kill()
        seconds = self.chance.uniform(5, 75)
        time.sleep(seconds)
        self.mlflow.start()
        return f"MLflow for {seconds:.0f} s"

    def disk(self) -> str | None:
        """Make a worker's writes to files fail from now on (EFBIG)."""
        if not (found := self._find("RayTrainWorker")):
            return None
        process = self.chance.choice(found)
        process.rlimit(resource.RLIMIT_FSIZE, (0, resource.RLIM_INFINITY))
        return f"disk of {process.pid}"

    def _kill(self, title: str) -> str | None:
        if not (found := self._find(title)):
            return None
        process = self.chance.choice(found)
        process.kill()
        return f"{title} {process.pid}"

    def _find(self, title: str) -> list[psutil.Process]:
        nodes = [*self.cluster.nodes, *([self.cluster.head] if self.cluster.head else [])]
        return _running(title, nodes)


KINDS = ("worker", "trial_driver", "controller", "node", "job", "head", "tracking", "disk")


def _running(title: str, nodes: Sequence[Node]) -> list[psutil.Process]:
    """Return the nodes' processes with `title` in their command line."""
    return sorted((p for node in nodes for p in node.processes() if title in _title(p)), key=lambda p: p.pid)


def _title(process: psutil.Process) -> str:
    try:
        return " ".join(process.cmdline())
    except psutil.Error:
        return ""


def disturb(
    faults: Faults, kinds: Sequence[str], say: Callable[[str], None], pause: float = 6.0
) -> list[str]:
    """Inject `kinds` one after the other, each up to `pause` seconds after trials train; returns those that hit
    something before the sweep ended."""
    hit: list[str] = []
    while len(hit) < len(kinds) and _wait_for_training(faults):
        time.sleep(faults.chance.uniform(0.0, pause))
        if faults.sweeping.process.poll() is not None:
            break
        kind = kinds[len(hit)]
        if what := getattr(faults, kind)():  # else its victim has just ended: the next one
            hit.append(kind)
            say(f"{kind:<13} {what}")
    return hit


def _wait_for_training(faults: Faults, seconds: float = 400) -> bool:
    """Wait until a trial makes a step; returns False if the sweep has ended."""
    before = _newest_row(faults)
    deadline = time.monotonic() + seconds
    while _newest_row(faults) <= before:
        if faults.sweeping.process.poll() is not None:
            return False
        if time.monotonic() > deadline:
            raise RuntimeError(f"nothing trains: {faults.sweeping.errors.read_text()[-3000:]}")
        time.sleep(0.2)
    return True


def _newest_row(faults: Faults) -> float:
    storage = Path(faults.sweeping.command[faults.sweeping.command.index("--storage") + 1])
    times = [0.0]
    for file in storage.glob("checkpoints/*/metrics.jsonl"):
        try:
            times.append(file.stat().st_mtime)
        except FileNotFoundError:
            continue
    return max(times)


def finish(sweeping: Sweeping, seconds: float = 900) -> dict[str, Any]:
    """Wait for the sweep to end, running it again until it succeeds; returns its trials."""
    for _ in range(3):
        sweeping.process.wait(timeout=seconds)
        if sweeping.process.returncode == 0:
            break
        if sweeping.process.returncode == 2:
            raise RuntimeError(sweeping.errors.read_text())
        sweeping.start()
    sweeping.process.wait(timeout=seconds)
    return sweeping.rows()


def differing(rows: dict[str, Any], reference: dict[str, Any]) -> list[str]:
    """Return trials whose evaluations differ in any bit from the reference's; memory and time don't count."""

    def results(row: dict[str, Any]) -> list[dict[str, float]]:
        return [{k: v for k, v in e.items() if not k.startswith("system/")} for e in row["evaluations"]]

    done = [name for name, row in rows.items() if row["status"] == "FINISHED"]
    return [name for name in done if results(rows[name]) != results(reference[name])]


def gaps(uri: str, steps: int, trials: int) -> list[str]:
    """Return MLflow runs whose training steps are not 1, 2, ..., `steps`, and trials with more than one run."""
    from mlflow import MlflowClient

    client = MlflowClient(uri)
    experiment = client.get_experiment_by_name("raymoe")
    runs = [r for r in client.search_runs([experiment.experiment_id]) if "raymoe.trial_key" in r.data.tags]
    wrong = [] if len(runs) == trials else [f"{len(runs)} runs for {trials} trials"]
    for run in runs:
        found = Counter(m.step for m in client.get_metric_history(run.info.run_id, "train/loss"))
        if found != Counter(range(1, steps + 1)):
            wrong.append(
                f"{run.info.run_name}: {steps - len(found)} missing, {sum(found.values()) - len(found)} twice"
            )
        if run.info.status != "FINISHED":
            wrong.append(f"{run.info.run_name}: {run.info.status}")
    return wrong


def round_of(
    cluster: Cluster,
    folder: Path,
    seed: int,
    kinds: Sequence[str],
    chance: random.Random,
    steps: int,
    say: Callable[[str], None],
) -> dict[str, Any]:
    """Run one sweep undisturbed and one under faults; returns what was hit and what came of it."""
    calm = folder / "calm"
    undisturbed = Sweeping(
        settings(steps, seed, calm / "runs"), cluster, calm, f"sqlite:///{calm / 'mlflow.db'}"
    )
    reference = finish(undisturbed)
    rough = folder / "rough"
    shutil.copytree(
        calm / "runs",
        rough / "runs",
        ignore=shutil.ignore_patterns("train-*", "checkpoints", "tune", "sweeps"),
    )
    mlflow = MLflow(rough / "mlflow")
    mlflow.start()
    try:
        sweeping = Sweeping(settings(steps, seed, rough / "runs"), cluster, rough, mlflow.uri)
        try:
            hit = disturb(Faults(cluster, mlflow, sweeping, chance), kinds, say)
            rows = finish(sweeping)
        finally:
            sweeping.process.kill()
        wrong = gaps(mlflow.uri, steps, len(METHODS))
    finally:
        mlflow.kill()
    lost = [name for name in reference if rows.get(name, {}).get("status") != "FINISHED"]
    return {
        "hit": hit,
        "lost": lost,
        "differ": differing(rows, reference),
        "mlflow": wrong,
        "starts": sweeping.starts,
    }


def main() -> None:
    options = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    options.add_argument("--faults", type=int, default=30)
    options.add_argument("--seed", type=int, default=0)
    options.add_argument("--steps", type=int, default=STEPS, help="of each trial")
    options.add_argument(
        "--folder", type=Path, default=Path("chaos"), help="gets all that is written; must be new"
    )
    given = options.parse_args()
    chance, folder = random.Random(given.seed), given.folder.absolute()
    folder.mkdir(parents=True)
    started, rounds, count = time.monotonic(), list[dict[str, Any]](), 0

    def say(text: str) -> None:
        print(f"{time.monotonic() - started:6.0f} s  {text}", flush=True)

    with Cluster(folder / "cluster", environment={"PYTHONPATH": str(ROOT)}) as cluster:
        for _ in range(2):
            cluster.add_node(num_cpus=1)
        while count < given.faults:
            kinds = [chance.choice(KINDS) for _ in range(given.faults - count)]
            say(f"sweep {len(rounds)}")
            rounds.append(
                round_of(
                    cluster,
                    folder / str(len(rounds)),
                    given.seed + len(rounds),
                    kinds,
                    chance,
                    given.steps,
                    say,
                )
            )
            say(json.dumps(rounds[-1]))
            count += len(rounds[-1]["hit"])
    total = Counter(kind for one in rounds for kind in one["hit"])
    figure = {
        "name": "chaos",
        "faults": sum(total.values()),
        "by_kind": dict(sorted(total.items())),
        "sweeps": len(rounds),
        "trials": len(METHODS) * len(rounds),
        "trials_lost": sum(len(one["lost"]) for one in rounds),
        "results_that_differ": sum(len(one["differ"]) for one in rounds),
        "mlflow_runs_wrong": sum(len(one["mlflow"]) for one in rounds),
        "commit": commit(),
    }
    print(json.dumps(figure))
    sys.exit(any(figure[key] for key in ("trials_lost", "results_that_differ", "mlflow_runs_wrong")))


if __name__ == "__main__":
    main()
