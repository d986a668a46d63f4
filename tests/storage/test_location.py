"""The store, leases and metric logs on folders and on S3, with processes that really die and disks that really
refuse; and a sweep whose processes share only a bucket."""

from __future__ import annotations

import json
import os
import re
import resource
import subprocess
import sys
import threading
import time
import uuid
from collections.abc import Iterator, Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pyarrow.fs
import pytest
import torch
from live_cluster import Cluster
from mlflow import MlflowClient
from support.s3_server import BUCKET, Server, s3_server

from raymoe.schema import InputError
from raymoe.storage import lease, store
from raymoe.storage import location as storage
from raymoe.storage.location import Location, Remote, StorageError, local, location, writing
from raymoe.storage.store import MARKER, Store
from raymoe.tracking.metric_log import MetricLog, read_rows
from raymoe.upcycle.simoe import load_simoe

ROOT = Path(__file__).parents[2]
IDENTITY = {"a": 1}

pytestmark = pytest.mark.skipif(
    not (find_spec("moto") or os.environ.get("MOTO_PYTHON")), reason="no S3 server: pip install moto[server]"
)


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    folder = tmp_path_factory.mktemp("s3")
    with s3_server(folder) as started, pytest.MonkeyPatch.context() as patch:
        for name, value in started.environment.items():
            patch.setenv(name, value)
        yield started


