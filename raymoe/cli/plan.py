"""What a run or a sweep will take, before it starts.

    raymoe plan my-run.yaml --gpu h100 --gpus 8 --mfu 0.4
    raymoe plan my-run.yaml --sweep sweeps/num_experts.py --gpus 4

Nothing is downloaded or written.
"""

from __future__ import annotations

from pathlib import Path

from raymoe.cli.command import Command
from raymoe.config import RunFile
from raymoe.console import to_json


def plan(command: Command) -> int:
    """Print the plan of a run, or of all trials of `--sweep`."""
    from raymoe.plan.options import parse_options
    from raymoe.plan.planner import plan, plan_sweep
    from raymoe.plan.show import show, show_sweep

    options = parse_options(command.options, command.run_file)
    if file := command.options.get("sweep"):
        sweep = plan_sweep(_trials(Path(file), command.run_file), options)
        print(to_json(sweep.as_json())) if command.json else show_sweep(sweep)
    else:
        run = plan(command.run_file, options)
        print(to_json(run.as_json())) if command.json else show(run)
    return 0


def _trials(file: Path, base: RunFile) -> dict[str, RunFile]:
    """Return each trial of a sweep file as a run of its own, by its name."""
    from raymoe.sweep.definition import load, run_files_of, trials_of

    return run_files_of(trials_of(load(file), base.run()), base.execution)
