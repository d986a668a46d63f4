"""The Ray cluster: connecting to it, and how much of it a trial takes. The only caller of `ray.init`."""

from __future__ import annotations

import functools
import logging
import os
import re
import secrets
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, redirect_stdout, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import ray
import yaml
from ray._private import ray_constants
from ray._private.authentication.authentication_token_setup import maybe_enable_token_auth_if_token_available
from ray.exceptions import RayError, RayTaskError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from raymoe.address import check, chosen, keep_token_private, no_token, refused_token
from raymoe.config import Execution, InputError
from raymoe.storage import Location, location, read_file, replace_file

TRIAL_SLOT = "trial_slot"
"""Custom resource of the head node: trial drivers take one each, and no CPU, so that they can't starve workers."""


@dataclass(frozen=True)
class Workers:
    """The training workers of one trial: `count` of them; of elastic ones that is the fewest, and `most` the most."""

    count: int
    cpus: int
    gpu: bool
    most: int

    @property
    def bundle(self) -> dict[str, float]:
        """Resources of each, which one node has to have."""
        return {"CPU": self.cpus, **({"GPU": 1} if self.gpu else {})}


@contextmanager
def connected(execution: Execution) -> Iterator[None]:
    """A cluster to work on: the one this process is connected to, the given one, the job's own, or a local one.

    What was connected here is disconnected at the end of the block; a local cluster ends with it.

    Raises:
        InputError: no cluster answers at the address, it asks for a token that is not here, or it is of another
            version of Ray or Python.
    """
    os.environ.setdefault("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", "0.2")  # a report is throttled to this
    os.environ.setdefault("RAY_COLOR_PREFIX", "0")  # what nodes say stays plain in logs
    os.environ.setdefault("RAY_AIR_NEW_OUTPUT", "0")
    os.environ.setdefault("RAY_CHDIR_TO_TRIAL_DIR", "0")  # relative paths mean the same everywhere
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    os.environ.setdefault("TUNE_DISABLE_STRICT_METRIC_CHECKING", "1")  # checkpoints come without metrics
    # Threads that spin while they wait make a step ten times slower as soon as a core is shared.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    if ray.is_initialized():
        yield
        return
    with redirect_stdout(sys.stderr):  # stdout is for results, and Ray tells of lost nodes there
        _connect(execution)
        try:
            yield
        finally:
            ray.shutdown()


def _connect(execution: Execution) -> None:
    key, address = chosen(execution)
    # It says on every start that the local cluster asks for a token, as it should.
    logging.getLogger("ray._private.authentication.authentication_token_setup").setLevel(logging.ERROR)
    if not address:
        _start_local()
        return
    if check(execution):
        maybe_enable_token_auth_if_token_available(warn_if_disabled=False)
    try:
        ray.init(address=address, log_to_driver=False, logging_level=logging.WARNING)
    except (ConnectionError, RuntimeError, ValueError, RayError) as error:
        ray.shutdown()
        raise _told(f"{key}: the Ray cluster at {address}", error) from None


def _told(where: str, error: BaseException) -> InputError:
    """Ray's reason for not connecting, on one line."""
    cause: BaseException | None = error
    words = ""
    while cause:
        words, cause = f"{words} {' '.join(str(cause).split())}", cause.__cause__
    if versions := re.search(r"Ray: (\S+) Python: (\S+) .*Ray: (\S+) Python: (\S+)", words):
        theirs, ours = versions.groups()[:2], versions.groups()[2:]
        return InputError(
            f"{where} runs Ray {theirs[0]} on Python {theirs[1]}, and here is Ray {ours[0]} on Python {ours[1]}: "
            "they have to be the same"
        )
    if "InvalidAuthToken" in words:
        return refused_token(where)
    if "no authentication token was found" in words:
        return no_token(where)
    return InputError(f"{where}: {' '.join(str(error).split())}")


def _start_local() -> None:
    """A cluster of this machine alone: every socket of Ray, gloo and NCCL on the loopback, with a token."""
    for library in ("GLOO", "NCCL"):
        os.environ.setdefault(f"{library}_SOCKET_IFNAME", "lo")
    keep_token_private()
    with _on_loopback():
        ray.init(
            address="local",
            resources={TRIAL_SLOT: 64},
            include_dashboard=False,
            log_to_driver=False,
            logging_level=logging.WARNING,
        )


@contextmanager
def _on_loopback() -> Iterator[None]:
    """What starts in this block calls itself 127.0.0.1 and listens there alone, as Ray does by default on macOS.

    On Linux Ray turns any spelling of the loopback into the machine's own address, and listens everywhere.
    """
    before = ray_constants.ENABLE_RAY_CLUSTER
    ray_constants.ENABLE_RAY_CLUSTER = False
    try:
        yield
    finally:
        ray_constants.ENABLE_RAY_CLUSTER = before