@pytest.fixture
def s3(server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Remote:
    """Return an unused address."""
    monkeypatch.setenv("RAYMOE_CACHE", str(tmp_path / "cache"))
    found = location(f"s3://{BUCKET}/{uuid.uuid4().hex[:8]}")
    assert isinstance(found, Remote)
    return found


@pytest.fixture(params=["folder", "s3"])
def root(request: pytest.FixtureRequest, tmp_path: Path) -> Location:
    return tmp_path / "runs" if request.param == "folder" else request.getfixturevalue("s3")


def client(server: Server) -> Any:
    """Return pyarrow's own file system, past raymoe and past the door."""
    return pyarrow.fs.S3FileSystem(
        access_key="somebody",
        secret_key="something",
        endpoint_override=f"127.0.0.1:{server.door.target}",
        scheme="http",
        region="us-east-1",
    )


def objects(server: Server, where: Remote) -> dict[str, bytes]:
    """Return all objects below `where`, by relative path."""
    selector = pyarrow.fs.FileSelector(where.path, allow_not_found=True, recursive=True)
    fs = client(server)
    files = [info for info in fs.get_file_info(selector) if info.is_file]
    return {
        info.path.removeprefix(where.path + "/"): fs.open_input_stream(info.path).read() for info in files
    }


def build(out: Location) -> Mapping[str, Any]:
    with writing(out) as folder:
        (folder / "model").mkdir()
        (folder / "model" / "weights.bin").write_bytes(bytes(range(256)) * 4096)
        (folder / "data.txt").write_text("42")
    return {"rows": 42}


def forbidden(out: Location) -> Mapping[str, Any]:
    raise AssertionError("built a second time")


class TestStages:
    def test_a_stage_on_s3_is_whole_and_made_once(self, server: Server, s3: Remote) -> None:
        output = Store(str(s3)).make("stage", IDENTITY, build)
        name = f"stage-{store.digest(IDENTITY)}"
        found = objects(server, s3)
        marker = json.loads(found.pop(f"{name}/{MARKER}"))
        assert marker["identity"] == IDENTITY and marker["info"] == {"rows": 42}
        folder = f"{name}/{marker['folder']}"
        assert found == {
            f"{folder}/data.txt": b"42",
            f"{folder}/model/weights.bin": bytes(range(256)) * 4096,
        }
        assert str(output.location) == f"{s3}/{folder}"
        again = Store(str(s3)).make("stage", IDENTITY, forbidden)
        assert again == output and Store(str(s3)).find("stage", {"a": 2}) is None
        assert (again.fetch() / "model" / "weights.bin").read_bytes() == bytes(range(256)) * 4096
        assert Store(str(s3)).path("stage", IDENTITY) == output.location

    def test_finding_a_stage_reads_its_marker_alone(self, server: Server, s3: Remote) -> None:
        Store(str(s3)).make("stage", IDENTITY, build)
        assert Store(str(s3)).find("stage", IDENTITY).info["rows"] == 42  # type: ignore[union-attr]
        marker = f"{s3.name}/stage-{store.digest(IDENTITY)}/{MARKER}"
        assert server.requests("GET", f"{s3.name}/") == server.requests("GET", marker) > 0

    def test_a_failed_build_leaves_no_object(self, server: Server, s3: Remote) -> None:
        def fail(out: Remote) -> Mapping[str, Any]:
            build(out)
            raise ValueError("broken")

        with pytest.raises(ValueError, match="broken"):
            Store(str(s3)).make("stage", IDENTITY, fail)
        assert objects(server, s3) == {}

    def test_a_killed_build_leaves_nothing_that_looks_finished(
        self, server: Server, s3: Remote, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        process = builder(s3, "killed")
        process.kill()
        process.wait()
        assert [name.rpartition("/")[2] for name in objects(server, s3)] == ["who.txt"]
        assert Store(str(s3)).find("stage", IDENTITY) is None
        Store(str(s3)).make("stage", IDENTITY, build)
        assert "who.txt" in " ".join(objects(server, s3))  # it may be of a writer that still runs
        place = Store(str(s3)).place("stage", IDENTITY)
        (place / MARKER).unlink()
        monkeypatch.setattr(store, "ABANDONED", -1.0)
        output = Store(str(s3)).make("stage", IDENTITY, build)
        assert {name.split("/")[1] for name in objects(server, s3)} == {MARKER, output.location.name}

    def test_processes_making_the_same_stage_share_one_output(self, root: Location, server: Server) -> None:
        processes = [builder(root, name) for name in ("one", "two", "three")]  # all build at this moment
        go(processes)
        results = [process.communicate(timeout=60)[0].split() for process in processes]
        assert [process.returncode for process in processes] == [0, 0, 0]
        for by, wrote in results:  # of three that publish in one moment each has a whole output
            assert by == wrote
        found = Store(str(root)).find("stage", IDENTITY)
        assert found is not None and (found.fetch() / "who.txt").read_text() == found.info["by"]
        if isinstance(root, Path):
            assert len({by for by, _ in results}) == 1
            assert os.listdir(root) == [found.location.name]

    def test_a_late_writer_uses_what_is_there_and_leaves_nothing(self, server: Server, s3: Remote) -> None:
        slow = builder(s3, "slow")
        output = Store(str(s3)).make("stage", IDENTITY, build)
        go([slow])
        assert slow.wait(60) != 0  # it prints `who.txt`, which the winner has not
        assert Store(str(s3)).find("stage", IDENTITY) == output
        assert {name.split("/")[1] for name in objects(server, s3)} == {MARKER, output.location.name}


BUILDER = """
import sys
from raymoe.storage.location import writing
from raymoe.storage.store import Store

root, name = sys.argv[1:]

def build(out):
    with writing(out) as folder:
        (folder / "who.txt").write_text(name)
    print("building", flush=True)
    sys.stdin.readline()
    return {"by": name}

output = Store(root).make("stage", {"a": 1}, build)
print(output.info["by"], (output.fetch() / "who.txt").read_text(), flush=True)
"""


def builder(root: Location, name: str) -> subprocess.Popen[str]:
    process = python(BUILDER, str(root), name)
    assert process.stdout is not None and process.stdout.readline() == "building\n"
    return process


def python(script: str, *arguments: str, **environment: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", script, *arguments],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT), **environment},
    )


def go(processes: list[subprocess.Popen[str]]) -> None:
    for process in processes:
        assert process.stdin is not None
        process.stdin.write("\n")
        process.stdin.flush()


class TestCopies:
    def test_processes_of_a_node_download_once(self, server: Server, s3: Remote, tmp_path: Path) -> None:
        with writing(s3 / "model") as folder:
            (folder / "weights.bin").write_bytes(os.urandom(2**20))
        script = (
            "import sys; from raymoe.storage.location import *;"
            "print((local(location(sys.argv[1])) / 'weights.bin').stat().st_ino)"
        )
        processes = [python(script, str(s3 / "model")) for _ in range(3)]
        assert len({process.communicate(timeout=60)[0] for process in processes}) == 1
        assert server.requests("GET", f"{s3.name}/model/weights.bin") == 1
        other = python(script, str(s3 / "model"), RAYMOE_CACHE=str(tmp_path / "another node"))
        other.communicate(timeout=60)
        assert server.requests("GET", f"{s3.name}/model/weights.bin") == 2

    def test_one_file_keeps_its_name(self, s3: Remote) -> None:
        (s3 / "masks.json").write_text("{}")
        assert local(s3 / "masks.json").name == "masks.json"
        assert local(s3 / "masks.json").read_text() == "{}"

    def test_a_missing_object(self, s3: Remote) -> None:
        with pytest.raises(FileNotFoundError, match="not there"):
            local(s3 / "nothing")
        assert not (s3 / "nothing").exists() and (s3 / "nothing").glob("*") == []
        (s3 / "nothing").unlink(missing_ok=True)
        storage.delete(s3 / "nothing")

    def test_a_folder_is_used_in_place(self, tmp_path: Path) -> None:
        assert local(tmp_path) is tmp_path
        with writing(tmp_path / "new") as folder:
            assert folder == tmp_path / "new"


class TestAddresses:
    def test_parts(self) -> None:
        found = location("s3://bucket/a/b/?endpoint_override=127.0.0.1:9000&scheme=http")
        assert isinstance(found, Remote)
        assert str(found / "c") == "s3://bucket/a/b/c?endpoint_override=127.0.0.1:9000&scheme=http"
        assert (found / "c").parent == found and found.name == "b" and found.path == "bucket/a/b"

    def test_the_endpoint_may_be_in_the_address(
        self, server: Server, s3: Remote, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.delenv("AWS_ENDPOINT_URL")
        where = location(
            f"{s3}/x?endpoint_override=127.0.0.1:{server.door.port}&scheme=http&region=us-east-1"
        )
        where.write_bytes(b"here")
        assert objects(server, s3) == {"x": b"here"}

    def test_a_filesystem_keeps_retrying_in_another_process(self, s3: Remote) -> None:
        import pickle

        there = pickle.loads(pickle.dumps(s3.filesystem))
        assert there is s3.filesystem  # made anew where it is not there yet, by the same function

    @pytest.mark.parametrize(
        ("root", "expected"),
        [
            ("abfs://x/y", "expected a folder, s3://bucket/prefix, gs://bucket/prefix"),
            ("s3://key:secret@bucket/y", "credentials belong in the environment"),
            ("s3://no-such-bucket/y", "there is no bucket 'no-such-bucket'"),
            (f"s3://{BUCKET}/y?colour=blue", "Unexpected query parameter"),
        ],
    )
    def test_an_unusable_address_is_an_error_of_one_line(
        self, server: Server, root: str, expected: str
    ) -> None:
        with pytest.raises(InputError, match=r"^execution\.storage: ") as caught:
            Store(root)
        assert expected in str(caught.value) and "\n" not in str(caught.value)
        assert "secret" not in str(caught.value)

    def test_a_server_that_does_not_answer(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(storage, "ATTEMPTS", 1)
        with pytest.raises(InputError, match=r"^execution\.storage: s3://other/y.*: .*onnect") as caught:
            Store("s3://other/y?endpoint_override=127.0.0.1:9&scheme=http&region=us-east-1")
        assert "\n" not in str(caught.value)


class TestWriteErrors:
    def test_a_server_that_is_down_for_seconds_is_waited_for(self, server: Server, s3: Remote) -> None:
        server.door.shut()
        back = threading.Timer(3, server.door.open)
        back.start()
        output = Store(str(s3)).make("stage", IDENTITY, build)
        back.join()
        assert (output.fetch() / "data.txt").read_text() == "42"

    def test_a_server_that_stays_down_leaves_nothing_that_looks_finished(
        self, server: Server, s3: Remote, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(storage, "ATTEMPTS", 2)
        storage._filesystem.cache_clear()
        there = Store(str(s3))

        def lose(out: Remote) -> Mapping[str, Any]:
            with writing(out) as folder:
                for i in range(3):
                    (folder / f"{i}.bin").write_bytes(bytes(2**16))
                server.door.shut()
            return {}

        try:
            with pytest.raises(StorageError) as caught:
                there.make("stage", IDENTITY, lose)
        finally:
            server.door.open()
            storage._filesystem.cache_clear()
        assert "\n" not in str(caught.value) and "onnect" in str(caught.value)
        assert there.find("stage", IDENTITY) is None
        assert there.make("stage", IDENTITY, build).info == {"rows": 42}

    def test_a_full_disk_leaves_no_stage(self, tmp_path: Path) -> None:
        def fail(out: Path) -> Mapping[str, Any]:
            (out / "small.txt").write_text("fits")
            with limited_files(4096):
                (out / "weights.bin").write_bytes(bytes(2**20))
            raise AssertionError

        with pytest.raises(OSError, match="File too large"):
            Store(tmp_path).make("stage", IDENTITY, fail)
        assert os.listdir(tmp_path) == []

    def test_a_marker_that_can_not_be_written_leaves_no_stage(self, tmp_path: Path) -> None:
        def nearly(out: Path) -> Mapping[str, Any]:
            (out / "weights.bin").write_bytes(bytes(10))
            resource.setrlimit(resource.RLIMIT_FSIZE, (8, resource.RLIM_INFINITY))
            return {}

        try:
            with pytest.raises(OSError, match="File too large"):
                Store(tmp_path).make("stage", IDENTITY, nearly)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
        assert os.listdir(tmp_path) == []

    def test_a_copy_that_does_not_fit_is_not_kept(self, s3: Remote) -> None:
        with writing(s3 / "model") as folder:
            (folder / "weights.bin").write_bytes(os.urandom(2**20))
        with limited_files(4096), pytest.raises(StorageError):
            local(s3 / "model")
        assert (local(s3 / "model") / "weights.bin").stat().st_size == 2**20

    def test_a_truncated_list_of_checkpoints_falls_back_to_the_one_before(self, tmp_path: Path) -> None:
        from raymoe.cluster.ray_internals import checkpoint_list_name
        from raymoe.train.launch import keep_snapshot, mend_snapshot

        file = tmp_path / checkpoint_list_name()
        file.write_text('{"checkpoint_results": [1]}')
        keep_snapshot(tmp_path)
        with limited_files(8), pytest.raises(OSError, match="File too large"):
            file.write_text('{"checkpoint_results": [1, 2]}')
        keep_snapshot(tmp_path)
        mend_snapshot(tmp_path)
        assert json.loads(file.read_text()) == {"checkpoint_results": [1]}
        mend_snapshot(tmp_path)
        assert json.loads(file.read_text()) == {"checkpoint_results": [1]}


class limited_files:  # noqa: N801
    """Let no file grow larger within the block, as a quota would."""

    def __init__(self, size: int) -> None:
        self.size = size

    def __enter__(self) -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (self.size, resource.RLIM_INFINITY))

    def __exit__(self, *_: object) -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))


class TestMetricLog:
    def test_rows_are_there_after_flushing_and_resuming(self, root: Location) -> None:
        log = MetricLog(root / "metrics.jsonl")
        for step in range(1, 6):
            log.append(step, {"train/loss": 1.0 / step})
        log.append(3, {"train/loss": 9.0})  # a step that is there
        log.flush()
        assert [(r["step"], r["metrics"]["train/loss"]) for r in read_rows(root / "metrics.jsonl")] == [
            (step, 1.0 / step) for step in range(1, 6)
        ]
        again = MetricLog(root / "metrics.jsonl", resume_after=3)
        assert [row["step"] for row in read_rows(root / "metrics.jsonl")] == [1, 2, 3]
        again.append(4, {"train/loss": 4.0})
        again.flush()
        assert [row["step"] for row in read_rows(root / "metrics.jsonl")] == [1, 2, 3, 4]
        assert read_rows(root / "other.jsonl") == []

    def test_not_every_row_writes_an_object(self, server: Server, s3: Remote) -> None:
        log = MetricLog(s3 / "metrics.jsonl")
        for step in range(200):
            log.append(step, {"train/loss": 1.0})
        log.flush()
        log.flush()
        assert server.requests("PUT", f"{s3.name}/metrics.jsonl") <= 4
        assert len(read_rows(s3 / "metrics.jsonl")) == 200

    def test_a_server_that_is_down_does_not_end_training(
        self, server: Server, s3: Remote, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(storage, "ATTEMPTS", 1)
        storage._filesystem.cache_clear()
        log = MetricLog(s3 / "metrics.jsonl")
        log._next = 0.0
        server.door.shut()
        try:
            log.append(1, {"train/loss": 1.0})
            with pytest.raises(StorageError):
                log.flush()
        finally:
            server.door.open()
            storage._filesystem.cache_clear()
        log.flush()
        assert [row["step"] for row in read_rows(s3 / "metrics.jsonl")] == [1]


HOLDER = """
import sys, time
from raymoe.storage import lease
from raymoe.storage.location import location

folder, lease.SETTLE = sys.argv[1], float(sys.argv[2])
with lease.held(location(folder), lambda: False, lambda text: print(text, flush=True)) as mine:
    print("mine", mine, flush=True)
    sys.stdin.readline()
    print("over", flush=True)
"""


@pytest.fixture
def brief(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lease, "SETTLE", 0.3)


def leaser(root: Location, settle: float = 0.3) -> subprocess.Popen[str]:
    return python(HOLDER, str(root), str(settle))


@pytest.mark.usefixtures("brief")
class TestLease:
    def test_a_second_waits_until_the_first_is_done(self, root: Location) -> None:
        first = leaser(root)
        assert line(first).startswith("mine")
        assert lease.holder(root) == f"process {first.pid} on {os.uname().nodename}"
        second = leaser(root)
        assert re.fullmatch(rf"waiting: process {first.pid} on .* is training it", line(second))
        go([first])
        assert line(first) == "over"
        assert line(second).startswith("mine")
        go([second])
        assert (first.wait(20), second.wait(20)) == (0, 0)
        assert lease.holder(root) is None and not (root / lease.FILE).exists()

    def test_a_waiter_stops_when_nothing_is_left_to_do(self, root: Location) -> None:
        first = leaser(root)
        line(first)
        said: list[str] = []
        with lease.held(root, lambda: True, said.append) as mine:
            assert mine is None
        assert len(said) == 1
        first.kill()
        first.wait()

    def test_the_lease_of_a_dead_process_of_this_machine_is_taken_at_once(
        self, root: Location, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        first = leaser(root)
        line(first)
        first.kill()
        first.wait()
        monkeypatch.setattr(lease, "STALE_AFTER", 1e9)
        said: list[str] = []
        with lease.held(root, lambda: False, said.append) as mine:
            assert mine and lease.is_held_by(root, mine)
        assert said == []

    def test_a_stale_lease_of_another_machine_is_taken(
        self, root: Location, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        other = {"id": "x", "host": "elsewhere/1", "pid": 1, "started": "1", "time": time.time()}
        storage.replace_file(root / lease.FILE, json.dumps(other).encode())
        monkeypatch.setattr(lease, "STALE_AFTER", 1.5)
        said: list[str] = []
        started = time.monotonic()
        with lease.held(root, lambda: False, said.append) as mine:
            assert time.monotonic() - started > 1.5
            assert mine and not lease.is_held_by(root, "x")
        assert said == ["waiting: process 1 on elsewhere is training it"]

    @pytest.mark.parametrize("content", [b"", b"{", b"[1]", b"{}"])
    def test_a_damaged_lease_has_no_holder(self, tmp_path: Path, content: bytes) -> None:
        (tmp_path / lease.FILE).write_bytes(content)
        with lease.held(tmp_path, lambda: False, print) as mine:
            assert mine

    def test_of_several_at_once_one_holds_it(self, root: Location) -> None:
        processes = [leaser(root, 1.5) for _ in range(3)]
        first = [line(process).split()[0] for process in processes]
        assert sorted(first) == ["mine", "waiting:", "waiting:"]
        for process in processes:
            process.kill()
            process.wait()

    def test_it_is_renewed(self, root: Location, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(lease, "RENEWED_EVERY", 0.2)
        with lease.held(root, lambda: False, print):
            before = json.loads((root / lease.FILE).read_bytes())
            time.sleep(0.7)
            after = json.loads((root / lease.FILE).read_bytes())
        assert after["id"] == before["id"] and after["time"] > before["time"]


TRAINER = """
import sys
from raymoe.storage import lease
from raymoe.config import Execution, Run
from raymoe.stages import Context, Stage, make
from raymoe.storage.location import writing
from raymoe.storage.store import Store

lease.SETTLE = 0.3

def build(out, context):
    print("trains", context.lease, file=sys.__stdout__, flush=True)
    sys.stdin.readline()
    with writing(out) as folder:
        (folder / "model.bin").write_bytes(b"weights")
    return {}

stage = Stage("train", {"a": 1}, (), build, Run(), trains="train-x")
output = make(stage, Context(Store(sys.argv[1]), Execution(), lambda text: print(text, flush=True)))
print("has", (output.fetch() / "model.bin").read_text(), flush=True)
"""


def test_two_sweeps_train_the_same_run_once(root: Location) -> None:
    first = python(TRAINER, str(root))
    assert line(first).endswith(": started") and line(first).startswith("trains ")
    second = python(TRAINER, str(root))
    assert f": waiting: process {first.pid} on " in line(second)
    go([first])
    rest = [process.communicate(timeout=60)[0].splitlines() for process in (first, second)]
    assert rest[0][-1] == "has weights" and rest[1] == ["has weights"]  # the second has trained nothing


def line(process: subprocess.Popen[str]) -> str:
    assert process.stdout is not None
    return process.stdout.readline().strip()


STEPS = 20


@pytest.mark.slow
def test_a_sweep_whose_processes_share_only_a_bucket(
    server: Server, s3: Remote, tmp_path: Path, pico: Path, data_folder: Path
) -> None:
    """The disk refuses a checkpoint, then the sweep is killed; the same command resumes from the bucket."""

    def caches(name: str) -> dict[str, str]:
        return {"RAYMOE_CACHE": str(tmp_path / "caches" / name)}

    with Cluster(
        tmp_path / "cluster",
        environment={"PYTHONPATH": str(ROOT)},
        head_environment=caches("head"),
    ) as cluster:
        node = cluster.add_node(num_cpus=2, environment=caches("node"))
        environment = {**cluster.environment, **caches("driver"), "RAY_ADDRESS": cluster.address}
        words = [sys.executable, "-m", "raymoe.cli", "train", "--json", "--storage", str(s3)]
        words += settings(pico, data_folder)

        def start() -> subprocess.Popen[str]:
            pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
            return subprocess.Popen(words, cwd=tmp_path, env=environment, **pipes)  # type: ignore[call-overload,no-any-return]

        first = start()
        wait_for(first, lambda: reached(s3) >= 5)
        victim = next(p for p in node.processes() if "RayTrainWorker" in p.name() + " ".join(p.cmdline()))
        resource.prlimit(victim.pid, resource.RLIMIT_FSIZE, (4096, resource.RLIM_INFINITY))
        wait_for(first, lambda: not victim.is_running() and reached(s3) >= 10)
        first.kill()
        killed = time.time()
        first.communicate()

        stdout, stderr = start().communicate(timeout=300)
    (row,) = json.loads(stdout)
    assert row["status"] == "FINISHED", stderr
    assert not any(f"{stage}-" in stderr for stage in ("instructions", "prompts"))  # none was made again
    check_result(row, killed)
    assert objects(server, s3 / "checkpoints") == {}
    assert not (tmp_path / "runs").exists()
    runs = MlflowClient(f"sqlite:///{tmp_path / 'mlflow.db'}")
    experiment = runs.get_experiment_by_name("raymoe")
    (run,) = runs.search_runs([experiment.experiment_id], "tags.`raymoe.trial_key` != ''")
    steps = [m.step for m in runs.get_metric_history(run.info.run_id, "train/loss")]
    assert steps == list(range(1, STEPS + 1))
    assert run.data.tags["model"] == row["model"]
    assert "masks.json" in {file.path for file in runs.list_artifacts(run.info.run_id)}


def settings(pico: Path, data: Path) -> list[str]:
    values = {
        "method": "simoe",
        "model.name": pico,
        "data.train": data,
        "max-length": 128,
        "batch-size": 4,
        "max-steps": STEPS,
        "num-epochs": 30,
        "milestones": 1,
        "generation-examples": 0,
        "checkpoint-every": 5,
        "workers": 1,
        "cpus-per-worker": 1,  # of two: the placement group of the killed job is there for minutes
    }
    return [word for name, value in values.items() for word in (f"--{name}", str(value))]


def reached(s3: Remote) -> int:
    """Return the last step in the bucket."""
    logs = [folder / "metrics.jsonl" for folder in (s3 / "checkpoints").glob("train-*")]
    return max((row["step"] for log in logs for row in read_rows(log)), default=0)


def wait_for(process: subprocess.Popen[str], ready: Any) -> None:
    deadline = time.time() + 200
    while not ready():
        if process.poll() is not None or time.time() > deadline:
            process.kill()
            raise AssertionError(process.communicate())
        time.sleep(0.1)


def check_result(row: Mapping[str, Any], killed: float) -> None:
    """Check that every step is there once, the first ones from before the kill, and that the model loads."""
    model = location(row["model"])
    assert isinstance(model, Remote) and model.name == "model"
    written = read_rows(model.parent / "metrics.jsonl")
    steps = [r["step"] for r in written if "train/loss" in r["metrics"]]
    assert steps == list(range(1, STEPS + 1))
    before = [r["step"] for r in written if r["time"] / 1000 < killed]
    assert before == list(range(1, len(before) + 1)) and len(before) >= 5  # its last whole checkpoint
    load_simoe(local(model), torch.float32)
    assert (model.parent / "figures").glob("*.png")
