"""Ray's internal names are where they were when this version of Ray was chosen, and in no other file of raymoe."""

from __future__ import annotations

import re
from collections.abc import Callable
from importlib import import_module
from pathlib import Path

import pytest
import ray
from ray._common.constants import HEAD_NODE_RESOURCE_NAME
from ray.core.generated import gcs_pb2, gcs_service_pb2
from ray.util.placement_group import placement_group, remove_placement_group

from raymoe.cluster import ray_internals

PACKAGE = Path(ray_internals.__file__).parents[1]
CONTAINER = {"resources": {"limits": {"cpu": "2", "memory": "4Gi"}}}
DESCRIPTION = {
    "metadata": {"name": "c", "namespace": "n"},
    "spec": {
        "headGroupSpec": {"rayStartParams": {}, "template": {"spec": {"containers": [CONTAINER]}}},
        "workerGroupSpecs": [],
    },
}
"""A cluster of KubeRay with a head alone."""


def head() -> bool:
    return ray_internals.HEAD == HEAD_NODE_RESOURCE_NAME


def cluster_id_method() -> bool:
    package, name, method = re.split(r"\.(?=\w+/)|/", ray_internals.CLUSTER_ID_METHOD[1:])
    service = gcs_service_pb2.DESCRIPTOR.services_by_name[name]
    return service.file.package == package and method in service.methods_by_name


def packaging_logger() -> bool:
    return import_module(ray_internals.PACKAGING_LOGGER).default_logger.name == ray_internals.PACKAGING_LOGGER


def token_logger() -> bool:
    return import_module(ray_internals.TOKEN_LOGGER).logger.name == ray_internals.TOKEN_LOGGER


def loopback_switch() -> bool:
    return ray_internals.loopback_switch().ENABLE_RAY_CLUSTER in (True, False)


def enable_token() -> bool:
    ray_internals.enable_token()  # there is none
    return True


def kuberay_client() -> bool:
    return callable(ray_internals.kuberay_client("n").get)


def kuberay_autoscaling_config() -> bool:
    config = ray_internals.kuberay_autoscaling_config(DESCRIPTION)
    head = config["available_node_types"][config["head_node_type"]]
    return head["resources"]["CPU"] == 2


def checkpoint_list_name() -> bool:
    return ray_internals.checkpoint_list_name().endswith(".json")


def in_tune_trial() -> bool:
    return not ray_internals.in_tune_trial()


def torch_backend() -> bool:
    backend, set_environment = ray_internals.torch_backend()
    return callable(backend.on_start) and callable(set_environment)


USES: dict[str, Callable[[], bool]] = {
    "HEAD": head,
    "CLUSTER_ID_METHOD": cluster_id_method,
    "PACKAGING_LOGGER": packaging_logger,
    "TOKEN_LOGGER": token_logger,
    "loopback_switch": loopback_switch,
    "enable_token": enable_token,
    "kuberay_client": kuberay_client,
    "kuberay_autoscaling_config": kuberay_autoscaling_config,
    "checkpoint_list_name": checkpoint_list_name,
    "in_tune_trial": in_tune_trial,
    "torch_backend": torch_backend,
}


@pytest.mark.parametrize("name", USES)
def test_ray_still_has_it(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("RAY_AUTH_TOKEN", raising=False)
    assert USES[name]()


@pytest.mark.slow
def test_ray_still_has_its_table_of_placement_groups(local_ray: None) -> None:
    group = placement_group([{"CPU": 1.0}])
    ray.get(group.ready())
    (data,) = ray_internals.placement_group_table()
    assert data.placement_group_id.hex() == group.id.hex() and data.state == data.CREATED
    assert [dict(bundle.unit_resources) for bundle in data.bundles] == [{"CPU": 1.0}]
    assert data.creator_job_id.hex() == ray.get_runtime_context().get_job_id()
    remove_placement_group(group)
    assert ray_internals.placement_group_table() == []


def test_fields_of_a_placement_groups_record() -> None:
    fields = set(gcs_pb2.PlacementGroupTableData.DESCRIPTOR.fields_by_name)
    assert {"creator_actor_id", "creator_job_dead", "creator_actor_dead", "is_detached"} <= fields


def test_every_name_is_used_here() -> None:
    defined = {
        name
        for name, value in vars(ray_internals).items()
        if name.isupper() or getattr(value, "__module__", "") == ray_internals.__name__
    }
    assert defined == {*USES, "placement_group_table"}


def test_no_other_file_names_rays_internals() -> None:
    internal = re.compile(r"\bray\.(\w+\.)*_[a-z]|from ray(\.\S+)? import .*\b_[a-z]|ray\.core\.generated")
    files = [f for f in PACKAGE.rglob("*.py") if internal.search(f.read_text())]
    assert files == [Path(ray_internals.__file__)]
