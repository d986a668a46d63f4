"""The runs of one MLflow experiment, as the ledger's thread writes them.

Every method may be called again after it failed halfway: what MLflow holds already is not written twice.
"""

from __future__ import annotations

import contextlib
import functools
import json
import math
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from raymoe.storage.location import Location, local
from raymoe.tracking.client import (
    SWEEP_KEY,
    TRIAL_KEY,
    allowed_name,
    connect,
    first_line,
    quiet,
    without_credentials,
)
from raymoe.tracking.followed_log import FollowedLog
from raymoe.tracking.metric_log import MARKS, kind_of_row

EXPERIMENT_TAGS = {"mlflow.experimentKind": "custom_model_development"}
"""Makes MLflow's pages open on training runs instead of traces."""
BATCH = 1000
"""Most metrics in one request that MLflow's server takes."""


@dataclass(frozen=True)
class TrialEntry:
    """What MLflow is told about a trial when it starts."""

    key: str
    name: str
    params: Mapping[str, Any]
    tags: Mapping[str, str]
    config: str
    log: Location | None
    """Metric log to follow."""
    data: Mapping[str, str]
    """`name`, `digest` and `source` of its dataset; nothing if it is empty."""


@dataclass(frozen=True)
class TrialEnd:
    """What MLflow is told about a trial when it ends."""

    key: str
    status: str
    summary: Mapping[str, float]
    tags: Mapping[str, str]
    log: Location | None
    """Metric log to read to the end, if it is another than the one followed."""
    artifacts: list[tuple[Location, str | None]]
    """Files, and the artifact folders that they go to."""


@dataclass
class _OpenTrial:
    run_id: str
    log: FollowedLog
    last: dict[str, int] = field(default_factory=dict)
    """Last step in MLflow of every kind of row."""


