"""Room: what a trial takes of the cluster, what the cluster has, and what an autoscaler may add to it."""

from __future__ import annotations

import functools
import logging
import os
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import ray
import yaml

from raymoe.cluster import ray_internals
from raymoe.cluster.ray_internals import HEAD
from raymoe.config import Execution
from raymoe.console import counted
from raymoe.schema import InputError

TRIAL_SLOT = "trial_slot"
"""Custom resource of the head node. Trial drivers take one each, and no CPU: they can't starve workers."""


@dataclass(frozen=True)
class Workers:
    """The training workers of one trial: `count` to `most` of them, which differ for elastic trials alone."""

    count: int
    cpus: int
    gpu: bool
    most: int

    @property
    def bundle(self) -> dict[str, float]:
        """Resources that each worker takes, all on one node."""
        return {"CPU": self.cpus, **({"GPU": 1} if self.gpu else {})}


def uses_gpu(execution: Execution) -> bool:
    """True if work runs on GPUs: as configured, else if the cluster has any or may get some."""
    return _known_capacity().total("GPU") >= 1 if execution.gpu is None else execution.gpu


def trial_workers(execution: Execution, batch_size: int) -> Workers:
    """Return the workers of one trial.

    The most that share `batch_size` evenly, up to the number configured: by default one per GPU of one node, or two
    on CPUs. Elastic ones are as configured, and at most one per sequence.
    """
    gpu = uses_gpu(execution)
    limit = execution.workers or _worker_limit(gpu)
    if isinstance(limit, tuple):
        count, most = (min(n, batch_size) for n in limit)
    else:
        count = most = next(n for n in range(limit, 0, -1) if batch_size % n == 0)
    return Workers(count, execution.cpus_per_worker or _cpus_of_worker(gpu, most), gpu, most)


def decided(execution: Execution) -> Execution:
    """Return `execution` with what the cluster decides filled in: trials don't ask again, when a node may be away."""
    gpu = uses_gpu(execution)
    workers = execution.workers or _worker_limit(gpu)
    cpus = execution.cpus_per_worker or _cpus_of_worker(gpu, execution.most_workers or _worker_limit(gpu))
    return execution.model_copy(update={"gpu": gpu, "workers": workers, "cpus_per_worker": cpus})


def check_room(workers: Workers) -> None:
    """Make sure, before anything starts, that a trial's workers fit.

    Raises:
        InputError: they never will, not even on all nodes that the cluster's autoscaler may add.
    """
    have = capacity()
    if not have.final:
        return
    will = "may grow to" if have.autoscaler else "has"
    if workers.gpu and have.total("GPU") < 1:
        raise InputError(
            f"execution.gpu: a trial needs {counted(workers.count, 'GPU')}, the cluster {will} 0"
        )
    for resource, each in workers.bundle.items():
        if (need := workers.count * each) > (total := have.total(resource)):
            raise InputError(
                f"execution.workers: a trial needs {counted(need, resource)}, the cluster {will} {total:g}"
            )
    if (most := have.largest("CPU")) < workers.cpus:
        raise InputError(
            f"execution.cpus_per_worker: a worker needs {counted(workers.cpus, 'CPU')}, the largest node has {most:g}"
        )
    if (room := have.room(workers.bundle)) < workers.count:
        raise InputError(
            f"execution.workers: a trial needs {counted(workers.count, 'worker')} of {_words(workers.bundle)}, "
            f"and no more than {room} fit on the nodes that the cluster {'may have' if have.autoscaler else 'has'}"
        )


def concurrent_trials(execution: Execution, workers: Workers) -> int:
    """Return how many trials fit side by side on all nodes that there may be: others would wait for nodes alone."""
    if execution.max_concurrent_trials:
        return execution.max_concurrent_trials
    have = capacity()
    slots = have.room({TRIAL_SLOT: 1})
    fits = have.room(workers.bundle) // workers.most
    return max(1, min(fits, slots) if slots else fits)


def trial_driver_resources() -> dict[str, float]:
    """Return what a trial's driver takes: a slot of the head node, or a sliver of a CPU if no node has slots."""
    if ray.cluster_resources().get(TRIAL_SLOT):
        return {TRIAL_SLOT: 1}
    return {"CPU": 0.001}


def _worker_limit(gpu: bool) -> int:
    """Return a trial's default number of workers: what one node holds, since the network between nodes is slow."""
    have = _known_capacity()
    return max(1, int(have.largest("GPU"))) if gpu else max(1, min(2, int(have.largest("CPU"))))


