"""`raymoe sweep FILE`, `raymoe train`, and sweep files run by Python."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from raymoe.cli.command import Command, guarded, option_lines, parse
from raymoe.cli.options import help_text

if TYPE_CHECKING:
    from raymoe.sweep.definition import Sweep


def run_sweep(sweep: Sweep, arguments: Sequence[str]) -> int:
    """Entry point of a sweep file: `python sweeps/x.py [config.yaml] [--key value ...]`."""
    return guarded(lambda: execute_sweep(sweep, list(arguments), Path(sys.argv[0])))


def sweep_file(arguments: list[str]) -> int:
    """`raymoe sweep FILE ...`."""
    if not arguments or arguments[0] in ("--help", "-h"):
        print("raymoe sweep sweeps/<file>.py [config.yaml] [--key value ...]\n")
        print(
            "Run every trial of a sweep; what they share is made once, what is in the store is not made again.\n"
        )
        print(f"{option_lines(SWEEP_OPTIONS)}\n{help_text()}")
        return 0
    from raymoe.sweep.definition import load as load_sweep

    return execute_sweep(load_sweep(Path(arguments[0])), arguments[1:], Path(arguments[0]))


SWEEP_OPTIONS = {
    "asha": "stop trials early that do worse than others at the same step",
    "submit": "run as a job of the Ray cluster whose dashboard is at --execution.address, and follow its log",
}


def execute_sweep(sweep: Sweep, arguments: list[str], file: Path) -> int:
    """Run or submit `sweep` as the command line asks; returns the exit code."""
    if "--help" in arguments or "-h" in arguments:
        print(f"{sweep.name}: {sweep.question}\n\n{option_lines(SWEEP_OPTIONS)}\n{help_text()}")
        return 0
    from raymoe.sweep.definition import SweepOptions
    from raymoe.sweep.run import execute

    command = parse(list(arguments), SWEEP_OPTIONS)
    if command.options.get("submit"):
        from raymoe.sweep.submit import submit

        return submit(sweep, file, arguments, command.job, command.dry_run)
    asha = bool(command.options.get("asha"))
    return execute(sweep, command.job, SweepOptions(command.dry_run, command.json, asha))


def train(command: Command) -> int:
    """A sweep of one run."""
    from raymoe.sweep.definition import Sweep, SweepOptions
    from raymoe.sweep.run import execute

    method = command.job.method
    point = {
        "method": method.name,
        **({"num_experts": method.num_experts} if hasattr(method, "num_experts") else {}),
    }
    sweep = Sweep("train", "one run", [point], lambda base, _: base)
    return execute(sweep, command.job, SweepOptions(command.dry_run, command.json))


def main(sweep: Sweep) -> None:
    """Entry point of a sweep file: command line, run, exit code."""
    sys.exit(run_sweep(sweep, sys.argv[1:]))
