"""A local cluster as raymoe starts it: who can reach it from where, and with what."""

from __future__ import annotations

import ipaddress
import os
import stat
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc
import psutil
import pytest
from live_cluster import answers

ROOT = Path(__file__).parents[2]
CLUSTER = """
import os, sys, threading, time
from pathlib import Path
import ray
from ray.train import RunConfig, ScalingConfig
from ray.train.torch import TorchTrainer
from raymoe.cluster.connection import connected
from raymoe.config import Execution
from raymoe.train.process_group import ProcessGroup

HOME = Path(os.environ["HOME"])

def loop(config):
    import torch.distributed
    torch.distributed.barrier()
    (config["home"] / f"joined-{torch.distributed.get_rank()}").touch()
    while not (config["home"] / "end").exists():
        time.sleep(0.1)

with connected(Execution()):
    trainer = TorchTrainer(
        loop,
        train_loop_config={"home": HOME},
        scaling_config=ScalingConfig(num_workers=2, resources_per_worker={"CPU": 0.5}),
        torch_config=ProcessGroup(backend="gloo"),
        run_config=RunConfig(storage_path=str(HOME / "runs")),
    )
    training = threading.Thread(target=trainer.fit)
    training.start()
    while not all((HOME / f"joined-{rank}").exists() for rank in range(2)):
        assert training.is_alive()
        time.sleep(0.1)
    (HOME / ".address").write_text(ray.get_runtime_context().gcs_address)
    (HOME / ".address").rename(HOME / "address")
    sys.stdin.read()
    (HOME / "end").touch()
    training.join()
"""


class Local:
    """The cluster, from outside of its process."""

    def __init__(self, process: subprocess.Popen[bytes], home: Path) -> None:
        self.process, self.home = process, home
        while not (home / "address").is_file():
            assert process.poll() is None, "the cluster did not start"
            time.sleep(0.1)
        self.address = (home / "address").read_text()
        self.token = (home / ".ray" / "auth_token").read_text().strip()

    def listening(self) -> list[tuple[str, str, int]]:
        """Name of the process, address and port of everything that waits for connections or datagrams."""
        root = psutil.Process(self.process.pid)
        found = []
        for process in [root, *root.children(recursive=True)]:
            for socket in process.net_connections("inet"):
                if socket.laddr and socket.status in (psutil.CONN_LISTEN, psutil.CONN_NONE):
                    found.append((process.name(), socket.laddr.ip, socket.laddr.port))
        return found


@pytest.fixture(scope="module")
def local() -> Iterator[Local]:
    with tempfile.TemporaryDirectory(prefix="s") as home:
        kept = {k: v for k, v in os.environ.items() if k not in ("RAY_ADDRESS", "RAY_AUTH_MODE")}
        process = subprocess.Popen(
            [sys.executable, "-c", CLUSTER],
            env={**kept, "HOME": home, "RAY_TMPDIR": home, "PYTHONPATH": str(ROOT)},
            stdin=subprocess.PIPE,
        )
        try:
            yield Local(process, Path(home))
            process.communicate(timeout=60)
        finally:
            process.kill()
            process.wait()


def others() -> list[str]:
    """This machine's addresses besides the loopback's."""
    found = [address.address for every in psutil.net_if_addrs().values() for address in every]
    parsed = []
    for text in found:
        try:
            parsed.append(ipaddress.ip_address(text.partition("%")[0]))
        except ValueError:  # a hardware address
            continue
    return [str(ip) for ip in parsed if not ip.is_loopback and not ip.is_link_local]


def ask(address: str, service: str, shown: str | None) -> Any:
    """The status with which a method of Ray's answers an empty message."""
    metadata = [("authorization", f"Bearer {shown}")] if shown else None
    with grpc.insecure_channel(address, options=[("grpc.enable_http_proxy", 0)]) as channel:
        call = channel.unary_unary(service, request_serializer=bytes, response_deserializer=bytes)
        try:
            call(b"", timeout=10, metadata=metadata)
        except grpc.RpcError as error:
            return error.code()
    return grpc.StatusCode.OK


@pytest.mark.slow
def test_every_socket_of_a_local_cluster_is_on_the_loopback(local: Local) -> None:
    sockets = local.listening()
    assert {"gcs_server", "raylet"} <= {name for name, _, _ in sockets}
    assert any("RayTrainWorker" in name for name, _, _ in sockets)
    ips = {(name, ip): ipaddress.ip_address(ip) for name, ip, _ in sockets}
    plain = {key: getattr(ip, "ipv4_mapped", None) or ip for key, ip in ips.items()}
    assert not [key for key, ip in plain.items() if not ip.is_loopback]
    host, _, port = local.address.rpartition(":")
    assert host == "127.0.0.1" and answers(host, int(port))
    assert not [(ip, port) for _, _, port in sockets for ip in others() if answers(ip, port, 0.2)]


@pytest.mark.slow
def test_a_local_cluster_refuses_work_without_its_token(local: Local) -> None:
    services = ["NodeInfoGcsService/GetClusterId", "JobInfoGcsService/GetNextJobID"]
    services += ["InternalKVGcsService/InternalKVKeys", "ActorInfoGcsService/GetAllActorInfo"]
    for service in services:
        for shown in (None, "0" * 64):
            assert ask(local.address, f"/ray.rpc.{service}", shown) == grpc.StatusCode.UNAUTHENTICATED
    assert ask(local.address, f"/ray.rpc.{services[0]}", local.token) == grpc.StatusCode.OK


@pytest.mark.slow
def test_the_token_is_long_and_the_users_alone(local: Local) -> None:
    assert len(local.token) >= 64
    assert stat.S_IMODE((local.home / ".ray" / "auth_token").stat().st_mode) == 0o600
