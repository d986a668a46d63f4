from __future__ import annotations

import json
import math
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
from mlflow import MlflowClient

from raymoe.metrics import METRICS, Metric
from raymoe.schema import InputError
from raymoe.tracking import experiment as runs
from raymoe.tracking.client import TRIAL_KEY, default_uri, without_credentials
from raymoe.tracking.experiment import git_sha
from raymoe.tracking.ledger import Ledger, best_and_final
from raymoe.tracking.metric_log import MetricLog, read_rows
from raymoe.tracking.results import read_sweeps

# ---- what is logged in these tests

PARAMS = {"num_experts": 4, "method": "su"}
DATA = {"name": "a.jsonl", "digest": "0123456789ab", "source": "/data/a.jsonl"}


def training(step: int, offset: float = 0.0) -> dict[str, float]:
    return {"train/loss": 10 / step + offset, "routing/load/0": 0.5, "train/tokens": 100.0 * step}


def evaluation(step: int) -> dict[str, float]:
    return {"eval/loss": 5.0 - step / 10, "eval/math/exact_match": step / 100, "eval/math/loss": 1.0}


def open_trial(
    ledger: Ledger, file: Path | None, key: str = "train-1", sweep: str = "s-1", **more: Any
) -> None:
    ledger.sweep(sweep, "why?", {"sweep": sweep.split("-")[0]}, "base: 1\n")
    values = {"params": PARAMS, "tags": {"sweep": "s"}, "config": "seed: 1\n", "data": DATA, **more}
    ledger.trial(key, f"trial of {key}", metrics=file, **values)


# ---- MLflow


