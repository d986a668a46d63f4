"""Connecting to a Ray cluster, or starting one on this machine. The only caller of `ray.init`."""

from __future__ import annotations

import logging
import os
import re
import secrets
import sys
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, redirect_stdout
from pathlib import Path
from typing import Any

import ray
from ray.exceptions import RayError, RayTaskError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from raymoe.cluster import ray_internals
from raymoe.cluster.address import (
    check,
    chosen,
    keep_token_private,
    no_token,
    refused_token,
)
from raymoe.cluster.capacity import TRIAL_SLOT
from raymoe.config import Execution
from raymoe.console import say
from raymoe.schema import InputError
from raymoe.storage.location import Location, location, read_file, replace_file


@contextmanager
def connected(execution: Execution) -> Iterator[None]:
    """Connect to a cluster to work on: the one that this process has, the given one, the job's own, or a local one.

    At the end of the block the connection that was made here is closed; a local cluster ends with it.

    Raises:
        InputError: no cluster answers at the address, it asks for a token that is not here, or it runs another
            version of Ray or Python.
    """
    for name, value in _ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    if ray.is_initialized():
        yield
        return
    with redirect_stdout(sys.stderr):  # stdout is for results, and Ray tells of lost nodes there
        _connect(execution)
        try:
            yield
        finally:
            ray.shutdown()


_ENVIRONMENT = {
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.2",  # a report is throttled to this
    "RAY_COLOR_PREFIX": "0",  # what nodes say stays plain in logs
    "RAY_AIR_NEW_OUTPUT": "0",
    "RAY_CHDIR_TO_TRIAL_DIR": "0",  # relative paths mean the same everywhere
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    "TUNE_DISABLE_STRICT_METRIC_CHECKING": "1",  # checkpoints come without metrics
    # Threads that spin while they wait make a step ten times slower as soon as a core is shared.
    "OMP_WAIT_POLICY": "PASSIVE",
}
"""Set before Ray starts, unless the user did."""


def _connect(execution: Execution) -> None:
    key, address = chosen(execution)
    logging.getLogger(ray_internals.TOKEN_LOGGER).setLevel(logging.ERROR)
    if not address:
        _start_local()
        return
    if check(execution):
        ray_internals.enable_token()
    try:
        ray.init(address=address, log_to_driver=False, logging_level=logging.WARNING)
    except (ConnectionError, RuntimeError, ValueError, RayError) as error:
        ray.shutdown()
        raise _told(f"{key}: the Ray cluster at {address}", error) from None


def _told(where: str, error: BaseException) -> InputError:
    """Return Ray's reason for not connecting, on one line."""
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
    """Start a cluster of this machine alone: every socket of Ray, gloo and NCCL on the loopback, with a token."""
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
    """Within the block, let Ray start as 127.0.0.1 and listen there alone, as it does by default on macOS.

    On Linux Ray turns any spelling of the loopback into the machine's own address, and listens everywhere.
    """
    switch = ray_internals.loopback_switch()
    before, switch.ENABLE_RAY_CLUSTER = switch.ENABLE_RAY_CLUSTER, False
    try:
        yield
    finally:
        switch.ENABLE_RAY_CLUSTER = before


def check_shared(storage: str) -> None:
    """Make sure that every present node reads what this process writes to the storage.

    On a node that an autoscaler adds later, the worker says so itself when it does not find the data.

    Raises:
        InputError: some nodes don't; names them.
    """
    here = ray.get_runtime_context().get_node_id()
    nodes = {n["NodeID"]: n["NodeManagerAddress"] for n in ray.nodes() if n["Alive"] and n["NodeID"] != here}
    if not nodes:
        return
    content = secrets.token_hex(16).encode()
    probe = location(storage) / f".probe-{secrets.token_hex(4)}"
    replace_file(probe, content)
    try:
        blind = sorted(nodes[id] for id in _blind(nodes, probe, content))
    finally:
        probe.unlink(missing_ok=True)
    if blind:
        raise InputError(
            f"execution.storage: {storage} is not shared: {', '.join(blind)} "
            f"{'does' if len(blind) == 1 else 'do'} not see what this node writes there"
        )


def _blind(nodes: Iterable[str], probe: Location, content: bytes) -> list[str]:
    """Return the ids of those `nodes` that do not read `content` from `probe`."""
    task = ray.remote(num_cpus=0, max_retries=0)(_reads)
    asked = {id: task.options(scheduling_strategy=_on_node(id)).remote(probe, content) for id in nodes}
    ready, _ = ray.wait(list(asked.values()), num_returns=len(asked), timeout=PROBE_SECONDS)
    return [id for id, answer in asked.items() if answer in ready and not _sees(answer)]


PROBE_SECONDS = 60
"""Seconds for a worker to start on every node; one that takes longer is not judged."""


def _reads(probe: Location, content: bytes) -> bool:
    for _ in range(10):  # a network file system may show a new file a little later
        if read_file(probe) == content:
            return True
        time.sleep(0.5)
    return False


def _sees(answer: Any) -> bool:
    """True if the node sees the file; one that went meanwhile is not judged."""
    try:
        return bool(ray.get(answer))
    except (RayTaskError, OSError):
        return False
    except RayError:
        return True


def _on_node(id: str) -> NodeAffinitySchedulingStrategy:
    return NodeAffinitySchedulingStrategy(id, soft=False)


def check_storage(storage: str) -> None:
    """Make sure that what a job computes outlives it.

    Raises:
        InputError: the storage is in the copy of the working folder, which goes with the job.
    """
    copy = _copy_of_working_folder()
    if copy is None:
        return
    if "://" not in storage and copy in Path(storage).expanduser().absolute().parents:
        raise InputError(
            f"execution.storage: {storage} would be in the job's temporary copy of the working folder: give a "
            "folder that all nodes see, or set RAYMOE_STORAGE"
        )
    if not os.environ.get("MLFLOW_TRACKING_URI"):
        say("MLFLOW_TRACKING_URI is not set: MLflow's runs go with the job; results stay in the storage")


def _copy_of_working_folder() -> Path | None:
    here = Path.cwd().absolute()
    return next((p for p in (here, *here.parents) if p.parent.name == "working_dir_files"), None)
