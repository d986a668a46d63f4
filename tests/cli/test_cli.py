from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

import raymoe
from raymoe import stages
from raymoe.cli import main as cli
from raymoe.config import Execution, Run, load
from raymoe.data.columns import Instruction
from raymoe.data.instructions import encode
from raymoe.methods import SparseInterpolation
from raymoe.models.gates import PromptRouter
from raymoe.models.simoe import interpolate
from raymoe.stages import Context, Stage
from raymoe.storage.store import Store
from raymoe.tracking.ledger import Ledger
from raymoe.upcycle.simoe import Masks, load_simoe, write_simoe

SWEEP = Path(raymoe.__file__).parents[1] / "sweeps" / "num_experts.py"
ENVIRONMENT = {**os.environ, "PYTHONPATH": str(Path(raymoe.__file__).parents[1])}


@pytest.fixture(autouse=True)
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def called(line: str, *more: str) -> int:
    with pytest.raises(SystemExit) as exit:
        cli.main([*line.split(), *more])
    assert isinstance(exit.value.code, int)
    return exit.value.code


def refused(line: str, capsys: pytest.CaptureFixture[str], *more: str) -> list[str]:
    """The lines on stderr of a command that the user got wrong."""
    assert called(line, *more) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    lines = captured.err.splitlines()
    assert all(line.startswith("raymoe: ") for line in lines)
    return [line.removeprefix("raymoe: ") for line in lines]


def finished(stage: Stage, **files: str) -> Path:
    """The stage's output in the store `runs`, as if it had been made."""

    def build(folder: Path) -> dict[str, object]:
        for name, content in files.items():
            path = folder / name.replace("__", "/")
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(content)
        return {"rows": 3}

    return Store("runs").make(stage.name, stage.identity, build).fetch()


# ---- help


def test_usage_names_every_verb(capsys: pytest.CaptureFixture[str]) -> None:
    for line in ("", "--help", "-h", "help"):
        assert called(line) == 0
        out = capsys.readouterr().out
        for verb in (*cli.VERBS, "sweep"):
            assert f"\n  {verb} " in out
    assert called("--version") == 0
    assert capsys.readouterr().out == f"{raymoe.__version__}\n"


