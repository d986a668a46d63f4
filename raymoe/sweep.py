"""Sweeps: many runs over one question, with Ray Tune; what they share is made once, before.

A sweep file holds a question, the points of its space and one function from a point to a complete run, and ends
with ``main(SWEEP)``. It is run as ``python sweeps/num_experts.py [config.yaml] [--key value ...]``, by
``ray job submit``, or as ``raymoe sweep sweeps/num_experts.py``.
"""

from __future__ import annotations

import importlib.util
import logging
import sys
import time
import traceback
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from raymoe import stages
from raymoe.address import check as check_address
from raymoe.config import Execution, InputError, Job, Run
from raymoe.jobs import check_storage
from raymoe.report import Row, print_table, root_cause, rows_as_json, to_json
from raymoe.storage import ray_storage
from raymoe.store import Store, digest
from raymoe.train.job import FAILURE, STOPPED_EARLY

if TYPE_CHECKING:
    from raymoe.tracking import Ledger

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


@dataclass(frozen=True)
class Options:
    """How a sweep is run, besides the configuration."""

    dry_run: bool = False
    """Print every trial and which stages are in the store, then stop."""
    json: bool = False
    """Print the results as JSON instead of a table."""
    asha: bool = False
    """Stop trials early that do worse than others at the same step (ASHA)."""


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


def jobs_of(trials: Iterable[Trial], execution: Execution) -> dict[str, Job]:
    """Each trial as the configuration of a run of its own, by its name."""
    parts = {"execution": execution}
    return {t.name: Job(**{n: getattr(t.run, n) for n in type(t.run).model_fields}, **parts) for t in trials}


def execute(sweep: Sweep, job: Job, options: Options) -> int:
    """Run `sweep` from the configuration `job`; returns the exit code (1: a trial failed, 130: interrupted)."""
    store = Store(job.execution.storage)
    trials = trials_of(sweep, job.run())
    if options.dry_run:
        _print_plan(sweep, trials, store, job, options)
        return 0
    check_storage(job.execution.storage)
    store.check_writable()
    rows = _run_all(sweep, trials, job, store, options)
    _print_result(sweep, rows, options)
    if any(row.status == "KILLED" for row in rows):
        _say("interrupted; the same command goes on from here")
    return max((_EXIT_CODES[row.status] for row in rows), default=0)


_EXIT_CODES = {"FINISHED": 0, "STOPPED": 0, "FAILED": 1, "KILLED": 130}


def main(sweep: Sweep) -> None:
    """Entry point of a sweep file: command line, run, exit code."""
    from raymoe.cli import run_sweep

    sys.exit(run_sweep(sweep, sys.argv[1:]))


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


def _run_all(sweep: Sweep, trials: Sequence[Trial], job: Job, store: Store, options: Options) -> list[Row]:
    from raymoe.tracking import Ledger

    finished = [trial.key for trial in trials if trial.stage.find(store)]
    todo = [trial for trial in trials if trial.key not in finished]
    _say(f"{sweep.name}: {len(trials)} trials, {len(finished)} of them already in {store.root}")
    if todo:
        check_address(job.execution)
    stages.prepare([t.stage for t in todo], stages.Context(store, job.execution, _say))
    ledger = Ledger("raymoe")
    identity = digest([sweep.name, sorted(t.key for t in trials)])
    tags = {"sweep": sweep.name}
    if sweep.average_over:
        tags["average_over"] = sweep.average_over
    name = f"{sweep.name}-{identity}"
    ledger.sweep(name, sweep.question, tags, _yaml(job))
    book = _Book(ledger, sweep, {trial.key: trial for trial in trials}, store, name)
    try:
        for key in finished:
            book.ended(key, None)
        if todo:
            _compute(sweep, todo, job.execution, store, options, book)
    finally:
        try:
            for key in book.trials.keys() - book.rows.keys():  # interrupted
                book.ended(key, None)
        finally:
            ledger.close(_overall(book.rows.values()), book.artifacts)
    return [book.rows[trial.key] for trial in trials]


class _Book:
    """What became of every trial, kept here and in MLflow as it happens."""

    def __init__(
        self, ledger: Ledger, sweep: Sweep, trials: Mapping[str, Trial], store: Store, name: str
    ) -> None:
        self.name = name
        self.trials, self.rows, self.artifacts = trials, dict[str, Row](), dict[str, str | bytes]()
        self._ledger, self._sweep, self._store, self._open = ledger, sweep, store, set[str]()

    def started(self, key: str) -> None:
        """A trial trains now."""
        _open(self._ledger, self._sweep, self.trials[key], self._store)
        self._open.add(key)

    def ended(self, key: str, error: str | None) -> None:
        """A trial ended; without a result in the store and without an error it was interrupted."""
        if key not in self._open:
            self.started(key)
        self.rows[key] = _row(self.trials[key], self._store, error)
        _close(self._ledger, self.trials[key], self.rows[key], self._store)


