"""Dry runs: what a sweep would do and cost; nothing is computed or written."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from raymoe import stages
from raymoe.config import RunFile
from raymoe.console import counted, to_json
from raymoe.schema import InputError
from raymoe.storage.store import Store
from raymoe.sweep.definition import Sweep, SweepOptions, Trial, run_files_of

if TYPE_CHECKING:
    from raymoe.plan.plans import SweepPlan


def print_dry_run(
    sweep: Sweep, trials: Sequence[Trial], store: Store, run_file: RunFile, options: SweepOptions
) -> None:
    """Print stages and trials, which of them are there already, and what the trials will cost."""
    shared = stages.upstream(t.stage for t in trials)
    cost = _cost(trials, run_file)
    if options.json:
        told = cost if isinstance(cost, str) else cost.as_json()
        print(to_json({**_plan(sweep, trials, shared, store), "cost": told}))
        return
    print(f"{sweep.name}: {sweep.question}\n")
    for title, some in (("shared stages", shared), ("trials", [t.stage for t in trials])):
        print(f"{title}:")
        names = {t.key: t.name for t in trials}
        for stage in some:
            state = "in the store" if stage.find(store) else "to do"
            print(f"  {state:<13} {stage.key:<30} {names.get(stage.key, '')}")
    trials_and_stages = f"{counted(len(trials), 'trial')}, {counted(len(shared), 'shared stage')}"
    print(f"\n{trials_and_stages}; store: {store.root}")
    if isinstance(cost, str):
        print(f"memory, hours and money can't be told: {cost}")
        return
    from raymoe.plan.show import show_sweep

    show_sweep(cost)
    print("other GPUs, all settings: `raymoe plan`, with --sweep FILE of all trials")


def _cost(trials: Sequence[Trial], run_file: RunFile) -> SweepPlan | str:
    """Return what the planner says of the trials on the GPUs of cluster.yaml, or why it can't say anything."""
    from raymoe.plan.options import parse_options
    from raymoe.plan.planner import plan_sweep

    try:
        return plan_sweep(run_files_of(trials, run_file.execution), parse_options({}, run_file))
    except InputError as error:
        return str(error)


def _plan(
    sweep: Sweep, trials: Sequence[Trial], shared: Sequence[stages.Stage], store: Store
) -> dict[str, Any]:
    """Return stages and trials as plain values."""

    def state(stage: stages.Stage) -> dict[str, Any]:
        return {"key": stage.key, "in_store": stage.find(store) is not None}

    return {
        "sweep": sweep.name,
        "question": sweep.question,
        "store": str(store.root),
        "stages": [state(stage) for stage in shared],
        "trials": [{"trial": t.name, "params": dict(t.point), **state(t.stage)} for t in trials],
    }
