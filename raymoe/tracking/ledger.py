"""MLflow: one parent run per sweep, one child per trial, written by one thread beside the driver.

Workers append their metrics to a file in the store (`MetricLog`) and never wait. The thread reads those files,
sends what the run does not hold yet in batches, and retries while the server is down. So training never stops
for MLflow, sqlite serves a cluster of any size, and after a crash no step is missing or logged twice.
"""

from __future__ import annotations

import contextlib
import json
import math
import re
import subprocess
import tempfile
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from raymoe.console import say
from raymoe.storage.location import Location, Remote, local, read_file
from raymoe.tracking.client import (
    SWEEP_KEY,
    TRIAL_KEY,
    connect,
    default_uri,
    first_line,
    quiet,
    without_credentials,
)
from raymoe.tracking.metric_log import MARKS, REMOTE_PAUSE, kind_of_row

EXPERIMENT_TAGS = {"mlflow.experimentKind": "custom_model_development"}
"""MLflow's pages then open on training runs instead of traces."""


@dataclass
class _Trial:
    run_id: str
    file: Location | None
    offset: int = 0
    tail: bytes = b""
    """The line that ends at `offset`; where it does not, the file was replaced."""
    last: dict[str, int] = field(default_factory=dict)
    looked: float = 0.0
    """When its log was last looked at, if that is an object."""
    version: tuple[float, int] = (0.0, 0)
    """Of the object, as it was read."""


