"""`raymoe sweep` and `raymoe train`, a sweep of one run; sweep files that Python runs.

    raymoe sweep sweeps/num_experts.py [config.yaml] [--key value ...] [--asha] [--submit]
    python sweeps/num_experts.py [config.yaml] [--key value ...]
    raymoe train my-run.yaml

With `--dry-run` they say what there is to do and what it will take.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from raymoe.cli.command import Command, guarded, parse, verb_help

if TYPE_CHECKING:
    from raymoe.sweep.definition import Sweep

SWEEP_OPTIONS = {
    "asha": "Stop trials early that do worse than others at the same step.",
    "submit": "Run as a job of the Ray cluster whose dashboard is at --execution.address, and follow its log.",
}


def main(sweep: Sweep) -> None:
    """Entry point of a sweep file: read the command line, run the sweep, exit with its code."""
    sys.exit(run_sweep(sweep, sys.argv[1:]))


def run_sweep(sweep: Sweep, arguments: Sequence[str]) -> int:
    """Run `sweep` as `python sweeps/x.py ARGUMENTS` does and return the exit code."""
    return guarded(lambda: execute_sweep(sweep, list(arguments), Path(sys.argv[0])))


def sweep_file(arguments: list[str]) -> int:
    """Run `raymoe sweep FILE ...` and return the exit code."""
    if not arguments or arguments[0] in ("--help", "-h"):
        about = "Run every trial of a sweep. What trials share is made once; what is in the store is not made again."
        print(verb_help("raymoe sweep sweeps/FILE.py", about, SWEEP_OPTIONS, arguments))
        return 0
    from raymoe.sweep.definition import load

    file = Path(arguments[0])
    return execute_sweep(load(file), arguments[1:], file)


def execute_sweep(sweep: Sweep, arguments: list[str], file: Path) -> int:
    """Run or submit the sweep of `file` as the command line asks and return the exit code."""
    if "--help" in arguments or "-h" in arguments:
        print(verb_help(f"raymoe sweep {file}", f"{sweep.name}: {sweep.question}", SWEEP_OPTIONS, arguments))
        return 0
    from raymoe.sweep.definition import SweepOptions
    from raymoe.sweep.run import execute

    command = parse(list(arguments), SWEEP_OPTIONS)
    if command.options.get("submit"):
        from raymoe.sweep.submit import submit

        return submit(sweep, file, arguments, command.run_file, command.dry_run)
    asha = bool(command.options.get("asha"))
    return execute(sweep, command.run_file, SweepOptions(command.dry_run, command.json, asha))


def train(command: Command) -> int:
    """Train one run: a sweep with one trial, named by its method."""
    from raymoe.sweep.definition import Sweep, SweepOptions
    from raymoe.sweep.run import execute

    method = command.run_file.method
    point = {"method": method.name}
    if (num_experts := getattr(method, "num_experts", None)) is not None:
        point["num_experts"] = num_experts
    sweep = Sweep("train", "one run", [point], lambda base, _: base)
    return execute(sweep, command.run_file, SweepOptions(command.dry_run, command.json))
