"""Sweeps on a cluster with Ray's real autoscaler, from no worker node to as many as it allows, and back."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from fake_autoscaler import HEAD_ID, AutoscalingCluster
from mlflow import MlflowClient
from ray.autoscaler._private.kuberay.autoscaling_config import _derive_autoscaling_config_from_ray_cr

from raymoe.cluster.capacity import Capacity, grown
from raymoe.cluster.watch import drawn

ROOT = Path(__file__).parents[2]

SWEEP = """
from raymoe.config import replace
from raymoe import Sweep, main

def run(base, point):
    return replace(base, {"optimization.learning_rate": point["learning_rate"]})

SWEEP = Sweep("tiny", "which one?", [{"learning_rate": rate} for rate in (0.03, 1e-7)], run)

if __name__ == "__main__":
    main(SWEEP)
"""

CONFIG = """
model: {{name: {model}}}
data: {{train: {data}, max_length: 128}}
method: {{name: dense}}
optimization: {{batch_size: 4, max_steps: 120, num_epochs: 100, schedule: constant}}
evaluation: {{milestones: [0, .1, .2, .3, .4, .5, .6, .7, .8, .9, 1], generation_examples: 0}}
execution: {{gpu: false, workers: 2, cpus_per_worker: 1, max_concurrent_trials: 1}}
"""

LEAVES_A_GROUP = """
import ray
ray.init(log_to_driver=False)
group = ray.util.placement_group([{"trial_slot": 1}], lifetime="detached", name="forgotten")
assert group.wait(60)
print(group.id.hex())
"""

ASKS = """
import json, time
import ray
from raymoe.cluster.capacity import capacity, check_room, concurrent_trials, decided, trial_workers
from raymoe.cluster.connection import connected
from raymoe.config import Execution, InputError
from raymoe.cluster.watch import Watch, placement_groups
from pathlib import Path

def answer(**settings):
    execution = Execution(**settings)
    workers = trial_workers(execution, 24)
    try:
        check_room(workers)
        return [workers.count, workers.cpus, workers.gpu, concurrent_trials(execution, workers)]
    except InputError as error:
        return str(error)

@ray.remote(num_cpus=0, resources={"trial_slot": 1})
class Trial:
    def reserve(self):
        group = ray.util.placement_group([{"trial_slot": 2}])
        assert group.wait(60)
        return group.id.hex()

with connected(Execution(address="auto")):
    before = sum(node["Alive"] for node in ray.nodes())
    answers = [
        answer(),
        answer(workers=2, cpus_per_worker=1, gpu=False),
        answer(workers=3, cpus_per_worker=1, gpu=False),
        answer(workers=4, cpus_per_worker=1, gpu=False),
        answer(workers=1, cpus_per_worker=3, gpu=False),
        answer(workers=3, cpus_per_worker=1),
        answer(workers=2, cpus_per_worker=2, gpu=False),
    ]
    said = []
    with Watch(Path("watched"), lambda: 1, 1, said.append, interval=0.2, leak_after=1.5) as watch:
        trial = Trial.remote()
        group = ray.get(trial.reserve.remote())
        time.sleep(2)
        quiet = list(said)
        ray.kill(trial)
        deadline = time.time() + 30
        while not said and time.time() < deadline:
            time.sleep(0.2)
        time.sleep(1)
    after = sum(node["Alive"] for node in ray.nodes())
