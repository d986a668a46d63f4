"""The papers' setups as files: they hold the papers' figures, resolve without a network and fit their GPUs."""

from __future__ import annotations

import socket
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from raymoe import stages
from raymoe.analysis.size import sizes
from raymoe.cli import main as cli
from raymoe.cli.options import parse_overrides
from raymoe.config import Run, RunFile, load
from raymoe.methods import ContextRepresentations, Representations, SparseInterpolation, TaskRepresentations

FOLDER = Path(__file__).parents[1] / "configs"
FILES = sorted(FOLDER.glob("*.yaml"))
SIMOE = [file for file in FILES if file.stem.endswith("-simoe")]
RSU = [file for file in FILES if file not in SIMOE]
TABLE_8 = {"OpenOrca": 200_000, "Evol": 100_000, "OSS": 50_000, "MetaMathQA": 200_000}
LEARNING_RATES = {"danube2": 1e-5, "llama2": 2e-5}  # RSU paper, 5.1.2
# The dense models' published shapes: 1.83 and 6.74 billion parameters.
SHAPES: dict[str, tuple[str, dict[str, Any]]] = {
    "danube2": (
        "mistral",
        {"hidden_size": 2560, "intermediate_size": 6912, "num_hidden_layers": 24, "heads": 8},
    ),
    "llama2": (
        "llama",
        {"hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32, "heads": 32},
    ),
}
LLAMA_3: dict[str, dict[str, Any]] = {  # 3.21 and 8.03 billion
    "llama3.2-3b": {"hidden_size": 3072, "intermediate_size": 8192, "num_hidden_layers": 28, "head_dim": 128}
    | {"num_attention_heads": 24, "tie_word_embeddings": True},
    "llama3-8b": {"hidden_size": 4096, "intermediate_size": 14_336, "num_hidden_layers": 32}
    | {"num_attention_heads": 32, "tie_word_embeddings": False},
}
# The page's baselines, as options after a file.
BASELINES = {
    "dense": {"method": "dense"},
    "upcycled": {"method": "su", "num_experts": 4, "top_k": 2},
}


def of(file: Path, table: dict[str, Any]) -> Any:
    return next(value for name, value in table.items() if file.stem.startswith(name))


def test_both_methods_are_there_for_both_models() -> None:
    names = {f"{model}-{method}" for model in ("danube2-1.8b", "llama2-7b") for method in ("trsu", "crsu")}
    assert names <= {file.stem for file in FILES}


@pytest.mark.parametrize("file", RSU, ids=lambda f: f.stem)
def test_figures_are_the_papers(file: Path) -> None:
    run_file = load(RunFile, file)
    assert run_file.optimization.learning_rate == of(file, LEARNING_RATES)
    assert (run_file.optimization.batch_size, run_file.data.max_length, run_file.optimization.num_epochs) == (
        128,
        4096,
        1,
    )
    assert run_file.execution.workers == 8
    method = run_file.method
    assert isinstance(method, Representations) and method.top_k == 1
    assert (method.representation, method.router_rows, method.gating) == (
        "attention_output",
        "raw",
        "softmax",
    )
    assert not method.spherical
    sources = run_file.data.sources("train")
    if isinstance(method, TaskRepresentations):
        assert (method.num_experts, method.tasks, method.perplexity_top_fraction) == (
            2,
            ("code", "math"),
            0.05,
        )
        counts = {name: s.max_examples for name in TABLE_8 for s in sources if name in s.name}
        assert counts == TABLE_8 and len(sources) == len(TABLE_8)
        assert set(method.tasks) < {s.domain for s in sources}
    else:
        assert isinstance(method, ContextRepresentations)
        assert (method.num_experts, method.token_fraction) == (4, 0.01)
        assert [(s.name, s.max_examples) for s in sources] == [("Open-Orca/SlimOrca", None)]


@pytest.mark.parametrize("file", RSU, ids=lambda f: f.stem)
def test_state_leaves_an_80_gb_gpu_room_for_activations(file: Path) -> None:
    """bf16: 2 bytes of weights, 4 of gradients, 12 of AdamW and fp32 weights (ZeRO paper, section 3, but for
    gradients in fp32; below stage 2 bf16 runs as stage 2)."""
    run_file, (kind, shape) = load(RunFile, file), of(file, SHAPES)
    heads = {"num_attention_heads": 32, "num_key_value_heads": shape["heads"], "vocab_size": 32_000}
    with torch.device("meta"):
        dense = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **shape, **heads))
    ffn = sum(p.numel() for name, p in dense.named_parameters() if ".mlp." in name)
    assert isinstance(run_file.method, Representations)
    parameters = dense.num_parameters() + (run_file.method.num_experts - 1) * ffn
    assert f"{parameters / 1e9:.2f}e9 parameters" in file.read_text()
    spread = {1: 16, 3: 18}[run_file.execution.zero_stage]  # bytes of a parameter that are over all workers
    state = parameters * (18 - spread + spread / 8)
    assert f"{state / 1e9:.0f} GB a GPU" in file.read_text()
    assert state < 45e9 and run_file.precision == "bfloat16"


