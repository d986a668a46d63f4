"""The cluster files: what Ray itself makes of them, offline; and what a job uploads of the working folder.

The RayJob is read by the code with which Ray's autoscaler reads a RayCluster; no KubeRay operator has seen it.
"""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import pytest
import ray
import yaml
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from ray._private.ray_constants import get_runtime_env_default_excludes
from ray._private.runtime_env.packaging import create_package
from ray.autoscaler._private.docker import docker_start_cmds
from ray.autoscaler._private.kuberay.autoscaling_config import _derive_autoscaling_config_from_ray_cr
from ray.autoscaler._private.util import prepare_config, validate_config
from ray.scripts.scripts import start

import raymoe
from raymoe.cli.options import parse_overrides
from raymoe.cluster.capacity import TRIAL_SLOT

ROOT = Path(__file__).parents[2]
CLOUDS = ["cluster.yaml", "deploy/gcp.yaml"]
FILES = [*CLOUDS, "deploy/rayjob.yaml"]
# Set for the cluster to do its work; a value of the user's is a placeholder.
ENVIRONMENT = {
    "RAYMOE_STORAGE": "/shared/runs",
    "HF_HOME": "/shared/huggingface",
    "MLFLOW_TRACKING_URI": "EDIT-MLFLOW-URI",
}


def load(name: str) -> dict[str, Any]:
    """A file of the repository, as YAML."""
    return dict(yaml.safe_load((ROOT / name).read_text()))


def prepared(name: str) -> dict[str, Any]:
    """A cluster file with Ray's defaults filled in and checked against Ray's schema."""
    config: dict[str, Any] = prepare_config(load(name))
    validate_config(config)
    return config


