"""The table of metrics: what every metric that raymoe logs means, which way is better and how it is shown.

It decides what `best/` is in MLflow, how sweeps are ranked, the columns of result tables and the table in
docs/mlflow.md, which is rewritten by

    python -m raymoe.metrics docs/mlflow.md

A metric without a row, such as that of a method of one's own, is logged and shown as it is; since nobody said which
way is better, it has no `best/` and no sweep is ranked by it.
"""

from __future__ import annotations

import functools
import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

Moment = Literal["step", "milestone", "end"]
"""When a metric is logged: at every optimizer step, when held-out data are measured, or once after training."""


@dataclass(frozen=True)
class Metric:
    """One row of the table."""

    pattern: str
    """Name as it is logged; `<i>` stands for a number, any other `<...>` for any text."""
    meaning: str
    better: Literal["higher", "lower"] | None = None
    """None: neither good nor bad in itself."""
    title: str = ""
    """Column heading in result tables, by default the name without `eval/`."""
    shown: Literal["number", "count", "bytes"] = "number"
    """`1.2345`, `1.24M` or `1.24MB`."""
    column: bool = False
    """True if result tables have a column for it."""
    logged: tuple[Moment, ...] = ("milestone",)

    def matches(self, name: str) -> bool:
        """Return True if this is the row of the metric `name`."""
        return _regex(self.pattern).fullmatch(name) is not None


EVERY_STEP: tuple[Moment, ...] = ("step",)
BOTH: tuple[Moment, ...] = ("step", "milestone")
AT_THE_END: tuple[Moment, ...] = ("end",)

METRICS = (
    # ---- training
    Metric(
        "train/loss",
        "mean loss of the completion tokens of the step's global batch, in nats",
        "lower",
        logged=EVERY_STEP,
    ),
    Metric("train/grad_norm", "norm of all gradients, before clipping", logged=EVERY_STEP),
    Metric(
        "train/learning_rate",
        "learning rate of the step (SIMoE: that of the shared delta)",
        logged=EVERY_STEP,
    ),
    Metric("train/tokens", "tokens trained on so far, prompts included", shown="count", logged=BOTH),
    Metric("train/progress", "share of the training's steps that are done", logged=EVERY_STEP),
    Metric(
        "train/load_balance_loss",
        "1 when balanced, N when every token takes the same of N experts; not weighted by alpha",
        "lower",
        logged=EVERY_STEP,
    ),
    # ---- routing
    Metric(
        "routing/load/<i>",
        "share of the step's tokens that expert i gets, mean over layers",
        logged=EVERY_STEP,
    ),
    Metric("routing/max_load", "share of the busiest expert, mean over layers", logged=EVERY_STEP),
    Metric(
        "routing/entropy",
        "entropy of the router's distribution, in nats, mean over tokens and layers",
        logged=EVERY_STEP,
    ),
    Metric(
        "routing/<domain>/load/<i>",
        "share of the domain's held-out tokens that expert i gets (RSU paper, Table 7)",
    ),
    # ---- held-out data
    Metric("eval/loss", "mean loss of all held-out completion tokens, in nats", "lower", column=True),
    Metric("eval/perplexity", "its exponential", "lower", column=True),
    Metric("eval/accuracy", "share of right answers, of an evaluation of your own", "higher", column=True),
    Metric(
        "eval/<domain>/exact_match",
        "share of held-out examples whose final answer greedy generation gets right (`--generation-domains`)",
        "higher",
        column=True,
    ),
    Metric("eval/<domain>/accuracy", "as `eval/accuracy`, of one domain", "higher", column=True),
    Metric("eval/<domain>/loss", "as `eval/loss`, of one domain", "lower", column=True),
    Metric("eval/<domain>/perplexity", "its exponential", "lower"),
    # ---- SIMoE's masks
    Metric(
        "masks/sparsity",
        "share of zeros, in the scope that is trained for",
        title="sparsity",
        column=True,
        logged=BOTH,
    ),
    Metric("masks/overlap", "mean cosine of two experts' masks", title="overlap", column=True, logged=BOTH),
    Metric("masks/target", "the sparsity that is asked for at this step", logged=EVERY_STEP),
    Metric("masks/multiplier", "the constraint's multiplier, mean over experts", logged=EVERY_STEP),
    Metric("masks/multiplier/<i>", "the same of expert i (`sparsity_scope: per_expert`)", logged=EVERY_STEP),
    Metric("masks/unit", "nats that a multiplier of 1 weighs", logged=EVERY_STEP),
    Metric("masks/saturated", "share of gates at 0 or 1", logged=EVERY_STEP),
    Metric(
        "masks/saturated_early",
        "by how much that share grew in the first steps; above 0.5 the gates learn too fast",
        "lower",
    ),
    Metric("masks/learning_rate", "the gates' learning rate, before its schedule"),
    Metric("masks/sparsity_union", "share of columns that no expert uses"),
    Metric("masks/sparsity_mean", "sparsity of one expert, mean over experts"),
    Metric("masks/live_parameters", "parameters of the delta that any expert uses", shown="count"),
    Metric("masks/nonzero/<kind>", "share of live columns of norm, query, key, value, out, gate, up, down"),
    # ---- the model and the machine
    Metric("model/parameters", "parameters stored", title="parameters", shown="count"),
    Metric(
        "model/active_parameters",
        "parameters that one token meets",
        title="active parameters",
        shown="count",
        column=True,
    ),
    Metric(
        "system/tokens_per_second", "throughput over all workers", "higher", shown="count", logged=EVERY_STEP
    ),
    Metric(
        "system/mfu",
        "model FLOPs per second over the peak of all workers' devices",
        "higher",
        logged=EVERY_STEP,
    ),
    Metric(
        "system/peak_memory_bytes",
        "of a GPU what was allocated, else what the process held",
        "lower",
        title="peak memory",
        shown="bytes",
        column=True,
        logged=BOTH,
    ),
    Metric("system/workers", "training workers", logged=EVERY_STEP),
    Metric("system/seconds", "seconds since this attempt began to train", logged=EVERY_STEP),
    # ---- after training
    Metric("cost/seconds", "seconds from the first start to the end", "lower", logged=AT_THE_END),
    Metric("cost/workers", "most training workers at a time", logged=AT_THE_END),
    Metric("cost/gpu_hours", "GPU hours of workers that trained; 0 on CPUs", "lower", logged=AT_THE_END),
    Metric("best/<m>", "best value of `eval/<m>` over the milestones: `best/loss`", logged=AT_THE_END),
    Metric(
        "final/<m>",
        "last value of `eval/<m>`, or of any other `<m>` of the last milestone: `final/masks/sparsity`",
        logged=AT_THE_END,
    ),
)


