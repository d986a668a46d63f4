from __future__ import annotations

import json
import math
import statistics
from typing import Any

import pytest

from raymoe.console import print_rows, root_cause, to_json
from raymoe.report.table import averages, print_table, rows_as_json
from raymoe.tracking.results import TrialResult


def evaluations(*losses: float, **more: float) -> list[dict[str, float]]:
    return [{"step": float(i), "eval/loss": loss, **more} for i, loss in enumerate(losses)]


def printed(
    rows: list[TrialResult], capsys: pytest.CaptureFixture[str], *args: str, **named: str
) -> list[list[str]]:
    """Cells of every line of the tables, titles first."""
    print_table("sweep", "which?", rows, *(args or ("eval/loss", "min")), **named)  # type: ignore[arg-type]
    lines = capsys.readouterr().out.splitlines()
    tables = [line for line in lines if line.startswith(("┃", "│"))]
    return [[cell.strip() for cell in line.strip("┃│").replace("┃", "│").split("│")] for line in tables]


def test_best_first_and_those_without_a_result_last(capsys: pytest.CaptureFixture[str]) -> None:
    rows = [
        TrialResult("broken", {"n": 0}, "FAILED", [], error="out of memory"),
        TrialResult("late", {"n": 2}, "FINISHED", evaluations(3.0, 1.0, 2.0)),
        TrialResult("diverged", {"n": 3}, "FAILED", evaluations(3.0, math.nan)),
        TrialResult("good", {"n": 4}, "FINISHED", evaluations(3.0, 1.5)),
    ]
    titles, *cells = printed(rows, capsys)
    assert titles == ["trial", "n", "loss", "best loss", "status"]
    assert cells[0] == ["good", "4", "1.5000", "1.5000", "FINISHED"]
    assert cells[1] == ["late", "2", "2.0000", "1.0000", "FINISHED"]
    assert {row[0] for row in cells[2:]} == {"broken", "diverged"}


def test_more_can_be_better(capsys: pytest.CaptureFixture[str]) -> None:
    rows = [
        TrialResult("a", {}, "FINISHED", evaluations(1.0, **{"eval/math/exact_match": 0.25})),
        TrialResult("none", {}, "FAILED"),
        TrialResult("b", {}, "FINISHED", evaluations(2.0, **{"eval/math/exact_match": 0.5})),
    ]
    titles, *cells = printed(rows, capsys, "eval/math/exact_match", "max")
    assert titles == ["trial", "math/exact_match", "loss", "best math/exact_match", "status"]
    assert [row[0] for row in cells] == ["b", "a", "none"]


def test_nothing_is_cut_in_a_log(capsys: pytest.CaptureFixture[str]) -> None:
    domains = [f"domain_with_a_long_name_{i}" for i in range(12)]
    losses = {f"eval/{d}/loss": 100 + i / 10 for i, d in enumerate(domains)}
    error = "x" * 500
    row = TrialResult("t", {"tasks": "[code, math]"}, "FAILED", evaluations(1.0, **losses), error=error)
    titles, cells = printed([row], capsys)
    assert titles[3:-2] == [f"{d}/loss" for d in domains]
    assert cells == [
        "t",
        "[code, math]",
        "1.0000",
        *(f"{x:.1f}" for x in losses.values()),
        "1.0000",
        "FAILED",
    ]
    print_table("s", "q", [row], "eval/loss", "min")
    assert f"t: FAILED: {error}" in capsys.readouterr().out.splitlines()


def test_params_of_all_trials_have_a_column(capsys: pytest.CaptureFixture[str]) -> None:
    rows = [
        TrialResult("a", {"x": 1}, "FINISHED", evaluations(1.0)),
        TrialResult("b", {"y": 2}, "FINISHED", evaluations(2.0)),
    ]
    titles, *cells = printed(rows, capsys)
    assert titles[:3] == ["trial", "x", "y"]
    assert [row[:3] for row in cells] == [["a", "1", ""], ["b", "", "2"]]


def test_a_row_knows_its_last_and_its_best_value() -> None:
    row = TrialResult("a", {}, "FINISHED", evaluations(3.0, 1.0, 2.0))
    assert (row.final("eval/loss"), row.best("eval/loss", "min"), row.best("eval/loss", "max")) == (2, 1, 3)
    assert row.final("eval/x") is None
    assert row.best("eval/x", "min") is None
    assert TrialResult("b", {}, "FAILED").final("eval/loss") is None


