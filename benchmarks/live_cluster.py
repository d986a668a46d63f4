"""Ray clusters on this machine, started as a user starts them: every node is a process tree of ours.

with Cluster(folder) as cluster:                  # the head: no CPU, 8 trial slots
    node = cluster.add_node(num_cpus=1)           # `ray start --address`
    subprocess.run(["ray", "job", "submit", "--address", cluster.jobs_address, ...], env=cluster.environment)
    node.kill()                                   # SIGKILL to everything that belongs to the node
"""

from __future__ import annotations

import json
import os
import random
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import psutil

PORTS = range(20_000, 32_000)
"""Ports outside Ray's range for workers (10002-19999) and the kernel's for outgoing connections (32768-60999)."""
MARK = "LIVE_CLUSTER_NODE"
"""Environment variable of a node's processes, whose value identifies the node."""
OF_A_CLUSTER = ("RAY_ADDRESS", "RAY_API_SERVER_ADDRESS", "RAY_JOB_CONFIG_JSON_ENV_VAR", "RAY_TMPDIR", MARK)


class Node:
    """One `ray start --block` with all processes it started."""

    def __init__(self, arguments: Sequence[str], environment: Mapping[str, str], log: Path) -> None:
        self.log, self._mark = log, secrets.token_hex(8)
        self._known = dict[int, psutil.Process]()
        command = [str(Path(sys.executable).with_name("ray")), "start", *arguments, "--block"]
        with log.open("wb") as out:
            self._process = subprocess.Popen(
                command,
                env={**environment, MARK: self._mark},
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=out,
                cwd=log.parent,
                start_new_session=True,
            )

    @property
    def pid(self) -> int:
        """Process id of the `ray start`, and id of its session."""
        return self._process.pid

    @property
    def running(self) -> bool:
        """True if its `ray start` is alive."""
        return self._process.poll() is None

    def processes(self) -> list[psutil.Process]:
        """Return the node's living processes: its session, their descendants, and those with its mark."""
        found = {p.pid: p for p in psutil.process_iter() if self._owns(p)}
        for process in list(found.values()):
            found |= {child.pid: child for child in _children(process)}
        self._known |= found
        return [p for p in self._known.values() if p.is_running() and _status(p) != psutil.STATUS_ZOMBIE]

    def kill(self) -> None:
        """Kill every process of the node at once, as if the machine were gone."""
        for _ in range(20):
            living = self.processes()
            for process in living:
                _signal(process, signal.SIGKILL)
            self._process.poll()
            if not living:
                return
            psutil.wait_procs(living, timeout=0.5)
        raise RuntimeError(f"processes of a node outlive SIGKILL: {self.processes()}")

    def _owns(self, process: psutil.Process) -> bool:
        if process.pid == self.pid or _quietly(lambda: os.getsid(process.pid), None) == self.pid:
            return True
        return bool(_quietly(lambda: process.environ().get(MARK), None) == self._mark)


