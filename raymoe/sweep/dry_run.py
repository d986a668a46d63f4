"""What a sweep would do and cost; nothing is computed or written."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from raymoe import stages
from raymoe.config import RunFile
from raymoe.console import to_json
from raymoe.schema import InputError
from raymoe.storage.store import Store
from raymoe.sweep.definition import Sweep, SweepOptions, Trial, jobs_of

if TYPE_CHECKING:
    from raymoe.plan.planner import SweepPlan


def print_dry_run(
    sweep: Sweep, trials: Sequence[Trial], store: Store, job: RunFile, options: SweepOptions
) -> None:
    """The dry run: stages and trials, which are there already, and what the others will cost."""
    shared = stages.upstream(t.stage for t in trials)
    cost = _cost(trials, job)
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
    print(f"\n{len(trials)} trials, {len(shared)} shared stages; store: {store.root}")
    if isinstance(cost, str):
        print(f"memory, hours and money can't be told: {cost}")
        return
    from raymoe.plan.show import show_sweep

    show_sweep(cost)
    print("other GPUs, all settings: `raymoe plan`, with --sweep FILE of all trials")


def _cost(trials: Sequence[Trial], job: RunFile) -> SweepPlan | str:
    """The planner's words on the trials, with the GPUs of cluster.yaml, or why it has none."""
    from raymoe.plan.options import parse_options
    from raymoe.plan.planner import plan_sweep

    try:
        return plan_sweep(jobs_of(trials, job.execution), parse_options({}, job))
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