@pytest.fixture(scope="module")
def empty_database(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("mlflow") / "mlflow.db"
    MlflowClient(f"sqlite:///{file}").search_experiments()  # creates its tables, which takes seconds
    return file


@pytest.fixture
def database(empty_database: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)  # where artifacts go
    return Path(shutil.copy(empty_database, tmp_path / "mlflow.db"))


@pytest.fixture
def uri(database: Path) -> str:
    return f"sqlite:///{database}"


class Held:
    """What MLflow holds."""

    def __init__(self, uri: str) -> None:
        self.client = MlflowClient(uri)

    def runs(self) -> list[Any]:
        experiment = self.client.get_experiment_by_name("raymoe")
        return list(self.client.search_runs([experiment.experiment_id])) if experiment else []

    def trials(self) -> dict[str, Any]:
        return {r.data.tags[TRIAL_KEY]: r for r in self.runs() if TRIAL_KEY in r.data.tags}

    def parents(self) -> list[Any]:
        return [r for r in self.runs() if TRIAL_KEY not in r.data.tags]

    def history(self, metric: str, key: str = "train-1") -> list[tuple[int, float]]:
        """Every (step, value) that the trial has, duplicates too."""
        trial = self.trials().get(key)
        values = self.client.get_metric_history(trial.info.run_id, metric) if trial else []
        return sorted((m.step, m.value) for m in values)

    def artifact(self, run: Any, name: str) -> str:
        return Path(self.client.download_artifacts(run.info.run_id, name)).read_text()


def holds_exactly(held: Held, rows: Mapping[int, Mapping[str, float]], key: str = "train-1") -> None:
    """Every metric of every step once, with the value given."""
    for name in dict.fromkeys(name for metrics in rows.values() for name in metrics):
        expected = sorted((step, metrics[name]) for step, metrics in rows.items() if name in metrics)
        assert held.history(name, key) == expected, name


def wait_until(true: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 60
    while not true():
        assert time.monotonic() < deadline
        time.sleep(0.02)


# ---- metric logs


def test_a_metric_log_gives_back_its_rows(tmp_path: Path) -> None:
    log = MetricLog(tmp_path / "deep" / "metrics.jsonl")
    log.append(1, training(1))
    log.append(1, evaluation(1))
    log.append(1, training(1, offset=1))  # that step's row is there
    rows = read_rows(log.file)
    assert [(r["step"], r["metrics"]) for r in rows] == [(1, training(1)), (1, evaluation(1))]
    assert all(abs(r["time"] / 1000 - time.time()) < 3600 for r in rows)  # milliseconds
    assert read_rows(tmp_path / "none") == []


def test_a_resumed_run_forgets_the_steps_that_it_does_again(tmp_path: Path) -> None:
    file = tmp_path / "metrics.jsonl"
    first = MetricLog(file)
    for step in range(1, 7):
        first.append(step, training(step))
    resumed = MetricLog(file, resume_after=4)
    assert [r["step"] for r in read_rows(file)] == [1, 2, 3, 4]
    for step in range(4, 8):
        resumed.append(step, training(step, offset=1))
    values = {r["step"]: r["metrics"]["train/loss"] for r in read_rows(file)}
    assert values == {s: 10 / s + (s > 4) for s in range(1, 8)}
    assert MetricLog(file) and read_rows(file) == []  # no checkpoint: from the start


def test_half_a_line_is_no_row(tmp_path: Path) -> None:
    file = tmp_path / "metrics.jsonl"
    MetricLog(file).append(1, training(1))
    with file.open("a") as stream:
        stream.write('{"step": 2, "time": 1, "metr')
    assert [r["step"] for r in read_rows(file)] == [1]
    MetricLog(file, resume_after=1).append(2, training(2))  # the worker was killed while it wrote
    assert [r["step"] for r in read_rows(file)] == [1, 2]


def test_not_a_number_survives(tmp_path: Path) -> None:
    log = MetricLog(tmp_path / "metrics.jsonl")
    log.append(1, {"train/loss": math.nan, "x": math.inf})
    (row,) = read_rows(log.file)
    assert math.isnan(row["metrics"]["train/loss"])
    assert row["metrics"]["x"] == math.inf


# ---- the ledger


def test_a_sweep_in_mlflow(uri: str, tmp_path: Path) -> None:
    ledger = Ledger("raymoe", uri)
    log = MetricLog(tmp_path / "metrics.jsonl")
    open_trial(ledger, log.file)
    rows: dict[int, dict[str, float]] = {}
    for step in range(1, 401):  # 1,200 values: more than MLflow takes at once
        log.append(step, training(step))
        rows[step] = training(step)
        if step % 200 == 0:
            log.append(step, evaluation(step))
            rows[step] = {**rows[step], **evaluation(step)}
    evaluations = [{"step": float(s), **evaluation(s)} for s in (200, 400)]
    (tmp_path / "clusters.json").write_text("[]")
    files = [tmp_path / "clusters.json", tmp_path / "none.json"]
    cost, tags = {"gpu_hours": 1.5}, {"model": "/models/1"}
    ledger.finish("train-1", "FINISHED", evaluations, tags=tags, files=files, cost=cost)
    for name, status in {"failed": "FAILED", "killed": "KILLED"}.items():
        open_trial(ledger, None, key=name)
        ledger.finish(name, status, tags={"error": "it broke"})
    open_trial(ledger, None, key="unfinished")
    assert ledger.close("FAILED")

    held = Held(uri)
    (parent,) = held.parents()
    assert (parent.info.run_name, parent.info.status) == ("s-1", "FAILED")
    assert parent.data.tags["mlflow.note.content"] == "why?"
    assert held.artifact(parent, "sweep.yaml") == "base: 1\n"
    trials = held.trials()
    assert {r.data.tags["mlflow.parentRunId"] for r in trials.values()} == {parent.info.run_id}
    statuses = {key: run.info.status for key, run in trials.items()}
    assert statuses == {
        "train-1": "FINISHED",
        "failed": "FAILED",
        "killed": "KILLED",
        "unfinished": "KILLED",
    }
    trial = trials["train-1"]
    assert trial.info.run_name == "trial of train-1"
    assert trial.data.params == {"num_experts": "4", "method": "su"}
    artifacts = {a.path: held.artifact(trial, a.path) for a in held.client.list_artifacts(trial.info.run_id)}
    assert artifacts == {"run.yaml": "seed: 1\n", "clusters.json": "[]"}
    assert trial.data.metrics["cost/gpu_hours"] == 1.5
    assert trial.data.tags["model"] == "/models/1"
    assert trials["failed"].data.tags["error"] == "it broke"
    (dataset,) = [d.dataset for d in trial.inputs.dataset_inputs]
    assert (dataset.name, dataset.digest) == ("a.jsonl", "0123456789ab")
    assert json.loads(dataset.source) == {"uri": "/data/a.jsonl"}
    holds_exactly(held, rows)
    summary = {k: v for k, v in trial.data.metrics.items() if k.startswith(("best/", "final/"))}
    assert summary == {
        "best/loss": 5.0 - 40,
        "final/loss": 5.0 - 40,
        "best/math/exact_match": 4.0,
        "final/math/exact_match": 4.0,
        "best/math/loss": 1.0,
        "final/math/loss": 1.0,
    }


def test_best_is_the_smallest_loss_and_the_most_right_answers() -> None:
    losses, matches = [3.0, 2.0, 2.5], [0.1, 0.4, 0.3]
    rows = [
        {"step": 1.0, "eval/loss": a, "eval/math/exact_match": b, "routing/math/load/0": 0.5}
        for a, b in zip(losses, matches, strict=True)
    ]
    assert best_and_final(rows) == {
        "best/loss": 2.0,
        "final/loss": 2.5,
        "best/math/exact_match": 0.4,
        "final/math/exact_match": 0.3,
    }
    assert best_and_final([]) == {}


@pytest.mark.parametrize("metric", [m for m in METRICS if m.better and m.pattern.startswith("eval/")])
def test_best_is_what_the_table_calls_better(metric: Metric) -> None:
    name = metric.pattern.replace("<domain>", "math")
    rows = [{"step": i, "eval/loss": 1.0, name: value} for i, value in enumerate((0.2, 0.4, 0.1, 0.3))]
    summary = best_and_final(rows)
    assert summary[f"best/{name[5:]}"] == (0.4 if metric.better == "higher" else 0.1)
    assert summary[f"final/{name[5:]}"] == 0.3


def test_nothing_is_guessed_of_a_metric_that_is_not_in_the_table() -> None:
    rows = [{"step": i, "eval/loss": 1.0, "eval/math/bleu": i, "mine/size": 2 * i} for i in range(1, 3)]
    assert best_and_final(rows) == {
        "best/loss": 1.0,
        "final/loss": 1.0,
        "final/math/bleu": 2,
        "final/mine/size": 4,
    }


def test_what_describes_the_model_has_an_end_but_no_best() -> None:
    rows = [
        {"step": 1.0, "eval/loss": 3.0, "masks/sparsity": 0.5, "model/active_parameters": 10.0},
        {
            "step": 2.0,
            "eval/loss": 2.0,
            "masks/sparsity": 0.75,
            "model/active_parameters": 8.0,
            "train/tokens": 9.0,
        },
    ]
    assert best_and_final(rows) == {
        "best/loss": 2.0,
        "final/loss": 2.0,
        "final/masks/sparsity": 0.75,
        "final/model/active_parameters": 8.0,
    }


def test_the_same_sweep_again_goes_on_in_the_same_runs(uri: str, tmp_path: Path) -> None:
    log = MetricLog(tmp_path / "metrics.jsonl")
    rows = {step: {**training(step), **evaluation(step)} for step in range(1, 6)}
    for step in rows:
        log.append(step, training(step))
        log.append(step, evaluation(step))
    ends: list[int] = []
    for status in ("KILLED", "FINISHED", "FINISHED"):
        ledger = Ledger("raymoe", uri)
        open_trial(ledger, log.file)
        open_trial(ledger, None, key="another")
        ledger.finish("train-1", status, list(map(evaluation, rows)))
        assert ledger.close("FINISHED")
        held = Held(uri)
        assert len(held.runs()) == 3
        assert held.trials()["train-1"].info.status == status
        holds_exactly(held, rows)
        assert len(held.history("best/loss")) == 1
        assert len(held.trials()["train-1"].inputs.dataset_inputs) == 1
        ends.append(held.trials()["train-1"].info.end_time)
    assert ends[0] < ends[1] == ends[2]  # a finished run keeps its end


def test_a_trial_of_two_sweeps_has_a_run_in_each(uri: str) -> None:
    for sweep in ("a-1", "b-1"):
        ledger = Ledger("raymoe", uri)
        open_trial(ledger, None, sweep=sweep)
        assert ledger.close("FINISHED")
    held = Held(uri)
    parents = {r.info.run_id for r in held.parents()}
    children = [r for r in held.runs() if TRIAL_KEY in r.data.tags]
    assert {r.data.tags["mlflow.parentRunId"] for r in children} == parents
    assert len(parents) == len(children) == 2


LEDGER_PROCESS = """
import sys, time
from pathlib import Path
from raymoe.tracking.ledger import Ledger

uri, file = sys.argv[1], Path(sys.argv[2])
ledger = Ledger("raymoe", uri)
ledger.sweep("s-1", "why?", {"sweep": "s"}, "base: 1")
ledger.trial("train-1", "trial", {"num_experts": 4}, {}, "seed: 1", file)
time.sleep(600)
"""


def test_no_step_is_lost_or_doubled_when_the_ledgers_process_is_killed(uri: str, tmp_path: Path) -> None:
    log, held = MetricLog(tmp_path / "metrics.jsonl"), Held(uri)
    steps = iter(range(1, 1000))
    written = []

    def write(count: int) -> None:
        for _ in range(count):
            written.append(next(steps))
            log.append(written[-1], training(written[-1]))

    write(20)
    process = subprocess.Popen(
        [sys.executable, "-c", LEDGER_PROCESS, uri, str(log.file)],
        env={**os.environ, "PYTHONPATH": str(Path(runs.__file__).parents[2])},
    )
    wait_until(lambda: len(held.history("train/tokens")) >= 20)
    write(20)  # some of these may be on their way
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert held.trials()["train-1"].info.status == "RUNNING"
    write(20)
    ledger = Ledger("raymoe", uri)
    open_trial(ledger, log.file)
    write(20)
    ledger.finish("train-1", "FINISHED")
    assert ledger.close("FINISHED")
    holds_exactly(held, {step: training(step) for step in written})
    assert len(held.runs()) == 2
    assert held.trials()["train-1"].info.status == "FINISHED"


@pytest.mark.parametrize("restarts", [1, 2])
def test_steps_that_a_resumed_worker_does_again_are_logged_once(
    uri: str, tmp_path: Path, restarts: int
) -> None:
    file, held = tmp_path / "metrics.jsonl", Held(uri)
    log = MetricLog(file)
    ledger = Ledger("raymoe", uri)
    open_trial(ledger, file)
    for step in range(1, 7):
        log.append(step, training(step))
    log.append(6, evaluation(6))
    wait_until(lambda: len(held.history("eval/loss")) == 1)
    for _ in range(restarts):  # faster than the ledger looks; a new file may get a former one's inode
        log = MetricLog(file, resume_after=4)
        for step in range(5, 9):
            log.append(step, {**training(step, offset=0 if step > 6 else 1), "system/longer": 1.0})
        log.append(6, evaluation(6))
        log.append(8, evaluation(8))
    ledger.finish("train-1", "FINISHED")
    assert ledger.close("FINISHED")
    rows = {step: training(step) for step in range(1, 9)}
    holds_exactly(held, rows)
    assert held.history("eval/loss") == [(6, 4.4), (8, 4.2)]


def test_the_finished_stages_copy_of_the_log_goes_on_where_the_log_ended(uri: str, tmp_path: Path) -> None:
    log = MetricLog(tmp_path / "metrics.jsonl")
    ledger = Ledger("raymoe", uri)
    open_trial(ledger, log.file)
    for step in range(1, 4):
        log.append(step, training(step))
    wait_until(lambda: len(Held(uri).history("train/loss")) == 3)
    log.append(4, training(4))
    copy = Path(shutil.copy(log.file, tmp_path / "copy.jsonl"))
    log.file.unlink()
    ledger.finish("train-1", "FINISHED", metrics=copy)
    assert ledger.close("FINISHED")
    holds_exactly(Held(uri), {step: training(step) for step in range(1, 5)})


def test_half_a_line_waits_until_it_is_whole(uri: str, tmp_path: Path) -> None:
    log, held = MetricLog(tmp_path / "metrics.jsonl"), Held(uri)
    log.append(1, training(1))
    log.append(2, training(2))
    whole = log.file.read_text()
    log.file.write_text(whole[:-20])
    ledger = Ledger("raymoe", uri)
    open_trial(ledger, log.file)
    wait_until(lambda: len(held.history("train/tokens")) == 1)
    with log.file.open("a") as stream:
        stream.write(whole[-20:])
    log.append(3, training(3))
    ledger.finish("train-1", "FINISHED")
    assert ledger.close("FINISHED")
    holds_exactly(held, {step: training(step) for step in (1, 2, 3)})


def test_mlflow_that_comes_up_later_gets_everything(
    empty_database: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    place = tmp_path / "server"
    place.write_text("a file where the database's folder should be")
    said: list[str] = []
    uri = f"sqlite:///{place}/mlflow.db"
    ledger = Ledger("raymoe", uri, say=said.append)
    log = MetricLog(tmp_path / "metrics.jsonl")
    open_trial(ledger, log.file)
    for step in range(1, 11):
        log.append(step, training(step))
    wait_until(lambda: bool(said))
    ledger.finish("train-1", "FINISHED")
    assert not ledger.close("FINISHED", timeout=0.1)
    assert f"MLflow at {uri} fails" in said[0]
    assert "did not take everything" in said[-1]
    place.unlink()
    place.mkdir()
    shutil.copy(empty_database, place / "mlflow.db")
    assert ledger.close("FINISHED")
    assert said[-1] == f"MLflow at {uri} answers again"
    assert len([line for line in said if "fails" in line]) == 1
    holds_exactly(Held(uri), {step: training(step) for step in range(1, 11)})


def test_nothing_waits_for_an_mlflow_that_hangs(
    uri: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    answers, connect = threading.Event(), runs.connect

    def hanging(where: str) -> Any:
        assert answers.wait(60)
        return connect(where)

    monkeypatch.setattr(runs, "connect", hanging)
    ledger = Ledger("raymoe", uri)
    log = MetricLog(tmp_path / "metrics.jsonl")
    open_trial(ledger, log.file)
    for step in range(1, 4):
        log.append(step, training(step))
    ledger.finish("train-1", "FINISHED", [evaluation(3)])
    answers.set()  # not reached if any of these calls waited
    assert ledger.close("FINISHED")
    holds_exactly(Held(uri), {step: training(step) for step in (1, 2, 3)})


def test_a_run_that_mlflow_failed_after_creating_is_completed(uri: str, tmp_path: Path) -> None:
    client = MlflowClient(uri)
    experiment = client.create_experiment("raymoe")
    parent = client.create_run(experiment, tags={runs.SWEEP_KEY: "s-1", "sweep": "s"}, run_name="s-1")
    tags = {TRIAL_KEY: "train-1", "mlflow.parentRunId": parent.info.run_id}
    trial = client.create_run(experiment, tags=tags, run_name="x")
    client.log_param(trial.info.run_id, "method", "su")
    ledger = Ledger("raymoe", uri)
    open_trial(ledger, None)
    assert ledger.close("FINISHED")
    held = Held(uri)
    assert len(held.runs()) == 2
    run = held.trials()["train-1"]
    assert run.data.params == {"num_experts": "4", "method": "su"}
    assert held.artifact(run, "run.yaml") == "seed: 1\n"
    assert held.artifact(held.parents()[0], "sweep.yaml") == "base: 1\n"
    assert len(run.inputs.dataset_inputs) == 1


def test_names_and_values_that_mlflow_refuses(uri: str, tmp_path: Path) -> None:
    log = MetricLog(tmp_path / "metrics.jsonl")
    metrics = {
        "eval/loss": 1.0,
        "eval/c++/loss": 2.0,
        "eval/数学/perplexity": math.inf,
        "eval/x/loss": math.nan,
    }
    log.append(1, metrics)
    ledger = Ledger("raymoe", uri)
    open_trial(ledger, log.file)
    ledger.finish("train-1", "FINISHED", [metrics])
    assert ledger.close("FINISHED")
    held = Held(uri)
    assert held.history("eval/c__/loss") == [(1, 2.0)]
    assert held.history("best/c__/loss") == [(0, 2.0)]
    assert held.history("eval/数学/perplexity") == [(1, sys.float_info.max)]
    assert math.isnan(held.history("eval/x/loss")[0][1])


def test_what_mlflow_will_never_take_is_told_and_does_not_hold_up_the_rest(uri: str, tmp_path: Path) -> None:
    told: list[str] = []
    ledger = Ledger("raymoe", uri, told.append)
    logs = {key: MetricLog(tmp_path / key) for key in ("train-1", "train-2")}
    for key, log in logs.items():
        log.append(1, training(1))
        open_trial(ledger, log.file, key=key)
    wait_until(lambda: len(Held(uri).trials()) == 2)
    client = MlflowClient(uri)
    client.delete_run(Held(uri).trials()["train-1"].info.run_id)  # by somebody else, while it is written
    for key, log in logs.items():
        log.append(2, training(2))
        ledger.finish(key, "FINISHED", [evaluation(2)])
    assert ledger.close("FINISHED", timeout=30)
    assert 1 <= len(told) <= 3 and all("refuses something" in line for line in told)
    held = Held(uri)
    assert held.trials()["train-2"].info.status == "FINISHED" and set(held.trials()) == {"train-2"}
    assert [step for step, _ in held.history("train/loss", "train-2")] == [1, 2]


# ---- reading back


def test_sweeps_read_back_as_they_were_logged(uri: str, tmp_path: Path) -> None:
    def run_sweep(name: str, trials: Sequence[tuple[str, str]]) -> None:
        ledger = Ledger("raymoe", uri)
        for key, status in trials:
            log = MetricLog(tmp_path / name / key)
            for step in (2, 10):
                log.append(step, training(step))
                log.append(step, evaluation(step))
            open_trial(ledger, log.file, key=key, sweep=name, params={"n": key[-1]})
            tags = {"model": f"/m/{key}"} | ({"error": "broke"} if status == "FAILED" else {})
            ledger.finish(key, status, [evaluation(2), evaluation(10)], tags=tags)
        assert ledger.close("FINISHED")

    run_sweep("old-1", [("train-1", "FINISHED"), ("train-2", "FAILED")])
    run_sweep("new-1", [("train-1", "KILLED")])
    new, old = read_sweeps(uri=uri)
    assert (new.name, old.name) == ("new-1", "old-1")
    assert old.question == "why?"
    assert (
        [s.name for s in read_sweeps("old", uri)] == ["old-1"] == [s.name for s in read_sweeps("old-1", uri)]
    )
    rows = {row.name: row for row in old.rows}
    first = rows["trial of train-1"]
    assert (first.point, first.status, first.model, first.error) == ({"n": "1"}, "FINISHED", "/m/train-1", "")
    assert list(first.evaluations) == [{"step": 2, **evaluation(2)}, {"step": 10, **evaluation(10)}]
    second = rows["trial of train-2"]
    assert (second.status, second.error) == ("FAILED", "broke")
    with pytest.raises(InputError, match=r"^report: no sweep other in .*; there are: new-1, old-1$"):
        read_sweeps("other", uri)


def test_what_evaluations_say_of_the_model_is_read_back(uri: str, tmp_path: Path) -> None:
    log = MetricLog(tmp_path / "metrics.jsonl")
    of_masks = {"masks/overlap": 0.25, "masks/other": 1.0, "model/active_parameters": 100.0}
    for step in range(1, 5):  # training steps log them too
        log.append(step, {**training(step), "masks/sparsity": step / 100})
        if step % 2 == 0:
            time.sleep(0.002)  # evaluated after the step, by milliseconds
            log.append(step, {**evaluation(step), "masks/sparsity": step / 10, **of_masks})
    ledger = Ledger("raymoe", uri)
    open_trial(ledger, log.file)
    ledger.finish("train-1", "FINISHED")
    assert ledger.close("FINISHED")
    (sweep,) = read_sweeps(uri=uri)
    (row,) = sweep.rows
    shown = {"masks/overlap": 0.25, "model/active_parameters": 100.0}
    assert list(row.evaluations) == [
        {"step": s, **evaluation(s), "masks/sparsity": s / 10, **shown} for s in (2, 4)
    ]
    assert sweep.average_over is None


def test_what_to_average_over_is_known_of_a_sweep_that_is_there_already(uri: str) -> None:
    for tags in ({"sweep": "s"}, {"sweep": "s", "average_over": "seed"}):
        ledger = Ledger("raymoe", uri)
        ledger.sweep("s-1", "why?", tags, "")
        assert ledger.close("FINISHED")
    (sweep,) = read_sweeps(uri=uri)
    assert sweep.average_over == "seed"


def test_nothing_to_read(uri: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no sweep .*there are: none"):
        read_sweeps(uri=uri)
    with pytest.raises(InputError, match=r"^report: no MLflow database at .*none\.db"):
        read_sweeps(uri=f"sqlite:///{tmp_path}/none.db")
    assert not (tmp_path / "none.db").exists()
    (tmp_path / "text.db").write_text("this is no database" * 100)
    with pytest.raises(InputError, match=r"^report: MLflow at .*text\.db does not answer") as caught:
        read_sweeps(uri=f"sqlite:///{tmp_path}/text.db")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("https://user:pa@ss/w0rd@host:5000/x", "https://host:5000/x"),
        (
            "at 'postgresql+psycopg2://u:p@h/db': no http://u@h/",
            "at 'postgresql+psycopg2://h/db': no http://h/",
        ),
        ("https://host:5000", "https://host:5000"),
        ("sqlite:////home/me@work/mlflow.db", "sqlite:////home/me@work/mlflow.db"),
        ("ask me@there", "ask me@there"),
    ],
)
def test_addresses_without_credentials(text: str, shown: str) -> None:
    assert without_credentials(text) == shown


def test_credentials_stand_nowhere_alone_either() -> None:
    uri = "http://user:p%40ss@host"
    assert without_credentials("bad: user:p%40ss@host, user:p@ss@host", uri) == "bad: host, host"


def test_credentials_are_never_said(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(runs, "connect", lambda uri: MlflowClient(uri))
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))  # not listening: connections are refused
        for address in (f"127.0.0.1:{probe.getsockname()[1]}", "in valid:port"):
            monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://user:s3cret@{address}")
            with pytest.raises(InputError, match="does not answer") as caught:
                read_sweeps()
            assert "s3cret" not in str(caught.value) and "user" not in str(caught.value)
            assert "http://" + address in str(caught.value)
            ledger = Ledger("raymoe")
            ledger.sweep("s-1", "why?", {"sweep": "s"}, "")
            wait_until(lambda ledger=ledger: ledger._down)  # type: ignore[misc]
            assert not ledger.close("FINISHED", timeout=0.1)
            ledger._queue.clear()  # else its thread asks again for the rest of the tests
            assert ledger.close("FINISHED")
    captured = capfd.readouterr()
    assert captured.out == ""
    assert captured.err.count("fails (") == 2 and captured.err.count("did not take everything") == 2
    assert "s3cret" not in captured.err


def test_the_database_is_where_mlflow_says_or_here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert default_uri() == f"sqlite:///{tmp_path}/mlflow.db"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://there:5000")
    assert default_uri() == "http://there:5000"


def test_the_commit_of_the_working_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert git_sha() == ""
    (tmp_path / "a").write_text("1")
    for command in ("init -q", "add a", "-c user.name=x -c user.email=x commit -q -m x"):
        subprocess.run(["git", *command.split()], check=True, env={**os.environ, "HOME": str(tmp_path)})
    head = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True).stdout.strip()
    assert git_sha() == head[:12]
    (tmp_path / "a").write_text("2")
    assert git_sha() == head[:12] + "-dirty"
