"""What became of every trial of a sweep: kept in the driver, and in MLflow as it happens."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from raymoe import stages
from raymoe.storage.store import Output, Store
from raymoe.sweep.definition import Sweep, Trial
from raymoe.tracking.ledger import Ledger
from raymoe.tracking.metric_log import kind_of_row, metric_log, read_rows
from raymoe.tracking.results import TrialResult
from raymoe.train.spec import STOPPED_EARLY


class TrialBook:
    """The trials of one sweep, and the result of each that has ended."""

    def __init__(
        self, ledger: Ledger, sweep: Sweep, trials: Mapping[str, Trial], store: Store, name: str
    ) -> None:
        """`trials` by their keys; `name` is that of the sweep's run."""
        self.name = name
        self.trials, self.results = trials, dict[str, TrialResult]()
        self.artifacts = dict[str, str | bytes]()
        """Files for the sweep's run, content by name."""
        self._ledger, self._sweep, self._store, self._open = ledger, sweep, store, set[str]()

    def started(self, key: str) -> None:
        """Note that a trial trains now."""
        self._open_run(self.trials[key])
        self._open.add(key)

    def ended(self, key: str, error: str | None) -> None:
        """Note that a trial ended; without a result in the store and without an error it was interrupted."""
        if key not in self._open:
            self.started(key)
        trial = self.trials[key]
        found = trial.stage.find(self._store)
        self.results[key] = _result(trial, found) if found else self._result_without_model(trial, error)
        self._close_run(trial, self.results[key], found)

    def close(self) -> None:
        """Note that trials which have not ended were interrupted, and end the sweep's run."""
        try:
            for key in self.trials.keys() - self.results.keys():
                self.ended(key, None)
        finally:
            self._ledger.close(_overall(self.results.values()), self.artifacts)

    def _open_run(self, trial: Trial) -> None:
        run, sources = trial.run, trial.run.data.sources("train")
        self._ledger.trial(
            trial.key,
            trial.name,
            params=trial.point,
            tags={"sweep": self._sweep.name, "method": run.method.name, "base_model": run.model.name},
            config=as_yaml(run),
            metrics=metric_log(self._store.checkpoints, trial.key),
            data={
                "name": ", ".join(Path(source.name).name for source in sources),
                "digest": next(n for n in trial.stage.needs if n.name == "instructions").key[-12:],
                "source": ", ".join(source.name for source in sources),
            },
        )

    def _close_run(self, trial: Trial, result: TrialResult, found: Output | None) -> None:
        clusters = [s.find(self._store) for s in stages.upstream([trial.stage]) if s.name == "clusters"]
        self._ledger.finish(
            trial.key,
            "KILLED" if result.status == "STOPPED" else result.status,
            found.info["evaluations"] if found else (),
            tags={"model": result.model, "error": result.error} if result.error else {"model": result.model},
            metrics=found.location / "metrics.jsonl" if found else None,
            cost=found.info["cost"] if found else None,
            files=[
                *(made.location / "clusters.json" for made in clusters if made),
                *([found.location / "masks.json"] if found else []),
            ],
            figures=sorted((found.location / "figures").glob("*.png"), key=str) if found else (),
        )

    def _result_without_model(self, trial: Trial, error: str | None) -> TrialResult:
        rows = read_rows(metric_log(self._store.checkpoints, trial.key))
        evaluations = [
            {"step": row["step"], **row["metrics"]}
            for row in rows
            if kind_of_row(row["metrics"]) == "eval/loss"
        ]
        if error == STOPPED_EARLY:
            return TrialResult(trial.name, trial.point, "STOPPED", evaluations)
        status = "FAILED" if error else "KILLED"
        return TrialResult(trial.name, trial.point, status, evaluations, error=error or "interrupted")


def _result(trial: Trial, found: Output) -> TrialResult:
    model = str(found.location / "model")
    return TrialResult(trial.name, trial.point, "FINISHED", found.info["evaluations"], model)


def _overall(results: Iterable[TrialResult]) -> str:
    """Return the status of the sweep's run: that of the trial that went worst."""
    statuses = {result.status for result in results}
    return next((status for status in ("KILLED", "FAILED") if status in statuses), "FINISHED")


def as_yaml(config: Any) -> str:
    """Return a configuration as YAML."""
    import yaml

    return yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False)
