"""Every name of Ray's internals that raymoe uses: an upgrade of Ray that moves one fails here and in one test.

Imported where they are used: Ray's autoscaler for Kubernetes, say, is not loaded on a laptop.
"""

from __future__ import annotations

from typing import Any

HEAD = "node:__internal_head__"
"""Resource that Ray gives the head node, and it alone."""


def loopback_switch() -> Any:
    """The module whose ENABLE_RAY_CLUSTER decides if Ray listens beyond the loopback."""
    from ray._private import ray_constants

    return ray_constants


def enable_token() -> None:
    """Have Ray show the token to a cluster that asks for one."""
    from ray._private.authentication.authentication_token_setup import (
        maybe_enable_token_auth_if_token_available,
    )

    maybe_enable_token_auth_if_token_available(warn_if_disabled=False)


def placement_group_table() -> list[Any]:
    """Ray's records of placement groups, as protocol buffers: its public table does not say who made a group."""
    from ray._private.state import state
    from ray.core.generated import gcs_pb2

    table = state._connect_and_get_accessor().get_placement_group_table()
    parsed = [gcs_pb2.PlacementGroupTableData.FromString(row) for row in table]
    return [data for data in parsed if data.state != gcs_pb2.PlacementGroupTableData.REMOVED]


def kuberay_autoscaling() -> tuple[Any, Any]:
    """Modules that read a KubeRay cluster's autoscaling configuration: (autoscaling_config, node_provider)."""
    from ray.autoscaler._private.kuberay import autoscaling_config, node_provider

    return autoscaling_config, node_provider


def checkpoint_list_name() -> str:
    """Name of the file in which Ray Train lists a run's checkpoints."""
    from ray.train.v2._internal.constants import CHECKPOINT_MANAGER_SNAPSHOT_FILENAME

    return str(CHECKPOINT_MANAGER_SNAPSHOT_FILENAME)


def in_tune_trial() -> bool:
    """True inside a Ray Tune trial."""
    from ray.tune.trainable.trainable_fn_utils import _in_tune_session

    return bool(_in_tune_session())


def torch_backend() -> tuple[type[Any], Any]:
    """Ray Train's class that sets torch's process group up, and the function that sets the workers' environment."""
    from ray.train.torch.config import _set_torch_distributed_env_vars, _TorchBackend

    return _TorchBackend, _set_torch_distributed_env_vars
