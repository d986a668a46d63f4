from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from mlflow import MlflowClient

from raymoe import stages
from raymoe.cli import sweep as cli
from raymoe.cli.main import main as command_line
from raymoe.config import Execution, Run, RunFile, replace, validate
from raymoe.methods import Dense, SparseInterpolation, SparseUpcycling
from raymoe.schema import InputError
from raymoe.stages import Context, Stage
from raymoe.storage.store import Store
from raymoe.sweep.book import TrialBook
from raymoe.sweep.definition import Point, Sweep, SweepOptions, Trial, load, trials_of
from raymoe.sweep.run import execute, make_shared_stages
from raymoe.tracking.client import TRIAL_KEY
from raymoe.tracking.ledger import Ledger
from raymoe.tracking.results import read_sweeps

ROOT = Path(__file__).parents[2]
SWEEPS = sorted((ROOT / "sweeps").glob("*.py"))


def experts(base: Run, point: Point) -> Run:
    return replace(base, {"method.num_experts": point["num_experts"]})


def sweep_over(*values: int) -> Sweep:
    return Sweep("experts", "how many?", [{"num_experts": n} for n in values], experts)


# ---- the sweep files and configurations that come with raymoe


@pytest.mark.parametrize("file", SWEEPS, ids=lambda f: f.stem)
def test_every_sweep_dry_runs(file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    sweep = load(file)
    assert cli.run_sweep(sweep, ["--dry-run", "--storage", str(tmp_path)]) == 0
    out = capsys.readouterr().out
    assert sweep.question in out
    trials = [line.split() for line in out.split("trials:\n")[1].splitlines() if line.startswith("  ")]
    assert [words[-1] for words in trials] == ["-".join(map(str, p.values())) for p in sweep.points]
    keys = [words[-2] for words in trials]
    assert len(set(keys)) == len(sweep.points) > 1
    assert all(key.startswith("train-") for key in keys)
    assert f"{len(keys)} trials" in out
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("file", SWEEPS, ids=lambda f: f.stem)
def test_every_point_shows_in_its_run(file: Path) -> None:
    sweep = load(file)
    for trial in trials_of(sweep, Run()):
        method = trial.run.method.model_dump()
        for name, value in trial.point.items():
            if name == "method":
                assert method["name"] == value
            elif name in method:
                assert method[name] == value


def test_num_experts_keeps_what_the_configuration_sets() -> None:
    base = validate(Run, {"method": {"name": "trsu", "gating": "softmax"}, "seed": 5})
    for trial in trials_of(load(ROOT / "sweeps" / "num_experts.py"), base):
        assert trial.run.seed == 5
        assert getattr(trial.run.method, "gating", "softmax") == "softmax"
        assert trial.run.method.name in ("dense", "simoe") or hasattr(trial.run.method, "gating")


def test_load_balance_alpha_shares_all_stages() -> None:
    trials = trials_of(
        load(ROOT / "sweeps" / "load_balance_alpha.py"), validate(Run, {"method": {"name": "trsu"}})
    )
    shared = stages.upstream(t.stage for t in trials)
    assert [s.key for s in shared] == [s.key for s in stages.upstream([trials[0].stage])]


def test_sparsity_targets_beside_their_baselines() -> None:
    base = validate(Run, {"method": {"name": "simoe", "orthogonality": 0.3}, "seed": 5})
    dense, upcycled, *simoe = [t.run for t in trials_of(load(ROOT / "sweeps" / "sparsity_target.py"), base)]
    assert dense.method == Dense()
    assert upcycled.method == SparseUpcycling(num_experts=4, top_k=2)
    targets = (0.5, 0.75, 0.9, 0.95)
    assert [run.method for run in simoe] == [
        SparseInterpolation(sparsity_target=target, orthogonality=0.3) for target in targets
    ]
    for run in (dense, upcycled, *simoe):
        assert run == base.model_copy(update={"method": run.method})


def test_every_method_has_three_seeds_from_the_configurations_on() -> None:
    sweep = load(ROOT / "sweeps" / "methods.py")
    trials = trials_of(sweep, validate(Run, {"seed": 40, "optimization": {"max_steps": 7}}))
    seeds: dict[str, list[int]] = {}
    for trial in trials:
        seeds.setdefault(trial.run.method.name, []).append(trial.run.seed)
        assert trial.run.optimization.max_steps == 7
    assert seeds == {name: [40, 41, 42] for name in ("dense", "su", "trsu", "crsu", "simoe")}
    assert sweep.average_over == "seed"


def test_averages_are_over_a_swept_parameter() -> None:
    with pytest.raises(InputError, match=r"^experts: average_over: no trial has 'seed'$"):
        trials_of(dataclasses.replace(sweep_over(2, 4), average_over="seed"), Run())


def test_every_configuration_dry_runs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    files = sorted((ROOT / "configs").glob("**/*.yaml"))
    for file in files:
        with pytest.raises(SystemExit) as exit:
            command_line(["train", str(file), "--dry-run", "--storage", str(tmp_path)])
        captured = capsys.readouterr()
        assert exit.value.code == 0, f"{file}: {captured.err}"
        assert "1 trial, " in captured.out


# ---- planning


def test_the_dry_run_says_what_is_there_already(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run_file = RunFile(execution=Execution(storage=str(tmp_path)))
    trials = trials_of(sweep_over(2, 4), run_file.run())
    shared = stages.upstream([trials[0].stage])[0]
    for stage in (shared, trials[1].stage):
        Store(tmp_path).make(stage.name, stage.identity, lambda folder: {})
    assert execute(sweep_over(2, 4), run_file, SweepOptions(dry_run=True)) == 0
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    there = [line[3] for line in lines if line[:3] == ["in", "the", "store"]]
    todo = [line[2] for line in lines if line[:2] == ["to", "do"]]
    assert there == [shared.key, trials[1].key]
    assert trials[0].key in todo
    assert len(there) + len(todo) == len(stages.upstream(t.stage for t in trials)) + 2


def test_a_dry_run_says_what_the_trials_cost(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--dry-run", "--storage", str(tmp_path)]
    assert cli.run_sweep(sweep_over(2, 4), words) == 0
    known = capsys.readouterr().out
    assert "on 1 x l40s each" in known and "--zero-stage 0 --micro-batch" in known
    assert cli.run_sweep(sweep_over(2, 4), [*words, "--model.name", "nobody/nothing"]) == 0
    told = capsys.readouterr().out.splitlines()
    assert told[-1].startswith(
        "memory, hours and money can't be told: model.name: 'nobody/nothing' is not in"
    )


def test_the_dry_run_as_json(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run_file = RunFile(execution=Execution(storage=str(tmp_path)))
    trials = trials_of(sweep_over(2, 4), run_file.run())
    stage = trials[1].stage
    Store(tmp_path).make(stage.name, stage.identity, lambda folder: {})
    assert execute(sweep_over(2, 4), run_file, SweepOptions(dry_run=True, json=True)) == 0
    told = json.loads(capsys.readouterr().out)
    rows = told.pop("cost")["trials"]
    assert [(row["trial"], row["in_store"]) for row in rows] == [("2", False), ("4", True)]
    assert [row["active"] for row in rows] != [row["total"] for row in rows]
    assert told == {
        "sweep": "experts",
        "question": "how many?",
        "store": str(tmp_path),
        "stages": [{"key": s.key, "in_store": False} for s in stages.upstream(t.stage for t in trials)],
        "trials": [
            {"trial": "2", "params": {"num_experts": 2}, "key": trials[0].key, "in_store": False},
            {"trial": "4", "params": {"num_experts": 4}, "key": trials[1].key, "in_store": True},
        ],
    }


def test_invalid_points_are_named_all_at_once() -> None:
    with pytest.raises(InputError) as caught:
        trials_of(sweep_over(2, 1, 4, 0), Run())
    lines = str(caught.value).splitlines()
    assert [line.split(":")[0] for line in lines] == ["trial 1", "trial 0"]
    assert all("method.num_experts" in line and "greater than or equal to 2" in line for line in lines)


def test_two_points_that_are_the_same_run_are_refused() -> None:
    with pytest.raises(InputError, match=r"^trial 2: the same run as trial 2$"):
        trials_of(sweep_over(2, 4, 2), Run())
    same = Sweep("s", "?", [{"a": 1}, {"a": 2}], lambda base, _: base)
    with pytest.raises(InputError, match=r"^trial 2: the same run as trial 1$"):
        trials_of(same, Run())


def test_a_trial_is_the_same_in_whatever_sweep() -> None:
    other = Sweep("other", "?", [{"n": 4}], lambda base, p: replace(base, {"method.num_experts": p["n"]}))
    assert trials_of(other, Run())[0].key == trials_of(sweep_over(2, 4), Run())[1].key
    assert trials_of(other, Run())[0].run.method == SparseUpcycling(num_experts=4)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("none.py", None, "no such sweep file"),
        ("sweep.txt", "", "not a Python file"),
        ("empty.py", "", "defines no SWEEP"),
        ("wrong.py", "SWEEP = 3", "defines no SWEEP"),
        ("syntax.py", "x = 1\ny = = 2\n", r"^/\S*/syntax\.py:2: invalid syntax$"),
        (
            "import.py",
            "\nimport no_such_thing\n",
            r"^/\S*/import\.py:2: ModuleNotFoundError: No module .*thing'$",
        ),
        ("name.py", "def f():\n    return x\nf()", r"^/\S*/name\.py:2: NameError: name 'x' is not defined$"),
    ],
)
def test_files_that_are_no_sweep(tmp_path: Path, name: str, content: str | None, message: str) -> None:
    if content is not None:
        (tmp_path / name).write_text(content)
    with pytest.raises(InputError, match=message):
        load(tmp_path / name)


# ---- shared stages


def trial(name: str, *needs: Stage) -> Trial:
    def unused(folder: Path, context: Context) -> Mapping[str, Any]:
        raise AssertionError("trials are not made here")

    stage = Stage("train", {"of": name}, needs, unused, Run())
    return Trial(name, {"name": name}, Run(), stage)


def test_a_shared_stage_that_fails_fails_only_the_trials_that_need_it(tmp_path: Path) -> None:
    calls = []

    def good(folder: Path, context: Context) -> Mapping[str, Any]:
        calls.append("good")
        return {}

    def bad(folder: Path, context: Context) -> Mapping[str, Any]:
        calls.append("bad")
        raise RuntimeError("disk full\nand more")

    def wrong(folder: Path, context: Context) -> Mapping[str, Any]:
        raise InputError("data.train: x has no rows")

    root = Stage("root", {"r": 1}, (), good, Run())
    broken = Stage("broken", {"b": 1}, (root,), bad, Run())
    after = Stage("after", {"a": 1}, (broken,), good, Run())
    refused = Stage("refused", {"w": 1}, (), wrong, Run())
    trials = [trial("one", root), trial("two", after), trial("three", root, broken), trial("four", refused)]
    context = Context(Store(tmp_path), Execution(), lambda _: None)
    errors = make_shared_stages(trials, context)
    assert errors == {
        trials[1].key: "broken: RuntimeError: disk full",
        trials[2].key: "broken: RuntimeError: disk full",
        trials[3].key: "data.train: x has no rows",
    }
    assert calls == ["good", "bad"]


# ---- what a finished trial leaves in MLflow


def test_masks_and_figures_of_a_finished_trial_are_artifacts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    store, trial = Store(tmp_path / "runs"), trials_of(sweep_over(2), Run())[0]
    evaluation = {"step": 4.0, "eval/loss": 2.0, "masks/sparsity": 0.75, "model/active_parameters": 100.0}

    def build(folder: Path) -> dict[str, Any]:
        (folder / "figures").mkdir()
        (folder / "figures" / "overlap.png").write_bytes(b"overlap")
        (folder / "figures" / "where.png").write_bytes(b"where")
        (folder / "masks.json").write_text("{}")
        return {"evaluations": [evaluation], "cost": {}}

    store.make(trial.stage.name, trial.stage.identity, build)
    uri = f"sqlite:///{tmp_path}/mlflow.db"
    ledger = Ledger("raymoe", uri)
    ledger.sweep("experts-1", "how many?", {"sweep": "experts", "average_over": "num_experts"}, "")
    book = TrialBook(ledger, sweep_over(2), {trial.key: trial}, store, "tiny")
    book.ended(trial.key, None)
    assert ledger.close("FINISHED")
    client = MlflowClient(uri)
    (run,) = [
        r
        for r in client.search_runs([client.get_experiment_by_name("raymoe").experiment_id])
        if TRIAL_KEY in r.data.tags
    ]
    names = [a.path for folder in (None, "figures") for a in client.list_artifacts(run.info.run_id, folder)]
    assert sorted(names) == ["figures", "figures/overlap.png", "figures/where.png", "masks.json", "run.yaml"]
    assert Path(client.download_artifacts(run.info.run_id, "figures/where.png")).read_bytes() == b"where"
    summary = {k: v for k, v in run.data.metrics.items() if k.startswith(("best/", "final/"))}
    assert summary == {
        "best/loss": 2.0, "final/loss": 2.0, "final/masks/sparsity": 0.75, "final/model/active_parameters": 100.0,
    }  # fmt: skip
    (read,) = read_sweeps(uri=uri)
    assert read.average_over == "num_experts"