def _overall(rows: Iterable[Row]) -> str:
    """The parent run's status: that of the trial that went worst."""
    statuses = {row.status for row in rows}
    return next((s for s in ("KILLED", "FAILED") if s in statuses), "FINISHED")


def _compute(
    sweep: Sweep, todo: Sequence[Trial], execution: Execution, store: Store, options: Options, book: _Book
) -> None:
    """Make the shared stages, then train every trial in `todo`."""
    from raymoe.cluster import check_room, check_shared, connected, decided, trial_workers

    with connected(execution):
        check_shared(execution.storage)
        for size in {trial.run.optimization.batch_size for trial in todo}:
            check_room(trial_workers(execution, size))
        execution = decided(execution)
        context = stages.Context(store, execution, _say)
        with _watched(todo, store, book):
            errors = _shared_stages(todo, context)
            for key, error in errors.items():
                book.ended(key, error)
            if able := [t for t in todo if t.key not in errors]:
                _tune(sweep, able, execution, store, options, book)


@contextmanager
def _watched(todo: Sequence[Trial], store: Store, book: _Book) -> Iterator[None]:
    """Keep the timeline of nodes and trials in the store, and give it to MLflow in the end."""
    from raymoe.watch import Watch

    def left() -> int:
        return sum(trial.key not in book.rows for trial in todo)

    watch = Watch(store.root / "sweeps" / book.name, left, len(todo), _say)
    try:
        with watch:
            yield
    finally:
        book.artifacts |= watch.artifacts


def _shared_stages(todo: Sequence[Trial], context: stages.Context) -> dict[str, str]:
    """Make what the trials need, each stage once; returns the error of every trial that can't be trained.

    A stage that fails fails only the trials that need it.
    """
    failed: dict[str, str] = {}
    for stage in stages.upstream(t.stage for t in todo):
        error = next((failed[need.key] for need in stage.needs if need.key in failed), None)
        if error is None and (error := _made(stage, context)) is not None:
            _say(f"{stage.key}: failed: {error}")
        if error is not None:
            failed[stage.key] = error
    return {t.key: failed[need.key] for t in todo for need in t.stage.needs if need.key in failed}


def _made(stage: stages.Stage, context: stages.Context) -> str | None:
    """Make a stage whose needs are there; what went wrong, on one line, or None."""
    try:
        stages.make(stage, context)
        return None
    except InputError as error:
        return str(error)
    except Exception as error:
        return f"{stage.name}: {root_cause(error)}"


def _tune(
    sweep: Sweep, todo: Sequence[Trial], execution: Execution, store: Store, options: Options, book: _Book
) -> None:
    from ray import tune

    from raymoe.cluster import concurrent_trials, trial_driver_resources, trial_workers
    from raymoe.progress import TuneProgress, cooperative_asha

    workers = trial_workers(execution, min(t.run.optimization.batch_size for t in todo))
    payload = {t.key: t.run.model_dump(mode="json") for t in todo}
    trainable = tune.with_resources(
        tune.with_parameters(
            train_trial, payload=payload, execution=execution.model_dump(), root=str(store.root)
        ),
        trial_driver_resources(),
    )
    scheduler = cooperative_asha(store.checkpoints) if options.asha else None
    progress = TuneProgress(
        {t.key: t.name for t in todo}, sweep.metric, store, _say, book.started, book.ended
    )
    tuner = tune.Tuner(
        trainable,
        param_space={"key": tune.grid_search([t.key for t in todo])},
        tune_config=tune.TuneConfig(
            metric=sweep.metric,
            mode=sweep.mode,
            max_concurrent_trials=concurrent_trials(execution, workers),
            scheduler=scheduler,
        ),
        run_config=tune.RunConfig(
            name=f"{sweep.name}-{time.strftime('%Y%m%d-%H%M%S')}",
            **ray_storage(store.root / "tune"),
            failure_config=tune.FailureConfig(max_failures=execution.max_failures),
            callbacks=[progress],
            verbose=0,
        ),
    )
    # A trial's error is told in one line; Tune writes the whole of it into the trial's folder.
    logging.getLogger("ray.tune.execution.tune_controller").setLevel(logging.CRITICAL)
    with progress:
        tuner.fit()


def train_trial(
    config: Mapping[str, Any], payload: Mapping[str, Any], execution: Mapping[str, Any], root: str
) -> dict[str, str]:
    """A Tune trial: train the run under `config["key"]`, or find it finished.

    Returns why it failed, if it did: what is raised is tried again, as is right for processes and nodes that died.
    """
    from ray.exceptions import RayActorError
    from ray.train.v2.api.exceptions import ControllerError

    run = Run.model_validate(payload[config["key"]])
    context = stages.Context(Store(root), Execution.model_validate(execution))
    stage = stages.training(run)
    try:
        stages.make(stage, context)
    except (RayActorError, ControllerError, OSError):  # a process or a node that died, a storage that failed
        raise
    except Exception as error:
        return {FAILURE: STOPPED_EARLY if str(error) == STOPPED_EARLY else root_cause(error)}
    return {}