class Ledger:
    """What is to be in MLflow. Every call returns at once; `close` waits until everything is sent."""

    def __init__(self, experiment: str, uri: str | None = None, say: Callable[[str], None] = say) -> None:
        self.uri, self.experiment, self.say = uri or default_uri(), experiment, say
        self._shown_uri = without_credentials(self.uri)
        self._queue: deque[Callable[[], None]] = deque()
        self._trials: dict[str, _Trial] = {}
        self._parent: str | None = None
        self._closing = threading.Event()
        self._wake = threading.Event()
        self._down = False
        self._thread = threading.Thread(target=self._work, name="mlflow-ledger", daemon=True)
        self._thread.start()

    def sweep(self, name: str, question: str, tags: Mapping[str, str], config: str) -> None:
        """Open the parent run of sweep `name`, or the one that it has already."""
        self._later(lambda: self._open_sweep(name, question, dict(tags), config))

    def trial(
        self,
        key: str,
        name: str,
        params: Mapping[str, Any],
        tags: Mapping[str, str],
        config: str,
        metrics: Location | None,
        data: Mapping[str, str] | None = None,
    ) -> None:
        """Open the run of the trial `key`, or the one that it has already, and follow its metric log."""
        self._later(
            lambda: self._open_trial(key, name, dict(params), dict(tags), config, metrics, data or {})
        )

    def finish(
        self,
        key: str,
        status: str,
        evaluations: Iterable[Mapping[str, float]] = (),
        tags: Mapping[str, str] | None = None,
        metrics: Location | None = None,
        files: Iterable[Location] = (),
        cost: Mapping[str, float] | None = None,
        figures: Iterable[Location] = (),
    ) -> None:
        """End a trial's run (FINISHED, FAILED or KILLED) after its last metrics.

        Adds `best/` and `final/` of the evaluations, `cost/` metrics and, as artifacts, the `files` that exist
        and in their folder `figures` the pictures.
        """
        summary = best_and_final(evaluations) | {f"cost/{k}": v for k, v in (cost or {}).items()}
        given = [*((f, None) for f in files), *((f, "figures") for f in figures)]
        more, artifacts = dict(tags or {}), [(f, folder) for f, folder in given if f.is_file()]
        self._later(lambda: self._finish(key, status, summary, more, metrics, artifacts))

    def close(
        self, status: str, artifacts: Mapping[str, str | bytes] | None = None, timeout: float = 120.0
    ) -> bool:
        """End the sweep's run, wait until all is sent and stop; False if MLflow did not answer in time.

        `artifacts` are the contents of files, by their names.
        """
        files = dict(artifacts or {})
        self._later(lambda: self._close(status, files))
        self._closing.set()
        self._wake.set()
        self._thread.join(timeout)
        if self._thread.is_alive():
            self.say(
                f"MLflow at {self._shown_uri} did not take everything; the metric logs in the store hold it all"
            )
        return not self._thread.is_alive()

    # ---- below: in the thread

    def _later(self, call: Callable[[], None]) -> None:
        self._queue.append(call)
        self._wake.set()

    def _work(self) -> None:
        pause = 1.0
        while True:
            self._wake.wait(pause)
            self._wake.clear()
            try:
                self._send()
                if self._down:
                    self.say(f"MLflow at {self._shown_uri} answers again")
                pause, self._down = 1.0, False
                if self._closing.is_set() and not self._queue:
                    return
            except Exception as error:
                if not self._down:
                    why = first_line(error, self.uri)
                    self.say(f"MLflow at {self._shown_uri} fails ({why}); metrics are kept and sent later")
                pause, self._down = min(10.0, pause * 2), True

    def _send(self) -> None:
        while self._queue:
            self._unless_refused(self._queue[0])
            self._queue.popleft()
        for trial in self._trials.values():
            if not self._unless_refused(partial(self._follow, trial)):
                trial.file = None

    def _unless_refused(self, call: Callable[[], None]) -> bool:
        """Whether MLflow took it; what it will never take is told and left out, so that the rest gets through."""
        try:
            call()
        except Exception as error:
            if not _is_refusal(error):
                raise
            why = first_line(error, self.uri)
            self.say(f"MLflow at {self._shown_uri} refuses something, which is left out: {why}")
            return False
        return True

    @property
    def _client(self) -> Any:
        if not hasattr(self, "_cached_client"):
            self._cached_client = connect(self.uri)
        return self._cached_client

    def _experiment_id(self) -> str:
        with quiet():
            found = self._client.get_experiment_by_name(self.experiment)
            return str(
                found.experiment_id
                if found
                else self._client.create_experiment(self.experiment, tags=EXPERIMENT_TAGS)
            )

    def _find(self, tag: str, value: str, parent: str | None) -> Any:
        where = f"tags.`{tag}` = '{value}'" + (
            f" and tags.`mlflow.parentRunId` = '{parent}'" if parent else ""
        )
        runs = self._client.search_runs([self._experiment_id()], where, max_results=1)
        return runs[0] if runs else None

    def _open_sweep(self, name: str, question: str, tags: dict[str, str], config: str) -> None:
        found = self._find(SWEEP_KEY, name, None)
        if found is None:
            labels = {"mlflow.runName": name, SWEEP_KEY: name, "mlflow.note.content": question, **tags}
            found = self._client.create_run(self._experiment_id(), tags=labels, run_name=name)
        # Also where the run is there: MLflow may have failed right after it was created.
        for tag, value in tags.items():
            if found.data.tags.get(tag) != value:
                self._client.set_tag(found.info.run_id, tag, value)
        self._client.log_text(found.info.run_id, config, "sweep.yaml")
        self._client.update_run(found.info.run_id, status="RUNNING")
        self._parent = found.info.run_id

    def _open_trial(
        self,
        key: str,
        name: str,
        params: dict[str, Any],
        tags: dict[str, str],
        config: str,
        metrics: Location | None,
        data: Mapping[str, str],
    ) -> None:
        found = self._find(TRIAL_KEY, key, self._parent)
        if found is None:
            labels = {"mlflow.runName": name, TRIAL_KEY: key, "git_sha": git_sha(), **tags}
            if self._parent:
                labels["mlflow.parentRunId"] = self._parent
            found = self._client.create_run(self._experiment_id(), tags=labels, run_name=name)
        from mlflow.entities import Param

        run_id = found.info.run_id
        if found.info.status != "FINISHED":  # what has finished keeps its end and its duration
            self._client.update_run(run_id, status="RUNNING")
        # Also where the run is there: MLflow may have failed right after it was created.
        entries = [Param(k, str(v)) for k, v in params.items() if k not in found.data.params]
        self._client.log_batch(run_id, params=entries)
        self._client.log_text(run_id, config, "run.yaml")
        self._log_data(run_id, data)
        last = {mark: self._last_step(run_id, mark) for mark in MARKS}
        self._trials[key] = _Trial(run_id, metrics, last=last)

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

    def _last_step(self, run_id: str, metric: str) -> int:
        return max((m.step for m in self._client.get_metric_history(run_id, metric)), default=-1)

    def _follow(self, trial: _Trial, last: bool = False) -> None:
        """Send the rows that the trial's log got since the last look; `last`: look at an object at once."""
        if isinstance(trial.file, Remote):
            self._follow_object(trial, trial.file, last)
            return
        if trial.file is None or not trial.file.is_file():
            return
        with trial.file.open("rb") as stream:
            start = max(0, trial.offset - len(trial.tail))
            stream.seek(start)
            offset = trial.offset if stream.read(trial.offset - start) == trial.tail else 0
            stream.seek(offset)
            lines = stream.read().splitlines(keepends=True)
        self._log_lines(trial, lines, offset)

    def _follow_object(self, trial: _Trial, file: Remote, last: bool) -> None:
        if not last and time.monotonic() - trial.looked < REMOTE_PAUSE:
            return
        trial.looked = time.monotonic()
        if (version := file.modified()) == trial.version and not last:
            return
        content = read_file(file) or b""
        start = max(0, trial.offset - len(trial.tail))
        offset = trial.offset if content[start : trial.offset] == trial.tail else 0
        self._log_lines(trial, content[offset:].splitlines(keepends=True), offset)
        trial.version = version

    def _log_lines(self, trial: _Trial, lines: Iterable[bytes], offset: int) -> None:
        """Send the whole `lines` of the trial's log, which begin at `offset`."""
        whole = [line for line in lines if line.endswith(b"\n")]
        self._log_rows(trial, [json.loads(line) for line in whole])
        trial.offset = offset + sum(map(len, whole))
        trial.tail = whole[-1] if whole else trial.tail if offset else b""

    def _log_rows(self, trial: _Trial, rows: Iterable[Mapping[str, Any]]) -> None:
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
            batch += [Metric(_name(k), _finite(v), row["time"], row["step"]) for k, v in metrics]
        for start in range(0, len(batch), 1000):  # the server's limit for one request
            self._client.log_batch(trial.run_id, metrics=batch[start : start + 1000])
        trial.last = last

    def _finish(
        self,
        key: str,
        status: str,
        summary: Mapping[str, float],
        tags: dict[str, str],
        metrics: Location | None,
        artifacts: list[tuple[Location, str | None]],
    ) -> None:
        trial = self._trials.get(key)
        if trial is None:  # MLflow refused to open it
            return
        if metrics is not None and metrics != trial.file:
            trial.file, trial.offset, trial.tail = metrics, 0, b""
        self._follow(trial, last=True)
        from mlflow.entities import Metric, RunTag

        now = int(time.time() * 1000)
        values = {_name(k): _finite(v) for k, v in summary.items()}
        run = self._client.get_run(trial.run_id)
        fresh = [Metric(k, v, now, 0) for k, v in values.items() if run.data.metrics.get(k) != v]
        labels = [RunTag(k, str(v)[:5000]) for k, v in tags.items()]
        self._client.log_batch(trial.run_id, metrics=fresh, tags=labels)
        for file, folder in artifacts:
            self._unless_refused(partial(self._client.log_artifact, trial.run_id, str(local(file)), folder))
        if run.info.status != status:
            self._client.set_terminated(trial.run_id, status)
        del self._trials[key]

    def _close(self, status: str, artifacts: Mapping[str, str | bytes]) -> None:
        for trial in self._trials.values():
            self._unless_refused(partial(self._kill, trial))
        self._trials.clear()
        if self._parent:
            for name, content in artifacts.items():
                self._log_content(self._parent, name, content)
            self._client.set_terminated(self._parent, status)

    def _kill(self, trial: _Trial) -> None:
        self._follow(trial, last=True)
        self._client.set_terminated(trial.run_id, "KILLED")

    def _log_content(self, run_id: str, name: str, content: str | bytes) -> None:
        if isinstance(content, str):
            self._client.log_text(run_id, content, name)
            return
        with tempfile.TemporaryDirectory() as folder:
            (file := Path(folder) / name).write_bytes(content)
            self._client.log_artifact(run_id, str(file))


