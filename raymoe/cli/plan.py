"""`raymoe plan`: what a run or a sweep will take, before it starts."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from raymoe.cli.command import Command
from raymoe.config import RunFile
from raymoe.console import to_json

if TYPE_CHECKING:
    pass


def plan(command: Command) -> int:
    """Print the plan of a run, or of all trials of `--sweep`."""
    from raymoe.plan.cost import parsed, plan, plan_sweep
    from raymoe.plan.show import show, show_sweep

    options, file = parsed(command.options, command.job), command.options.get("sweep")
    made = plan_sweep(_trial_jobs(file, command.job), options) if file else plan(command.job, options)
    if command.json:
        print(to_json(made))
    else:
        (show_sweep if file else show)(made)
    return 0


def _trial_jobs(file: str, job: RunFile) -> dict[str, RunFile]:
    """The runs of a sweep file, by the names of its trials."""
    from raymoe.sweep.definition import load, run_files_of, trials_of

    return run_files_of(trials_of(load(Path(file)), job.run()), job.execution)
