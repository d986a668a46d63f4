"""The store on a disk: outputs made once and whole, whoever dies or races meanwhile."""

from __future__ import annotations

import hashlib
import os
import signal
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from raymoe.schema import InputError
from raymoe.storage.store import MARKER, Store, digest

IDENTITY = {"seed": 1, "model": {"name": "m", "sizes": [1, 2]}}

# A stage built in another process: prints that it builds, then waits for the file `go`.
BUILDER = """
import sys, time
from pathlib import Path
from raymoe.storage.store import Store

root, name = Path(sys.argv[1]), sys.argv[2]

def build(folder):
    (folder / "who.txt").write_text(name)
    print("building", flush=True)
    while not (root / "go").exists():
        time.sleep(0.01)
    return {"by": name}

output = Store(root).make("stage", {"a": 1}, build)
print(output.info["by"], (output.fetch() / "who.txt").read_text(), flush=True)
"""


def builder(root: Path, name: str) -> subprocess.Popen[str]:
    process = subprocess.Popen(
        [sys.executable, "-c", BUILDER, str(root), name], stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "building\n"
    return process


def visible(root: Path) -> list[str]:
    return sorted(p.name for p in root.iterdir() if not p.name.startswith("."))


def build(folder: Path) -> Mapping[str, Any]:
    assert not any(folder.iterdir())
    (folder / "data.txt").write_text("42")
    return {"rows": 42}


def forbidden(folder: Path) -> Mapping[str, Any]:
    raise AssertionError("built a second time")


def test_a_stage_is_a_folder_with_its_identity(tmp_path: Path) -> None:
    store = Store(tmp_path / "deep" / "root")
    assert store.find("stage", IDENTITY) is None
    output = store.make("stage", IDENTITY, build)
    assert output.fetch() == store.path("stage", IDENTITY) == tmp_path / "deep" / "root" / output.fetch().name
    assert output.fetch().name == f"stage-{digest(IDENTITY)}"
    assert (output.fetch() / "data.txt").read_text() == "42"
    assert output.info == {"rows": 42}
    assert output.marker["identity"] == IDENTITY
    assert output.marker["stage"] == "stage"
    assert 0 <= output.marker["seconds"] < 60
    assert os.listdir(store.root) == [output.fetch().name]


def test_a_stage_is_made_once(tmp_path: Path) -> None:
    first = Store(tmp_path).make("stage", IDENTITY, build)
    assert Store(tmp_path).make("stage", IDENTITY, forbidden) == first
    assert Store(tmp_path).find("stage", IDENTITY) == first


def test_another_identity_or_name_is_another_output(tmp_path: Path) -> None:
    store = Store(tmp_path)
    store.make("stage", IDENTITY, build)
    assert store.find("stage", {**IDENTITY, "seed": 2}) is None
    assert store.find("other", IDENTITY) is None


def test_the_digest_does_not_depend_on_key_order() -> None:
    shuffled = {"model": {"sizes": [1, 2], "name": "m"}, "seed": 1}
    assert list(shuffled) != list(IDENTITY)
    assert digest(shuffled) == digest(IDENTITY)
    others = [{"seed": 1}, {"seed": 1.5}, {"seed": "1"}, {"seed": None}, {"seed": [1]}, {"seed": {"1": 1}}]
    lists = [[1, 2], [2, 1], [[1], 2], [[1, 2]]]
    assert len({digest(x) for x in [*others, *lists]}) == len(others) + len(lists)
    # sha256 of the canonical JSON, which other tools can compute
    canonical = rb'{"a":"\u00e9","b":1}'
    assert digest({"b": 1, "a": "é"}) == hashlib.sha256(canonical).hexdigest()[:12]


def test_a_failed_build_leaves_nothing(tmp_path: Path) -> None:
    def fail(folder: Path) -> Mapping[str, Any]:
        (folder / "half.txt").write_text("half")
        raise ValueError("broken")

    with pytest.raises(ValueError, match="broken"):
        Store(tmp_path).make("stage", IDENTITY, fail)
    assert os.listdir(tmp_path) == []


def test_info_that_is_not_json_is_a_failed_build(tmp_path: Path) -> None:
    with pytest.raises(TypeError):
        Store(tmp_path).make("stage", IDENTITY, lambda folder: {"rows": object()})
    assert os.listdir(tmp_path) == []


def test_a_killed_build_leaves_nothing_that_looks_finished(tmp_path: Path) -> None:
    process = builder(tmp_path, "killed")
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    store = Store(tmp_path)
    assert visible(tmp_path) == []
    assert store.find("stage", {"a": 1}) is None
    assert store.make("stage", {"a": 1}, build).info == {"rows": 42}
    assert visible(tmp_path) == [store.path("stage", {"a": 1}).name]


def test_two_processes_making_the_same_stage_share_one_output(tmp_path: Path) -> None:
    processes = [builder(tmp_path, name) for name in ("one", "two")]  # both build at this moment
    (tmp_path / "go").touch()
    results = [process.communicate(timeout=60)[0].split() for process in processes]
    assert [process.returncode for process in processes] == [0, 0]
    assert results[0] == results[1]
    assert results[0] in (["one", "one"], ["two", "two"])
    assert sorted(os.listdir(tmp_path)) == ["go", Store(tmp_path).path("stage", {"a": 1}).name]


def test_a_folder_without_a_marker_is_not_an_output(tmp_path: Path) -> None:
    store = Store(tmp_path)
    folder = store.path("stage", IDENTITY)
    folder.mkdir()
    (folder / "data.txt").write_text("of somebody else")
    assert store.find("stage", IDENTITY) is None
    with pytest.raises(OSError):
        store.make("stage", IDENTITY, build)
    assert (folder / "data.txt").read_text() == "of somebody else"
    assert not (folder / MARKER).exists()


def test_a_root_that_can_not_be_written_is_an_input_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for root in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(InputError, match=r"execution\.storage: can't write to .*file.*: ") as caught:
            Store(root).check_writable()
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize("root", ["ftp://host/runs", "s3://", "file://host/runs"])
def test_an_address_of_another_kind_is_refused(root: str) -> None:
    expected = r"expected a folder, s3://bucket/prefix, gs://bucket/prefix"
    with pytest.raises(InputError, match=rf"^execution\.storage: {expected} \(got '{root}'\)$"):
        Store(root)


def test_the_address_of_a_folder_is_that_folder(tmp_path: Path) -> None:
    assert Store(f"file://{tmp_path}").root == tmp_path


def test_a_writable_root_is_created_and_left_empty(tmp_path: Path) -> None:
    Store(tmp_path / "new").check_writable()
    assert os.listdir(tmp_path / "new") == []


def test_the_root_may_be_below_home_and_does_not_move(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    assert Store("~/runs").root == tmp_path / "runs"
    monkeypatch.chdir(tmp_path)
    store = Store("here")
    monkeypatch.chdir("/")
    assert store.root == tmp_path / "here"


def test_left_overs_of_a_killed_process_are_removed_when_the_stage_is_made(tmp_path: Path) -> None:
    store = Store(tmp_path)
    script = (
        "import os, sys; from raymoe.storage.store import Store;"
        "Store(sys.argv[1]).make('s', {}, lambda folder: os.kill(os.getpid(), 9))"
    )
    killed = subprocess.run([sys.executable, "-c", script, str(tmp_path)], cwd=Path(__file__).parents[1])
    assert killed.returncode == -9
    assert len(list(tmp_path.glob(".partial-s-*"))) == 1
    store.make("s", {}, lambda folder: {})
    assert not list(tmp_path.glob(".partial-*"))
