"""Sweeps: many runs over one question, with Ray Tune; what they share is made once, before.

A sweep file holds a question, the points of its space and one function from a point to a complete run, and ends
with ``main(SWEEP)``. It is run as ``python sweeps/num_experts.py [config.yaml] [--key value ...]``, by
``ray job submit``, or as ``raymoe sweep sweeps/num_experts.py``.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from raymoe import stages
from raymoe.cluster.address import check as check_address
from raymoe.cluster.connection import check_storage
from raymoe.config import Execution, Run, RunFile
from raymoe.console import counted, root_cause, say
from raymoe.report.table import print_table, rows_as_json
from raymoe.schema import InputError
from raymoe.storage.location import ray_storage
from raymoe.storage.store import Store, digest
from raymoe.sweep.definition import Sweep, SweepOptions, Trial, trials_of
from raymoe.sweep.dry_run import print_dry_run
from raymoe.tracking.results import TrialResult
from raymoe.train.spec import FAILURE, STOPPED_EARLY

if TYPE_CHECKING:
    from ray.tune import Tuner

    from raymoe.sweep.book import TrialBook
    from raymoe.sweep.progress import TuneProgress


def execute(sweep: Sweep, run_file: RunFile, options: SweepOptions) -> int:
    """Run `sweep` from the configuration `run_file`.

    Returns:
        The exit code: 1 if a trial failed, 130 if it was interrupted, else 0.
    """
    store = Store(run_file.execution.storage)
    trials = trials_of(sweep, run_file.run())
    if options.dry_run:
        print_dry_run(sweep, trials, store, run_file, options)
        return 0
    check_storage(run_file.execution.storage)
    store.check_writable()
    results = _run_all(sweep, trials, run_file, store, options)
    _print_result(sweep, results, options)
    if any(each.status == "KILLED" for each in results):
        say("interrupted; the same command goes on from here")
    return max((_EXIT_CODES[each.status] for each in results), default=0)


_EXIT_CODES = {"FINISHED": 0, "STOPPED": 0, "FAILED": 1, "KILLED": 130}


def _run_all(
    sweep: Sweep, trials: Sequence[Trial], run_file: RunFile, store: Store, options: SweepOptions
) -> list[TrialResult]:
    finished = [trial.key for trial in trials if trial.stage.find(store)]
    todo = [trial for trial in trials if trial.key not in finished]
    say(f"{sweep.name}: {counted(len(trials), 'trial')}, {len(finished)} of them already in {store.root}")
    if todo:
        check_address(run_file.execution)
    stages.prepare([t.stage for t in todo], stages.Context(store, run_file.execution, say))
    book = _opened(sweep, trials, run_file, store)
    try:
        for key in finished:
            book.ended(key, None)
        if todo:
            _compute(sweep, todo, run_file.execution, store, options, book)
    finally:
        book.close()
    return [book.results[trial.key] for trial in trials]


def _opened(sweep: Sweep, trials: Sequence[Trial], run_file: RunFile, store: Store) -> TrialBook:
    """Open the sweep's run in MLflow, which the same sweep over the same trials finds again."""
    from raymoe.sweep.book import TrialBook, as_yaml
    from raymoe.tracking.ledger import Ledger

    metric, mode = sweep.ranking()
    tags = {"sweep": sweep.name, "metric": metric, "mode": mode}
    if sweep.average_over:
        tags["average_over"] = sweep.average_over
    name = f"{sweep.name}-{digest([sweep.name, sorted(t.key for t in trials)])}"
    ledger = Ledger("raymoe")
    ledger.sweep(name, sweep.question, tags, as_yaml(run_file))
    return TrialBook(ledger, sweep, {trial.key: trial for trial in trials}, store, name)


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
        return sum(trial.key not in book.results for trial in todo)

    watch = Watch(store.root / "sweeps" / book.name, left, len(todo), say)
    try:
        with watch:
            yield
    finally:
        book.artifacts |= watch.artifacts


def make_shared_stages(todo: Sequence[Trial], context: stages.Context) -> dict[str, str]:
    """Make what the trials need, each stage once; return the error of every trial that can't be trained.

    A stage that fails fails only the trials that need it.
    """
    failed: dict[str, str] = {}
    for stage in stages.upstream(t.stage for t in todo):
        error = next((failed[need.key] for need in stage.needs if need.key in failed), None)
        if error is None and (error := _error_of_making(stage, context)) is not None:
            say(f"{stage.key}: failed: {error}")
        if error is not None:
            failed[stage.key] = error
    return {t.key: failed[need.key] for t in todo for need in t.stage.needs if need.key in failed}


def _error_of_making(stage: stages.Stage, context: stages.Context) -> str | None:
    """Make a stage whose needs are there; return what went wrong, on one line, or None."""
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
    """Train every trial in `todo`, whose shared stages are there."""
    from raymoe.sweep.progress import TuneProgress

    names = {trial.key: trial.name for trial in todo}
    progress = TuneProgress(names, sweep.metric, store, say, book.started, book.ended)
    tuner = _tuner(sweep, todo, execution, store, options, progress)
    # A trial's error is told in one line; Tune writes the whole of it into the trial's folder.
    logging.getLogger("ray.tune.execution.tune_controller").setLevel(logging.CRITICAL)
    with progress:
        tuner.fit()


def _tuner(
    sweep: Sweep,
    todo: Sequence[Trial],
    execution: Execution,
    store: Store,
    options: SweepOptions,
    progress: TuneProgress,
) -> Tuner:
    from ray import tune

    from raymoe.cluster.capacity import concurrent_trials, trial_driver_resources, trial_workers
    from raymoe.sweep.progress import cooperative_asha

    metric, mode = sweep.ranking()
    workers = trial_workers(execution, min(t.run.optimization.batch_size for t in todo))
    payload = {t.key: t.run.model_dump(mode="json") for t in todo}
    trainable = tune.with_parameters(
        train_trial, payload=payload, execution=execution.model_dump(), root=str(store.root)
    )
    return tune.Tuner(
        tune.with_resources(trainable, trial_driver_resources()),
        param_space={"key": tune.grid_search([t.key for t in todo])},
        tune_config=tune.TuneConfig(
            metric=metric,
            mode=mode,
            max_concurrent_trials=concurrent_trials(execution, workers),
            scheduler=cooperative_asha(store.checkpoints) if options.asha else None,
        ),
        run_config=tune.RunConfig(
            name=f"{sweep.name}-{time.strftime('%Y%m%d-%H%M%S')}",
            **ray_storage(store.root / "tune"),
            failure_config=tune.FailureConfig(max_failures=execution.max_failures),
            callbacks=[progress],
            verbose=0,
        ),
    )


def train_trial(
    config: Mapping[str, Any], payload: Mapping[str, Any], execution: Mapping[str, Any], root: str
) -> dict[str, str]:
    """Train the run under `config["key"]` as a Tune trial, or find it finished.

    Returns:
        Why it failed, if it did. What is raised is tried again, as is right for processes and nodes that died.
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


def _print_result(sweep: Sweep, results: Sequence[TrialResult], options: SweepOptions) -> None:
    metric, mode = sweep.ranking()
    if options.json:
        print(rows_as_json(results, metric, mode, sweep.average_over))
    else:
        print_table(sweep.name, sweep.question, results, metric, mode, sweep.average_over)
