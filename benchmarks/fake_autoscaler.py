"""A cluster on this machine with Ray's real autoscaler and Ray's fake provider as its cloud: nodes are processes.

    with AutoscalingCluster(folder, {"worker": ({"CPU": 1}, 3)}) as cluster:        # 0 to 3 nodes of 1 CPU
        subprocess.run(["ray", "job", "submit", "--address", cluster.jobs_address, ...], env=cluster.environment)

Autoscaler v2, as on clouds; only starting a node differs, and takes seconds. The provider's nodes
descend from the head and carry its mark, so they end with it. `ray.cluster_utils.AutoscalingCluster` is not used: it
ends every Ray of the machine.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml
from live_cluster import Cluster

HEAD_ID = "fffffffffffffffffffffffffffffffffffffffffffffffffff00000"
"""Node id of the head in Ray's fake provider."""


class AutoscalingCluster(Cluster):
    """A head without CPUs and from 0 to a maximum of nodes of each type, by Ray's autoscaler.

    Args:
        folder: for the autoscaler's configuration and the head's log.
        node_types: resources and maximal number of the nodes of every type.
        idle_seconds: after which a node that does nothing goes away.
        head_resources: by default no CPU and 8 trial slots.
        environment: for all nodes and clients.
    """

    def __init__(
        self,
        folder: Path,
        node_types: Mapping[str, tuple[Mapping[str, float], int]],
        idle_seconds: float = 6,
        head_resources: Mapping[str, float] | None = None,
        environment: Mapping[str, str] | None = None,
    ) -> None:
        self.file = folder / "autoscaling.yaml"
        self._types, self._idle = dict(node_types), idle_seconds
        super().__init__(
            folder,
            head_resources,
            environment=environment,
            head_options=[f"--autoscaling-config={self.file}"],
            head_environment=HEAD_ENVIRONMENT,
        )

    def start(self) -> AutoscalingCluster:
        """Write the autoscaler's configuration and start the head."""
        self.folder.mkdir(parents=True, exist_ok=True)
        self.file.write_text(yaml.safe_dump(self._configuration()))
        super().start()
        return self

    def stop(self) -> None:
        """End every process at once; the provider would end its nodes one by one."""
        self.kill_head()
        super().stop()

    def _configuration(self) -> dict[str, Any]:
        workers = {
            name: {
                "resources": dict(resources),
                "labels": {"ray.io/node-group": name},  # as clouds' providers tell a node by its environment
                "min_workers": 0,
                "max_workers": most,
                "node_config": {},
            }
            for name, (resources, most) in self._types.items()
        }
        head = {"resources": dict(self._head_resources), "max_workers": 0, "node_config": {}}
        provider = {
            "type": "external",
            "module": "ray.autoscaler._private.fake_multi_node.node_provider.FakeMultiNodeProvider",
            "gcs_address": self.address,  # launches hang silently if it is wrong
            "head_node_id": HEAD_ID,
            "use_node_id_as_ip": True,
            "disable_node_updaters": True,
            "disable_launch_config_check": True,
            "launch_multiple": True,
        }
        return {
            "cluster_name": "fake",
            "max_workers": sum(most for _, most in self._types.values()),
            "provider": provider,
            "available_node_types": {"ray.head.default": head, **workers},
            "head_node_type": "ray.head.default",
            "idle_timeout_minutes": self._idle / 60,
            "upscaling_speed": 100,
            **{name: [] for name in _COMMANDS},
            **{name: {} for name in ("auth", "file_mounts")},
            "cluster_synced_files": [],
            "file_mounts_sync_continuously": False,
        }


HEAD_ENVIRONMENT = {
    "RAY_FAKE_CLUSTER": "1",
    "RAY_enable_autoscaler_v2": "1",
    "AUTOSCALER_UPDATE_INTERVAL_S": "1",
    "RAY_CLOUD_INSTANCE_ID": HEAD_ID,
    "RAY_OVERRIDE_NODE_ID_FOR_TESTING": HEAD_ID,
    "RAY_worker_maximum_startup_concurrency": "4",  # by default the CPUs, of which the head has none
}
_COMMANDS = (
    "initialization_commands",
    "setup_commands",
    "head_setup_commands",
    "worker_setup_commands",
    "head_start_ray_commands",
    "worker_start_ray_commands",
)
