"""Output for people: lines on stderr, tables and JSON on stdout, the reason of a failure."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.console import Console


def say(text: str) -> None:
    """Tell the user on stderr; stdout is for results."""
    print(text, file=sys.stderr, flush=True)


def counted(number: float, noun: str) -> str:
    """Return `1 trial`, `2 trials`."""
    return f"{number:g} {noun}" + ("" if number == 1 else "s")


def print_rows(title: str, rows: Sequence[Mapping[str, Any]]) -> None:
    """Print plain rows as a table, columns as in the first row."""
    from rich.table import Table

    table = Table(title=title, title_justify="left")
    for column in rows[0]:
        table.add_column(column, justify="right" if isinstance(rows[0][column], int | float) else "left")
    for row in rows:
        table.add_row(*(format_number(v) if isinstance(v, float) else str(v) for v in row.values()))
    terminal().print(table)


def terminal() -> Console:
    """Return a console for plain text; in a job's log it is so wide that nothing is cut."""
    from rich.console import Console

    return Console(width=None if sys.stdout.isatty() else 10_000, markup=False, highlight=False)


def to_json(value: Any) -> str:
    """Return plain values as JSON; NaN and infinities, which JSON has no numbers for, become null."""
    return json.dumps(_without_nan(value), indent=1, allow_nan=False)


def _without_nan(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _without_nan(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [_without_nan(each) for each in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def format_number(value: float | None) -> str:
    """Format with four decimals below 100, else with one; None as nothing."""
    return "" if value is None else f"{value:.4f}" if abs(value) < 100 else f"{value:.1f}"


def root_cause(error: BaseException | None) -> str:
    """Return the innermost cause of a failure that Ray wrapped, on one line."""
    if error is None:
        return "unknown error"
    seen: BaseException = error
    while True:
        inner = getattr(seen, "cause", None) or seen.__cause__ or _of_workers(seen)
        if not isinstance(inner, BaseException) or inner is seen:
            break
        seen = inner
    lines = [line for line in str(seen).splitlines() if line.strip()]
    return f"{type(seen).__name__}: {lines[0].strip() if lines else ''}"[:500]


def _of_workers(error: BaseException) -> BaseException | None:
    """Return the first worker's exception of a Ray Train failure."""
    failures = getattr(error, "worker_failures", None)
    return next(iter(failures.values())) if failures else None
