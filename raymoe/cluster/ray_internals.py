"""Every internal name of Ray that raymoe uses: an upgrade of Ray that moves one fails here and in this file's test.

Each is imported when it is used: Ray's autoscaler for Kubernetes, say, is not loaded on a laptop.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

HEAD = "node:__internal_head__"
"""Resource that Ray gives to the head node alone."""
CLUSTER_ID_METHOD = "/ray.rpc.NodeInfoGcsService/GetClusterId"
"""gRPC method by which a client asks a head for its cluster's id."""
PACKAGING_LOGGER = "ray._private.runtime_env.working_dir"
"""Name of the logger that tells which folders Ray leaves out of a job's working folder."""
TOKEN_LOGGER = "ray._private.authentication.authentication_token_setup"
"""Logger that says on every start of a cluster that it asks for a token."""


def loopback_switch() -> Any:
    """Return the module whose ENABLE_RAY_CLUSTER decides if Ray listens beyond the loopback."""
    from ray._private import ray_constants

    return ray_constants


def enable_token() -> None:
    """Have Ray show the token to a cluster that asks for one."""
    from ray._private.authentication.authentication_token_setup import (
        maybe_enable_token_auth_if_token_available,
    )

    maybe_enable_token_auth_if_token_available(warn_if_disabled=False)


def placement_group_table() -> list[Any]:
    """Return Ray's records of placement groups as protocol buffers: its public table does not say who made them."""
    from ray._private.state import state
    from ray.core.generated import gcs_pb2

    table = state._connect_and_get_accessor().get_placement_group_table()
    parsed = [gcs_pb2.PlacementGroupTableData.FromString(row) for row in table]
    return [data for data in parsed if data.state != gcs_pb2.PlacementGroupTableData.REMOVED]


def kuberay_client(namespace: str) -> Any:
    """Return the client by which Ray's autoscaler asks Kubernetes from within a pod."""
    from ray.autoscaler._private.kuberay.node_provider import KubernetesHttpApiClient

    return KubernetesHttpApiClient(namespace=namespace)


def kuberay_autoscaling_config(description: Mapping[str, Any]) -> dict[str, Any]:
    """Return what KubeRay's autoscaler makes of a RayCluster's description."""
    from ray.autoscaler._private.kuberay.autoscaling_config import _derive_autoscaling_config_from_ray_cr

    derived: dict[str, Any] = _derive_autoscaling_config_from_ray_cr(description)
    return derived


def checkpoint_list_name() -> str:
    """Return the name of the file in which Ray Train lists a run's checkpoints."""
    from ray.train.v2._internal.constants import CHECKPOINT_MANAGER_SNAPSHOT_FILENAME

    return str(CHECKPOINT_MANAGER_SNAPSHOT_FILENAME)


def in_tune_trial() -> bool:
    """True inside a Ray Tune trial."""
    from ray.tune.trainable.trainable_fn_utils import _in_tune_session

    return bool(_in_tune_session())


def torch_backend() -> tuple[type[Any], Any]:
    """Return Ray Train's class that sets up torch's process group, and its function for the workers' environment."""
    from ray.train.torch.config import _set_torch_distributed_env_vars, _TorchBackend

    return _TorchBackend, _set_torch_distributed_env_vars