def check_shared(storage: str) -> None:
    """See that every node there is now reads what this process writes to the storage.

    A node that an autoscaler adds later says so itself, when its worker does not find the data.

    Raises:
        InputError: naming the nodes that don't.
    """
    here = ray.get_runtime_context().get_node_id()
    nodes = {n["NodeID"]: n["NodeManagerAddress"] for n in ray.nodes() if n["Alive"] and n["NodeID"] != here}
    if not nodes:
        return
    content = secrets.token_hex(16).encode()
    probe = location(storage) / f".probe-{secrets.token_hex(4)}"
    replace_file(probe, content)
    try:
        task = ray.remote(num_cpus=0, max_retries=0)(_reads)
        asked = {id: task.options(scheduling_strategy=_on_node(id)).remote(probe, content) for id in nodes}
        ready, _ = ray.wait(list(asked.values()), num_returns=len(asked), timeout=PROBE_SECONDS)
        blind = [nodes[id] for id, answer in asked.items() if answer in ready and not _answer(answer)]
    finally:
        probe.unlink(missing_ok=True)
    if blind:
        raise InputError(
            f"execution.storage: {storage} is not shared: {', '.join(sorted(blind))} "
            f"{'does' if len(blind) == 1 else 'do'} not see what this node writes there"
        )


PROBE_SECONDS = 60
"""For a worker to start on every node; one that takes longer is not judged."""


def _reads(probe: Location, content: bytes) -> bool:
    for _ in range(10):  # a network file system may show a new file a little later
        if read_file(probe) == content:
            return True
        time.sleep(0.5)
    return False


def _answer(answer: Any) -> bool:
    """Whether the node sees the file; one that went meanwhile is not judged."""
    try:
        return bool(ray.get(answer))
    except (RayTaskError, OSError):
        return False
    except RayError:
        return True


def _on_node(id: str) -> NodeAffinitySchedulingStrategy:
    return NodeAffinitySchedulingStrategy(id, soft=False)


def uses_gpu(execution: Execution) -> bool:
    """Whether work runs on GPUs: as configured, else if the cluster has any or may have."""
    return _told_capacity().total("GPU") >= 1 if execution.gpu is None else execution.gpu


def trial_workers(execution: Execution, batch_size: int) -> Workers:
    """The workers of one trial: the most that share `batch_size` evenly, up to the number configured, by default
    up to one per GPU of one node, or two on CPUs; elastic ones as configured, and at most one per sequence."""
    gpu = uses_gpu(execution)
    limit = execution.workers or _worker_limit(gpu)
    if isinstance(limit, tuple):
        count, most = (min(n, batch_size) for n in limit)
    else:
        count = most = next(n for n in range(limit, 0, -1) if batch_size % n == 0)
    return Workers(count, execution.cpus_per_worker or _cpus_of_worker(gpu, most), gpu, most)


def decided(execution: Execution) -> Execution:
    """`execution` with what the cluster decides filled in: a trial does not ask again, when a node may be away."""
    gpu = uses_gpu(execution)
    workers = execution.workers or _worker_limit(gpu)
    cpus = execution.cpus_per_worker or _cpus_of_worker(gpu, execution.most_workers or _worker_limit(gpu))
    return execution.model_copy(update={"gpu": gpu, "workers": workers, "cpus_per_worker": cpus})


def check_room(workers: Workers) -> None:
    """Say it before anything starts if a trial's workers will never fit.

    Raises:
        InputError: not even on all nodes that the cluster's autoscaler may add.
    """
    have = capacity()
    if not have.final:
        return
    will = "may grow to" if have.autoscaler else "has"
    if workers.gpu and have.total("GPU") < 1:
        raise InputError(f"execution.gpu: a trial needs {workers.count} GPUs, the cluster {will} 0")
    for resource, each in workers.bundle.items():
        if (need := workers.count * each) > (total := have.total(resource)):
            raise InputError(
                f"execution.workers: a trial needs {need:g} {resource}s, the cluster {will} {total:g}"
            )
    if (most := have.largest("CPU")) < workers.cpus:
        raise InputError(
            f"execution.cpus_per_worker: a worker needs {workers.cpus} CPUs, the largest node has {most:g}"
        )
    if (room := have.room(workers.bundle)) < workers.count:
        raise InputError(
            f"execution.workers: a trial needs {workers.count} workers of {_words(workers.bundle)}, and no more "
            f"than {room} fit on the nodes that the cluster {'may have' if have.autoscaler else 'has'}"
        )


def concurrent_trials(execution: Execution, workers: Workers) -> int:
    """How many trials fit beside each other, on all nodes that there may be: waiting ones wait for nodes alone."""
    if execution.max_concurrent_trials:
        return execution.max_concurrent_trials
    have = capacity()
    slots = have.room({TRIAL_SLOT: 1})
    fits = have.room(workers.bundle) // workers.most
    return max(1, min(fits, slots) if slots else fits)


