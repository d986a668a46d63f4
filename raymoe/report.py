"""Results as a table: of a sweep that just ended, or read back from MLflow."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

SHOWN = ("eval/loss", "eval/perplexity", "eval/math/exact_match")
"""Metrics with a column of their own; losses per domain follow."""
STRUCTURE = {
    "masks/sparsity": "sparsity",
    "masks/overlap": "overlap",
    "model/active_parameters": "active parameters",
    "system/peak_memory_bytes": "peak memory",
}
"""What evaluations say about the model itself, and the titles of these last columns."""


@dataclass(frozen=True)
class Row:
    """One trial of a sweep: swept values, state, its evaluations in the order of training."""

    name: str
    point: Mapping[str, Any]
    status: str
    evaluations: Sequence[Mapping[str, float]] = field(default_factory=list)
    model: str = ""
    error: str = ""

    def final(self, metric: str) -> float | None:
        """The metric at the end of training."""
        return self.evaluations[-1].get(metric) if self.evaluations else None

    def best(self, metric: str, mode: str) -> float | None:
        """The metric's best value over the milestones."""
        values = [e[metric] for e in self.evaluations if metric in e]
        return (min if mode == "min" else max)(values, default=None)

    def as_json(self) -> dict[str, Any]:
        """Plain values for `--json`."""
        return {
            "trial": self.name,
            "params": dict(self.point),
            "status": self.status,
            "evaluations": [dict(e) for e in self.evaluations],
            "model": self.model,
            "error": self.error,
        }


@dataclass(frozen=True)
class Statistic:
    """Mean and sample standard deviation (n - 1) of one metric; of a single value there is no deviation."""

    mean: float
    std: float | None
    n: int

    @classmethod
    def of(cls, values: Sequence[float]) -> Statistic:
        """Of at least one value; infinities, which `statistics` refuses, make it infinite or nan."""
        n, mean = len(values), sum(values) / len(values)
        squares = sum((value - mean) * (value - mean) for value in values)
        return cls(mean, math.sqrt(squares / (n - 1)) if n > 1 else None, n)

    def shown(self, metric: str) -> str:
        """`1.2345 ± 0.0012`."""
        return _shown(metric, self.mean) + (f" ± {_shown(metric, self.std)}" if self.std is not None else "")


@dataclass(frozen=True)
class Average:
    """The trials that differ in one swept parameter alone, as one: statistics of their final metrics."""

    point: Mapping[str, Any]
    n: int
    """Finished trials, which these are the statistics of."""
    left_out: int
    """Trials without a final result."""
    final: Mapping[str, Statistic]

    def as_json(self) -> dict[str, Any]:
        """Plain values for `--json`."""
        final = {name: asdict(statistic) for name, statistic in self.final.items()}
        return {"params": dict(self.point), "n": self.n, "left_out": self.left_out, "final": final}


def averages(rows: Sequence[Row], over: str, metric: str, mode: str) -> list[Average]:
    """One average for every point of the sweep without its parameter `over`, best first.

    Without any if no trial has that parameter.
    """
    groups: dict[frozenset[tuple[str, str]], list[Row]] = {}
    for row in rows if any(over in row.point for row in rows) else ():
        point = frozenset((key, str(value)) for key, value in _without(row.point, over).items())
        groups.setdefault(point, []).append(row)
    made = [_average(group, over) for group in groups.values()]
    worst = float("inf") if mode == "min" else float("-inf")
    return sorted(
        made,
        key=lambda a: _or(a.final[metric].mean if metric in a.final else None, worst),
        reverse=mode == "max",
    )


def _average(rows: Sequence[Row], over: str) -> Average:
    ended = [row for row in rows if row.status == "FINISHED" and row.evaluations]
    names = dict.fromkeys(name for row in ended for name in row.evaluations[-1] if name != "step")
    values = {name: [v for row in ended if (v := row.final(name)) is not None] for name in names}
    statistics = {name: Statistic.of(each) for name, each in values.items()}
    return Average(_without(rows[0].point, over), len(ended), len(rows) - len(ended), statistics)


def _without(point: Mapping[str, Any], name: str) -> dict[str, Any]:
    return {key: value for key, value in point.items() if key != name}


