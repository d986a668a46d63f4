"""Progress of a sweep that trains: bars on a terminal, plain lines in a log."""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from ray import cloudpickle
from ray.tune import Callback
from ray.tune.schedulers import ASHAScheduler

from raymoe.console import root_cause
from raymoe.report.table import shown
from raymoe.storage.lease import holder
from raymoe.storage.location import Location, Remote
from raymoe.storage.store import Store
from raymoe.tracking.metric_log import REMOTE_PAUSE, metric_log, read_rows
from raymoe.train.spec import FAILURE, FIRST_STEPS, STOPPED_EARLY, stop_flag

SATURATED = 0.5
"""Share of SIMoE's gates that go to 0 or 1 in the first steps above which a person is warned."""


class TuneProgress(Callback):  # type: ignore[misc]
    """Follows the trials of a sweep. Afterwards `errors` says why each unfinished one has no result."""

    def __init__(
        self,
        names: Mapping[str, str],
        metric: str,
        store: Store,
        say: Callable[[str], None],
        started: Callable[[str], None],
        ended: Callable[[str, str | None], None],
    ) -> None:
        """Follow the trials with these `names`, by key.

        `started(key)` and `ended(key, error)` are called as it happens; `error` is None for one with a result.
        """
        self.errors: dict[str, str] = {}
        self._names, self._metric, self._store, self.say = names, metric, store, say
        self._start, self._end = started, ended
        self._bars = _Bars(self._names, store) if sys.stderr.isatty() else None
        self._warned: list[Any] = []

    def __getstate__(self) -> dict[str, Any]:
        """Return nothing: Tune writes its callbacks down for `Tuner.restore`, which raymoe has no use for."""
        return {}

    def __enter__(self) -> TuneProgress:
        if self._bars:
            self._bars.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._bars:
            self._bars.stop()

    def on_trial_start(self, iteration: int, trials: list[Any], trial: Any, **_: Any) -> None:
        """Say that a trial started."""
        other = None
        with suppress(OSError):  # a storage that fails for a moment is no reason to end the sweep
            other = holder(self._store.checkpoints / trial.config["key"])
        self._tell(trial, f"started; waits where {other} trains the same" if other else "started")
        self._start(trial.config["key"])
        if self._bars:
            self._bars.running.add(trial.config["key"])

    def on_trial_result(
        self, iteration: int, trials: list[Any], trial: Any, result: dict[str, Any], **_: Any
    ) -> None:
        """Say what was measured at a milestone."""
        if self._metric in result:
            value = shown(self._metric, result[self._metric])
            self._tell(trial, f"step {result['step']:.0f}  {self._metric} {value}")
        if result.get("masks/saturated_early", 0) > SATURATED and trial not in self._warned:
            self._warned.append(trial)
            self._tell(trial, _saturation_warning(result))

    def on_trial_recover(self, iteration: int, trials: list[Any], trial: Any, **_: Any) -> None:
        """Say that a trial's driver died; Tune starts another."""
        self._tell(
            trial, f"its driver died ({root_cause(_error_of(trial))}); goes on from the last checkpoint"
        )

    def on_trial_complete(self, iteration: int, trials: list[Any], trial: Any, **_: Any) -> None:
        """Say that a trial ended, and why if its training did not reach the end; the others go on."""
        key = trial.config["key"]
        if self._store.at(self._store.root / key) is None:
            self.errors[key] = (trial.last_result or {}).get(FAILURE, STOPPED_EARLY)
        error = self.errors.get(key, "")
        self._tell(trial, error if error == STOPPED_EARLY else f"failed: {error}" if error else "finished")
        self._ended(trial)

    def on_trial_error(self, iteration: int, trials: list[Any], trial: Any, **_: Any) -> None:
        """Say that a trial's driver has died too often."""
        self.errors[trial.config["key"]] = root_cause(_error_of(trial))
        self._tell(trial, f"failed: {self.errors[trial.config['key']]}")
        self._ended(trial)

    def _tell(self, trial: Any, text: str) -> None:
        self.say(f"{self._names[trial.config['key']]}: {text}")

    def _ended(self, trial: Any) -> None:
        self._end(trial.config["key"], self.errors.get(trial.config["key"]))
        if self._bars:
            self._bars.running.discard(trial.config["key"])


def cooperative_asha(checkpoints: Location) -> ASHAScheduler:
    """Return an ASHA that asks a trial to end at its next milestone instead of ending its driver.

    A driver that is ended leaves its training workers behind, with all they hold, and the next trial waits for ever.
    """

    class Cooperative(ASHAScheduler):  # type: ignore[misc]
        def on_trial_result(self, controller: Any, trial: Any, result: dict[str, Any]) -> str:
            if "step" not in result or self._metric not in result:
                return str(self.CONTINUE)
            if super().on_trial_result(controller, trial, result) == self.STOP:
                with suppress(OSError):  # at worst it trains on
                    stop_flag(checkpoints, trial.config["key"]).touch()
            return str(self.CONTINUE)

    return Cooperative(time_attr="step", max_t=10**9, grace_period=1, reduction_factor=2)


class _Bars:
    """One bar per running trial, read from its metric log: a file twice a second, an object every few seconds."""

    def __init__(self, names: Mapping[str, str], store: Store) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

        self.running: set[str] = set()
        self._names, self._store = names, store
        self._stop = threading.Event()
        self._progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            TextColumn("{task.percentage:>3.0f}%  {task.fields[loss]}"),
            TimeElapsedColumn(),
            console=Console(stderr=True),
            transient=True,
        )
        self._tasks: dict[str, Any] = {}
        self._thread = threading.Thread(target=self._work, daemon=True)

    def start(self) -> None:
        self._progress.start()
        self._thread.start()

    def stop(self) -> None:
        self._stop.set()
        self._thread.join()
        self._progress.stop()

    def _work(self) -> None:
        pause = REMOTE_PAUSE if isinstance(self._store.root, Remote) else 0.5
        while not self._stop.wait(pause):
            for key in list(self.running):
                self._update(key)
            for key in set(self._tasks) - self.running:
                self._progress.remove_task(self._tasks.pop(key))

    def _update(self, key: str) -> None:
        rows = read_rows(metric_log(self._store.checkpoints, key))
        metrics: dict[str, float] = next(
            (r["metrics"] for r in rows[::-1] if "train/loss" in r["metrics"]), {}
        )
        if key not in self._tasks:
            self._tasks[key] = self._progress.add_task(self._names[key], total=1.0, loss="")
        loss = f"loss {metrics['train/loss']:.3f}" if metrics else "starting"
        self._progress.update(self._tasks[key], completed=metrics.get("train/progress", 0.0), loss=loss)


def _saturation_warning(result: Mapping[str, float]) -> str:
    share, rate = result["masks/saturated_early"], result["masks/learning_rate"]
    return (
        f"warning: within the first {FIRST_STEPS:.0%} of the steps {share:.0%} of the gates went to 0 or 1: "
        f"method.mask_learning_rate {rate:.2g} is too high for them to be learnt"
    )


def _error_of(trial: Any) -> BaseException | None:
    """Return the exception that ended a trial, which Tune has just written to its folder."""
    file = trial.pickled_error_file
    try:
        return cloudpickle.loads(Path(file).read_bytes()) if file else None
    except Exception:  # half written, on a full disk
        return None
