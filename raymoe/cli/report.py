"""`raymoe report`: the tables of finished sweeps, from MLflow, each ranked as its sweep asks for."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from raymoe.cli.command import Command
from raymoe.console import to_json

if TYPE_CHECKING:
    from raymoe.tracking.results import SweepResult


def report(command: Command) -> int:
    """Print the tables of sweeps that MLflow holds."""
    from raymoe.report.table import print_table
    from raymoe.tracking.results import read_sweeps

    sweeps = read_sweeps(command.options.get("sweep"))
    if command.json:
        print(to_json([_as_json(sweep) for sweep in sweeps]))
        return 0
    for s in sweeps:
        print_table(s.name, s.question, s.rows, s.metric, s.mode, s.average_over)
    return 0


def _as_json(sweep: SweepResult) -> dict[str, Any]:
    from raymoe.report.table import averages

    part = {
        "sweep": sweep.name,
        "question": sweep.question,
        "metric": sweep.metric,
        "mode": sweep.mode,
        "rows": [row.as_json() for row in sweep.rows],
    }
    if sweep.average_over:
        made = averages(sweep.rows, sweep.average_over, sweep.metric, sweep.mode)
        part["averages"] = [average.as_json() for average in made]
    return part
