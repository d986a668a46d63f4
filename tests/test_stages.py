from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest

from raymoe import stages
from raymoe.config import Execution, Run, RunFile, replace, validate
from raymoe.schema import InputError
from raymoe.stages import Context, Stage, make, upstream
from raymoe.storage.store import Store

PATH: dict[str, Callable[[Run], Stage]] = {
    "instructions": stages.instructions,
    "perplexity": stages.perplexity,
    "representations": stages.representations,
    "clusters": stages.clusters,
    "upcycle": stages.upcycle,
    "train": stages.training,
}
FROM = {name: set(list(PATH)[i:]) for i, name in enumerate(PATH)}
"""Stage -> itself and all stages after it."""
TRSU = validate(Run, {"method": {"name": "trsu"}})
CRSU = validate(Run, {"method": {"name": "crsu"}})


def keys(run: Run) -> dict[str, str]:
    """Return the key of every stage on the path that the run's method has."""
    found = {}
    for name, stage in PATH.items():
        with contextlib.suppress(InputError):
            found[name] = stage(run).key
    return found


def changed(base: Run, changes: Mapping[str, Any]) -> set[str]:
    before, after = keys(base), keys(replace(base, changes))
    return {name for name in before if before[name] != after[name]}


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"method.load_balance_alpha": 0.5}, FROM["train"]),
        ({"optimization.learning_rate": 1e-5}, FROM["train"]),
        ({"evaluation.milestones": [1.0]}, FROM["train"]),
        ({"method.gating": "softmax"}, FROM["upcycle"]),
        ({"method.top_k": 2}, FROM["upcycle"]),
        ({"method.num_experts": 4}, FROM["clusters"]),
        ({"method.router_confidence": 0.7}, FROM["clusters"]),
        ({"method.router_rows": "raw"}, FROM["clusters"]),
        ({"method.spherical": False}, FROM["clusters"]),
        ({"method.kmeans_starts": 1}, FROM["clusters"]),
        ({"method.representation": "attention_output"}, FROM["representations"]),
        ({"method.max_tokens": 100}, FROM["representations"]),
        ({"method.tasks": ["math", "code"]}, FROM["representations"]),
        ({"method.perplexity_top_fraction": 0.5}, FROM["representations"]),
        ({"precision": "bfloat16"}, FROM["perplexity"]),
        ({"model.local.num_steps": 7}, FROM["perplexity"]),  # its tokenizer stays
        ({"model.local.learning_rate": 1e-3}, FROM["perplexity"]),
        ({"model.local.hidden_size": 64}, FROM["instructions"]),
        ({"data.max_length": 64}, FROM["instructions"]),
        ({"data.max_examples": 10}, FROM["instructions"]),
        ({"seed": 1}, FROM["representations"]),  # the seed samples tokens, and data only if limited
        ({"seed": 1, "data.max_examples": 10}, FROM["instructions"]),
    ],
    ids=lambda x: next(iter(x)) if isinstance(x, dict) else "",
)
def test_a_setting_changes_the_stages_that_read_it_and_those_after(
    changes: dict[str, Any], expected: set[str]
) -> None:
    assert changed(TRSU, changes) == expected


def test_crsu_needs_no_scores_and_shares_what_it_can() -> None:
    assert set(keys(CRSU)) == set(PATH)  # perplexity can be scored, but CRSU does not need it
    assert "perplexity" not in {s.name for s in upstream([stages.training(CRSU)])}
    assert changed(CRSU, {"method.num_experts": 4}) == FROM["clusters"]
    assert changed(CRSU, {"method.token_fraction": 0.5}) == FROM["representations"]
    shared = {name for name, key in keys(CRSU).items() if key == keys(TRSU)[name]}
    assert shared == {"instructions", "perplexity"}


def test_su_and_dense_share_data_and_model() -> None:
    su = validate(Run, {"method": {"name": "su"}})
    dense = validate(Run, {"method": {"name": "dense"}})
    assert changed(su, {"method.router_std": 1.0}) == {"upcycle", "train"}
    needs = {s.key for s in upstream([stages.training(dense)])}
    assert needs < {s.key for s in upstream([stages.training(su)])}
    assert needs < {s.key for s in upstream([stages.training(TRSU)])}


