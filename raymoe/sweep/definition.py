"""What a sweep is: a question, its points, and the run of each point."""

from __future__ import annotations

import difflib
import importlib.util
import sys
import traceback
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from raymoe import stages
from raymoe.config import Execution, Run, RunFile
from raymoe.console import root_cause
from raymoe.metrics import METRICS, find, mode_of
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
    """Makes a complete run of the base configuration and a point."""
    metric: str = "eval/loss"
    """What trials are ranked by: a metric of raymoe/metrics.py that is logged at milestones."""
    mode: str | None = None
    """`min` or `max`, whichever is best; by default what raymoe/metrics.py says of the metric."""
    average_over: str | None = None
    """A swept parameter, such as a seed: a second table has mean and standard deviation over its values."""

    def ranking(self) -> tuple[str, str]:
        """Return metric and mode that trials are ranked by.

        Raises:
            InputError: the metric is none that trials can be ranked by, or nothing says which way is better.
        """
        row = find(self.metric)
        if row is None:
            raise InputError(f"{self.name}: metric: {self.metric!r} is not {_one_of_the_table(self.metric)}")
        if "milestone" not in row.logged:
            raise InputError(f"{self.name}: metric: {self.metric} is not measured at milestones")
        if self.mode not in ("min", "max", None):
            raise InputError(f"{self.name}: mode: expected 'min' or 'max' (got {self.mode!r})")
        mode = self.mode or mode_of(self.metric)
        if mode is None:
            raise InputError(
                f"{self.name}: mode: {self.metric} is neither good nor bad in itself: give 'min' or 'max'"
            )
        return self.metric, mode


def _one_of_the_table(metric: str) -> str:
    close = difflib.get_close_matches(metric, [row.pattern for row in METRICS], n=1)
    return "in the table of raymoe/metrics.py" + (f": did you mean {close[0]}?" if close else "")


@dataclass(frozen=True)
class Trial:
    """One point of a sweep, with its run and the stage that trains it."""

    name: str
    point: Point
    run: Run
    stage: stages.Stage

    @property
    def key(self) -> str:
        """Its stage's key: equal for equal runs, in whatever sweep."""
        return self.stage.key


def trials_of(sweep: Sweep, base: Run) -> list[Trial]:
    """Return every trial of `sweep`, valid and distinct.

    Raises:
        InputError: invalid points (all of them, one line each), two that are the same run, an `average_over` that
            none has, or nothing to rank them by.
    """
    sweep.ranking()  # says here what is wrong with it, before anything is computed
    if sweep.average_over is not None and not any(sweep.average_over in p for p in sweep.points):
        raise InputError(f"{sweep.name}: average_over: no trial has {sweep.average_over!r}")
    trials: list[Trial] = []
    problems: dict[str, list[str]] = {}
    """Line -> names of the trials that it is about."""
    for point in sweep.points:
        name = "-".join(str(value) for value in point.values())
        try:
            run = sweep.run(base, point)
            trials.append(Trial(name, point, run, stages.training(run)))
        except InputError as error:
            for line in str(error).splitlines():
                problems.setdefault(line, []).append(name)
    for first, again in _repeated(trials):
        problems.setdefault(f"the same run as trial {first}", []).append(again)
    if problems:
        raise InputError("\n".join(_lines(problems, len(sweep.points))))
    return trials


def _repeated(trials: Iterable[Trial]) -> Iterator[tuple[str, str]]:
    """Yield (name of a trial, name of a later one that is the same run)."""
    seen: dict[str, str] = {}
    for trial in trials:
        if trial.key in seen:
            yield seen[trial.key], trial.name
        seen.setdefault(trial.key, trial.name)


def _lines(problems: Mapping[str, Sequence[str]], trials: int) -> Iterator[str]:
    """Yield every problem with the names of its trials, unless they are all of the `trials`."""
    for line, names in problems.items():
        yield line if len(names) == trials else f"trial {', '.join(names)}: {line}"


def run_files_of(trials: Iterable[Trial], execution: Execution) -> dict[str, RunFile]:
    """Return each trial as the configuration of a run of its own, by the trial's name."""
    return {
        trial.name: RunFile(
            **{name: getattr(trial.run, name) for name in Run.model_fields}, execution=execution
        )
        for trial in trials
    }


def load(file: Path) -> Sweep:
    """Return the sweep that a Python file defines as `SWEEP`.

    Raises:
        InputError: no such file, one that Python can't run, one without a sweep, or a sweep without a ranking.
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
    sweep = getattr(module, "SWEEP", None)
    if not isinstance(sweep, Sweep):
        raise InputError(f"{file}: defines no SWEEP")
    sweep.ranking()
    return sweep


@dataclass(frozen=True)
class SweepOptions:
    """What a sweep is asked for on the command line, besides the configuration."""

    dry_run: bool = False
    """Print every trial and which stages are in the store, then stop."""
    json: bool = False
    """Print the results as JSON instead of a table."""
    asha: bool = False
    """Stop trials early that do worse than others at the same step (ASHA)."""