def between(run: Run) -> list[str]:
    """The stages between the tokens and the training."""
    if isinstance(run.method, SparseInterpolation):
        return ["prompts"]
    scored = ["perplexity"] if isinstance(run.method, TaskRepresentations) else []
    return [*scored, "representations", "clusters", "upcycle"]


def test_the_pages_three_setups_are_there() -> None:
    expected = {"llama3.2-3b-superni-simoe", "llama3-8b-superni-simoe", "llama3-8b-tulu3-simoe"}
    assert {file.stem for file in SIMOE} == expected


@pytest.mark.parametrize("file", SIMOE, ids=lambda f: f.stem)
def test_figures_are_the_pages(file: Path) -> None:
    run_file = load(RunFile, file)
    method = run_file.method
    assert isinstance(method, SparseInterpolation)
    assert (method.num_experts, method.sparsity_target, method.sparsity_scope) == (8, 0.75, "union")
    (source,) = run_file.data.sources("train")
    columns = (source.system, source.prompt, source.completion)
    if "superni" in file.stem:
        assert source.name == "Muennighoff/natural-instructions"
        assert columns == ("definition", "inputs", "targets")
    else:
        assert source.name == "allenai/tulu-3-sft-mixture" and columns == (None, None, None)
    assert run_file.model.name == of(
        file, {"llama3.2-3b": "meta-llama/Llama-3.2-3B", "llama3-8b": "meta-llama/Meta-Llama-3-8B"}
    )


@pytest.mark.parametrize("file", SIMOE, ids=lambda f: f.stem)
def test_the_commands_in_its_header_are_the_pages_baselines(file: Path) -> None:
    train = f"#   raymoe train configs/{file.name} "
    lines = [line for line in file.read_text().splitlines() if line.startswith(train)]
    options = [line.removeprefix(train).split("#")[0].split() for line in lines]
    assert options[0] == ["--dry-run"]
    base = load(RunFile, file)
    for given, baseline in zip(options[1:], BASELINES.values(), strict=True):
        overrides = parse_overrides(given)
        assert overrides == baseline
        run = load(RunFile, file, overrides)
        assert run.method.name == baseline["method"]
        assert (run.data, run.optimization, run.seed) == (base.data, base.optimization, base.seed)


@pytest.mark.parametrize("file", SIMOE, ids=lambda f: f.stem)
def test_a_simoe_file_says_its_sizes_and_they_fit(file: Path) -> None:
    """bf16 with ZeRO-3: 18 bytes of what is trained, 2 of what is frozen, over all workers."""
    run_file, text = load(RunFile, file), file.read_text()
    shape = {**of(file, LLAMA_3), "num_key_value_heads": 8, "vocab_size": 128_256}
    assert isinstance(run_file.method, SparseInterpolation) and run_file.precision == "bfloat16"
    with torch.device("meta"):
        dense = AutoModelForCausalLM.from_config(AutoConfig.for_model("llama", **shape))
    ends = ("proj.weight", "norm.weight")
    delta = sum(p.numel() for name, p in dense.named_parameters() if name.endswith(ends))
    ffn = sum(p.numel() for name, p in dense.named_parameters() if ".mlp." in name)
    upcycled, active = dense.num_parameters() + 3 * ffn, dense.num_parameters() + ffn
    for number in (dense.num_parameters(), delta, upcycled, active):
        assert f"{number / 1e9:.2f}e9" in text
    assert run_file.execution.zero_stage == 3
    workers = run_file.execution.workers
    assert workers is not None
    for name, state in {
        "Full FT: ": 18 * dense.num_parameters() / workers,
        f"Upcyc., {upcycled / 1e9:.2f}e9 parameters: ": 18 * upcycled / workers,
    }.items():
        assert f"{name}{state / 1e9:.0f} GB" in text
        assert state < 60e9
    found = sizes(dense.config, run_file.method, precision="bfloat16", workers=workers, zero_stage=3)["simoe"]
    assert f"{found['training_bytes'] / 1e9:.0f} GB a GPU" in text
    assert f"{found['total'] / 1e9:.2f}e9, {1 - found['total'] / active:.1%} below" in text


@pytest.mark.parametrize("file", FILES, ids=lambda f: f.stem)
def test_a_dry_run_resolves_it_without_a_network(
    file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def refused(*_: object) -> None:
        raise AssertionError("a dry run connects to something")

    for name in ("connect", "connect_ex"):
        monkeypatch.setattr(socket.socket, name, refused)
    monkeypatch.setenv("RAYMOE_STORAGE", str(tmp_path))
    with pytest.raises(SystemExit) as ended:
        cli.main(["train", str(file), "--dry-run"])
    done = capsys.readouterr()
    assert (ended.value.code, done.err) == (0, "")
    run = load(RunFile, file).run()
    training = stages.training(run)
    planned = [line.split()[2] for line in done.out.splitlines() if line.startswith("  to do")]
    assert planned == [stage.key for stage in [*stages.upstream([training]), training]]
    expected = ["instructions", *between(run), "train"]
    assert [key.split("-")[0] for key in planned] == expected
    assert list(tmp_path.iterdir()) == []