@pytest.mark.parametrize("verb", [*cli.VERBS, "sweep"])
def test_help_of_a_verb_names_its_options_and_keys(verb: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert called(f"{verb} --help") == 0
    out = capsys.readouterr().out
    options = cli.VERBS[verb].options if verb in cli.VERBS else {"asha": ""}
    for name in (*options, "dry-run", "json", "method.num-experts", "execution.workers"):
        assert f"\n  --{name.replace('_', '-')} " in out


@pytest.mark.parametrize("line", ["--help", *(f"{verb} --help" for verb in (*cli.VERBS, "sweep"))])
def test_help_fits_100_columns(line: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert called(line) == 0
    assert max(map(len, capsys.readouterr().out.splitlines())) <= 100


def test_help_of_a_sweep_file_fits_100_columns(capsys: pytest.CaptureFixture[str]) -> None:
    assert called(f"sweep {SWEEP} --help") == 0
    out = capsys.readouterr().out
    assert out.startswith(f"usage: raymoe sweep {SWEEP} [config.yaml]")
    assert max(map(len, out.splitlines()[1:])) <= 100


def test_an_alias_is_told_and_means_its_verb(capsys: pytest.CaptureFixture[str]) -> None:
    assert called("--help") == 0
    assert "(alias: filter)" in capsys.readouterr().out
    shown = []
    for verb in ("score", "filter"):
        assert called(f"{verb} --help") == 0
        shown.append(capsys.readouterr().out)
    assert shown[0] == shown[1] and "(alias: filter)" in shown[0]


@pytest.mark.parametrize("method", ["--method trsu", "--method=trsu", "--method.name trsu"])
def test_help_with_a_method_shows_that_method_alone(method: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert called(f"train --help {method}") == 0
    out = capsys.readouterr().out
    assert "\nmethod trsu:\n" in out
    assert "--method.tasks " in out and "--method.num-experts " in out
    assert "--method.token-fraction " not in out and "--method.sparsity-target " not in out
    (line,) = refused("train --help --method rsu", capsys)
    assert line.startswith("method.name: 'rsu' is not a method: choose from dense,")


IMPORTS = """
import contextlib, io, sys
from raymoe.cli import main as cli
for line in sys.argv[1:]:
    with contextlib.suppress(SystemExit), contextlib.redirect_stderr(io.StringIO()) as errors:
        with contextlib.redirect_stdout(io.StringIO()) as out:
            cli.main(line.split())
    assert out.getvalue() or errors.getvalue(), line
    heavy = {"torch", "ray", "transformers", "mlflow", "deepspeed", "numpy", "pyarrow"} & set(sys.modules)
    print(line, "->", *sorted(heavy))
"""


def test_help_mistakes_and_dry_runs_of_stages_import_nothing_heavy(tmp_path: Path) -> None:
    lines = [
        "--help",
        "train --help",
        "train --help --method trsu",
        "sweep --help",
        f"sweep {SWEEP} --help",
        "trian",
        "train --no-such-key 1",
        "train none.yaml",
        "represent --dry-run --method trsu",
        "report --sweep",
    ]
    command = [sys.executable, "-c", IMPORTS, *lines]
    done = subprocess.run(command, capture_output=True, text=True, env=ENVIRONMENT, cwd=tmp_path)
    assert done.stderr == ""
    assert done.stdout.splitlines() == [f"{line} ->" for line in lines]


# ---- mistakes


def test_an_unknown_verb(capsys: pytest.CaptureFixture[str]) -> None:
    (line,) = refused("trian --seed 1", capsys)
    assert line.startswith("unknown verb 'trian': choose from plan, score, represent,")


def test_mistakes_in_the_configuration_come_together(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "run.yaml").write_text("sead: 1\noptimization: {batch_size: 0}\n")
    lines = refused("train run.yaml --precision half", capsys)
    assert {line.split(":")[0] for line in lines} == {"precision", "sead", "optimization.batch_size"}
    assert refused("train none.yaml", capsys) == ["none.yaml: No such file or directory"]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("train --dry-run run.yaml", "--dry-run: takes no value (got 'run.yaml')"),
        ("train --json run.yaml", "--json: takes no value (got 'run.yaml')"),
        ("export --out", "--out: expected a value"),
        ("evaluate --model-folder", "--model-folder: expected a value"),
        ("evaluate --model-folder none", "--model-folder: no model in none"),
        ("report --sweep", "--sweep: expected a value"),
        ("train --asha", "asha: unknown key"),
        ("train --out x", "out: unknown key"),
        ("evaluate", "evaluate: this run is not trained yet"),
        ("export --out x", "export: this run is not trained yet"),
        ("export", "export: --out FOLDER says where to"),
        ("represent --method su", "method.name: su uses no representations: choose from trsu, crsu"),
        ("cluster --method simoe", "method.name: simoe uses no representations: choose from trsu, crsu"),
        ("upcycle --method dense", "method.name: dense has nothing to upcycle"),
        ("upcycle --method simoe", "method.name: simoe has nothing to upcycle"),
        ("export --out x --merge Hi", "--merge: method.name is su, which has no masks to merge: only simoe"),
        (
            "export --merge-domain a --method dense",
            "--merge-domain: method.name is dense, which has no masks",
        ),
        ("export --method simoe --merge a --merge-domain b", "--merge, --merge-domain: give one of them"),
        ("export --method simoe --merge", "--merge: expected a value"),
        ("export --method simoe --merge=", "--merge: expected a value"),
        ("export --method simoe --merge two words", "--merge: takes one value, got 2; put it in quotes"),
        ("export --method simoe --merge Hi --out x", "export: this run is not trained yet"),
        ("export --model-folder none --out x", "--model-folder: no SIMoE model in none (no simoe.json)"),
        ("train --data.train none.jsonl", "data.train: none.jsonl does not exist"),
        ("train --model.name ./none", "model.name: "),
        ("sweep none.py", "none.py: no such sweep file"),
        ("upcycle --materialize run.yaml", "--materialize: run.yaml exists already"),
        (
            "train --storage ftp://runs",
            "execution.storage: expected a folder, s3://bucket/prefix, gs://bucket/prefix",
        ),
    ],
)
def test_mistakes(line: str, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "run.yaml").write_text("seed: 3\n")
    (shown,) = refused(line, capsys)
    assert shown.startswith(message)
    assert [p.name for p in tmp_path.iterdir()] == ["run.yaml"]


def test_a_report_without_a_database(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (line,) = refused("report", capsys)
    assert line.startswith(f"report: no MLflow database at sqlite:///{tmp_path}/mlflow.db: run a sweep first")
    assert list(tmp_path.iterdir()) == []


def test_a_storage_that_can_not_be_written(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").write_text("")
    for line in ("train", "score"):
        (shown,) = refused(f"{line} --storage file/runs", capsys)
        assert shown.startswith("execution.storage: can't write to")


# ---- what a person does to a running command


def test_a_reader_that_leaves_is_no_error() -> None:
    reader, writer = os.pipe()
    os.close(reader)
    command = [sys.executable, "-m", "raymoe.cli", "train", "--help"]
    done = subprocess.run(command, stdout=writer, stderr=subprocess.PIPE, text=True, env=ENVIRONMENT)
    os.close(writer)
    assert (done.returncode, done.stderr) == (128 + signal.SIGPIPE, "")


def test_an_interrupt_ends_with_130(tmp_path: Path) -> None:
    (tmp_path / "slow.py").write_text("import time\nprint('ready', flush=True)\ntime.sleep(60)\n")
    command = [sys.executable, "-m", "raymoe.cli", "sweep", "slow.py"]
    pipe = subprocess.PIPE
    process = subprocess.Popen(command, stdout=pipe, stderr=pipe, text=True, env=ENVIRONMENT, cwd=tmp_path)
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130
    assert errors == "raymoe: interrupted; the same command goes on from here\n"


# ---- verbs on what is in the store


@pytest.mark.parametrize(
    ("verb", "make"),
    [
        ("score", stages.perplexity),
        ("filter", stages.perplexity),
        ("represent", stages.representations),
        ("cluster", stages.clusters),
        ("upcycle", stages.upcycle),
        ("evaluate", stages.training),
        ("export", stages.training),
    ],
)
def test_a_dry_run_lists_what_is_to_do(
    verb: str, make: object, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = load(Run, None, {"method.name": "trsu", "seed": 2})
    stage = make(run)  # type: ignore[operator]
    path = [*stages.upstream([stage]), stage]
    assert called(f"{verb} --method trsu --seed 2 --dry-run") == 0
    assert capsys.readouterr().out == "".join(f"to do         {s.key}\n" for s in path)
    assert list(tmp_path.iterdir()) == []
    finished(path[0])
    assert called(f"{verb} --method trsu --seed 2 --dry-run") == 0
    assert capsys.readouterr().out.splitlines()[:2] == [
        f"in the store  {path[0].key}",
        f"to do         {path[1].key}",
    ]


def test_a_finished_stage_is_shown_and_not_made_again(capsys: pytest.CaptureFixture[str]) -> None:
    run = load(Run, None, {"method.name": "trsu"})
    folder = finished(stages.representations(run))
    assert called("represent --method trsu --json") == 0
    captured = capsys.readouterr()
    assert json.loads(captured.out) == {"path": str(folder), "rows": 3}
    assert captured.err == f"representations: already in {folder}\n"


def test_score_shows_each_task(capsys: pytest.CaptureFixture[str]) -> None:
    folder = finished(stages.perplexity(load(Run, None, {"method.name": "trsu"})))
    scores = {
        "task": ["a"] * 20 + ["b"] * 40,
        "perplexity": [*map(float, range(1, 21)), *map(float, range(40))],
    }
    table = {
        "record": range(60),
        "completion_tokens": [1] * 60,
        "tokens": [2] * 60,
        "nll": [1.0] * 60,
        **scores,
    }
    pq.write_table(pa.table({k: list(v) for k, v in table.items()}), folder / "scores.parquet")
    assert called("score --method trsu") == 0
    out = capsys.readouterr().out
    rows = {
        line.split()[1]: line.replace("│", " ").split() for line in out.splitlines() if line.startswith("│")
    }
    assert rows["a"][:2] == ["a", "20"]
    assert rows["b"][:2] == ["b", "40"]
    assert "10.5000" in rows["a"]  # median
    assert "19.5000" in rows["b"]
    assert "1" in rows["a"][2:]  # kept: 5%
    assert "2" in rows["b"][2:]


def test_export_copies_the_trained_model_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = finished(stages.training(Run()), model__config="{}") / "model"
    save_file({"w": torch.ones(3)}, model / "model.safetensors")
    assert called("export --out 2024") == 0  # a number is a name too
    assert capsys.readouterr().out == "loads with transformers: 2024\n"
    copied = {p.name: p.read_bytes() for p in (tmp_path / "2024").iterdir()}
    assert copied == {p.name: p.read_bytes() for p in model.iterdir()}
    (tmp_path / "2024" / "config").write_text("mine")
    (line,) = refused("export --out 2024", capsys)
    assert "2024" in line and "exist" in line
    assert (tmp_path / "2024" / "config").read_text() == "mine"


def test_an_export_that_fails_leaves_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = finished(stages.training(Run())) / "model"
    model.mkdir()
    save_file({"w": torch.ones(3)}, model / "model.safetensors")
    (model / "other").symlink_to("nowhere")  # can't be copied
    (line,) = refused("export --out out", capsys)
    assert line.startswith("out: can't write the model")
    assert [p.name for p in tmp_path.iterdir()] == ["runs"]


# ---- export of SIMoE


@pytest.fixture(scope="module")
def simoe_folder(pico: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A SIMoE model of the pico Llama, with random gates and deltas."""
    interpolated = interpolate(AutoModelForCausalLM.from_pretrained(pico))
    random = torch.Generator().manual_seed(3)
    for layer in interpolated.layers:
        layer.delta.data.normal_(0, 0.1, generator=random)
    method = SparseInterpolation(num_experts=2)
    gates = (torch.rand(2, interpolated.layout.size, generator=random) - 0.5).clamp(0)
    domains = {"math": [0.75, 0.25], "code": [0.125, 0.875]}
    masks = Masks(method, gates, PromptRouter(method, 32, seed=4).state_dict(), domains)
    out = tmp_path_factory.mktemp("trained") / "simoe"
    write_simoe(out, pico, masks, interpolated.model.named_parameters(), torch.float32)
    return out


def simoe_run(pico: Path, data_folder: Path, trained: Path) -> str:
    """The arguments of a run whose trained model `trained` is put into the store."""
    values = {"model.name": str(pico), "data.train": str(data_folder), "method.name": "simoe"}
    stage = stages.training(load(Run, None, values))

    def build(folder: Path) -> dict[str, object]:
        shutil.copytree(trained, folder / "model")
        return {}

    Store("runs").make(stage.name, stage.identity, build)
    return f"--model.name {pico} --data.train {data_folder} --method simoe"


def logits(folder: Path) -> torch.Tensor:
    with torch.no_grad():
        return AutoModelForCausalLM.from_pretrained(folder)(torch.arange(40)[None]).logits  # type: ignore[no-any-return]


PROMPT = "Compute: # what is 2 + 2?"  # YAML would make a mapping of it, or nothing


def test_a_simoe_run_is_exported_with_its_dense_model(
    pico: Path, data_folder: Path, simoe_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = simoe_run(pico, data_folder, simoe_folder)
    assert called(f"export {run} --out out") == 0
    assert capsys.readouterr().out == "loads with raymoe.upcycle.simoe.load_simoe: out\n"
    assert json.loads(Path("out/simoe.json").read_text())["dense"] == "dense"
    assert torch.equal(logits(Path("out/dense")), logits(pico))
    assert called("export --model-folder out --out again --json") == 0
    assert json.loads(capsys.readouterr().out) == {"path": "again"}
    load_simoe(Path("again"), torch.float32)


def test_the_model_of_a_prompt(
    pico: Path, data_folder: Path, simoe_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = simoe_run(pico, data_folder, simoe_folder)
    simoe = load_simoe(simoe_folder, torch.float32)
    data = load(Run, None, {"data.train": str(data_folder)}).data
    example = Instruction("", "", "", (("user", PROMPT),), "4", "")
    prompt = encode([example], AutoTokenizer.from_pretrained(pico), data).prompt(0)
    (weights,) = simoe.expert_weights([prompt])
    with simoe.interpolated.merged(weights @ simoe.gates_MG), torch.no_grad():
        expected = simoe.model(torch.arange(40)[None]).logits
    for source, out in ((run, "mine"), (f"--model-folder {simoe_folder}", "theirs")):
        assert called(f"export {source} --out {out} --json --merge", PROMPT) == 0
        captured = capsys.readouterr()
        shown = json.loads(captured.out)
        assert shown["path"] == out
        assert shown["expert_weights"] == pytest.approx(weights.tolist(), abs=1e-5)
        assert shown["kept_share"] == pytest.approx(1, abs=1e-4)
        assert "warning" not in captured.err
        torch.testing.assert_close(logits(Path(out)), expected, atol=1e-5, rtol=0)


def test_the_model_of_a_domain(
    pico: Path, data_folder: Path, simoe_folder: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    run = simoe_run(pico, data_folder, simoe_folder)
    (line,) = refused(f"export {run} --out out --merge-domain maths", capsys)
    assert line == "--merge-domain: unknown domain 'maths': choose from code, math"
    assert [p.name for p in tmp_path.iterdir()] == ["runs"]
    assert called(f"export {run} --out out --merge-domain math") == 0
    shown = capsys.readouterr().out.splitlines()
    assert shown == ["expert_weights: [0.75, 0.25]", "kept_share: 1.0", "loads with transformers: out"]
    simoe = load_simoe(simoe_folder, torch.float32)
    with simoe.interpolated.merged(torch.tensor([0.75, 0.25]) @ simoe.gates_MG), torch.no_grad():
        expected = simoe.model(torch.arange(40)[None]).logits
    torch.testing.assert_close(logits(Path("out")), expected, atol=1e-5, rtol=0)
    capsys.readouterr()
    assert refused(f"export {run} --out out", capsys) == [
        "--out: out exists already and is not an empty folder"
    ]


def test_a_merge_that_rounds_the_delta_away_is_warned_about(
    pico: Path, simoe_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(pico, "dense")
    tensors = {n: t.bfloat16() for n, t in load_file("dense/model.safetensors").items()}
    save_file(tensors, "dense/model.safetensors", {"format": "pt"})
    interpolated = interpolate(AutoModelForCausalLM.from_pretrained("dense", dtype=torch.float32))
    for layer in interpolated.layers:
        layer.delta.data.fill_(1e-5)
    method = SparseInterpolation(num_experts=1)
    masks = Masks(
        method,
        torch.ones(1, interpolated.layout.size),
        PromptRouter(method, 32).state_dict(),
        {"math": [1.0]},
    )
    write_simoe(Path("simoe"), Path("dense"), masks, interpolated.model.named_parameters(), torch.float32)
    assert called("export --model-folder simoe --merge-domain math --out out --json") == 0
    captured = capsys.readouterr()
    share = json.loads(captured.out)["kept_share"]
    assert share < 0.5
    assert f"warning: rounding to the dense model's dtype kept {share:.1%} of the delta" in captured.err


def test_a_dry_export_writes_nothing(
    pico: Path, data_folder: Path, simoe_folder: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    run = simoe_run(pico, data_folder, simoe_folder)
    assert called(f"export {run} --out out --merge-domain math --dry-run") == 0
    last = capsys.readouterr().out.splitlines()[-1]
    assert last.startswith("in the store  train-")
    assert called(f"export --model-folder {simoe_folder} --merge Hi --dry-run") == 0
    assert capsys.readouterr().out == f"to do         export {simoe_folder}\n"
    assert [p.name for p in tmp_path.iterdir()] == ["runs"]


def test_a_simoe_folder_has_the_tokenizer_of_its_dense_model(
    pico: Path, data_folder: Path, simoe_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(pico, "other")
    tokenizer = AutoTokenizer.from_pretrained(pico)
    tokenizer.add_tokens(["hello"])
    tokenizer.save_pretrained("other")
    line = f"evaluate --model-folder {simoe_folder} --model.name other --data.train {data_folder}"
    (message,) = refused(line, capsys)
    assert message.startswith(f"--model-folder: the tokenizer in {pico} has another vocabulary than that in")


# ---- verbs on a pico model


def test_a_materialized_model_is_checked_first_and_said_beside_the_json(
    pico: Path, data_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    line = f"upcycle --model.name {pico} --data.train {data_folder} --materialize moe"
    run = load(Run, None, {"model.name": str(pico), "data.train": str(data_folder)})
    (tmp_path / "moe").mkdir()
    (tmp_path / "moe" / "mine").touch()
    assert refused(line, capsys) == ["--materialize: moe exists already and is not an empty folder"]
    assert [p.name for p in tmp_path.iterdir()] == ["moe"]
    (tmp_path / "moe" / "mine").unlink()
    stage, store = stages.upcycle(run), Store("runs")
    for each in [*stages.upstream([stage]), stage]:  # what it computes is cheap enough to be done here
        store.make(
            each.name,
            each.identity,
            lambda f, s=each: s.build(f, Context(store, Execution())),  # type: ignore[misc]
        )
    assert called(f"{line} --json") == 0
    captured = capsys.readouterr()
    assert json.loads(captured.out)["path"] == str(stage.path(store))
    assert captured.err.splitlines()[-1] == "loads with transformers: moe"
    assert AutoModelForCausalLM.from_pretrained("moe").config.num_local_experts == 2


def test_a_model_with_another_tokenizer_is_not_measured(
    pico: Path, data_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(pico, "other")
    tokenizer = AutoTokenizer.from_pretrained(pico)
    tokenizer.add_tokens(["hello"])
    tokenizer.save_pretrained("other")
    (line,) = refused(f"evaluate --model-folder other --model.name {pico} --data.train {data_folder}", capsys)
    assert line.startswith(
        f"--model-folder: the tokenizer in other has another vocabulary than that in {pico}"
    )
    assert [p.name for p in tmp_path.iterdir()] == ["other"]


def test_a_report_is_one_json_value(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path}/mlflow.db")
    ledger = Ledger("raymoe")
    for name in ("old", "new"):
        ledger.sweep(f"{name}-1", f"{name}?", {"sweep": name}, "")
        ledger.trial(f"train-{name}", name, {"n": 2}, {}, "", None)
        ledger.finish(f"train-{name}", "FINISHED")
    assert ledger.close("FINISHED")
    capsys.readouterr()
    assert called("report --json") == 0
    read = json.loads(capsys.readouterr().out)
    assert {sweep["sweep"]: sweep["question"] for sweep in read} == {"new-1": "new?", "old-1": "old?"}
    assert sorted(row["trial"] for sweep in read for row in sweep["rows"]) == ["new", "old"]