def print_table(
    name: str,
    question: str,
    rows: Sequence[Row],
    metric: str,
    mode: str,
    average_over: str | None = None,
) -> None:
    """Print the rows, best first, with the columns that any of them has.

    With `average_over`, a swept parameter, a second table has mean and standard deviation over it.
    """
    worst = float("inf") if mode == "min" else float("-inf")
    ordered = sorted(rows, key=lambda r: _or(r.final(metric), worst), reverse=mode == "max")
    params = _params(row.point for row in rows)
    columns = _columns(rows, metric)
    titles = ["trial", *params, *map(_title, columns), f"best {metric[5:]}", "status"]
    cells = [
        [
            row.name,
            *(str(row.point.get(p, "")) for p in params),
            *(_shown(c, row.final(c)) for c in columns),
            _format(row.best(metric, mode)),
            row.status,
        ]
        for row in ordered
    ]
    console = _console()
    console.print(_table(f"{name}: {question}", titles, cells, left=("trial", "status")))
    for row in ordered:
        if row.error:
            console.print(f"{row.name}: {row.status}: {row.error}")
    if average_over and (made := averages(rows, average_over, metric, mode)):
        console.print(_table_of_averages(made, average_over, columns))


def _table_of_averages(made: Sequence[Average], over: str, columns: Sequence[str]) -> Table:
    params = _params(average.point for average in made)
    cells = [
        [
            *(str(average.point.get(p, "")) for p in params),
            *(average.final[c].shown(c) if c in average.final else "" for c in columns),
            str(average.n),
            str(average.left_out),
        ]
        for average in made
    ]
    titles = [*params, *map(_title, columns), "n", "left out"]
    return _table(f"mean ± standard deviation over {over}", titles, cells, left=params[:1])


def _params(points: Iterable[Mapping[str, Any]]) -> list[str]:
    return list(dict.fromkeys(p for point in points for p in point))


def _table(title: str, titles: Sequence[str], cells: Sequence[Sequence[str]], left: Sequence[str]) -> Table:
    from rich.table import Table

    table = Table(title=title, title_justify="left")
    for column in titles:
        table.add_column(column, justify="left" if column in left else "right")
    for row in cells:
        table.add_row(*row)
    return table


def print_rows(title: str, rows: Sequence[Mapping[str, Any]]) -> None:
    """Print plain rows as a table, columns as in the first row."""
    from rich.table import Table

    table = Table(title=title, title_justify="left")
    for column in rows[0]:
        table.add_column(column, justify="right" if isinstance(rows[0][column], int | float) else "left")
    for row in rows:
        table.add_row(*(_format(v) if isinstance(v, float) else str(v) for v in row.values()))
    _console().print(table)


def _console() -> Console:
    """Plain text; in a job's log as wide as it gets, so that nothing is cut."""
    from rich.console import Console

    return Console(width=None if sys.stdout.isatty() else 10_000, markup=False, highlight=False)


def rows_as_json(
    rows: Sequence[Row], metric: str = "eval/loss", mode: str = "min", average_over: str | None = None
) -> str:
    """The rows as a JSON list; with `average_over` an object of `rows` and `averages`."""
    plain = [row.as_json() for row in rows]
    if not average_over:
        return to_json(plain)
    return to_json(
        {"rows": plain, "averages": [a.as_json() for a in averages(rows, average_over, metric, mode)]}
    )


def to_json(value: Any) -> str:
    """Plain values as JSON; NaN and infinities, which JSON has no numbers for, are null."""
    return json.dumps(_without_nan(value), indent=1, allow_nan=False)


def _without_nan(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _without_nan(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [_without_nan(each) for each in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _columns(rows: Sequence[Row], metric: str) -> list[str]:
    present = dict.fromkeys(k for row in rows for e in row.evaluations for k in e)
    losses = [k for k in present if k.startswith("eval/") and k.endswith("/loss")]
    return [c for c in dict.fromkeys([metric, *SHOWN, *losses, *STRUCTURE]) if c in present]


def _title(metric: str) -> str:
    return STRUCTURE.get(metric, metric.removeprefix("eval/"))


def _or(value: float | None, default: float) -> float:
    return default if value is None or value != value else value  # nan has no place in an order


def _format(value: float | None) -> str:
    return "" if value is None else f"{value:.4f}" if abs(value) < 100 else f"{value:.1f}"


def _shown(metric: str, value: float | None) -> str:
    """A metric's value; numbers of parameters as `1.24M`, bytes as `1.24GB`."""
    if value is None or not metric.startswith(("model/", "system/")) or not math.isfinite(value):
        return _format(value)
    power = next((i for i in range(4) if abs(value) < 999.5 * 1000**i), 4)
    units = ("B", "kB", "MB", "GB", "TB") if metric.endswith("_bytes") else ("", "K", "M", "B", "T")
    return f"{value / 1000**power:.3g}{units[power]}"


def root_cause(error: BaseException | None) -> str:
    """The innermost cause of a failure that Ray wrapped, on one line."""
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
    """The first worker's exception of a Ray Train failure."""
    failures = getattr(error, "worker_failures", None)
    return next(iter(failures.values())) if failures else None
