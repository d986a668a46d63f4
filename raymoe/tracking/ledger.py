"""MLflow: one parent run per sweep, one child per trial, written by one thread beside the driver.

Workers append their metrics to a file in the store (`MetricLog`) and never wait. The thread reads those files,
sends in batches what the run does not hold yet, and retries while the server is down. So training never stops
for MLflow, sqlite serves a cluster of any size, and after a crash no step is missing or logged twice.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from typing import Any

from raymoe.console import say
from raymoe.metrics import mode_of
from raymoe.storage.location import Location
from raymoe.tracking.client import default_uri, first_line
from raymoe.tracking.experiment import Experiment, TrialEnd, TrialEntry

LONGEST_PAUSE = 10.0
"""Seconds between two attempts while MLflow fails, at most."""


class Ledger:
    """Writes a sweep and its trials to MLflow. Every call returns at once; `close` waits until all is sent."""

    def __init__(self, experiment: str, uri: str | None = None, say: Callable[[str], None] = say) -> None:
        self.say = say
        self._experiment = Experiment(experiment, uri or default_uri(), say)
        self._queue: deque[Callable[[], None]] = deque()
        self._closing = threading.Event()
        self._wake = threading.Event()
        self._down = False
        self._thread = threading.Thread(target=self._work, name="mlflow-ledger", daemon=True)
        self._thread.start()

    def sweep(self, name: str, question: str, tags: Mapping[str, str], config: str) -> None:
        """Open the parent run of the sweep `name`, or the one that it has already."""
        self._later(partial(self._experiment.open_sweep, name, question, dict(tags), config))

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
        entry = TrialEntry(key, name, dict(params), dict(tags), config, metrics, dict(data or {}))
        self._later(partial(self._experiment.open_trial, entry))

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

        Adds `best/` and `final/` of the evaluations, `cost/` metrics, the `files` that exist as artifacts and, in a
        folder of their own, the `figures`.
        """
        summary = best_and_final(evaluations) | {f"cost/{k}": v for k, v in (cost or {}).items()}
        given = [*((f, None) for f in files), *((f, "figures") for f in figures)]
        artifacts = [(file, folder) for file, folder in given if file.is_file()]
        end = TrialEnd(key, status, summary, dict(tags or {}), metrics, artifacts)
        self._later(partial(self._experiment.finish, end))

    def close(
        self, status: str, artifacts: Mapping[str, str | bytes] | None = None, timeout: float = 120.0
    ) -> bool:
        """End the sweep's run with `artifacts` (content by file name), wait until all is sent, and stop.

        Returns False if MLflow did not answer in time.
        """
        self._later(partial(self._experiment.close, status, dict(artifacts or {})))
        self._closing.set()
        self._wake.set()
        self._thread.join(timeout)
        if self._thread.is_alive():
            self.say(
                f"MLflow at {self._experiment.shown_uri} did not take everything; the metric logs in the store hold "
                "it all"
            )
        return not self._thread.is_alive()

    def _later(self, call: Callable[[], None]) -> None:
        self._queue.append(call)
        self._wake.set()

    # ---- in the thread

    def _work(self) -> None:
        shown, pause = self._experiment.shown_uri, 1.0
        while True:
            self._wake.wait(pause)
            self._wake.clear()
            try:
                self._send()
                if self._down:
                    self.say(f"MLflow at {shown} answers again")
                pause, self._down = 1.0, False
                if self._closing.is_set() and not self._queue:
                    return
            except Exception as error:
                if not self._down:
                    why = first_line(error, self._experiment.uri)
                    self.say(f"MLflow at {shown} fails ({why}); metrics are kept and sent later")
                pause, self._down = min(LONGEST_PAUSE, pause * 2), True

    def _send(self) -> None:
        while self._queue:
            self._experiment.unless_refused(self._queue[0])
            self._queue.popleft()
        self._experiment.follow_trials()


def best_and_final(evaluations: Iterable[Mapping[str, float]]) -> dict[str, float]:
    """Return the summary of a trial's evaluations: MLflow's compare views show only the last value of a metric.

    `final/<m>` of every `eval/<m>`; `best/<m>` too where the table of metrics says which way is better; and
    `final/<name>` of whatever else the last evaluation says about the model.
    """
    rows = list(evaluations)
    summary: dict[str, float] = {}
    for name in rows[-1] if rows else ():
        if name == "step" or name.startswith(("train/", "routing/")):
            continue
        short, values = name.removeprefix("eval/"), [row[name] for row in rows if name in row]
        if name.startswith("eval/") and (mode := mode_of(name)):
            summary[f"best/{short}"] = (min if mode == "min" else max)(values)
        summary[f"final/{short}"] = values[-1]
    return summary
