"""Results as a table: of a sweep that just ended, or read back from MLflow."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from raymoe.console import format_number, terminal, to_json
from raymoe.metrics import STRUCTURE
from raymoe.tracking.results import TrialResult

if TYPE_CHECKING:
    from rich.table import Table

SHOWN = ("eval/loss", "eval/perplexity", "eval/math/exact_match")
"""Metrics with a column of their own; losses per domain follow."""


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


def averages(rows: Sequence[TrialResult], over: str, metric: str, mode: str) -> list[Average]:
    """One average for every point of the sweep without its parameter `over`, best first.

    Without any if no trial has that parameter.
    """
    groups: dict[frozenset[tuple[str, str]], list[TrialResult]] = {}
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


def _average(rows: Sequence[TrialResult], over: str) -> Average:
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
    rows: Sequence[TrialResult],
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
            format_number(row.best(metric, mode)),
            row.status,
        ]
        for row in ordered
    ]
    console = terminal()
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


def rows_as_json(
    rows: Sequence[TrialResult], metric: str = "eval/loss", mode: str = "min", average_over: str | None = None
) -> str:
    """The rows as a JSON list; with `average_over` an object of `rows` and `averages`."""
    plain = [row.as_json() for row in rows]
    if not average_over:
        return to_json(plain)
    return to_json(
        {"rows": plain, "averages": [a.as_json() for a in averages(rows, average_over, metric, mode)]}
    )


def _columns(rows: Sequence[TrialResult], metric: str) -> list[str]:
    present = dict.fromkeys(k for row in rows for e in row.evaluations for k in e)
    losses = [k for k in present if k.startswith("eval/") and k.endswith("/loss")]
    return [c for c in dict.fromkeys([metric, *SHOWN, *losses, *STRUCTURE]) if c in present]


def _title(metric: str) -> str:
    return STRUCTURE.get(metric, metric.removeprefix("eval/"))


def _or(value: float | None, default: float) -> float:
    return default if value is None or value != value else value  # nan has no place in an order


def _shown(metric: str, value: float | None) -> str:
    """A metric's value; numbers of parameters as `1.24M`, bytes as `1.24GB`."""
    if value is None or not metric.startswith(("model/", "system/")) or not math.isfinite(value):
        return format_number(value)
    power = next((i for i in range(4) if abs(value) < 999.5 * 1000**i), 4)
    units = ("B", "kB", "MB", "GB", "TB") if metric.endswith("_bytes") else ("", "K", "M", "B", "T")
    return f"{value / 1000**power:.3g}{units[power]}"