def test_rows_as_json_hold_everything() -> None:
    row = TrialResult("a", {"n": 1}, "FINISHED", evaluations(3.0, 1.0), model="/m", error="")
    (read,) = json.loads(rows_as_json([row]))
    expected: dict[str, Any] = {
        "trial": "a",
        "params": {"n": 1},
        "status": "FINISHED",
        "evaluations": [{"step": 0.0, "eval/loss": 3.0}, {"step": 1.0, "eval/loss": 1.0}],
        "model": "/m",
        "error": "",
    }
    assert read == expected


def test_json_has_null_for_what_it_has_no_number_for() -> None:
    row = TrialResult("a", {"x": math.inf}, "FINISHED", evaluations(math.nan, 1.0))
    (read,) = json.loads(rows_as_json([row]), parse_constant=pytest.fail)
    assert read["params"] == {"x": None}
    assert [e["eval/loss"] for e in read["evaluations"]] == [None, 1.0]
    text = to_json({"a": [(1, -math.inf)], "b": True, "c": "NaN"})
    assert json.loads(text, parse_constant=pytest.fail) == {"a": [[1, None]], "b": True, "c": "NaN"}


def test_plain_rows(capsys: pytest.CaptureFixture[str]) -> None:
    print_rows("title [x]", [{"task": "[code]", "n": 3, "perplexity": 1.23456}])
    out = capsys.readouterr().out
    assert "title [x]" in out
    assert "│ [code] │ 3 │     1.2346 │" in out


def test_the_root_cause_is_the_innermost_on_one_line() -> None:
    try:
        try:
            raise ValueError("shapes differ:\n  [2] and [3]\n")
        except ValueError as inner:
            raise RuntimeError("a worker failed") from inner
    except RuntimeError as outer:
        caught = outer
    assert root_cause(caught) == "ValueError: shapes differ:"
    wrapped = RuntimeError("ray")
    wrapped.worker_failures = {0: caught}  # type: ignore[attr-defined]
    assert root_cause(wrapped) == "ValueError: shapes differ:"
    assert root_cause(KeyError()) == "KeyError: "
    assert root_cause(None) == "unknown error"


# ---- what evaluations say about the model


def test_sparsity_overlap_and_size_come_after_the_losses(capsys: pytest.CaptureFixture[str]) -> None:
    masks = {"masks/sparsity": 0.7512, "masks/overlap": 0.1101, "model/active_parameters": 9_601_234_567.0}
    rows = [
        TrialResult(
            "simoe", {}, "FINISHED", evaluations(1.0, **masks, **{"eval/math/loss": 1.5, "masks/other": 1.0})
        ),
        TrialResult("dense", {}, "FINISHED", evaluations(2.0, **{"model/active_parameters": 999_700.0})),
        TrialResult("tiny", {}, "FINISHED", evaluations(3.0, **{"model/active_parameters": 999.0})),
    ]
    titles, *cells = printed(rows, capsys)
    shown = ["loss", "math/loss", "sparsity", "overlap", "active parameters", "best loss", "status"]
    assert titles[1:] == shown
    assert cells[0][1:6] == ["1.0000", "1.5000", "0.7512", "0.1101", "9.6B"]
    assert cells[1][3:6] == ["", "", "1M"]
    assert cells[2][5] == "999"


def test_metrics_have_the_order_and_units_of_the_table(capsys: pytest.CaptureFixture[str]) -> None:
    measured = {
        "system/peak_memory_bytes": 1.5e9,
        "eval/text/bleu": 31.25,  # not in the table: as it is, behind those that are
        "eval/text/loss": 1.5,
        "eval/code/exact_match": 0.5,
        "eval/accuracy": 0.25,
        "eval/perplexity": 2.0,
        "eval/text/perplexity": 4.0,
        "routing/text/load/0": 0.5,
        "mine/size": 3.0,
    }
    row = TrialResult("a", {}, "FINISHED", evaluations(1.0, **measured))
    titles, cells = printed([row], capsys)
    assert dict(zip(titles[1:-2], cells[1:-2], strict=True)) == {
        "loss": "1.0000",
        "perplexity": "2.0000",
        "accuracy": "0.2500",
        "code/exact_match": "0.5000",
        "text/loss": "1.5000",
        "text/bleu": "31.2500",
        "peak memory": "1.5GB",
    }
    assert titles[1:5] == ["loss", "perplexity", "accuracy", "code/exact_match"]
    titles, cells = printed([row], capsys, "system/peak_memory_bytes", "min")
    assert titles[1] == "peak memory" and titles[-2:] == ["best peak memory", "status"]
    assert cells[-2] == "1.5GB"


