"""Sweeps: many runs over one question, with Ray Tune; what they share is made once, before.

A sweep file holds a question, the points of its space and one function from a point to a complete run, and ends
with ``main(SWEEP)``. It is run as ``python sweeps/num_experts.py [config.yaml] [--key value ...]``, by
``ray job submit``, or as ``raymoe sweep sweeps/num_experts.py``.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from raymoe import stages
from raymoe.cluster.address import check as check_address
from raymoe.cluster.connection import check_storage
from raymoe.config import Execution, Run, RunFile
from raymoe.console import root_cause, say
from raymoe.report.table import print_table, rows_as_json
from raymoe.schema import InputError
from raymoe.storage.location import ray_storage
from raymoe.storage.store import Store, digest
from raymoe.sweep.definition import Sweep, SweepOptions, Trial, trials_of
from raymoe.sweep.dry_run import print_dry_run
from raymoe.tracking.results import TrialResult
from raymoe.train.spec import FAILURE, STOPPED_EARLY

if TYPE_CHECKING:
    from raymoe.tracking.ledger import Ledger


def execute(sweep: Sweep, job: RunFile, options: SweepOptions) -> int:
    """Run `sweep` from the configuration `job`; returns the exit code (1: a trial failed, 130: interrupted)."""
    store = Store(job.execution.storage)
    trials = trials_of(sweep, job.run())
    if options.dry_run:
        print_dry_run(sweep, trials, store, job, options)
        return 0
    check_storage(job.execution.storage)
    store.check_writable()
    rows = _run_all(sweep, trials, job, store, options)
    _print_result(sweep, rows, options)
    if any(row.status == "KILLED" for row in rows):
        say("interrupted; the same command goes on from here")
    return max((_EXIT_CODES[row.status] for row in rows), default=0)


_EXIT_CODES = {"FINISHED": 0, "STOPPED": 0, "FAILED": 1, "KILLED": 130}


def _run_all(
    sweep: Sweep, trials: Sequence[Trial], job: RunFile, store: Store, options: SweepOptions
) -> list[TrialResult]:
    from raymoe.tracking.ledger import Ledger

    finished = [trial.key for trial in trials if trial.stage.find(store)]
    todo = [trial for trial in trials if trial.key not in finished]
    say(f"{sweep.name}: {len(trials)} trials, {len(finished)} of them already in {store.root}")
    if todo:
        check_address(job.execution)
    stages.prepare([t.stage for t in todo], stages.Context(store, job.execution, say))
    ledger = Ledger("raymoe")
    identity = digest([sweep.name, sorted(t.key for t in trials)])
    tags = {"sweep": sweep.name}
    if sweep.average_over:
        tags["average_over"] = sweep.average_over
    name = f"{sweep.name}-{identity}"
    ledger.sweep(name, sweep.question, tags, _yaml(job))
    book = TrialBook(ledger, sweep, {trial.key: trial for trial in trials}, store, name)
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


class TrialBook:
    """What became of every trial, kept here and in MLflow as it happens."""

    def __init__(
        self, ledger: Ledger, sweep: Sweep, trials: Mapping[str, Trial], store: Store, name: str
    ) -> None:
        self.name = name
        self.trials, self.rows, self.artifacts = trials, dict[str, TrialResult](), dict[str, str | bytes]()
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


def _overall(rows: Iterable[TrialResult]) -> str:
    """The parent run's status: that of the trial that went worst."""
    statuses = {row.status for row in rows}
    return next((s for s in ("KILLED", "FAILED") if s in statuses), "FINISHED")


