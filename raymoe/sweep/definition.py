"""What a sweep is: a question, its points, and the run of each point."""

from __future__ import annotations

import importlib.util
import sys
import traceback
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from raymoe import stages
from raymoe.config import Execution, Run, RunFile
from raymoe.console import root_cause
from raymoe.schema import InputError

Point = Mapping[str, str | int | float]


@dataclass(frozen=True)
class Sweep:
    """A question and the runs that answer it."""

    name: str
    question: str
    points: Sequence[Point]
    """Swept values of every trial: strings and numbers, under the names that MLflow shows."""
    run: Callable[[Run, Point], Run]
    """From the base configuration and a point to a complete run."""
    metric: str = "eval/loss"
    mode: str = "min"
    average_over: str | None = None
    """A swept parameter, such as a seed: a second table has mean and standard deviation over its values."""


@dataclass(frozen=True)
class Trial:
    """One point of a sweep, resolved."""

    name: str
    point: Point
    run: Run
    stage: stages.Stage

    @property
    def key(self) -> str:
        """Identity: equal for equal runs, in whatever sweep."""
        return self.stage.key


def trials_of(sweep: Sweep, base: Run) -> list[Trial]:
    """Every trial of `sweep`, valid and distinct.

    Raises:
        InputError: invalid points (all of them, one line each), two that are the same run, or an `average_over`
            that none has.
    """
    if sweep.average_over is not None and not any(sweep.average_over in p for p in sweep.points):
        raise InputError(f"{sweep.name}: average_over: no trial has {sweep.average_over!r}")
    trials: list[Trial] = []
    problems: dict[str, list[str]] = {}
    for point in sweep.points:
        name = "-".join(str(value) for value in point.values())
        try:
            run = sweep.run(base, point)
            trials.append(Trial(name, point, run, stages.training(run)))
        except InputError as error:
            for line in str(error).splitlines():
                problems.setdefault(line, []).append(name)
    seen: dict[str, str] = {}
    for trial in trials:
        if trial.key in seen:
            problems.setdefault(f"the same run as trial {seen[trial.key]}", []).append(trial.name)
        seen.setdefault(trial.key, trial.name)
    if problems:
        every = len(sweep.points)
        raise InputError(
            "\n".join(
                line if len(names) == every else f"trial {', '.join(names)}: {line}"
                for line, names in problems.items()
            )
        )
    return trials


def jobs_of(trials: Iterable[Trial], execution: Execution) -> dict[str, RunFile]:
    """Each trial as the configuration of a run of its own, by its name."""
    parts = {"execution": execution}
    return {
        t.name: RunFile(**{n: getattr(t.run, n) for n in type(t.run).model_fields}, **parts) for t in trials
    }


def load(file: Path) -> Sweep:
    """The sweep that a Python file defines as `SWEEP`.

    Raises:
        InputError: no such file, one that Python can't run, or one without a sweep.
    """
    if not file.is_file():
        raise InputError(f"{file}: no such sweep file")
    spec = importlib.util.spec_from_file_location(file.stem, file)
    if spec is None or spec.loader is None:
        raise InputError(f"{file}: not a Python file")
    module = importlib.util.module_from_spec(spec)
    sys.path.insert(0, str(file.parent.absolute()))  # as Python does: what lies beside it can be imported
    try:
        spec.loader.exec_module(module)
    except InputError:
        raise
    except SyntaxError as error:
        raise InputError(f"{error.filename or file}:{error.lineno}: {error.msg}") from error
    except Exception as error:
        own = [f.lineno for f in traceback.extract_tb(error.__traceback__) if f.filename == spec.origin]
        raise InputError(":".join(map(str, [file, *own[-1:]])) + f": {root_cause(error)}") from error
    if not isinstance(getattr(module, "SWEEP", None), Sweep):
        raise InputError(f"{file}: defines no SWEEP")
    return module.SWEEP  # type: ignore[no-any-return]


@dataclass(frozen=True)
class SweepOptions:
    """How a sweep is run, besides the configuration."""

    dry_run: bool = False
    """Print every trial and which stages are in the store, then stop."""
    json: bool = False
    """Print the results as JSON instead of a table."""
    asha: bool = False
    """Stop trials early that do worse than others at the same step (ASHA)."""