def test_the_seed_of_a_run_leaves_the_embedded_dense_model() -> None:
    other = replace(TRSU, {"seed": 1, "optimization.batch_size": 2, "precision": "bfloat16"})
    assert stages.dense(other).identity == stages.dense(TRSU).identity
    assert changed(TRSU, {}) == set()


def test_execution_never_enters() -> None:
    here = RunFile(method=TRSU.method)
    there = replace(
        here,
        {
            "execution.storage": "/elsewhere",
            "execution.workers": 8,
            "execution.zero_stage": 3,
            "execution.micro_batch": 1,
            "execution.tokens_per_batch": 64,
            "execution.gpu": True,
        },
    )
    assert keys(here.run()) == keys(there.run()) == keys(TRSU)


def test_a_revision_makes_a_stage_and_all_after_it_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    before = keys(TRSU)
    monkeypatch.setitem(stages.REVISIONS, "clusters", stages.REVISIONS["clusters"] + 1)
    after = keys(TRSU)
    assert {name for name in before if before[name] != after[name]} == FROM["clusters"]


def test_methods_without_a_stage_say_so() -> None:
    with pytest.raises(InputError, match=r"method\.name: su uses no representations: choose from trsu, crsu"):
        stages.representations(Run())
    with pytest.raises(InputError, match=r"method\.name: dense has nothing to upcycle"):
        stages.upcycle(validate(Run, {"method": {"name": "dense"}}))


# ---- data and models of the user


def run_on(train: Path | str, **data: Any) -> Run:
    return validate(Run, {"data": {"train": str(train), **data}, "method": {"name": "trsu"}})


def test_changed_data_make_all_stages_anew(tmp_path: Path) -> None:
    file = tmp_path / "a.jsonl"
    file.write_text('{"prompt": "a", "completion": "b"}\n')
    run = run_on(file)
    first = keys(run)
    assert keys(run) == first
    with file.open("a") as stream:
        stream.write('{"prompt": "c", "completion": "d"}\n')
    longer = keys(run)
    assert not set(first.values()) & set(longer.values())
    status = file.stat()
    file.write_text(file.read_text().replace("d", "e"))  # as long as before
    os.utime(file, ns=(status.st_atime_ns, status.st_mtime_ns + 1))
    assert not set(longer.values()) & set(keys(run).values())


def test_changed_held_out_data_and_new_files_in_a_folder_count(tmp_path: Path) -> None:
    for name in ("train.jsonl", "held.jsonl"):
        (tmp_path / name).write_text("{}\n")
    run = run_on(tmp_path / "train.jsonl", validation=str(tmp_path / "held.jsonl"))
    before = stages.instructions(run).key
    (tmp_path / "held.jsonl").write_text("{}\n{}\n")
    assert stages.instructions(run).key != before
    whole = stages.instructions(run_on(tmp_path)).key
    (tmp_path / "more.jsonl").write_text("{}\n")
    assert stages.instructions(run_on(tmp_path)).key != whole


def test_data_below_home_are_watched_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "a.jsonl").write_text("{}\n")
    before = stages.instructions(run_on("~/a.jsonl")).key
    (tmp_path / "a.jsonl").write_text("{}\n{}\n")
    assert stages.instructions(run_on("~/a.jsonl")).key != before


@pytest.mark.parametrize("name", ["none.jsonl", "./none", "/none/x", "~/none"])
def test_data_that_are_not_there_are_refused_before_anything_starts(name: str) -> None:
    with pytest.raises(InputError, match=r"^data\.train: .*none.* does not exist$"):
        stages.training(run_on(name))