def find(name: str) -> Metric | None:
    """Return the first row that matches the metric `name`; None for a metric that is not in the table."""
    return next((metric for metric in METRICS if metric.matches(name)), None)


def better(name: str) -> Literal["higher", "lower"] | None:
    """Return which values of the metric `name` are better; None if neither are, or if it is not in the table."""
    group, _, rest = name.partition("/")
    if group in ("best", "final"):
        return better(f"eval/{rest}") or better(rest)
    return row.better if (row := find(name)) else None


def mode_of(name: str) -> Literal["min", "max"] | None:
    """Return the mode that a search for the best value of the metric `name` has; None where `better` is None."""
    return {"higher": "max", "lower": "min", None: None}[better(name)]


def title(name: str) -> str:
    """Return the column heading of the metric `name`."""
    row = find(name)
    return row.title if row and row.title else name.removeprefix("eval/")


@functools.cache
def _regex(pattern: str) -> re.Pattern[str]:
    parts = re.split(r"(<\w+>)", pattern)
    return re.compile("".join(_PLACEHOLDERS.get(p, ".+") if p[:1] == "<" else re.escape(p) for p in parts))


_PLACEHOLDERS = {"<i>": r"\d+"}


# ---- docs/mlflow.md

BEGIN, END = "<!-- the table of raymoe/metrics.py -->", "<!-- end of the table -->"


def markdown() -> str:
    """Return the table as Markdown."""
    return "\n".join(_lines())


def _lines() -> Iterator[str]:
    yield "| metric | better | logged at | what it means |"
    yield "|---|---|---|---|"
    for metric in METRICS:
        way = "as `<m>`" if metric.pattern.endswith("/<m>") else metric.better or ""
        yield f"| `{metric.pattern}` | {way} | {', '.join(metric.logged)} | {metric.meaning} |"


def updated(page: str) -> str:
    """Return `page` with the table between its two markers brought up to date."""
    before, _, rest = page.partition(BEGIN)
    _, _, after = rest.partition(END)
    return f"{before}{BEGIN}\n\n{markdown()}\n\n{END}{after}"


if __name__ == "__main__":
    file = Path(sys.argv[1])
    file.write_text(updated(file.read_text()))