def _cpus_of_worker(gpu: bool, workers: int) -> int:
    return 1 if gpu else max(1, int(_known_capacity().largest("CPU")) // workers)


def _known_capacity() -> Capacity:
    """Return the capacity that defaults are derived from.

    Raises:
        InputError: the cluster has no worker node yet, and what it may get is not known.
    """
    have = capacity()
    if not have.final and have.total("CPU") < 1:
        raise InputError(
            "execution.gpu, execution.workers: give them, and without GPUs execution.cpus_per_worker: there is "
            "no worker node yet, and what the cluster's autoscaler may add can't be read on its head"
        )
    return have


def _words(bundle: Mapping[str, float]) -> str:
    return " and ".join(counted(amount, resource) for resource, amount in bundle.items())


# ---- what the cluster has, and what it may get


@dataclass(frozen=True)
class Capacity:
    """The nodes that a cluster has or, with an autoscaler, may get."""

    nodes: tuple[Mapping[str, float], ...]
    """Resources of each node."""
    most: int | None = None
    """Most nodes at a time, if the autoscaler limits all types together."""
    autoscaler: bool = False
    final: bool = True
    """False if there may be more, as with an autoscaler whose configuration can't be read."""

    def room(self, bundle: Mapping[str, float]) -> int:
        """Return how many times `bundle` fits, each time on one node."""
        holds = (
            min(int(node.get(name, 0) / amount + 1e-6) for name, amount in bundle.items())
            for node in self.nodes
        )
        return sum(sorted(holds, reverse=True)[: self.most])

    def total(self, resource: str) -> float:
        """Return what all nodes have together."""
        return sum(sorted((node.get(resource, 0) for node in self.nodes), reverse=True)[: self.most])

    def largest(self, resource: str) -> float:
        """Return what the node with most of it has."""
        return max((node.get(resource, 0) for node in self.nodes), default=0)


def capacity() -> Capacity:
    """Return what the connected cluster has, or may grow to.

    The control store does not know an autoscaler's maximum (its call for that returns None with autoscaler v2), so
    the configuration is read on the head node.
    """
    alive = [node for node in ray.nodes() if node["Alive"]]
    resources = tuple(node["Resources"] for node in alive)
    heads = [node for node in alive if HEAD in node["Resources"]]
    if not heads:
        return Capacity(resources, final=False)
    config = _autoscaler(ray.get_runtime_context().gcs_address, heads[0]["NodeID"])
    if not config:
        return Capacity(resources, final=config is not None)
    return grown(config, heads[0]["Resources"])


def grown(config: Mapping[str, Any], head: Mapping[str, float]) -> Capacity:
    """Return the head and every node that an autoscaler of this configuration may start."""
    types = [
        kind for name, kind in config["available_node_types"].items() if name != config["head_node_type"]
    ]
    most = config.get("max_workers", 2)  # Ray's own default
    nodes = [
        kind.get("resources") or {} for kind in types for _ in range(min(most, kind.get("max_workers", most)))
    ]
    return Capacity((head, *nodes), most + 1, autoscaler=True, final=all(nodes))


@functools.cache
def _autoscaler(gcs_address: str, head: str) -> dict[str, Any] | None:
    """Return the configuration of the cluster's autoscaler: `{}` if it has none, None if that is not known."""
    try:
        if ray.get_runtime_context().get_node_id() == head:
            return _autoscaler_here(gcs_address)
        ask = ray.remote(num_cpus=0, resources={HEAD: 0.001}, max_retries=0)(_autoscaler_here)
        return cast("dict[str, Any] | None", ray.get(ask.remote(gcs_address), timeout=60))
    except Exception as error:  # whatever it is, work can go on
        logging.getLogger(__name__).debug("autoscaler's configuration: %s", error)
        return None


def _autoscaler_here(gcs_address: str) -> dict[str, Any] | None:
    """Do as `_autoscaler`, on the head node: read the file that Ray's monitor was given, or ask KubeRay."""
    for file in Path("/proc").glob("[0-9]*/cmdline"):
        with suppress(OSError):
            words = file.read_bytes().decode(errors="replace").split("\0")
            if f"--gcs-address={gcs_address}" in words and any(w.endswith("/monitor.py") for w in words):
                given = next((w for w in words if w.startswith("--autoscaling-config=")), None)
                return _read(Path(given.partition("=")[2]).expanduser()) if given else {}
    return _kuberay() if "RAY_CLUSTER_NAME" in os.environ else None


def _read(file: Path) -> dict[str, Any]:
    return cast(dict[str, Any], yaml.safe_load(file.read_text()))


def _kuberay() -> dict[str, Any]:
    """Derive the configuration from the cluster's own description, as KubeRay's autoscaler does in the head's pod."""
    account = Path("/var/run/secrets/kubernetes.io/serviceaccount/namespace")
    client = ray_internals.kuberay_client(account.read_text().strip())
    description = client.get(f"rayclusters/{os.environ['RAY_CLUSTER_NAME']}")
    return ray_internals.kuberay_autoscaling_config(description)
