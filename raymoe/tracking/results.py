"""Sweeps and their trials, read back from MLflow."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from raymoe.metrics import STRUCTURE
from raymoe.schema import InputError
from raymoe.tracking.client import SWEEP_KEY, connect, default_uri, first_line, quiet, without_credentials


@dataclass(frozen=True)
class TrialResult:
    """One trial of a sweep: swept values, state, its evaluations in the order of training."""

    name: str
    point: Mapping[str, Any]
    status: str
    evaluations: Sequence[Mapping[str, float]] = field(default_factory=list)
    model: str = ""
    error: str = ""

    def final(self, metric: str) -> float | None:
        """The metric at the end of training."""
        return self.evaluations[-1].get(metric) if self.evaluations else None

    def best(self, metric: str, mode: str) -> float | None:
        """The metric's best value over the milestones."""
        values = [e[metric] for e in self.evaluations if metric in e]
        return (min if mode == "min" else max)(values, default=None)

    def as_json(self) -> dict[str, Any]:
        """Plain values for `--json`."""
        return {
            "trial": self.name,
            "params": dict(self.point),
            "status": self.status,
            "evaluations": [dict(e) for e in self.evaluations],
            "model": self.model,
            "error": self.error,
        }


@dataclass(frozen=True)
class SweepResult:
    """A sweep as MLflow holds it."""

    name: str
    question: str
    rows: list[TrialResult]
    average_over: str | None = None


def read_sweeps(
    name: str | None = None, uri: str | None = None, experiment: str = "raymoe"
) -> list[SweepResult]:
    """All sweeps in MLflow, newest first, or the one called `name` (its run name or its sweep's).

    Raises:
        InputError: nothing there, or no such sweep.
    """
    where = uri or default_uri()
    shown = without_credentials(where)
    if where.startswith("sqlite:///") and not Path(where.removeprefix("sqlite:///")).is_file():
        raise InputError(
            f"report: no MLflow database at {shown}: run a sweep first, or set MLFLOW_TRACKING_URI"
        )
    try:
        with quiet():
            client = connect(where)
            found = client.get_experiment_by_name(experiment)
            runs = list(client.search_runs([found.experiment_id], max_results=5000)) if found else []
    except Exception as error:  # MLflow's, SQLAlchemy's or an HTTP client's
        raise InputError(f"report: MLflow at {shown} does not answer: {first_line(error, where)}") from None
    parents = [
        r for r in runs if SWEEP_KEY in r.data.tags and name in (None, r.info.run_name, r.data.tags["sweep"])
    ]
    if not parents:
        known = sorted({r.info.run_name for r in runs if SWEEP_KEY in r.data.tags})
        raise InputError(f"report: no sweep {name or ''} in {shown}; there are: {', '.join(known) or 'none'}")
    return [_sweep_result(client, parent, runs) for parent in parents]


def _sweep_result(client: Any, parent: Any, runs: Iterable[Any]) -> SweepResult:
    children = [r for r in runs if r.data.tags.get("mlflow.parentRunId") == parent.info.run_id]
    rows = [
        TrialResult(
            name=child.info.run_name,
            point=child.data.params,
            status=child.info.status,
            evaluations=_evaluations(client, child),
            model=child.data.tags.get("model", ""),
            error=child.data.tags.get("error", ""),
        )
        for child in children
    ]
    tags = parent.data.tags
    return SweepResult(
        parent.info.run_name, tags.get("mlflow.note.content", ""), rows, tags.get("average_over")
    )


def _evaluations(client: Any, run: Any) -> list[dict[str, float]]:
    """The `eval/` metrics of a run, one row per step, and of the model itself what the table shows of it.

    Training steps log that too: only the evaluations' steps are taken, and of two values at one the later.
    """
    steps: dict[int, dict[str, float]] = {}
    for name in run.data.metrics:
        if name.startswith("eval/"):
            for metric in client.get_metric_history(run.info.run_id, name):
                steps.setdefault(metric.step, {"step": metric.step})[name] = metric.value
    for name in STRUCTURE:
        if name in run.data.metrics:
            history = client.get_metric_history(run.info.run_id, name)
            for metric in sorted(history, key=lambda m: m.timestamp):
                if metric.step in steps:
                    steps[metric.step][name] = metric.value
    return [steps[step] for step in sorted(steps)]
