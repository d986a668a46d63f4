"""`raymoe report` ranks each sweep as the sweep itself was, from what MLflow holds."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from mlflow import MlflowClient

from raymoe.cli.command import guarded
from raymoe.cli.main import main
from raymoe.config import Execution, Run, RunFile, replace
from raymoe.storage.store import Store
from raymoe.sweep.definition import Point, Sweep, SweepOptions, trials_of
from raymoe.sweep.run import execute
from raymoe.tracking.client import SWEEP_KEY
from raymoe.tracking.ledger import Ledger
from raymoe.tracking.metric_log import MetricLog

MEASURED = {
    2: {"eval/loss": 1.0, "eval/c++/accuracy": 0.5, "masks/sparsity": 0.5},
    3: {"eval/loss": 3.0, "eval/c++/accuracy": 0.75, "masks/sparsity": 0.7},
    4: {"eval/loss": 2.0, "eval/c++/accuracy": 0.25, "masks/sparsity": 0.9},
}
"""Number of experts -> last evaluation. Every metric puts the trials into another order."""


def experts(base: Run, point: Point) -> Run:
    return replace(base, {"method.num_experts": point["num_experts"]})


@pytest.fixture
def run_finished_sweep(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Sweep]:
    """Runs a sweep whose trials are in the store already: from the sweep file's words to MLflow, without Ray."""
    monkeypatch.chdir(tmp_path)

    def run(name: str, **ranking: Any) -> Sweep:
        run_file = RunFile(execution=Execution(storage=str(tmp_path / "runs")))
        sweep = Sweep(name, "how many?", [{"num_experts": n} for n in MEASURED], experts, **ranking)
        for trial in trials_of(sweep, run_file.run()):
            put(Store(tmp_path / "runs"), trial)
        assert execute(sweep, run_file, SweepOptions()) == 0
        return sweep

    return run


def put(store: Store, trial: Any) -> None:
    """Let the store hold the trial's result: its accuracy was better at a milestone before the last."""
    last = MEASURED[trial.point["num_experts"]]
    earlier = {**last, "eval/c++/accuracy": last["eval/c++/accuracy"] + 0.125}
    evaluations = [{"step": 2.0, **earlier}, {"step": 4.0, **last}]

    def build(folder: Path) -> dict[str, Any]:
        log = MetricLog(folder / "metrics.jsonl")
        for step, metrics in ((2, earlier), (4, last)):
            log.append(step, metrics)
        return {"evaluations": evaluations, "cost": {}}

    store.make(trial.stage.name, trial.stage.identity, build)


def cells(out: str) -> list[list[str]]:
    lines = [line for line in out.splitlines() if line.startswith(("┃", "│"))]
    return [[cell.strip() for cell in line.strip("┃│").replace("┃", "│").split("│")] for line in lines]


def reported(capsys: pytest.CaptureFixture[str], *words: str) -> str:
    capsys.readouterr()
    with pytest.raises(SystemExit) as exit:
        main(["report", *words])
    assert exit.value.code == 0
    return capsys.readouterr().out


@pytest.mark.parametrize(
    ("ranking", "mode", "order"),
    [
        ({}, "min", ["2", "4", "3"]),
        ({"metric": "eval/c++/accuracy"}, "max", ["3", "2", "4"]),
        ({"metric": "eval/c++/accuracy", "mode": "min"}, "min", ["4", "2", "3"]),
        ({"metric": "masks/sparsity", "mode": "min"}, "min", ["2", "3", "4"]),
        ({"metric": "masks/sparsity", "mode": "max"}, "max", ["4", "3", "2"]),
    ],
)
def test_a_report_ranks_as_the_sweep_did(
    run_finished_sweep: Callable[..., Sweep],
    capsys: pytest.CaptureFixture[str],
    ranking: dict[str, str],
    mode: str,
    order: list[str],
) -> None:
    sweep = run_finished_sweep("experts", average_over="num_experts", **ranking)
    printed = cells(capsys.readouterr().out)
    again = cells(reported(capsys))
    assert [row[0] for row in printed[1:4]] == [row[0] for row in again[1:4]] == order
    in_mlflow = sweep.metric.replace("c++", "c__")
    (read,) = json.loads(reported(capsys, "--json", "--sweep", "experts"))
    assert (read["metric"], read["mode"]) == (in_mlflow, mode)
    values = {row["trial"]: row["evaluations"][-1][in_mlflow] for row in read["rows"]}
    assert values == {str(n): measured[sweep.metric] for n, measured in MEASURED.items()}
    (average,) = read["averages"]
    assert average["final"][in_mlflow]["n"] == 3