def _compute(
    sweep: Sweep,
    todo: Sequence[Trial],
    execution: Execution,
    store: Store,
    options: SweepOptions,
    book: TrialBook,
) -> None:
    """Make the shared stages, then train every trial in `todo`."""
    from raymoe.cluster.capacity import check_room, decided, trial_workers
    from raymoe.cluster.connection import check_shared, connected

    with connected(execution):
        check_shared(execution.storage)
        for size in {trial.run.optimization.batch_size for trial in todo}:
            check_room(trial_workers(execution, size))
        execution = decided(execution)
        context = stages.Context(store, execution, say)
        with _watched(todo, store, book):
            errors = make_shared_stages(todo, context)
            for key, error in errors.items():
                book.ended(key, error)
            if able := [t for t in todo if t.key not in errors]:
                _tune(sweep, able, execution, store, options, book)


@contextmanager
def _watched(todo: Sequence[Trial], store: Store, book: TrialBook) -> Iterator[None]:
    """Keep the timeline of nodes and trials in the store, and give it to MLflow in the end."""
    from raymoe.cluster.watch import Watch

    def left() -> int:
        return sum(trial.key not in book.rows for trial in todo)

    watch = Watch(store.root / "sweeps" / book.name, left, len(todo), say)
    try:
        with watch:
            yield
    finally:
        book.artifacts |= watch.artifacts


def make_shared_stages(todo: Sequence[Trial], context: stages.Context) -> dict[str, str]:
    """Make what the trials need, each stage once; returns the error of every trial that can't be trained.

    A stage that fails fails only the trials that need it.
    """
    failed: dict[str, str] = {}
    for stage in stages.upstream(t.stage for t in todo):
        error = next((failed[need.key] for need in stage.needs if need.key in failed), None)
        if error is None and (error := _made(stage, context)) is not None:
            say(f"{stage.key}: failed: {error}")
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
    sweep: Sweep,
    todo: Sequence[Trial],
    execution: Execution,
    store: Store,
    options: SweepOptions,
    book: TrialBook,
) -> None:
    from ray import tune

    from raymoe.cluster.capacity import concurrent_trials, trial_driver_resources, trial_workers
    from raymoe.sweep.progress import TuneProgress, cooperative_asha

    workers = trial_workers(execution, min(t.run.optimization.batch_size for t in todo))
    payload = {t.key: t.run.model_dump(mode="json") for t in todo}
    trainable = tune.with_resources(
        tune.with_parameters(
            train_trial, payload=payload, execution=execution.model_dump(), root=str(store.root)
        ),
        trial_driver_resources(),
    )
    scheduler = cooperative_asha(store.checkpoints) if options.asha else None
    progress = TuneProgress({t.key: t.name for t in todo}, sweep.metric, store, say, book.started, book.ended)
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
    from raymoe.tracking.metric_log import metric_log

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


def _close(ledger: Ledger, trial: Trial, row: TrialResult, store: Store) -> None:
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


def _row(trial: Trial, store: Store, error: str | None) -> TrialResult:
    found = trial.stage.find(store)
    if found:
        model = str(found.location / "model")
        return TrialResult(trial.name, trial.point, "FINISHED", found.info["evaluations"], model)
    evaluations = _evaluations(store, trial)
    if error == STOPPED_EARLY:
        return TrialResult(trial.name, trial.point, "STOPPED", evaluations, "")
    return TrialResult(
        trial.name, trial.point, "FAILED" if error else "KILLED", evaluations, "", error or "interrupted"
    )


def _evaluations(store: Store, trial: Trial) -> list[dict[str, float]]:
    """What an unfinished trial measured so far."""
    from raymoe.tracking.metric_log import metric_log, read_rows

    rows = read_rows(metric_log(store.checkpoints, trial.key))
    return [{"step": row["step"], **row["metrics"]} for row in rows if "eval/loss" in row["metrics"]]


def _print_result(sweep: Sweep, rows: Sequence[TrialResult], options: SweepOptions) -> None:
    if options.json:
        print(rows_as_json(rows, sweep.metric, sweep.mode, sweep.average_over))
    else:
        print_table(sweep.name, sweep.question, rows, sweep.metric, sweep.mode, sweep.average_over)


def _yaml(config: Any) -> str:
    import yaml

    return yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False)
