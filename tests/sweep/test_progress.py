"""What a person sees of a training sweep, without Ray."""

from __future__ import annotations

import pickle
import threading
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from ray import cloudpickle

from raymoe.console import root_cause
from raymoe.storage.store import Store
from raymoe.sweep.progress import TuneProgress, cooperative_asha
from raymoe.train.spec import stop_flag


def progress(tmp_path: Path, lines: list[str], ends: list[tuple[str, str | None]]) -> TuneProgress:
    lock = threading.Lock()
    starts: list[str] = []

    def ended(key: str, error: str | None) -> None:
        with lock:
            ends.append((key, error))

    return TuneProgress({"train-a": "su-2"}, "eval/loss", Store(tmp_path), lines.append, starts.append, ended)


def trial(**attributes: Any) -> Any:
    return SimpleNamespace(config={"key": "train-a"}, **{"last_result": {}, **attributes})


def test_tune_can_write_it_down_whatever_it_holds(tmp_path: Path) -> None:
    pickle.loads(cloudpickle.dumps(progress(tmp_path, [], [])))


def test_on_a_terminal_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.stderr.isatty", lambda: True)
    shown = progress(tmp_path, [], [])
    cloudpickle.dumps(shown)
    with shown:
        shown.on_trial_start(0, [], trial())
        shown.on_trial_complete(0, [], trial())


def test_lines_and_ends(tmp_path: Path) -> None:
    lines: list[str] = []
    ends: list[tuple[str, str | None]] = []
    shown = progress(tmp_path, lines, ends)
    shown.on_trial_start(0, [], trial())
    shown.on_trial_result(0, [], trial(), {"step": 3.0, "eval/loss": 1.25})
    for failure in ("stopped early", "TrainingFailed: the loss is nan at step 3"):
        shown.on_trial_complete(0, [], trial(last_result={"failure": failure}))
    assert lines[:2] == ["su-2: started", "su-2: step 3  eval/loss 1.2500"]
    assert lines[2:] == ["su-2: stopped early", "su-2: failed: TrainingFailed: the loss is nan at step 3"]
    assert [error for _, error in ends] == ["stopped early", "TrainingFailed: the loss is nan at step 3"]
    Store(tmp_path).root.joinpath("train-a").mkdir()
    (tmp_path / "train-a" / "stage.json").write_text("{}")
    shown.errors.clear()
    shown.on_trial_complete(0, [], trial())
    assert ends[2] == ("train-a", None)


def test_a_milestone_is_told_in_the_metrics_own_unit(tmp_path: Path) -> None:
    lines: list[str] = []
    shown = TuneProgress(
        {"train-a": "su-2"},
        "model/parameters",
        Store(tmp_path),
        lines.append,
        lambda _: None,
        lambda *_: None,
    )
    shown.on_trial_result(0, [], trial(), {"step": 3.0, "model/parameters": 1_380_000.0, "eval/loss": 1.25})
    assert lines == ["su-2: step 3  model/parameters 1.38M"]


def test_an_error_is_told_by_its_root_cause(tmp_path: Path) -> None:
    lines: list[str] = []
    ends: list[tuple[str, str | None]] = []
    file = tmp_path / "error.pkl"
    try:
        try:
            raise ValueError("no room\nfor this")
        except ValueError as inner:
            raise RuntimeError("wrapped") from inner
    except RuntimeError as outer:
        file.write_bytes(cloudpickle.dumps(outer))
        assert root_cause(outer) == "ValueError: no room"
    shown = progress(tmp_path, lines, ends)
    shown.on_trial_recover(0, [], trial(pickled_error_file=str(file)))
    shown.on_trial_error(0, [], trial(pickled_error_file=str(file)))
    assert ends == [("train-a", "RuntimeError: wrapped")]  # a cause is not pickled
    assert (
        "goes on from the last checkpoint" in lines[0] and lines[1] == "su-2: failed: RuntimeError: wrapped"
    )


def test_asha_asks_the_worse_trial_to_stop_and_never_ends_its_driver(tmp_path: Path) -> None:
    scheduler = cooperative_asha(tmp_path)
    assert scheduler.set_search_properties("eval/loss", "min")
    trials = {
        key: SimpleNamespace(trial_id=key, config={"key": key}, status="RUNNING") for key in ("good", "bad")
    }
    for key, one in trials.items():
        (tmp_path / key).mkdir()
        scheduler.on_trial_add(None, one)
    for key, loss in (("good", 1.0), ("bad", 2.0)):
        for step in (0, 1, 2, 4):
            result = {"step": step, "eval/loss": loss}
            assert scheduler.on_trial_result(None, trials[key], result) == scheduler.CONTINUE
        assert scheduler.on_trial_result(None, trials[key], {"step": 5}) == scheduler.CONTINUE
    assert stop_flag(tmp_path, "bad").exists()
    assert not stop_flag(tmp_path, "good").exists()