class Cluster:
    """A head and the nodes added to it, with token authentication; ends with the block, whatever happens.

    `head_options` and `head_environment` go to the head's `ray start` besides, `environment` to all nodes and
    clients. Logs of the nodes are `<folder>/*.log`, the token is in `home`, the head's own files are in `ray_folder`.
    """

    def __init__(
        self,
        folder: Path,
        head_resources: Mapping[str, float] | None = None,
        dashboard: bool = True,
        environment: Mapping[str, str] | None = None,
        head_options: Sequence[str] = (),
        head_environment: Mapping[str, str] | None = None,
    ) -> None:
        self.folder = folder
        self._head_resources = dict(head_resources or {"CPU": 0, "trial_slot": 8})
        self._dashboard, self._head_options = dashboard, tuple(head_options)
        self._head_environment = dict(head_environment or {})
        self._short = tempfile.TemporaryDirectory(prefix="rc")  # sockets' paths are limited to 107 bytes
        self.home, self.ray_folder = Path(self._short.name) / "h", Path(self._short.name) / "r"
        self.token = secrets.token_hex(32)
        self.ip = _own_address()
        self.port, self.dashboard_port = free_ports(2)
        self._started, self.nodes = 0, list[Node]()
        self.head: Node | None = None
        self.environment = self._environment(environment or {})

    @property
    def address(self) -> str:
        """`ip:port` for `ray start --address`, RAY_ADDRESS and ray.init."""
        return f"{self.ip}:{self.port}"

    @property
    def jobs_address(self) -> str:
        """Address of the jobs API, on loopback only."""
        return f"http://127.0.0.1:{self.dashboard_port}"

    def __enter__(self) -> Cluster:
        try:
            return self.start()
        except BaseException:
            self.stop()
            raise

    def __exit__(self, *error: object) -> None:
        self.stop()

    def start(self) -> Cluster:
        """Write the token and start the head."""
        self.folder.mkdir(parents=True, exist_ok=True)
        token = self.home / ".ray" / "auth_token"
        token.parent.mkdir(parents=True, exist_ok=True)
        token.write_text(self.token)
        token.chmod(0o600)
        self._start_head()
        return self

    def add_node(
        self,
        num_cpus: float = 1,
        resources: Mapping[str, float] | None = None,
        options: Sequence[str] = (),
        environment: Mapping[str, str] | None = None,
        wait: bool = True,
    ) -> Node:
        """Add a node on this machine; with `wait`, return once it has joined the cluster."""
        arguments = [f"--address={self.address}", f"--num-cpus={num_cpus:g}", *_PORTS, *options]
        arguments += [f"--resources={json.dumps(dict(resources or {}))}"]
        self._started += 1
        # Nodes that share a folder would delete each other's copies of a job's working folder.
        arguments.append(f"--temp-dir={self.ray_folder.parent / f'n{self._started}'}")
        log = self.folder / f"node-{self._started}.log"
        node = Node(arguments, {**self.environment, **(environment or {})}, log)
        self.nodes.append(node)
        if wait:
            _wait(lambda: _says_started(node), node)
        return node

    def kill_head(self) -> None:
        """Kill the head with all its processes: control store, dashboard, drivers of jobs."""
        if self.head:
            self.head.kill()

    def restart_head(self) -> None:
        """Start a new head at the same addresses. It has no state, and the old nodes end: add new ones."""
        for node in [*([self.head] if self.head else []), *self.nodes]:
            node.kill()
        self.nodes = []
        self._start_head()

    def stop(self) -> None:
        """End every node, the head last, and remove Ray's files."""
        for node in [*self.nodes, *([self.head] if self.head else [])]:
            node.kill()
        self.nodes, self.head = [], None
        shutil.rmtree(self._short.name, ignore_errors=True)

    def _start_head(self) -> None:
        resources = dict(self._head_resources)
        arguments = ["--head", f"--port={self.port}", f"--num-cpus={resources.pop('CPU', 0):g}", *_PORTS]
        if "GPU" in resources:
            arguments.append(f"--num-gpus={resources.pop('GPU'):g}")
        arguments += [f"--resources={json.dumps(resources)}", f"--temp-dir={self.ray_folder}"]
        arguments += [f"--include-dashboard={self._dashboard}", f"--dashboard-port={self.dashboard_port}"]
        arguments += [f"--ray-client-server-port={free_ports(1)[0]}", "--disable-usage-stats"]
        log = self.folder / "head.log"
        self.head = Node(
            [*arguments, *self._head_options], {**self.environment, **self._head_environment}, log
        )
        _wait(lambda: _says_started(self.head), self.head)
        if self._dashboard:
            _wait(lambda: answers("127.0.0.1", self.dashboard_port), self.head)

    def _environment(self, more: Mapping[str, str]) -> dict[str, str]:
        """Return this process's environment, without what points to another cluster, with what this one needs."""
        kept = {name: value for name, value in os.environ.items() if name not in OF_A_CLUSTER}
        return {
            **kept,
            "HOME": str(self.home),
            "PATH": os.pathsep.join([str(Path(sys.executable).parent), kept.get("PATH", "")]),
            "RAY_AUTH_MODE": "token",
            "RAY_USAGE_STATS_ENABLED": "0",
            "RAY_worker_maximum_startup_concurrency": "4",  # else as many as the node has CPUs
            "OMP_NUM_THREADS": kept.get("OMP_NUM_THREADS", "1"),
            **more,
        }


_PORTS = ("--min-worker-port=0", "--max-worker-port=0", "--dashboard-agent-listen-port=0")
"""Ports chosen free, instead of the defaults that every other cluster on the machine uses."""


def _own_address() -> str:
    """Return this machine's IP as a new Ray process sees it; a connected process would see its cluster's."""
    ask = [sys.executable, "-c", "import ray.util; print(ray.util.get_node_ip_address())"]
    return subprocess.run(ask, capture_output=True, text=True, check=True).stdout.split()[-1]


def free_ports(count: int) -> list[int]:
    """Return ports that nobody listens on."""
    found: list[int] = []
    while len(found) < count:
        port = random.SystemRandom().choice(PORTS)
        with socket.socket() as probe:
            try:
                probe.bind(("", port))
            except OSError:
                continue
        if port not in found:
            found.append(port)
    return found


def answers(host: str, port: int, seconds: float = 1) -> bool:
    """True if something accepts connections there."""
    try:
        socket.create_connection((host, port), timeout=seconds).close()
        return True
    except OSError:
        return False


def _says_started(node: Node | None) -> bool:
    return node is not None and "Ray runtime started." in node.log.read_text(errors="replace")


def _wait(ready: Callable[[], bool], node: Node, seconds: float = 240) -> None:
    deadline = time.monotonic() + seconds
    while not ready():
        if not node.running or time.monotonic() > deadline:
            raise RuntimeError(f"ray start did not come up:\n{node.log.read_text(errors='replace')[-4000:]}")
        time.sleep(0.1)


def _quietly(work: Callable[[], Any], otherwise: Any) -> Any:
    """Return the result of `work`, or `otherwise` if the process has ended or isn't ours to read."""
    try:
        return work()
    except (psutil.Error, OSError):
        return otherwise


def _children(process: psutil.Process) -> Any:
    return _quietly(lambda: process.children(recursive=True), [])


def _status(process: psutil.Process) -> Any:
    return _quietly(process.status, psutil.STATUS_ZOMBIE)


def _signal(process: psutil.Process, number: int) -> None:
    _quietly(lambda: process.send_signal(number), None)
