"""Sweeps as jobs of a real cluster, by `ray job submit` and by `--submit`; and clusters that can't be used."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import pytest
import ray
from live_cluster import Cluster, free_ports
from mlflow import MlflowClient

from raymoe.cli.main import main

ROOT = Path(__file__).parents[2]
SWEEP = """
from raymoe.config import replace
from raymoe import Sweep, main

def run(base, point):
    return replace(base, {"method.name": point["method"]})

SWEEP = Sweep("tiny", "which one?", [{"method": "dense"}], run)

if __name__ == "__main__":
    main(SWEEP)
"""
CONFIG = """
model: {{name: {model}}}
data: {{train: {data}, max_length: 128}}
optimization: {{batch_size: 4, max_steps: 150, num_epochs: 30}}  # the client leaves before the job ends
evaluation: {{milestones: [1.0], generation_examples: 0}}
execution: {{workers: 1, cpus_per_worker: 1}}
"""


class User:
    """Somebody with a working folder, and a cluster."""

    def __init__(self, root: Path, cluster: Cluster, pico: Path, data: Path) -> None:
        self.cluster, self.folder, self.shared = cluster, root / "work", root / "shared"
        self.folder.mkdir()
        (self.folder / "tiny.py").write_text(SWEEP)
        (self.folder / "my-run.yaml").write_text(CONFIG.format(model=pico, data=data))
        self.database = f"sqlite:///{root / 'mlflow.db'}"
        self.storage = {"RAYMOE_STORAGE": str(self.shared), "MLFLOW_TRACKING_URI": self.database}
        self.environment = {**cluster.environment, "PYTHONPATH": str(ROOT)}

    def start(self, *command: str, **environment: str) -> subprocess.Popen[str]:
        return subprocess.Popen(
            command,
            cwd=self.folder,
            env={**self.environment, **environment},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def submit(self, *more: str, **environment: str) -> subprocess.Popen[str]:
        """`raymoe sweep --submit`."""
        command = [sys.executable, "-m", "raymoe.cli", "sweep", "tiny.py", "my-run.yaml", "--submit"]
        address = {"RAY_API_SERVER_ADDRESS": self.cluster.jobs_address}
        return self.start(*command, *more, **{**address, **environment})

    def ray_job(self, *entrypoint: str) -> tuple[int, str]:
        """`ray job submit`, as the README has it."""
        command = ["ray", "job", "submit", "--address", self.cluster.jobs_address, "--working-dir", "."]
        variables = json.dumps({"env_vars": {**self.storage, "PYTHONPATH": str(ROOT)}})
        return ended(self.start(*command, "--runtime-env-json", variables, "--", *entrypoint))


def ended(process: subprocess.Popen[str], seconds: float = 120) -> tuple[int, str]:
    """Exit code, and what it printed: its stdout before its stderr."""
    try:
        out, error = process.communicate(timeout=seconds)
    finally:
        process.kill()
    return process.returncode, out + error


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    with Cluster(tmp_path_factory.mktemp("cluster"), environment={"PYTHONPATH": str(ROOT)}) as cluster:
        cluster.add_node(num_cpus=2)
        yield cluster


@pytest.fixture(scope="module")
def user(cluster: Cluster, tmp_path_factory: pytest.TempPathFactory, pico: Path, data_folder: Path) -> User:
    return User(tmp_path_factory.mktemp("user"), cluster, pico, data_folder)


@pytest.mark.slow
def test_a_job_outlives_its_client_is_found_again_and_resumed(user: User) -> None:
    first = user.submit(**user.storage)
    assert first.stdout is not None and first.stderr is not None
    told = first.stderr.readline()
    name = told.split(":")[0]
    assert name.startswith("raymoe-tiny-") and f"RAYMOE_STORAGE={user.shared}" in told
    while "tiny: 1 trial, 0 of them already in" not in first.stdout.readline():
        assert first.poll() is None
    first.send_signal(signal.SIGINT)
    code, text = ended(first)
    assert code == 130, text
    assert f"{name} goes on" in text and f"ray job stop --address {user.cluster.jobs_address} {name}" in text
    assert "Traceback" not in text

    code, text = ended(user.submit(**user.storage))
    assert code == 0, text
    assert f"{name} runs already" in text and "dense: finished" in text
    assert "FINISHED" in text and "dense: started" in text  # the log from its beginning
    lines = [line for line in text.splitlines() if not line.startswith("(raylet)")]
    assert not [line for line in lines if "\x1b" in line or "\r" in line]
    assert len(list(user.shared.glob("train-*/model"))) == 1

    code, text = user.ray_job("python", "tiny.py", "my-run.yaml")
    assert code == 0, text
    assert "tiny: 1 trial, 1 of them already in" in text and "dense: started" not in text
    client = MlflowClient(user.database)
    runs = client.search_runs([client.get_experiment_by_name("raymoe").experiment_id])
    assert sorted(run.info.status for run in runs) == ["FINISHED", "FINISHED"]  # the sweep and its trial


@pytest.mark.slow
def test_a_job_fails_with_its_own_exit_code(user: User) -> None:
    jobs = [user.submit(), user.submit("--seed", "1", MLFLOW_TRACKING_URI=user.database)]
    for job in jobs:  # without a storage: it would be in the copy of the working folder
        code, text = ended(job)
        assert code == 2, text
        assert "execution.storage: runs would be in the job's temporary copy" in text
        assert "FAILED (exit code 2)" in text
    code, text = user.ray_job("python", "tiny.py", "--no-such-key", "1")
    assert code == 1 and "no_such_key: unknown key" in text


class Other(BaseHTTPRequestHandler):
    """The jobs API of another version of Ray."""

    def do_GET(self) -> None:
        answer = json.dumps({"version": "4", "ray_version": "2.9.3"}).encode()
        self.send_response(200)
        self.end_headers()
        self.wfile.write(answer)

    def log_message(self, *arguments: Any) -> None:
        """Nothing."""


@pytest.fixture
def other_version() -> Iterator[str]:
    server = HTTPServer(("127.0.0.1", 0), Other)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    thread.join()
    server.server_close()


@pytest.mark.slow
def test_clusters_that_cannot_be_used_are_told_in_one_line(
    user: User, other_version: str, tmp_path: Path
) -> None:
    cluster, nobody = user.cluster, f"127.0.0.1:{free_ports(1)[0]}"
    homes = {name: tmp_path / name for name in ("none", "wrong")}
    (homes["wrong"] / ".ray").mkdir(parents=True)
    (homes["wrong"] / ".ray" / "auth_token").write_text("0" * 64)

    def direct(address: str, **environment: str) -> subprocess.Popen[str]:
        verb = ["filter", "my-run.yaml", "--method", "trsu", "--storage", str(tmp_path / "s")]
        command = [sys.executable, "-m", "raymoe.cli", *verb, "--execution.address", address]
        return user.start(*command, **environment)

    connect = """if True:
    import ray
    from raymoe.cli.command import guarded
    from raymoe.cluster.connection import connected
    from raymoe.config import Execution
    ray.__version__ = "2.59.0"
    def work():
        with connected(Execution()):
            return 0
    raise SystemExit(guarded(work))
    """
    older = user.start(sys.executable, "-c", connect, RAY_ADDRESS=cluster.address)
    jobs = {"RAY_API_SERVER_ADDRESS": f"http://{nobody}"}
    versions = f"runs Ray {ray.__version__}"
    cases = [
        (direct(nobody), "no Ray cluster at", "connection refused"),
        (direct(cluster.jobs_address.removeprefix("http://")), "no Ray cluster at", "something else"),
        (direct(cluster.jobs_address), "not host:port of a cluster's head", "add --submit"),
        (direct(cluster.address, HOME=str(homes["none"])), "asks for a token", "there is none here"),
        (direct(cluster.address, HOME=str(homes["wrong"])), "refuses this machine's token", "auth_token"),
        (older, versions, "here is Ray 2.59.0"),
        (user.submit(**jobs), "no Ray cluster at", "connection refused"),
        (user.submit(HOME=str(homes["none"])), "asks for a token", "there is none here"),
        (user.submit(HOME=str(homes["wrong"])), "refuses this machine's token", "auth_token"),
        (
            user.submit(RAY_API_SERVER_ADDRESS=other_version),
            "runs Ray 2.9.3",
            f"here is Ray {ray.__version__}",
        ),
    ]
    told = [(*ended(process), wanted) for process, *wanted in cases]
    for code, text, wanted in told:
        assert code == 2, text
        (line,) = [line for line in text.splitlines() if line.startswith("raymoe: ")]
        assert all(words in line for words in wanted), (line, wanted)
        assert "Traceback" not in text
    assert not list((tmp_path / "s").glob("[!.]*"))  # nothing was made before


@pytest.mark.slow
def test_a_storage_that_nodes_do_not_share_is_told_before_anything_starts(user: User) -> None:
    code = """if True:
    import sys
    from raymoe.cluster.connection import check_shared, connected
    from raymoe.config import Execution, InputError
    with connected(Execution(address=sys.argv[1])):
        check_shared(sys.argv[2])
        try:
            check_shared("/proc/self/cwd/storage")  # the same name, another folder in every process
        except InputError as error:
            print("told:", error)
    """
    command = [sys.executable, "-c", code, user.cluster.address, str(user.shared)]
    code_, text = ended(user.start(*command))
    assert code_ == 0, text
    (line,) = [line for line in text.splitlines() if line.startswith("told: ")]
    assert line == (
        "told: execution.storage: /proc/self/cwd/storage is not shared: "
        f"{user.cluster.ip} does not see what this node writes there"
    )
    assert not list(user.shared.glob(".probe-*"))


class TestWhatIsSubmitted:
    """Decided here, without a cluster."""

    @pytest.fixture(autouse=True)
    def folder(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
        monkeypatch.chdir(tmp_path)
        for name in ("RAY_API_SERVER_ADDRESS", "RAY_ADDRESS", "RAYMOE_STORAGE", "MLFLOW_TRACKING_URI"):
            monkeypatch.delenv(name, raising=False)
        Path("tiny.py").write_text(SWEEP)
        Path("my-run.yaml").write_text("optimization: {batch_size: 4}\n")
        return tmp_path

    def submit(self, capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str]:
        with pytest.raises(SystemExit) as ended:
            main(["sweep", *arguments, "--submit"])
        captured = capsys.readouterr()
        return int(ended.value.code or 0), captured.out + captured.err

    def named(self, capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
        code, text = self.submit(capsys, *arguments, "--dry-run")
        assert code == 0, text
        return text.split()[1]

    def test_the_name_follows_what_is_submitted(self, capsys: pytest.CaptureFixture[str]) -> None:
        name = self.named(capsys, "tiny.py", "my-run.yaml")
        assert self.named(capsys, "tiny.py", "my-run.yaml", "--execution.address", "http://h:1") == name
        assert self.named(capsys, "tiny.py", "--batch-size", "4") == name  # the same run in other words
        assert self.named(capsys, "tiny.py", "my-run.yaml", "--seed", "1") != name
        assert self.named(capsys, "tiny.py", "my-run.yaml", "--asha") != name
        Path("tiny.py").write_text(SWEEP.replace("which one?", "which?"))
        assert self.named(capsys, "tiny.py", "my-run.yaml") != name

    def test_what_runs_there(
        self, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setenv("RAYMOE_STORAGE", "/shared/runs")
        address = ["--execution.address", "http://10.0.0.1:8265/"]
        code, text = self.submit(
            capsys, str(Path("tiny.py").absolute()), "my-run.yaml", "--dry-run", *address
        )
        where, command, passed = text.splitlines()
        assert code == 0 and where.endswith(" at http://10.0.0.1:8265")
        assert command.startswith("python -m raymoe.cli sweep tiny.py my-run.yaml")
        assert command.endswith("--execution.address=auto")
        assert "--submit" not in command and "--dry-run" not in command
        assert passed == "passed on: RAYMOE_STORAGE=/shared/runs"

    @pytest.mark.parametrize(
        ("arguments", "environment", "told"),
        [
            (["my-run.yaml", "--storage", "runs"], {}, "execution.storage: runs is a relative path"),
            (["my-run.yaml"], {"RAYMOE_STORAGE": "runs"}, "RAYMOE_STORAGE: runs is a relative path"),
            (["my-run.yaml", "--execution.address", "10.0.0.1:6379"], {}, "http://127.0.0.1:8265 (got"),
            (["my-run.yaml"], {"RAY_ADDRESS": "auto"}, "RAY_ADDRESS: a job goes to the dashboard's address"),
            (["my-run.yaml", "--data.train", "tiny.py"], {}, "data.train: tiny.py is a relative path"),
        ],
    )
    def test_what_a_job_could_not_find_is_refused(
        self,
        arguments: list[str],
        environment: dict[str, str],
        told: str,
        capsys: pytest.CaptureFixture[str],
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        for name, value in environment.items():
            monkeypatch.setenv(name, value)
        code, text = self.submit(capsys, "tiny.py", *arguments)
        assert code == 2 and told in text and len(text.splitlines()) == 1

    def test_a_file_outside_the_working_folder_is_refused(
        self, folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        Path("inside").mkdir()
        monkeypatch.chdir("inside")
        code, text = self.submit(capsys, "../tiny.py")
        assert code == 2 and "--submit: ../tiny.py is not in the working folder" in text

    def test_a_password_is_neither_passed_on_nor_shown(
        self, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setenv("MLFLOW_TRACKING_URI", "https://me:geheim@mlflow.example")
        code, text = self.submit(capsys, "tiny.py", "my-run.yaml")
        assert code == 2 and "MLFLOW_TRACKING_URI" in text and "geheim" not in text

    def test_help_names_it(self, capsys: pytest.CaptureFixture[str]) -> None:
        with pytest.raises(SystemExit):
            main(["sweep", "--help"])
        assert "--submit" in capsys.readouterr().out
