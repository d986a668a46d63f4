"""Sweeps and their trials, read back from MLflow."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from raymoe.metrics import find
from raymoe.schema import InputError
from raymoe.tracking.client import (
    SWEEP_KEY,
    allowed_name,
    connect,
    default_uri,
    first_line,
    quiet,
    without_credentials,
)

OLD_RANKING = ("eval/loss", "min")
"""Metric and mode of sweeps from before these were tags of their runs."""


@dataclass(frozen=True)
class TrialResult:
    """One trial of a sweep: its swept values, its status and its evaluations in the order of training."""

    name: str
    point: Mapping[str, Any]
    status: str
    evaluations: Sequence[Mapping[str, float]] = field(default_factory=list)
    model: str = ""
    error: str = ""

    def final(self, metric: str) -> float | None:
        """Return the metric's value at the end of training; None if it was not measured there."""
        return self.evaluations[-1].get(metric) if self.evaluations else None

    def best(self, metric: str, mode: str) -> float | None:
        """Return the metric's best value over the milestones; None if it was never measured."""
        values = [e[metric] for e in self.evaluations if metric in e]
        return (min if mode == "min" else max)(values, default=None)

    def as_json(self) -> dict[str, Any]:
        """Return plain values for `--json`."""
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
    metric: str
    """What its trials are ranked by, as MLflow spells it."""
    mode: str
    average_over: str | None = None


def read_sweeps(
    name: str | None = None, uri: str | None = None, experiment: str = "raymoe"
) -> list[SweepResult]:
    """Return all sweeps in MLflow, newest first, or the one called `name` (its run's name or the sweep's).

    Raises:
        InputError: MLflow does not answer, holds nothing, or has no such sweep.
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
    sweeps = [run for run in runs if SWEEP_KEY in run.data.tags]
    parents = [run for run in sweeps if name in (None, run.info.run_name, run.data.tags["sweep"])]
    if not parents:
        known = ", ".join(sorted({run.info.run_name for run in sweeps})) or "none"
        raise InputError(f"report: no sweep {name or ''} in {shown}; there are: {known}")
    return [_sweep_result(client, parent, runs) for parent in parents]


def _sweep_result(client: Any, parent: Any, runs: Iterable[Any]) -> SweepResult:
    tags, (metric, mode) = parent.data.tags, OLD_RANKING
    if "metric" in tags and "mode" in tags:
        metric, mode = allowed_name(tags["metric"]), tags["mode"]
    children = [r for r in runs if r.data.tags.get("mlflow.parentRunId") == parent.info.run_id]
    return SweepResult(
        name=parent.info.run_name,
        question=tags.get("mlflow.note.content", ""),
        rows=[_trial_result(client, child, metric) for child in children],
        metric=metric,
        mode=mode,
        average_over=tags.get("average_over"),
    )


def _trial_result(client: Any, run: Any, metric: str) -> TrialResult:
    return TrialResult(
        name=run.info.run_name,
        point=run.data.params,
        status=run.info.status,
        evaluations=_evaluations(client, run, metric),
        model=run.data.tags.get("model", ""),
        error=run.data.tags.get("error", ""),
    )


def _evaluations(client: Any, run: Any, metric: str) -> list[dict[str, float]]:
    """Return what result tables show of a run's evaluations, and the sweep's `metric`: one row per milestone.

    Training steps log some of these, too: only milestones are taken, and of two values at one the later.
    """
    steps: dict[int, dict[str, float]] = {}
    for name in run.data.metrics:
        if name.startswith("eval/"):
            for value in client.get_metric_history(run.info.run_id, name):
                steps.setdefault(value.step, {"step": value.step})[name] = value.value
    for name in run.data.metrics:
        if not name.startswith("eval/") and (name == metric or _has_column(name)):
            history = client.get_metric_history(run.info.run_id, name)
            for value in sorted(history, key=lambda v: v.timestamp):
                if value.step in steps:
                    steps[value.step][name] = value.value
    return [steps[step] for step in sorted(steps)]


def _has_column(name: str) -> bool:
    row = find(name)
    return row is not None and row.column