def test_an_accuracy_has_its_best_value_in_mlflow_and_in_the_table(
    run_finished_sweep: Callable[..., Sweep], capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    run_finished_sweep("experts", metric="eval/c++/accuracy")
    titles, best = cells(capsys.readouterr().out)[:2]
    assert dict(zip(titles, best, strict=True)) == {
        "trial": "3", "num_experts": "3", "c++/accuracy": "0.7500", "loss": "3.0000", "sparsity": "0.7000",
        "best c++/accuracy": "0.8750", "status": "FINISHED",
    }  # fmt: skip
    client = MlflowClient(f"sqlite:///{tmp_path}/mlflow.db")
    runs = client.search_runs([client.get_experiment_by_name("raymoe").experiment_id])
    found = {r.info.run_name: r.data.metrics for r in runs if SWEEP_KEY not in r.data.tags}
    assert found["3"]["best/c__/accuracy"] == 0.875 and found["3"]["final/c__/accuracy"] == 0.75


def test_a_sweep_from_before_ranks_by_its_loss(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    ledger = Ledger("raymoe")
    ledger.sweep("old-1", "why?", {"sweep": "old"}, "")
    for name, loss in (("worse", 2.0), ("better", 1.0)):
        log = MetricLog(tmp_path / name)
        log.append(1, {"eval/loss": loss})
        ledger.trial(name, name, {}, {}, "", log.file)
        ledger.finish(name, "FINISHED")
    assert ledger.close("FINISHED")
    assert [row[0] for row in cells(reported(capsys))[1:]] == ["better", "worse"]
    (read,) = json.loads(reported(capsys, "--json"))
    assert (read["metric"], read["mode"]) == ("eval/loss", "min")


# ---- sweeps that nothing can be ranked by


@pytest.mark.parametrize(
    ("ranking", "told"),
    [
        (
            {"metric": "eval/los"},
            "metric: 'eval/los' is not in the table of raymoe/metrics.py: did you mean eval/loss?",
        ),
        ({"metric": "zzz"}, "metric: 'zzz' is not in the table of raymoe/metrics.py"),
        ({"metric": "train/loss"}, "metric: train/loss is not measured at milestones"),
        ({"metric": "best/loss"}, "metric: best/loss is not measured at milestones"),
        ({"mode": "lowest"}, "mode: expected 'min' or 'max' (got 'lowest')"),
        ({"mode": ""}, "mode: expected 'min' or 'max' (got '')"),
        ({"metric": "masks/overlap"}, "mode: masks/overlap is neither good nor bad in itself: give 'min' or 'max'"),
    ],
)  # fmt: skip
def test_a_sweep_without_a_ranking_is_refused_in_one_line(
    ranking: dict[str, str], told: str, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    sweep = Sweep("s", "?", [{"num_experts": 2}], experts, **ranking)  # type: ignore[arg-type]
    run_file = RunFile(execution=Execution(storage=str(tmp_path / "runs")))
    assert guarded(lambda: execute(sweep, run_file, SweepOptions(dry_run=True))) == 2
    assert capsys.readouterr().err.splitlines() == [f"raymoe: s: {told}"]
    words = "".join(f", {key}={value!r}" for key, value in ranking.items())
    (tmp_path / "s.py").write_text(
        f'from raymoe import Sweep\nSWEEP = Sweep("s", "?", [{{"a": 1}}], None{words})\n'
    )
    for verb in (["sweep", str(tmp_path / "s.py")], ["plan", "--sweep", str(tmp_path / "s.py")]):
        with pytest.raises(SystemExit) as exit:
            main(verb)
        assert exit.value.code == 2
        assert capsys.readouterr().err.splitlines() == [f"raymoe: s: {told}"]
