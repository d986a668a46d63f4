"""Results as a table, of a sweep that just ended or read back from MLflow.

Columns, their order, titles and units are those of the table of metrics (raymoe/metrics.py).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from raymoe.console import format_number, terminal, to_json
from raymoe.metrics import METRICS, find, title
from raymoe.tracking.results import TrialResult

if TYPE_CHECKING:
    from rich.table import Table


@dataclass(frozen=True)
class Statistic:
    """Mean and sample standard deviation (n - 1) of one metric; a single value has no deviation."""

    mean: float
    std: float | None
    n: int

    @classmethod
    def of(cls, values: Sequence[float]) -> Statistic:
        """Return the statistic of at least one value; infinities, which `statistics` refuses, make it inf or nan."""
        n, mean = len(values), sum(values) / len(values)
        squares = sum((value - mean) * (value - mean) for value in values)
        return cls(mean, math.sqrt(squares / (n - 1)) if n > 1 else None, n)

    def shown(self, metric: str) -> str:
        """Return `1.2345 ± 0.0012`."""
        deviation = "" if self.std is None else f" ± {shown(metric, self.std)}"
        return shown(metric, self.mean) + deviation


@dataclass(frozen=True)
class Average:
    """Trials that differ in one swept parameter alone, as one: statistics of their final metrics."""

    point: Mapping[str, Any]
    n: int
    """Finished trials, which these are the statistics of."""
    left_out: int
    """Trials without a final result."""
    final: Mapping[str, Statistic]

    def as_json(self) -> dict[str, Any]:
        """Return plain values for `--json`."""
        final = {name: asdict(statistic) for name, statistic in self.final.items()}
        return {"params": dict(self.point), "n": self.n, "left_out": self.left_out, "final": final}


def averages(rows: Sequence[TrialResult], over: str, metric: str, mode: str) -> list[Average]:
    """Return one average for every point of the sweep without its parameter `over`, best first.

    There are none if no trial has that parameter.
    """
    groups: dict[frozenset[tuple[str, str]], list[TrialResult]] = {}
    for row in rows if any(over in row.point for row in rows) else ():
        point = frozenset((key, str(value)) for key, value in _without(row.point, over).items())
        groups.setdefault(point, []).append(row)
    made = [_average(group, over) for group in groups.values()]
    return _best_first(made, lambda a: a.final[metric].mean if metric in a.final else None, mode)


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
    """Print the trials, best first, with the columns that any of them has.

    With `average_over`, a swept parameter, a second table has mean and standard deviation over it.
    """
    ordered = _best_first(rows, lambda row: row.final(metric), mode)
    columns = _columns(rows, metric)
    console = terminal()
    console.print(_table_of_trials(f"{name}: {question}", ordered, columns, metric, mode))
    for row in ordered:
        if row.error:
            console.print(f"{row.name}: {row.status}: {row.error}")
    if average_over and (made := averages(rows, average_over, metric, mode)):
        console.print(_table_of_averages(made, average_over, columns))


def _table_of_trials(
    heading: str, rows: Sequence[TrialResult], columns: Sequence[str], metric: str, mode: str
) -> Table:
    params = _params(row.point for row in rows)
    cells = [
        [
            row.name,
            *(str(row.point.get(p, "")) for p in params),
            *(shown(c, row.final(c)) for c in columns),
            shown(metric, row.best(metric, mode)),
            row.status,
        ]
        for row in rows
    ]
    titles = ["trial", *params, *map(title, columns), f"best {title(metric)}", "status"]
    return _table(heading, titles, cells, left=("trial", "status"))


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
    titles = [*params, *map(title, columns), "n", "left out"]
    return _table(f"mean ± standard deviation over {over}", titles, cells, left=params[:1])


def _params(points: Iterable[Mapping[str, Any]]) -> list[str]:
    return list(dict.fromkeys(p for point in points for p in point))


def _table(heading: str, titles: Sequence[str], cells: Sequence[Sequence[str]], left: Sequence[str]) -> Table:
    from rich.table import Table

    table = Table(title=heading, title_justify="left")
    for column in titles:
        table.add_column(column, justify="left" if column in left else "right")
    for row in cells:
        table.add_row(*row)
    return table


def rows_as_json(
    rows: Sequence[TrialResult], metric: str = "eval/loss", mode: str = "min", average_over: str | None = None
) -> str:
    """Return the trials as a JSON list; with `average_over` an object of `rows` and `averages`."""
    plain = [row.as_json() for row in rows]
    if not average_over:
        return to_json(plain)
    made = averages(rows, average_over, metric, mode)
    return to_json({"rows": plain, "averages": [average.as_json() for average in made]})


def _columns(rows: Sequence[TrialResult], metric: str) -> list[str]:
    """Return the metrics to show of those present: the sweep's own, then those of evaluations, then of the model.

    Evaluations that the table does not know come behind those that it knows.
    """
    present = dict.fromkeys(name for row in rows for e in row.evaluations for name in e)
    known = [name for row in METRICS if row.column for name in present if find(name) is row]
    measured = [name for name in known if name.startswith("eval/")]
    unknown = [name for name in present if name.startswith("eval/") and find(name) is None]
    return [c for c in dict.fromkeys([metric, *measured, *unknown, *known]) if c in present]


def _best_first(items: Iterable[Any], value: Callable[[Any], float | None], mode: str) -> list[Any]:
    """Sort by `value`; items without one, or with nan, which has no place in an order, come last."""
    worst = math.inf if mode == "min" else -math.inf

    def key(item: Any) -> float:
        found = value(item)
        return worst if found is None or math.isnan(found) else found

    return sorted(items, key=key, reverse=mode == "max")


def shown(metric: str, value: float | None) -> str:
    """Return the metric's value as the table of metrics has it shown: `1.2345`, `1.24M` or `1.24MB`."""
    row = find(metric)
    if value is None or row is None or row.shown == "number" or not math.isfinite(value):
        return format_number(value)
    power = next((i for i in range(4) if abs(value) < 999.5 * 1000**i), 4)
    units = ("B", "kB", "MB", "GB", "TB") if row.shown == "bytes" else ("", "K", "M", "B", "T")
    return f"{value / 1000**power:.3g}{units[power]}"