def test_a_changed_model_folder_makes_all_stages_anew(pico: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(pico, tmp_path / "model")
    run = validate(Run, {"model": {"name": str(folder)}, "method": {"name": "trsu"}})
    first = keys(run)
    assert {s.name for s in upstream([stages.training(run)])} == {"corpus", *PATH} - {"train"}
    weights = folder / "model.safetensors"
    os.utime(weights, ns=(0, weights.stat().st_mtime_ns + 1))
    second = keys(run)
    config = folder / "config.json"
    config.write_text(config.read_text().replace("rms_norm_eps", "rms_norm_epsilon"))
    third = keys(run)
    assert len({*first.values(), *second.values(), *third.values()}) == 3 * len(PATH)


# ---- planning and making


def test_a_hundred_alphas_share_everything_but_their_training() -> None:
    runs = [replace(TRSU, {"method.load_balance_alpha": i / 100}) for i in range(100)]
    trainings = [stages.training(run) for run in runs]
    shared = upstream(trainings)
    assert len({s.key for s in trainings}) == 100
    # corpus, initial, two instructions, dense, perplexity, representations, clusters, upcycle
    assert len(shared) == 9
    assert [s.key for s in shared] == [s.key for s in upstream(trainings[:1])]


def test_upstream_is_an_order_in_which_stages_can_be_made() -> None:
    runs = [TRSU, CRSU, Run(), replace(TRSU, {"method.num_experts": 4}), replace(TRSU, {"seed": 1})]
    trainings = [stages.training(run) for run in runs]
    ordered = upstream(trainings)
    position = {s.key: i for i, s in enumerate(ordered)}
    assert len(position) == len(ordered)
    for i, stage in enumerate(ordered):
        assert all(position[need.key] < i for need in stage.needs)
    assert all(need.key in position for t in trainings for need in t.needs)


def stage(name: str, calls: list[str], *needs: Stage) -> Stage:
    def build(folder: Path, context: Context) -> Mapping[str, Any]:
        for need in needs:
            assert (need.path(context.store) / "made").read_text() == need.name
        calls.append(name)
        (folder / "made").write_text(name)
        return {"rows": 1234, "text": "x"}

    return Stage(name, {"of": name, "needs": [n.identity for n in needs]}, needs, build, Run())


def test_make_makes_what_is_needed_once(tmp_path: Path) -> None:
    calls: list[str] = []
    said: list[str] = []
    a = stage("a", calls)
    b, c = stage("b", calls, a), stage("c", calls, a)
    d = stage("d", calls, b, c)
    context = Context(Store(tmp_path), Execution(), said.append)
    output = make(d, context)
    assert calls == ["a", "b", "c", "d"]
    assert output.info["rows"] == 1234
    assert said[:2] == [f"{a.key}: started", f"{a.key}: done in 0 s (rows 1,234)"]
    assert make(d, context) == output
    assert len(said) == 8
    shutil.rmtree(b.path(context.store))
    assert make(d, context) == output  # its inputs are no longer needed
    assert calls == ["a", "b", "c", "d"]
    make(stage("e", calls, b), context)
    assert calls[4:] == ["b", "e"]


def test_a_stage_that_fails_leaves_those_before_it(tmp_path: Path) -> None:
    calls: list[str] = []
    a = stage("a", calls)

    def fail(folder: Path, context: Context) -> Mapping[str, Any]:
        raise ValueError("no")

    b = Stage("b", {"b": 1}, (a,), fail, Run())
    context = Context(Store(tmp_path), Execution(), lambda _: None)
    with pytest.raises(ValueError, match="no"):
        make(b, context)
    assert a.find(context.store) is not None
    assert b.find(context.store) is None


def test_a_gating_that_no_class_of_the_family_has_is_refused_before_anything_is_scored(
    dense_models: Mapping[str, Path], data_folder: Path, tmp_path: Path
) -> None:
    settings = {"name": "crsu", "settings": "paper"}  # whose gating is softmax
    run = validate(
        Run,
        {
            "model": {"name": str(dense_models["granite"])},
            "data": {"train": str(data_folder)},
            "method": settings,
        },
    )
    store = Store(tmp_path / "runs")
    with pytest.raises(InputError, match="softmax"):
        stages.prepare([stages.training(run)], Context(store, Execution(storage=str(store.root))))
    assert {folder.name.split("-")[0] for folder in (tmp_path / "runs").iterdir()} <= {"instructions"}