print(json.dumps({
    "answers": answers, "nodes": [before, after], "group": group, "quiet": quiet, "said": said,
    "artifacts": sorted(watch.artifacts),
}))
"""


class User:
    """Somebody beside an autoscaling cluster of up to two small nodes and one with a GPU."""

    def __init__(self, cluster: AutoscalingCluster, folder: Path) -> None:
        self.cluster, self.folder = cluster, folder
        self.environment = {**cluster.environment, "RAY_ADDRESS": cluster.address, "PYTHONPATH": str(ROOT)}
        folder.mkdir()

    def run(self, *command: str, seconds: float = 400) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, *command],
            cwd=self.folder,
            env=self.environment,
            capture_output=True,
            text=True,
            timeout=seconds,
        )

    def actors(self) -> list[dict[str, Any]]:
        """All that ever ran on the cluster, with its class and node."""
        environment = {**self.environment, "RAY_ADDRESS": self.cluster.jobs_address}
        command = [
            Path(sys.executable).with_name("ray"),
            "list",
            "actors",
            "--limit",
            "1000",
            "--format",
            "json",
        ]
        said = subprocess.run(
            command, env=environment, capture_output=True, text=True, timeout=60, check=True
        )
        return json.loads(said.stdout)  # type: ignore[no-any-return]


@pytest.fixture(scope="module")
def user(tmp_path_factory: pytest.TempPathFactory) -> Iterator[User]:
    folder = tmp_path_factory.mktemp("autoscaling")
    nodes = {"small": ({"CPU": 1}, 2), "gpu": ({"CPU": 2, "GPU": 1}, 1)}
    with AutoscalingCluster(folder, nodes, idle_seconds=4) as cluster:
        yield User(cluster, folder / "user")


@pytest.mark.slow
def test_capacity_is_the_maximum_and_a_group_without_its_maker_is_told(user: User) -> None:
    ran = user.run("-c", ASKS)
    assert ran.returncode == 0, ran.stderr
    told = json.loads(ran.stdout.splitlines()[-1])
    assert told["nodes"] == [1, 1]  # asking starts nothing
    assert told["answers"] == [
        [1, 1, True, 1],  # by default one node's GPUs
        [2, 1, False, 2],  # 4 CPUs on three nodes
        [3, 1, False, 1],
        [4, 1, False, 1],
        "execution.cpus_per_worker: a worker needs 3 CPUs, the largest node has 2",
        "execution.workers: a trial needs 3 GPUs, the cluster may grow to 1",
        "execution.workers: a trial needs 2 workers of 2 CPUs, and no more than 1 fit on the nodes that the cluster "
        "may have",
    ]
    assert told["quiet"] == []
    (line,) = told["said"]
    assert told["group"] in line and "keeps 2 trial_slot" in line and "belongs to no running trial" in line
    assert told["artifacts"] == ["timeline.jsonl"]  # of one node there is nothing to draw


@pytest.mark.slow
def test_a_sweep_brings_up_nodes_runs_on_them_and_they_go(user: User, pico: Path, data_folder: Path) -> None:
    leaked = user.run("-c", LEAVES_A_GROUP).stdout.split()[-1]
    (user.folder / "tiny.py").write_text(SWEEP)
    (user.folder / "tiny.yaml").write_text(CONFIG.format(model=pico, data=data_folder))
    ran = user.run("tiny.py", "tiny.yaml", "--asha", "--json")
    assert ran.returncode == 0, ran.stderr
    rows = {row["trial"]: row["status"] for row in json.loads(ran.stdout[ran.stdout.index("[") :])}
    assert rows["0.03"] == "FINISHED" and rows["1e-07"] == "STOPPED", ran.stderr

    (file,) = user.folder.glob("runs/sweeps/*/timeline.jsonl")
    timeline = [json.loads(line) for line in file.read_text().splitlines()]
    workers = [sum(row["nodes"].values()) - 1 for row in timeline]
    assert workers[0] == 0 and max(workers) == 2
    assert all(row["nodes"]["head"] == 1 for row in timeline)
    assert max(row["training"] for row in timeline) == 1
    assert all(2 * row["training"] <= n for row, n in zip(timeline, workers, strict=True))
    assert all(row["training"] + row["waiting"] + row["ended"] == 2 for row in timeline)
    assert (timeline[-1]["ended"], timeline[-1]["groups"]) == (2, 0)
    # The one group that leaked is that of the job before, though a trial was stopped early.
    assert timeline[-1]["leaked"] == [leaked]
    assert ran.stderr.count("belongs to no running trial") == 1

    client = MlflowClient(f"sqlite:///{user.folder / 'mlflow.db'}")
    experiment = client.get_experiment_by_name("raymoe")
    parent = next(
        r for r in client.search_runs([experiment.experiment_id]) if r.info.run_name.startswith("tiny-")
    )
    artifacts = {artifact.path for artifact in client.list_artifacts(parent.info.run_id)}
    assert {"timeline.jsonl", "timeline.png"} <= artifacts
    assert (file.parent / "timeline.png").read_bytes().startswith(b"\x89PNG")

    places = {(actor["class_name"], actor["node_id"] == HEAD_ID) for actor in user.actors()}
    assert ("RayTrainWorker", False) in places and ("RayTrainWorker", True) not in places
    assert ("TrainController", True) in places and ("TrainController", False) not in places
    wait_for_no_nodes(user)


def wait_for_no_nodes(user: User, seconds: float = 40) -> None:
    """The nodes are processes of the head's, of which each has a raylet."""
    deadline = time.time() + seconds
    assert user.cluster.head is not None
    while time.time() < deadline:
        commands = [" ".join(p.cmdline()[:1]) for p in user.cluster.head.processes()]
        if sum(command.endswith("/raylet") for command in commands) == 1:
            return
        time.sleep(0.5)
    raise AssertionError(f"nodes are still there {seconds} s after the sweep")