# ---- averages


def seeds(method: str, *losses: float, status: str = "FINISHED") -> list[TrialResult]:
    return [
        TrialResult(f"{method}-{i}", {"method": method, "seed": i}, status, evaluations(9.0, loss))
        for i, loss in enumerate(losses)
    ]


SEEDS = [
    *seeds("late", 2.5, 2.75, 2.25),
    TrialResult("late-3", {"method": "late", "seed": 3}, "FAILED", evaluations(0.1), error="out of memory"),
    TrialResult("late-4", {"method": "late", "seed": 4}, "KILLED"),
    *seeds("good", 1.0, 1.5),
    *seeds("never", 0.5, status="STOPPED"),
    *seeds("once", 2.0),
]


def test_mean_and_deviation_over_seeds(capsys: pytest.CaptureFixture[str]) -> None:
    titles, *cells = printed(SEEDS, capsys, average_over="seed")[1 + len(SEEDS) :]
    assert titles == ["method", "loss", "n", "left out"]
    assert cells == [
        ["good", f"{1.25:.4f} ± {statistics.stdev([1.0, 1.5]):.4f}", "2", "0"],
        ["once", "2.0000", "1", "0"],
        ["late", f"{2.5:.4f} ± {statistics.stdev([2.5, 2.75, 2.25]):.4f}", "3", "2"],
        ["never", "", "0", "1"],
    ]
    print_table("sweep", "which?", SEEDS, "eval/loss", "min", "seed")
    assert "mean ± standard deviation over seed" in capsys.readouterr().out


def test_averages_of_more_metrics_best_first() -> None:
    matches = {"a": (0.25, 0.75), "b": (0.5, 1.0), "c": (0.0, 0.125)}
    rows = [
        TrialResult(
            f"{name}{i}",
            {"seed": i, "method": name, "top_k": 1},
            "FINISHED",
            evaluations(3.0, 1.0, **{"eval/x/exact_match": value, "train/tokens": 8.0}),
        )
        for i in (0, 1)
        for name, value in ((n, v[i]) for n, v in matches.items())
    ]
    found = averages(rows, "seed", "eval/x/exact_match", "max")
    assert [average.point for average in found] == [{"method": m, "top_k": 1} for m in ("b", "a", "c")]
    for average in found:
        values = matches[average.point["method"]]
        assert average.as_json() == {
            "params": dict(average.point),
            "n": 2,
            "left_out": 0,
            "final": {
                "eval/loss": {"mean": 1.0, "std": 0.0, "n": 2},
                "eval/x/exact_match": {
                    "mean": statistics.mean(values),
                    "std": pytest.approx(statistics.stdev(values)),
                    "n": 2,
                },
                "train/tokens": {"mean": 8.0, "std": 0.0, "n": 2},
            },
        }


def test_a_metric_that_only_some_have_is_averaged_over_those() -> None:
    rows = seeds("a", 1.0, 2.0, 3.0)
    rows[0].evaluations[-1]["eval/new/loss"] = 4.0  # type: ignore[index]
    (found,) = averages(rows, "seed", "eval/loss", "min")
    assert (found.n, found.final["eval/new/loss"].n, found.final["eval/new/loss"].std) == (3, 1, None)


def test_what_is_not_swept_is_not_averaged(capsys: pytest.CaptureFixture[str]) -> None:
    assert averages(SEEDS, "top_k", "eval/loss", "min") == []
    assert printed(SEEDS, capsys, average_over="top_k") == printed(SEEDS, capsys)


@pytest.mark.parametrize("value", [math.inf, math.nan, 1.7976931348623157e308])
def test_averages_of_what_is_no_number(value: float) -> None:
    rows = [*seeds("bad", 1.0, value), *seeds("good", 5.0, 6.0)]
    found = averages(rows, "seed", "eval/loss", "min")
    assert [average.point["method"] for average in found] == ["good", "bad"]
    assert not found[1].final["eval/loss"].mean < 1e307


def test_averages_in_json() -> None:
    read = json.loads(rows_as_json(SEEDS, average_over="seed"))
    assert [row["trial"] for row in read["rows"]] == [row.name for row in SEEDS]
    assert [average["params"]["method"] for average in read["averages"]] == ["good", "once", "late", "never"]
    assert read["averages"][0]["final"]["eval/loss"]["mean"] == 1.25
    assert isinstance(json.loads(rows_as_json(SEEDS)), list)
