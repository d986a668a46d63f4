"""Rendezvous of a trial's workers, through a store that listens on the first worker's address alone.

torch's own rendezvous listens on every interface, and its store authenticates nobody.
"""

from __future__ import annotations

import os
import socket
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import ray
import ray.util
import torch.distributed as dist
from ray.train.torch.config import TorchConfig
from torch.distributed import TCPStore  # type: ignore[attr-defined]

from raymoe.cluster.ray_internals import torch_backend

TorchBackend, set_environment = torch_backend()

_hosted: list[TCPStore] = []
"""The store, in the first worker between `_host` and `_join`."""


@dataclass
class ProcessGroup(TorchConfig):  # type: ignore[misc]
    """Ray Train's torch configuration with this rendezvous; a cluster on the loopback stays there."""

    @property
    def backend_cls(self) -> type[Any]:
        """Return the backend that sets up the workers' process group."""
        return _Backend


class _Backend(TorchBackend):  # type: ignore[misc, valid-type]
    def on_start(self, worker_group: Any, backend_config: TorchConfig) -> None:
        timeout = timedelta(seconds=backend_config.timeout_s)
        worker_group.execute(set_environment)
        address, port = worker_group.execute_single(0, _host, len(worker_group), timeout)
        joining = [
            worker_group.execute_single_async(i, _join, backend_config.backend, address, port, timeout)
            for i in range(len(worker_group))
        ]
        ray.get(joining)


def _host(world_size: int, timeout: timedelta) -> tuple[str, int]:
    """Start the store in this process; return its address and port."""
    address = ray.util.get_node_ip_address()
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    listener = socket.create_server((address, 0), family=family, backlog=1024)
    port = listener.getsockname()[1]
    store = TCPStore(
        address,
        port,
        world_size,
        is_master=True,
        timeout=timeout,
        wait_for_workers=False,
        master_listen_fd=listener.detach(),
    )
    _hosted[:] = [store]
    return address, port


def _join(backend: str, address: str, port: int, timeout: timedelta) -> None:
    """Join the process group; the worker's rank is in the environment."""
    os.environ |= {"MASTER_ADDR": address, "MASTER_PORT": str(port)}  # DeepSpeed reads them
    rank, world_size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    store = _hosted.pop() if rank == 0 else TCPStore(address, port, world_size, timeout=timeout)
    dist.init_process_group(backend, store=store, rank=rank, world_size=world_size, timeout=timeout)