def _open(ledger: Ledger, sweep: Sweep, trial: Trial, store: Store) -> None:
    from raymoe.tracking import metric_log

    run = trial.run
    ledger.trial(
        trial.key,
        trial.name,
        params=trial.point,
        tags={"sweep": sweep.name, "method": run.method.name, "base_model": run.model.name},
        config=_yaml(run),
        metrics=metric_log(store.checkpoints, trial.key),
        data={
            "name": ", ".join(Path(source.name).name for source in run.data.sources("train")),
            "digest": next(n for n in trial.stage.needs if n.name == "instructions").key[-12:],
            "source": ", ".join(source.name for source in run.data.sources("train")),
        },
    )


def _close(ledger: Ledger, trial: Trial, row: Row, store: Store) -> None:
    found = trial.stage.find(store)
    clusters = [s.find(store) for s in stages.upstream([trial.stage]) if s.name == "clusters"]
    ledger.finish(
        trial.key,
        "KILLED" if row.status == "STOPPED" else row.status,
        found.info["evaluations"] if found else (),
        tags={"model": row.model, "error": row.error} if row.error else {"model": row.model},
        metrics=found.location / "metrics.jsonl" if found else None,
        cost=found.info["cost"] if found else None,
        files=[
            *(made.location / "clusters.json" for made in clusters if made),
            *([found.location / "masks.json"] if found else []),
        ],
        figures=sorted((found.location / "figures").glob("*.png"), key=str) if found else (),
    )


def _row(trial: Trial, store: Store, error: str | None) -> Row:
    found = trial.stage.find(store)
    if found:
        model = str(found.location / "model")
        return Row(trial.name, trial.point, "FINISHED", found.info["evaluations"], model)
    evaluations = _evaluations(store, trial)
    if error == STOPPED_EARLY:
        return Row(trial.name, trial.point, "STOPPED", evaluations, "")
    return Row(
        trial.name, trial.point, "FAILED" if error else "KILLED", evaluations, "", error or "interrupted"
    )


def _evaluations(store: Store, trial: Trial) -> list[dict[str, float]]:
    """What an unfinished trial measured so far."""
    from raymoe.tracking import metric_log, read_rows

    rows = read_rows(metric_log(store.checkpoints, trial.key))
    return [{"step": row["step"], **row["metrics"]} for row in rows if "eval/loss" in row["metrics"]]


def _print_plan(sweep: Sweep, trials: Sequence[Trial], store: Store, job: Job, options: Options) -> None:
    """The dry run: stages and trials, which are there already, and what the others will cost."""
    shared = stages.upstream(t.stage for t in trials)
    cost = _cost(trials, job)
    if options.json:
        print(to_json({**_plan(sweep, trials, shared, store), "cost": cost}))
        return
    print(f"{sweep.name}: {sweep.question}\n")
    for title, some in (("shared stages", shared), ("trials", [t.stage for t in trials])):
        print(f"{title}:")
        names = {t.key: t.name for t in trials}
        for stage in some:
            state = "in the store" if stage.find(store) else "to do"
            print(f"  {state:<13} {stage.key:<30} {names.get(stage.key, '')}")
    print(f"\n{len(trials)} trials, {len(shared)} shared stages; store: {store.root}")
    if isinstance(cost, str):
        print(f"memory, hours and money can't be told: {cost}")
        return
    from raymoe.plan import show_sweep

    show_sweep(cost)
    print("other GPUs, all settings: `raymoe plan`, with --sweep FILE of all trials")


def _cost(trials: Sequence[Trial], job: Job) -> dict[str, Any] | str:
    """The planner's words on the trials, with the GPUs of cluster.yaml, or why it has none."""
    from raymoe.plan import parsed, plan_sweep

    try:
        return plan_sweep(jobs_of(trials, job.execution), parsed({}, job))
    except InputError as error:
        return str(error)


def _plan(
    sweep: Sweep, trials: Sequence[Trial], shared: Sequence[stages.Stage], store: Store
) -> dict[str, Any]:
    """The dry run as plain values."""

    def state(stage: stages.Stage) -> dict[str, Any]:
        return {"key": stage.key, "in_store": stage.find(store) is not None}

    return {
        "sweep": sweep.name,
        "question": sweep.question,
        "store": str(store.root),
        "stages": [state(stage) for stage in shared],
        "trials": [{"trial": t.name, "params": dict(t.point), **state(t.stage)} for t in trials],
    }


def _print_result(sweep: Sweep, rows: Sequence[Row], options: Options) -> None:
    if options.json:
        print(rows_as_json(rows, sweep.metric, sweep.mode, sweep.average_over))
    else:
        print_table(sweep.name, sweep.question, rows, sweep.metric, sweep.mode, sweep.average_over)


def _yaml(config: Any) -> str:
    import yaml

    return yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False)


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
