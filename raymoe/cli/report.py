"""`raymoe report`: the tables of finished sweeps, from MLflow."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from raymoe.cli.command import Command
from raymoe.console import to_json

if TYPE_CHECKING:
    pass


def report(command: Command) -> int:
    """Print the tables of sweeps that MLflow holds."""
    from raymoe.report.table import averages, print_table
    from raymoe.tracking.results import read_sweeps

    sweeps = read_sweeps(command.options.get("sweep"))
    if command.json:
        parts: list[dict[str, Any]] = []
        for s in sweeps:
            parts.append({"sweep": s.name, "question": s.question, "rows": [row.as_json() for row in s.rows]})
            if s.average_over:
                made = averages(s.rows, s.average_over, "eval/loss", "min")
                parts[-1]["averages"] = [average.as_json() for average in made]
        print(to_json(parts))
        return 0
    for s in sweeps:
        print_table(s.name, s.question, s.rows, "eval/loss", "min", s.average_over)
    return 0
