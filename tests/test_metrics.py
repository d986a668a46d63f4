"""The table of metrics: what it says of a name, that it covers what runs log, and the page made of it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from support.local_session import LocalSession, environment, free_port, small_run, small_spec

from raymoe.data.instructions import prepare
from raymoe.methods import Dense, SparseInterpolation, SparseUpcycling
from raymoe.metrics import METRICS, better, find, markdown, mode_of, title, updated
from raymoe.train.worker import train

ROOT = Path(__file__).parents[1]


@pytest.mark.parametrize(
    ("name", "pattern"),
    [
        ("eval/loss", "eval/loss"),
        ("eval/math/loss", "eval/<domain>/loss"),
        ("eval/c__/x y/loss", "eval/<domain>/loss"),
        ("eval/math/exact_match", "eval/<domain>/exact_match"),
        ("routing/load/12", "routing/load/<i>"),
        ("routing/code/load/0", "routing/<domain>/load/<i>"),
        ("masks/multiplier", "masks/multiplier"),
        ("masks/multiplier/3", "masks/multiplier/<i>"),
        ("best/math/loss", "best/<m>"),
    ],
)
def test_a_name_has_its_row(name: str, pattern: str) -> None:
    row = find(name)
    assert row is not None and row.pattern == pattern


@pytest.mark.parametrize(
    "name", ["loss", "eval/losses", "xeval/loss", "eval//loss", "routing/load/x", "masks/other"]
)
def test_a_name_that_is_not_in_the_table(name: str) -> None:
    assert find(name) is None
    assert better(name) is None and mode_of(name) is None
    assert title(name) == name.removeprefix("eval/")


@pytest.mark.parametrize(
    ("name", "mode"),
    [
        ("eval/loss", "min"),
        ("eval/math/perplexity", "min"),
        ("eval/code/exact_match", "max"),
        ("eval/accuracy", "max"),
        ("system/mfu", "max"),
        ("masks/sparsity", None),
        ("routing/load/0", None),
        ("best/loss", "min"),
        ("best/code/exact_match", "max"),
        ("final/code/loss", "min"),
        ("final/system/peak_memory_bytes", "min"),
        ("final/masks/sparsity", None),
    ],
)
def test_which_way_is_better(name: str, mode: str | None) -> None:
    assert mode_of(name) == mode


def test_titles() -> None:
    assert [title(n) for n in ("eval/loss", "eval/math/loss", "model/active_parameters", "masks/target")] == [
        "loss",
        "math/loss",
        "active parameters",
        "masks/target",
    ]


# ---- what runs log

LOGGED_BY_NOBODY_HERE = {
    "eval/accuracy", "eval/<domain>/accuracy",  # of evaluations that users add
    "cost/seconds", "cost/workers", "cost/gpu_hours", "best/<m>", "final/<m>",  # tests/test_end_to_end.py
}  # fmt: skip


def test_the_table_covers_what_runs_log_and_holds_nothing_else(
    pico: Path, data_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    environment(monkeypatch.setenv, 0, 1, free_port())
    prepare(small_run(pico, data_folder).data, pico, tmp_path / "encoded", corpus=None, seed=0)
    methods: list[Any] = [
        Dense(),
        SparseUpcycling(num_experts=2),
        SparseInterpolation(num_experts=2, sparsity_scope="per_expert"),
    ]
    names: set[str] = set()
    for method in methods:
        session, run = LocalSession(), small_run(pico, data_folder, method, max_steps=2)
        rows = train(small_spec(run, pico, tmp_path / "encoded", tmp_path / method.name), session)
        names |= {name for row in (*rows, *(row for _, row in session.rows)) for name in row}
    names.remove("step")
    assert {name for name in names if find(name) is None} == set()
    matched = {row.pattern for name in names if (row := find(name))}
    assert {row.pattern for row in METRICS} - matched == LOGGED_BY_NOBODY_HERE


# ---- the page


def test_the_page_has_the_table_of_today() -> None:
    page = (ROOT / "docs" / "mlflow.md").read_text()
    assert markdown() in page
    assert updated(page) == page, "run `make docs`"


def test_every_metric_is_in_the_page_once() -> None:
    rows = [line.split(" | ") for line in markdown().splitlines()[2:]]
    assert [row[0] for row in rows] == [f"| `{metric.pattern}`" for metric in METRICS]
    assert {len(row) for row in rows} == {4}
    assert len({metric.pattern for metric in METRICS}) == len(METRICS)
