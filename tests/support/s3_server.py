"""A real S3 server (moto's) in a process of its own, and a door before it that can be shut."""

from __future__ import annotations

import os
import re
import selectors
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

BUCKET = "bucket"


class Door:
    """Forwards connections of a port to another; while it is shut it refuses new ones and has cut the others."""

    def __init__(self, target: int) -> None:
        self.target, self.port = target, 0
        self._open: list[socket.socket] = []
        self._lock = threading.Lock()
        self.open()

    def open(self) -> None:
        self._listener = socket.socket()
        self._listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        self._listener.bind(("127.0.0.1", self.port))
        self._listener.listen(64)
        self.port = self._listener.getsockname()[1]
        threading.Thread(target=self._accept, args=(self._listener,), daemon=True).start()

    def shut(self) -> None:
        with self._lock:
            self._listener.shutdown(socket.SHUT_RDWR)
            self._listener.close()
            for end in self._open:
                end.close()
            self._open.clear()

    def _accept(self, listener: socket.socket) -> None:
        while True:
            try:
                near, _ = listener.accept()
                far = socket.create_connection(("127.0.0.1", self.target))
            except OSError:
                return
            with self._lock:
                self._open += [near, far]
            threading.Thread(target=self._forward, args=(near, far), daemon=True).start()

    def _forward(self, near: socket.socket, far: socket.socket) -> None:
        with selectors.DefaultSelector() as ready:
            try:
                ready.register(near, selectors.EVENT_READ, far)
                ready.register(far, selectors.EVENT_READ, near)
                while True:
                    for key, _ in ready.select():
                        content = key.fileobj.recv(65536)  # type: ignore[union-attr]
                        if not content:
                            return
                        key.data.sendall(content)
            except (OSError, ValueError):
                return
            finally:
                near.close()
                far.close()


class Server:
    """The server behind its door."""

    def __init__(self, door: Door, log: Path) -> None:
        self.door, self._log = door, log

    @property
    def environment(self) -> dict[str, str]:
        return {
            "AWS_ACCESS_KEY_ID": "somebody",
            "AWS_SECRET_ACCESS_KEY": "something",
            "AWS_EC2_METADATA_DISABLED": "true",
            "AWS_REGION": "us-east-1",
            "AWS_ENDPOINT_URL": f"http://127.0.0.1:{self.door.port}",
        }

    def requests(self, method: str, part: str) -> int:
        """How many requests with this method came for an object whose address contains `part`."""
        lines = re.sub(r"\x1b\[[0-9;]*m", "", self._log.read_text()).splitlines()  # coloured by status
        return sum(f'"{method} /' in line and part in line and "list-type" not in line for line in lines)


@contextmanager
def s3_server(folder: Path) -> Iterator[Server]:
    """The server, with an empty bucket. MOTO_PYTHON: another interpreter, which has moto."""
    import pyarrow.fs

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    log = folder / "s3.log"
    command = [os.environ.get("MOTO_PYTHON", sys.executable), "-m", "moto.server", "-H", "127.0.0.1"]
    with log.open("w") as stream:
        process = subprocess.Popen([*command, "-p", str(port)], stdout=stream, stderr=stream)
    try:
        _wait(port, process, log)
        admin = pyarrow.fs.S3FileSystem(
            access_key="somebody",
            secret_key="something",
            endpoint_override=f"127.0.0.1:{port}",
            scheme="http",
            region="us-east-1",
            allow_bucket_creation=True,
        )
        admin.create_dir(BUCKET)
        yield Server(Door(port), log)
    finally:
        process.kill()
        process.wait()


def _wait(port: int, process: subprocess.Popen[bytes], log: Path) -> None:
    deadline = time.time() + 60
    while time.time() < deadline and process.poll() is None:
        try:
            socket.create_connection(("127.0.0.1", port), timeout=1).close()
            return
        except OSError:
            time.sleep(0.05)
    raise AssertionError(f"the S3 server did not start: {log.read_text()[-2000:]}")