def test_capacity_of_the_files_that_are_shipped() -> None:
    job = yaml.safe_load((ROOT / "deploy/rayjob.yaml").read_text())
    described = {"metadata": {"namespace": "x", "name": "y"}, "spec": job["spec"]["rayClusterSpec"]}
    kube = grown(_derive_autoscaling_config_from_ray_cr(described), {"trial_slot": 64})
    assert (kube.total("GPU"), kube.largest("GPU"), kube.largest("CPU"), kube.final) == (16, 4, 40, True)
    assert (
        kube.room({"CPU": 1, "GPU": 1}),
        kube.room({"CPU": 30, "GPU": 1}),
        kube.room({"trial_slot": 1}),
    ) == (16, 4, 64)

    aws = yaml.safe_load((ROOT / "cluster.yaml").read_text())
    assert not grown(aws, {}).final  # Ray fills in what the instance type has, when it starts the cluster
    aws["available_node_types"]["gpu_spot"]["resources"] = {"CPU": 48, "GPU": 4}
    assert grown(aws, {}).total("GPU") == 16


def test_room_on_nodes_of_several_types() -> None:
    small, large = {"CPU": 2.0}, {"CPU": 8.0, "GPU": 2.0}
    have = Capacity((small, small, large, large), most=3)
    assert (have.total("CPU"), have.total("GPU"), have.largest("CPU")) == (18, 4, 8)
    assert have.room({"CPU": 3}) == 4  # two on each large node, none on the small ones
    assert have.room({"CPU": 2}) == 9  # of three nodes at a time, the best: 4 + 4 + 1
    assert have.room({"CPU": 8, "GPU": 1}) == 2
    assert have.room({"TPU": 1}) == 0


def test_the_timeline_shows_nodes_and_trials() -> None:
    rows = [
        {"time": 0.0, "nodes": {"head": 1}, "training": 0, "waiting": 2, "ended": 0},
        {"time": 30.0, "nodes": {"head": 1, "spot": 1}, "training": 1, "waiting": 1, "ended": 0},
        {"time": 90.0, "nodes": {"head": 1}, "training": 0, "waiting": 0, "ended": 2},
    ]
    assert drawn(rows).startswith(b"\x89PNG")
    from raymoe.analysis.figures import timeline

    nodes, trials = timeline(rows).axes
    assert [area.get_label() for area in nodes.collections] == ["spot"]
    assert [area.get_label() for area in trials.collections] == ["ended", "training", "waiting"]
    heights = [area.get_paths()[0].vertices[:, 1].max() for area in trials.collections]
    assert heights == [2, 2, 2]  # on top of each other, two trials in all
    (spot,) = nodes.collections
    assert spot.get_paths()[0].vertices[:, 0].max() == 90