class Experiment:
    """One MLflow experiment: a parent run of the sweep, and its trials' runs."""

    def __init__(self, name: str, uri: str, say: Callable[[str], None]) -> None:
        self.name, self.uri, self.say = name, uri, say
        self.shown_uri = without_credentials(uri)
        self._trials: dict[str, _OpenTrial] = {}
        self._parent: str | None = None

    @functools.cached_property
    def _client(self) -> Any:
        return connect(self.uri)

    def unless_refused(self, call: Callable[[], None]) -> bool:
        """Return True if MLflow took it. What it will never take is told and left out: the rest gets through."""
        try:
            call()
        except Exception as error:
            if not _is_refusal(error):
                raise
            why = first_line(error, self.uri)
            self.say(f"MLflow at {self.shown_uri} refuses something, which is left out: {why}")
            return False
        return True

    # ---- the sweep's run

    def open_sweep(self, name: str, question: str, tags: Mapping[str, str], config: str) -> None:
        """Open the parent run of the sweep `name`, or the one that it has already."""
        found = self._find(SWEEP_KEY, name, None)
        if found is None:
            labels = {"mlflow.runName": name, SWEEP_KEY: name, "mlflow.note.content": question, **tags}
            found = self._client.create_run(self._id(), tags=labels, run_name=name)
        # Also if the run is there: MLflow may have failed right after it was created.
        for tag, value in tags.items():
            if found.data.tags.get(tag) != value:
                self._client.set_tag(found.info.run_id, tag, value)
        self._client.log_text(found.info.run_id, config, "sweep.yaml")
        self._client.update_run(found.info.run_id, status="RUNNING")
        self._parent = found.info.run_id

    def close(self, status: str, artifacts: Mapping[str, str | bytes]) -> None:
        """End the parent run with `artifacts` (content by file name), and trials that are still open as KILLED."""
        for trial in self._trials.values():
            self.unless_refused(partial(self._kill, trial))
        self._trials.clear()
        if self._parent:
            for name, content in artifacts.items():
                self._log_content(self._parent, name, content)
            self._client.set_terminated(self._parent, status)

    def _kill(self, trial: _OpenTrial) -> None:
        self._follow(trial, last=True)
        self._client.set_terminated(trial.run_id, "KILLED")

    # ---- a trial's run

    def open_trial(self, entry: TrialEntry) -> None:
        """Open the trial's run, or the one that it has already, and follow its metric log."""
        found = self._find(TRIAL_KEY, entry.key, self._parent) or self._create_trial(entry)
        from mlflow.entities import Param

        run_id = found.info.run_id
        if found.info.status != "FINISHED":  # what has finished keeps its end and its duration
            self._client.update_run(run_id, status="RUNNING")
        # Also if the run is there: MLflow may have failed right after it was created.
        missing = [Param(k, str(v)) for k, v in entry.params.items() if k not in found.data.params]
        self._client.log_batch(run_id, params=missing)
        self._client.log_text(run_id, entry.config, "run.yaml")
        self._log_data(run_id, entry.data)
        last = {mark: self._last_step(run_id, mark) for mark in MARKS}
        self._trials[entry.key] = _OpenTrial(run_id, FollowedLog(entry.log), last)

    def _create_trial(self, entry: TrialEntry) -> Any:
        labels = {"mlflow.runName": entry.name, TRIAL_KEY: entry.key, "git_sha": git_sha(), **entry.tags}
        if self._parent:
            labels["mlflow.parentRunId"] = self._parent
        return self._client.create_run(self._id(), tags=labels, run_name=entry.name)

    def finish(self, end: TrialEnd) -> None:
        """End the trial's run after its last metrics."""
        trial = self._trials.get(end.key)
        if trial is None:  # MLflow refused to open it
            return
        if end.log is not None and end.log != trial.log.file:
            trial.log = FollowedLog(end.log)
        self._follow(trial, last=True)
        run = self._client.get_run(trial.run_id)
        self._log_summary(run, end)
        for file, folder in end.artifacts:
            self.unless_refused(partial(self._client.log_artifact, trial.run_id, str(local(file)), folder))
        if run.info.status != end.status:
            self._client.set_terminated(trial.run_id, end.status)
        del self._trials[end.key]

    def _log_summary(self, run: Any, end: TrialEnd) -> None:
        from mlflow.entities import Metric, RunTag

        now = int(time.time() * 1000)
        values = {allowed_name(k): _finite(v) for k, v in end.summary.items()}
        fresh = [Metric(k, v, now, 0) for k, v in values.items() if run.data.metrics.get(k) != v]
        labels = [RunTag(k, str(v)[:5000]) for k, v in end.tags.items()]
        self._client.log_batch(run.info.run_id, metrics=fresh, tags=labels)

    # ---- metrics

    def follow_trials(self) -> None:
        """Send what the logs of all open trials have got since the last look."""
        for trial in self._trials.values():
            if not self.unless_refused(partial(self._follow, trial)):
                trial.log.file = None

    def _follow(self, trial: _OpenTrial, last: bool = False) -> None:
        fresh = trial.log.fresh(last)
        if fresh is not None:
            self._log_rows(trial, [json.loads(line) for line in fresh.lines])
            trial.log.take(fresh)

    def _log_rows(self, trial: _OpenTrial, rows: Iterable[Mapping[str, Any]]) -> None:
        from mlflow.entities import Metric

        batch: list[Any] = []
        last = dict(trial.last)
        for row in rows:
            mark = kind_of_row(row["metrics"])
            if row["step"] <= last[mark]:
                continue
            last[mark] = row["step"]
            # The mark comes last: where it is in MLflow, so is its whole row.
            metrics = sorted(row["metrics"].items(), key=lambda item: item[0] == mark)
            batch += [Metric(allowed_name(k), _finite(v), row["time"], row["step"]) for k, v in metrics]
        for start in range(0, len(batch), BATCH):
            self._client.log_batch(trial.run_id, metrics=batch[start : start + BATCH])
        trial.last = last

    def _last_step(self, run_id: str, metric: str) -> int:
        return max((m.step for m in self._client.get_metric_history(run_id, metric)), default=-1)

    # ---- what runs are made of

    def _id(self) -> str:
        with quiet():
            found = self._client.get_experiment_by_name(self.name)
            if found:
                return str(found.experiment_id)
            return str(self._client.create_experiment(self.name, tags=EXPERIMENT_TAGS))

    def _find(self, tag: str, value: str, parent: str | None) -> Any:
        """Return the run whose `tag` is `value`, among the children of `parent` if that is given; else None."""
        where = f"tags.`{tag}` = '{value}'"
        if parent:
            where += f" and tags.`mlflow.parentRunId` = '{parent}'"
        runs = self._client.search_runs([self._id()], where, max_results=1)
        return runs[0] if runs else None

    def _log_data(self, run_id: str, data: Mapping[str, str]) -> None:
        if not data:
            return
        from mlflow.entities import Dataset, DatasetInput

        dataset = Dataset(
            name=data["name"],
            digest=data["digest"],
            source_type="local",
            source=json.dumps({"uri": data["source"]}),
            profile=data.get("profile"),
        )
        self._client.log_inputs(run_id, [DatasetInput(dataset)])

    def _log_content(self, run_id: str, name: str, content: str | bytes) -> None:
        if isinstance(content, str):
            self._client.log_text(run_id, content, name)
            return
        with tempfile.TemporaryDirectory() as folder:
            (file := Path(folder) / name).write_bytes(content)
            self._client.log_artifact(run_id, str(file))


def git_sha() -> str:
    """Return the commit of the working folder, with `-dirty` if it has changes; empty outside a repository."""
    with contextlib.suppress(OSError, subprocess.SubprocessError):
        command = ["git", "describe", "--always", "--dirty", "--abbrev=12"]
        return subprocess.run(command, capture_output=True, text=True, timeout=10).stdout.strip()
    return ""


def _finite(value: float) -> float:
    """Return `value`, an infinity as the largest float of its sign: MLflow refuses infinities on some databases."""
    return math.copysign(1.7976931348623157e308, value) if math.isinf(value) else value


def _is_refusal(error: Exception) -> bool:
    """True if asking again is no use. Missing rights may still be given, and a busy server becomes quiet."""
    from mlflow.exceptions import MlflowException
    from requests import HTTPError

    if isinstance(error, HTTPError):  # of artifacts that go through the server
        return error.response is not None and error.response.status_code in (400, 409, 413)
    if not isinstance(error, MlflowException):
        return False
    code = error.get_http_status_code()
    # A proxy before a server that starts says 404, too, but not in MLflow's words.
    return code in (400, 409, 413) or (code == 404 and not str(error).startswith("API request"))