def node_types(config: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """The head's node type and the workers' only one."""
    types = dict(config["available_node_types"])
    head = types.pop(config["head_node_type"])
    (worker,) = types.values()
    return head, worker


def docker_run(config: dict[str, Any], kind: str) -> list[str]:
    """The words of the `docker run` that Ray gives on nodes of `kind`."""
    docker = config["docker"]
    options = [*docker["run_options"], *docker[f"{kind}_run_options"]]
    mounts = config["file_mounts"]
    return shlex.split(
        docker_start_cmds(
            "ubuntu", docker[f"{kind}_image"], mounts, "raymoe", options, "raymoe", "/home/ray", "docker"
        )
    )


def docker_environment(config: dict[str, Any], kind: str) -> dict[str, str]:
    """The variables of the container on nodes of `kind`."""
    words = docker_run(config, kind)
    return dict(words[i + 1].split("=", 1) for i, word in enumerate(words) if word == "-e")


def ray_start(config: dict[str, Any], kind: str) -> tuple[str, dict[str, Any]]:
    """The command that starts Ray on nodes of `kind`, and its options as Ray's own command line reads them."""
    stop, command = config[f"{kind}_start_ray_commands"]
    assert stop == "ray stop"
    arguments = shlex.split(command[command.index("ray start ") + len("ray start ") :])
    return command, start.make_context("start", arguments).params


def spec() -> dict[str, Any]:
    """The RayJob's cluster."""
    return dict(load("deploy/rayjob.yaml")["spec"]["rayClusterSpec"])


def container(group: dict[str, Any]) -> dict[str, Any]:
    """The Ray container of a group of pods, and the only one."""
    (only,) = group["template"]["spec"]["containers"]
    return dict(only)


@pytest.mark.parametrize("name", CLOUDS)
class TestCloud:
    def test_ray_accepts_it(self, name: str) -> None:
        config = prepared(name)
        assert set(load(name)) <= set(config)
        head, worker = node_types(config)
        assert (head["min_workers"], head["max_workers"]) == (0, 0)
        assert worker["min_workers"] == 0
        assert worker["max_workers"] == config["max_workers"] > 0

    def test_the_head_has_slots_for_drivers_and_no_cpu_for_work(self, name: str) -> None:
        head, worker = node_types(prepared(name))
        assert head["resources"] == {"CPU": 0, TRIAL_SLOT: 64}
        assert TRIAL_SLOT not in worker["resources"]

    def test_nodes_outlive_their_start(self, name: str) -> None:
        config = prepared(name)
        assert config["idle_timeout_minutes"] >= 15
        assert "cache_stopped_nodes" in config["provider"]
        assert config["provider"]["cache_stopped_nodes"] is False
        limit = docker_environment(config, "head")["RAY_AUTOSCALER_RECONCILE_RAY_INSTALL_STATUS_TIMEOUT_S"]
        assert int(limit) > config["idle_timeout_minutes"] * 60

    @pytest.mark.parametrize("kind", ["head", "worker"])
    def test_every_node_asks_for_the_token(self, name: str, kind: str) -> None:
        config = prepared(name)
        assert docker_environment(config, kind)["RAY_AUTH_MODE"] == "token"
        command, _ = ray_start(config, kind)
        assert "export RAY_AUTH_MODE=token;" in command.split("ray start")[0]
        assert "/tmp/ray_tmp_mount/raymoe/~/.ray/auth_token:/home/ray/.ray/auth_token" in docker_run(
            config, kind
        )

    def test_the_token_is_a_file_and_in_no_file(self, name: str) -> None:
        config = prepared(name)
        assert config["file_mounts"]["~/.ray/auth_token"] == "~/.ray/auth_token"
        assert "test -s ~/.ray/auth_token" in config["head_setup_commands"]
        assert "test -s ~/.ray/auth_token" in config["worker_setup_commands"]
        assert "RAY_AUTH_TOKEN" not in (ROOT / name).read_text()

    def test_the_dashboard_answers_on_the_head_alone(self, name: str) -> None:
        config = prepared(name)
        _, options = ray_start(config, "head")
        assert options["head"] and options["dashboard_host"] == "127.0.0.1"
        assert options["dashboard_port"] == 8265
        assert "security_group" not in config["provider"]  # Ray's own: SSH, and the nodes among themselves
        assert not [word for word in docker_run(config, "head") if word in ("-p", "-P", "--publish")]
        assert not re.search(r"(0\.0\.0\.0|::)", re.sub(r"#.*", "", (ROOT / name).read_text()))

    def test_ray_starts_with_the_autoscaler_and_finds_the_head(self, name: str) -> None:
        _, head = ray_start(prepared(name), "head")
        _, worker = ray_start(prepared(name), "worker")
        assert head["autoscaling_config"] == "~/ray_bootstrap_config.yaml"
        assert worker["address"] == f"$RAY_HEAD_IP:{head['port']}"
        assert not worker["head"]
        # Resources come from the node types: the command line would go over them.
        assert not any(options[key] for options in (head, worker) for key in ("num_cpus", "num_gpus"))

    @pytest.mark.parametrize("kind", ["head", "worker"])
    def test_storage_and_mlflow_come_from_the_environment(self, name: str, kind: str) -> None:
        config = prepared(name)
        assert ENVIRONMENT.items() <= docker_environment(config, kind).items()
        assert "/mnt/shared:/shared" in docker_run(config, kind)
        worker = node_types(config)[1]
        for commands in (config["initialization_commands"], worker.get("initialization_commands")):
            assert commands is None or any("sudo mount -t nfs" in command for command in commands)

    def test_all_nodes_install_what_is_synced(self, name: str) -> None:
        config = prepared(name)
        common = load("cluster.yaml")["setup_commands"]
        assert config["setup_commands"] == config["worker_setup_commands"] == common
        assert config["head_setup_commands"][: len(common)] == common

    def test_nothing_big_is_synced(self, name: str, tmp_path: Path) -> None:
        home = synced(prepared(name), tmp_path)
        top = {path.name for path in (home / "raymoe-source").iterdir()}
        assert top == {"raymoe", "sweeps", "configs", "pyproject.toml", "README.md", "LICENSE"}
        assert sum(path.stat().st_size for path in home.rglob("*") if path.is_file()) < 2**20


def test_nodes_install_this_very_version(tmp_path: Path) -> None:
    """The setup commands, run on what is synced, in a home and a folder of packages of their own."""
    config = prepared("cluster.yaml")
    home, site = synced(config, tmp_path), tmp_path / "site"
    environment = {
        **os.environ,
        "HOME": str(home),
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        "PIP_TARGET": str(site),
        # Without a network: raymoe alone, built with the setuptools that is here.
        **{"PIP_NO_INDEX": "1", "PIP_NO_DEPS": "1", "PIP_NO_BUILD_ISOLATION": "0", "PIP_QUIET": "1"},
    }
    for command in config["setup_commands"]:
        subprocess.run(["bash", "-c", command], env=environment, check=True, cwd=tmp_path)
    assert (site / f"raymoe-{raymoe.__version__}.dist-info").is_dir()
    assert python_files(site / "raymoe") == python_files(home / "raymoe-source/raymoe") != {}


def synced(config: dict[str, Any], folder: Path) -> Path:
    """A home with the file mounts of `config`, and a token for the user's; other paths are of the repository."""
    home = folder / "home"
    for remote, local in config["file_mounts"].items():
        target = home / remote.removeprefix("~/")
        target.parent.mkdir(parents=True, exist_ok=True)
        if local.startswith("~"):
            target.write_text("token")
        elif (ROOT / local).is_dir():
            shutil.copytree(ROOT / local, target, ignore=rsync_ignore(config))
        else:
            shutil.copy(ROOT / local, target)
    return home


def rsync_ignore(config: dict[str, Any]) -> Any:
    """`rsync_exclude` for shutil: its patterns are names at any depth."""
    assert all(pattern.startswith("**/") for pattern in config["rsync_exclude"])
    return shutil.ignore_patterns(*(pattern[3:] for pattern in config["rsync_exclude"]))


def python_files(folder: Path) -> dict[str, bytes]:
    """Content of the Python files below `folder`."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*.py"))}


def test_aws_takes_the_head_on_demand_and_gpus_on_the_spot_market() -> None:
    head, worker = node_types(prepared("cluster.yaml"))
    assert "InstanceMarketOptions" not in head["node_config"]
    assert re.match(r"[cmrt]\d", head["node_config"]["InstanceType"])  # AWS's families without accelerators
    assert worker["node_config"]["InstanceMarketOptions"] == {"MarketType": "spot"}
    assert re.match(r"[gp]\d", worker["node_config"]["InstanceType"])
    assert {node["node_config"]["ImageId"] for node in (head, worker)} == {"EDIT-AMI"}


def test_gcp_takes_the_head_on_demand_and_gpus_on_the_spot_market() -> None:
    head, worker = node_types(prepared("deploy/gcp.yaml"))
    assert "scheduling" not in head["node_config"] and "guestAccelerators" not in head["node_config"]
    assert re.match(r"[cen]\d", head["node_config"]["machineType"])
    assert worker["node_config"]["scheduling"]["provisioningModel"] == "SPOT"
    assert worker["node_config"]["scheduling"]["onHostMaintenance"] == "TERMINATE"
    assert worker["node_config"]["machineType"] == "g2-standard-48"  # 48 CPUs and 4 L4, which Ray is told:
    assert worker["resources"] == {"CPU": 48, "GPU": 4}


class TestRayJob:
    def test_rays_autoscaler_reads_what_is_meant(self) -> None:
        cluster = {"metadata": {"name": "raymoe", "namespace": "default"}, "spec": spec()}
        config = _derive_autoscaling_config_from_ray_cr(cluster)
        validate_config(config)
        head, worker = node_types(config)
        assert {key: head["resources"][key] for key in ("CPU", TRIAL_SLOT)} == {"CPU": 0, TRIAL_SLOT: 64}
        assert "GPU" not in head["resources"]
        assert worker["resources"]["GPU"] == 4 and TRIAL_SLOT not in worker["resources"]
        assert (worker["min_workers"], worker["max_workers"]) == (0, 4)
        assert config["idle_timeout_minutes"] >= 15

    def test_it_scales_from_nothing(self) -> None:
        assert spec()["enableInTreeAutoscaling"] is True
        options = spec()["autoscalerOptions"]
        assert options["version"] == "v2"
        (limit,) = options["env"]
        assert limit["name"] == "RAY_AUTOSCALER_RECONCILE_ALLOCATE_STATUS_TIMEOUT_S"
        assert int(limit["value"]) > options["idleTimeoutSeconds"]
        (group,) = spec()["workerGroupSpecs"]
        assert group["replicas"] == group["minReplicas"] == 0

    def test_the_operator_hands_out_the_token_of_a_secret(self) -> None:
        assert spec()["authOptions"] == {"mode": "token", "secretName": "raymoe-auth-token"}
        text = (ROOT / "deploy/rayjob.yaml").read_text()
        assert "kubectl create secret generic raymoe-auth-token --from-file=auth_token=" in text
        assert "RAY_AUTH" not in text  # a second setting could disagree

    def test_the_dashboard_stays_inside_the_cluster(self) -> None:
        head = spec()["headGroupSpec"]
        assert head["serviceType"] == "ClusterIP" and head["enableIngress"] is False
        assert "headService" not in head
        assert not any("hostPort" in port for port in container(head)["ports"])
        assert "hostNetwork" not in head["template"]["spec"]

    def test_workers_are_spot_and_the_head_is_not(self) -> None:
        (group,) = spec()["workerGroupSpecs"]
        pod = group["template"]["spec"]
        ((label, value),) = pod["nodeSelector"].items()
        assert {"key": label, "operator": "Equal", "value": value, "effect": "NoSchedule"} in pod[
            "tolerations"
        ]
        assert {"key": "nvidia.com/gpu", "operator": "Exists", "effect": "NoSchedule"} in pod["tolerations"]
        affinity = spec()["headGroupSpec"]["template"]["spec"]["affinity"]["nodeAffinity"]
        (term,) = affinity["requiredDuringSchedulingIgnoredDuringExecution"]["nodeSelectorTerms"]
        assert term["matchExpressions"] == [{"key": label, "operator": "NotIn", "values": [value]}]

    def test_head_and_workers_share_image_environment_and_storage(self) -> None:
        groups = [spec()["headGroupSpec"], *spec()["workerGroupSpecs"]]
        for group in groups:
            assert container(group)["image"] == f"EDIT-REGISTRY/raymoe:{raymoe.__version__}"
            given = {item["name"]: item["value"] for item in container(group)["env"]}
            assert given == {**ENVIRONMENT, "RAY_worker_maximum_startup_concurrency": "8"}
            assert {"name": "shared", "mountPath": "/shared"} in container(group)["volumeMounts"]
            names = {volume["name"] for volume in group["template"]["spec"]["volumes"]}
            assert names == {mount["name"] for mount in container(group)["volumeMounts"]}

    def test_the_job_runs_a_sweep_of_the_image(self) -> None:
        job = load("deploy/rayjob.yaml")
        assert (job["apiVersion"], job["kind"]) == ("ray.io/v1", "RayJob")
        words = job["spec"]["entrypoint"].split()
        assert words[0] == "python"
        assert (ROOT / Path(words[1]).relative_to("/home/ray/raymoe")).is_file()
        assert parse_overrides(words[3:]) == {"execution.gpu": True, "execution.workers": 4}
        assert job["spec"]["shutdownAfterJobFinishes"] is True and job["spec"]["backoffLimit"] > 0
        dockerfile = (ROOT / "deploy/Dockerfile").read_text()
        assert "pip install --no-cache-dir /home/ray/raymoe" in dockerfile


def test_all_files_have_one_ray_that_raymoe_accepts() -> None:
    texts = {name: (ROOT / name).read_text() for name in [*FILES, "deploy/Dockerfile"]}
    versions = {v for text in texts.values() for v in re.findall(r"rayproject/ray:([\d.]+)-py311", text)}
    (version,) = versions | {spec()["rayVersion"]}
    wanted = SpecifierSet(">=0")
    for line in re.findall(r'^    "(ray\[.*)",$', (ROOT / "pyproject.toml").read_text(), re.M):
        wanted = Requirement(line).specifier
    assert "2.60" in str(wanted) and version in wanted
    assert ray.__version__ in wanted


@pytest.mark.parametrize("name", FILES)
def test_the_docs_say_what_to_edit(name: str) -> None:
    page = (ROOT / "docs" / "clusters.md").read_text()
    placeholders = set(re.findall(r"EDIT-[A-Z-]*[A-Z]", (ROOT / name).read_text()))
    assert placeholders
    assert not [word for word in placeholders if f"`{word}`" not in page]


@pytest.mark.parametrize("include_gitignore", [True, False])
def test_a_job_uploads_the_sources_alone(tmp_path: Path, include_gitignore: bool) -> None:
    """Ray's own packaging, on a copy of the sources among all that gathers beside them."""
    tree = tmp_path / "tree"
    sources = [".gitignore", ".rayignore", "raymoe", "sweeps", "configs", "benchmarks", "tests", "deploy"]
    tree.mkdir()
    for name in [*sources, "pyproject.toml", "README.md", "cluster.yaml"]:
        copy = shutil.copytree if (ROOT / name).is_dir() else shutil.copy
        copy(ROOT / name, tree / name)
    ballast = [
        ".venv/lib/python3.11/site-packages/torch/lib/libtorch.so",
        ".git/objects/pack/pack-1.pack",
        "runs/train-1/model/model.safetensors",
        "runs/checkpoints/train-1/step-1/state.pt",
        "mlruns/1/artifacts/run.yaml",
        "mlartifacts/1/run.yaml",
        "mlflow.db",
        "mlflow.db-wal",
        "data/train.jsonl",
        "data/nested/train.parquet",
        "my-model/model.safetensors",
        "raymoe.egg-info/PKG-INFO",
        ".mypy_cache/3.11/raymoe.data.json",
        "raymoe/__pycache__/ballast.pyc",
    ]
    for name in ballast:
        path = tree / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(os.urandom(2**20))
    (tree / "my-run.yaml").write_text("{}\n")

    package = tmp_path / "package.zip"
    excludes = get_runtime_env_default_excludes()
    create_package(str(tree), package, include_gitignore=include_gitignore, excludes=excludes)
    names = {name for name in zipfile.ZipFile(package).namelist() if not name.endswith("/")}

    assert not names & set(ballast)
    expected = {
        str(path.relative_to(ROOT))
        for folder in ("raymoe", "sweeps", "configs", "benchmarks")
        for path in (ROOT / folder).rglob("*")
        if path.suffix in (".py", ".yaml")
    }
    assert "raymoe/data/packing.py" in expected
    assert expected | {"my-run.yaml", "pyproject.toml"} <= names
    assert {name.split("/")[0] for name in names} <= {*sources, *os.listdir(ROOT), "my-run.yaml"}
    assert not [name for name in names if name.startswith(("tests/", "deploy/"))]
    assert package.stat().st_size < 2**20