def best_and_final(evaluations: Iterable[Mapping[str, float]]) -> dict[str, float]:
    """Summary of the evaluations: compare views show only the last value of a metric.

    `best/<metric>` and `final/<metric>` of all `eval/` metrics; of what describes the model, which is neither
    good nor bad, `final/masks/...` and `final/model/...`.
    """
    rows = list(evaluations)
    last = rows[-1] if rows else {}
    summary = {
        f"final/{name}": last[name] for name in last if name.startswith(("masks/", "model/", "system/"))
    }
    for name in [k for k in last if k.startswith("eval/")]:
        values = [row[name] for row in rows if name in row]
        better = max if name.endswith("exact_match") else min
        summary |= {f"best/{name[5:]}": better(values), f"final/{name[5:]}": values[-1]}
    return summary


def git_sha() -> str:
    """Commit of the working folder, with `-dirty` where it has changes; empty outside a repository."""
    with contextlib.suppress(OSError, subprocess.SubprocessError):
        command = ["git", "describe", "--always", "--dirty", "--abbrev=12"]
        return subprocess.run(command, capture_output=True, text=True, timeout=10).stdout.strip()
    return ""


def _finite(value: float) -> float:
    """MLflow's SQL stores refuse infinities of some databases: keep the sign, at the largest float."""
    return math.copysign(1.7976931348623157e308, value) if math.isinf(value) else value


def _name(metric: str) -> str:
    """`metric` in the characters that MLflow takes: domains are named by users (`c++`)."""
    return re.sub(r"[^\w./ :-]", "_", metric)


def _is_refusal(error: Exception) -> bool:
    """Whether asking again is no use. Missing rights may be given, and a server that is busy gets quiet."""
    from mlflow.exceptions import MlflowException
    from requests import HTTPError

    if isinstance(error, HTTPError):  # of artifacts that go through the server
        return error.response is not None and error.response.status_code in (400, 409, 413)
    if not isinstance(error, MlflowException):
        return False
    code = error.get_http_status_code()
    # a proxy before a server that starts says 404, too, but not in MLflow's words
    return code in (400, 409, 413) or (code == 404 and not str(error).startswith("API request"))