def trial_driver_resources() -> dict[str, float]:
    """What a trial's driver takes: a slot of the head node, or a sliver of a CPU where no node has slots."""
    if ray.cluster_resources().get(TRIAL_SLOT):
        return {TRIAL_SLOT: 1}
    return {"CPU": 0.001}


def _worker_limit(gpu: bool) -> int:
    """Workers of a trial by default: what one node holds, since the network between nodes is slow."""
    have = _told_capacity()
    return max(1, int(have.largest("GPU"))) if gpu else max(1, min(2, int(have.largest("CPU"))))


def _cpus_of_worker(gpu: bool, workers: int) -> int:
    return 1 if gpu else max(1, int(_told_capacity().largest("CPU")) // workers)


def _told_capacity() -> Capacity:
    """What defaults are made from; there are none for a cluster without a node that doesn't tell what it may have."""
    have = capacity()
    if not have.final and have.total("CPU") < 1:
        raise InputError(
            "execution.gpu, execution.workers: give them, and without GPUs execution.cpus_per_worker: there is "
            "no worker node yet, and what the cluster's autoscaler may add can't be read on its head"
        )
    return have


def _words(bundle: Mapping[str, float]) -> str:
    return " and ".join(f"{amount:g} {resource}s" for resource, amount in bundle.items())


# ---- what the cluster has, and what it may grow to


@dataclass(frozen=True)
class Capacity:
    """The nodes that a cluster has or, with an autoscaler, may have."""

    nodes: tuple[Mapping[str, float], ...]
    """Resources of every one of them."""
    most: int | None = None
    """Nodes at the same time, where the autoscaler has a limit over all types."""
    autoscaler: bool = False
    final: bool = True
    """Whether there will never be more: not known of an autoscaler whose configuration can't be read."""

    def room(self, bundle: Mapping[str, float]) -> int:
        """How many times `bundle` fits, each time on one node."""
        holds = (
            min(int(node.get(name, 0) / amount + 1e-6) for name, amount in bundle.items())
            for node in self.nodes
        )
        return sum(sorted(holds, reverse=True)[: self.most])

    def total(self, resource: str) -> float:
        """Of all nodes together."""
        return sum(sorted((node.get(resource, 0) for node in self.nodes), reverse=True)[: self.most])

    def largest(self, resource: str) -> float:
        """Of the node that has most of it."""
        return max((node.get(resource, 0) for node in self.nodes), default=0)


def capacity() -> Capacity:
    """What the connected cluster has, or may grow to.

    Of an autoscaler's maximum the control store says nothing (the call for it answers None with autoscaler v2), so
    its configuration is read on the head, where it is.
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
    """The head and every node that an autoscaler of this configuration may start."""
    types = [
        kind for name, kind in config["available_node_types"].items() if name != config["head_node_type"]
    ]
    most = config.get("max_workers", 2)  # Ray's own default
    nodes = [
        kind.get("resources") or {} for kind in types for _ in range(min(most, kind.get("max_workers", most)))
    ]
    return Capacity((head, *nodes), most + 1, autoscaler=True, final=all(nodes))


HEAD = "node:__internal_head__"
"""Resource that Ray gives the head node, and it alone."""


@functools.cache
def _autoscaler(gcs_address: str, head: str) -> dict[str, Any] | None:
    """Configuration of the cluster's autoscaler, `{}` if it has none, None if that can't be told."""
    try:
        if ray.get_runtime_context().get_node_id() == head:
            return _autoscaler_here(gcs_address)
        ask = ray.remote(num_cpus=0, resources={HEAD: 0.001}, max_retries=0)(_autoscaler_here)
        return cast("dict[str, Any] | None", ray.get(ask.remote(gcs_address), timeout=60))
    except Exception as error:  # whatever it is, work can go on
        logging.getLogger(__name__).debug("autoscaler's configuration: %s", error)
        return None


def _autoscaler_here(gcs_address: str) -> dict[str, Any] | None:
    """As `_autoscaler`, on the head node: from the file that Ray's monitor was given, or from KubeRay."""
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
    """What KubeRay's autoscaler makes of the cluster's own description, which the head's pod may read."""
    from ray.autoscaler._private.kuberay import autoscaling_config, node_provider

    account = Path("/var/run/secrets/kubernetes.io/serviceaccount/namespace")
    client = node_provider.KubernetesHttpApiClient(namespace=account.read_text().strip())
    described = client.get(f"rayclusters/{os.environ['RAY_CLUSTER_NAME']}")
    derived = autoscaling_config._derive_autoscaling_config_from_ray_cr(described)
    return cast(dict[str, Any], derived)
