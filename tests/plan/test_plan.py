"""The planner: counts against instantiated models, memory against what training allocates, hours against formulas."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import plan_memory
import pytest
import torch
import yaml
from support.models import FAMILIES, pico_model

from raymoe.analysis.size import count, on_meta
from raymoe.cli.main import main
from raymoe.config import RunFile
from raymoe.methods import Experts, SparseInterpolation
from raymoe.models.gates import Gates, PromptRouter
from raymoe.models.moe import upcycle_model
from raymoe.models.simoe import interpolate
from raymoe.plan.cost import CLUSTER_INSTANCE, INSTANCES
from raymoe.plan.memory import activations, recommended
from raymoe.plan.options import PlanOptions, parse_options
from raymoe.plan.planner import model_config, plan, plan_sweep
from raymoe.schema import InputError

ROOT = Path(__file__).parents[2]
PLANS: list[dict[str, Any]] = json.loads((Path(__file__).parent / "plans.json").read_text())
"""Arguments of `raymoe plan` and the JSON that commit 6ca74ed printed for them."""
METHODS: dict[str, dict[str, Any]] = {
    "dense": {"name": "dense"},
    "su": {"name": "su", "num_experts": 4, "top_k": 2},
    "crsu": {"name": "crsu", "num_experts": 3},
    "trsu": {"name": "trsu", "num_experts": 4},
    "simoe": {"name": "simoe", "num_experts": 3, "sparsity_target": 0.0},
}
PAPERS: dict[str, dict[str, Any]] = {
    "danube2-1.8b": {
        "model_type": "mistral", "hidden_size": 2560, "intermediate_size": 6912, "num_hidden_layers": 24,
        "num_attention_heads": 32, "num_key_value_heads": 8, "vocab_size": 32_000,
    },
    "llama-2-7b": {
        "model_type": "llama", "hidden_size": 4096, "intermediate_size": 11_008, "num_hidden_layers": 32,
        "num_attention_heads": 32, "num_key_value_heads": 32, "vocab_size": 32_000,
    },
    "llama-3.2-3b": {
        "model_type": "llama", "hidden_size": 3072, "intermediate_size": 8192, "num_hidden_layers": 28,
        "num_attention_heads": 24, "num_key_value_heads": 8, "head_dim": 128, "vocab_size": 128_256,
        "tie_word_embeddings": True,
    },
    "llama-3-8b": {
        "model_type": "llama", "hidden_size": 4096, "intermediate_size": 14_336, "num_hidden_layers": 32,
        "num_attention_heads": 32, "num_key_value_heads": 8, "vocab_size": 128_256,
    },
}  # fmt: skip
KNOWN = {  # parameters, as the models' publishers give them
    "danube2-1.8b": 1_831_201_280,
    "llama-2-7b": 6_738_415_616,
    "llama-3.2-3b": 3_212_749_824,
    "llama-3-8b": 8_030_261_248,
}


def write_shape(folder: Path, name: str) -> Path:
    """A folder with config.json alone."""
    (folder / "config.json").write_text(json.dumps(PAPERS[name]))
    return folder


def run_file(folder: Path | str, method: str = "dense", **settings: Any) -> RunFile:
    return RunFile.model_validate({"model": {"name": str(folder)}, "method": METHODS[method], **settings})


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("family", FAMILIES)
def test_counts_are_the_instantiated_models(family: str, method: str, dense_models: dict[str, Path]) -> None:
    made = plan(run_file(dense_models[family], method), PlanOptions(tokens=10**6)).counts
    model = pico_model(family)
    active = total = trained = sum(p.numel() for p in model.parameters())
    settings = run_file(dense_models[family], method).method
    if isinstance(settings, Experts):
        n, k = settings.num_experts, settings.top_k
        upcycle_model(model, torch.randn(2, n, 32), settings)
        total = trained = sum(p.numel() for p in model.parameters())
        experts = sum(p.numel() for name, p in model.named_parameters() if ".experts." in name)
        active = total - experts * (n - k) // n
    elif isinstance(settings, SparseInterpolation):
        made_of = interpolate(model)
        trained = sum(layer.delta.numel() for layer in made_of.layers)
        beside = [*Gates(settings, made_of.layout).parameters(), *PromptRouter(settings, 32).parameters()]
        active = total = total + trained + sum(p.numel() for p in beside)
    assert (made.total, made.active, made.trained) == (total, active, trained)


@pytest.mark.parametrize("name", PAPERS)
def test_the_papers_models_have_their_known_sizes(name: str, tmp_path: Path) -> None:
    config = model_config(run_file(write_shape(tmp_path, name)))
    assert on_meta(config).num_parameters() == KNOWN[name]


@pytest.mark.parametrize("name", PAPERS)
def test_the_known_sizes_are_the_sum_of_the_shapes(name: str) -> None:
    c = PAPERS[name]
    width, heads = c["hidden_size"], c["num_attention_heads"]
    head = c.get("head_dim", width // heads)
    attention = 2 * width * head * (heads + c["num_key_value_heads"])  # query and output; key and value
    layer = attention + 3 * width * c["intermediate_size"] + 2 * width  # gate, up, down; two norms
    embeddings = c["vocab_size"] * width * (1 if c.get("tie_word_embeddings") else 2)
    assert embeddings + c["num_hidden_layers"] * layer + width == KNOWN[name]


def test_flops_are_six_per_parameter_and_attention(tmp_path: Path) -> None:
    made = plan(
        run_file(write_shape(tmp_path, "llama-2-7b"), data={"max_length": 2048}), PlanOptions(tokens=10**9)
    )
    parameters = KNOWN["llama-2-7b"] - 32_000 * 4096
    assert made.flops_per_token == 6 * parameters + 6 * 32 * 2048 * 4096


def test_hours_and_price_are_flops_over_peak(tmp_path: Path) -> None:
    options = PlanOptions("a100-80gb", gpus=8, mfu=0.4, tokens=10**9, price_per_gpu_hour=2.5)
    settings: dict[str, Any] = {
        "precision": "bfloat16",
        "data": {"max_length": 1000},
        "optimization": {"batch_size": 8},
    }
    made = plan(run_file(write_shape(tmp_path, "llama-2-7b"), **settings), options)
    hours = made.flops_per_token * 1e9 / (8 * 312e12 * 0.4) / 3600
    assert made.steps == 125_000
    assert made.on[0].cost.hours == pytest.approx(hours)
    assert made.on[0].cost.price == pytest.approx(hours * 8 * 2.5)


def test_memory_of_the_stages_is_their_state(tmp_path: Path) -> None:
    made = plan(
        run_file(write_shape(tmp_path, "danube2-1.8b"), precision="bfloat16"),
        PlanOptions(gpus=8, tokens=10**9),
    )
    n = KNOWN["danube2-1.8b"]
    state = {(s.zero_stage, s.offload): s.state for s in made.memory}
    spread = 2 * n + 16 * n / 8  # bf16 weights; fp32 gradients, weights and two moments over 8
    for stage in range(3):  # below ZeRO-2, bf16 runs as ZeRO-2
        assert state[stage, "none"] == pytest.approx(spread, rel=1e-6)
    assert state[2, "optimizer"] == pytest.approx(2 * n, rel=1e-6)
    assert state[3, "none"] == pytest.approx(18 * n / 8, rel=1e-6)
    assert state[3, "parameters"] == 0
    assert (0, "optimizer") not in state and (2, "parameters") not in state


@pytest.mark.slow
def test_memory_is_what_training_allocates(monkeypatch: pytest.MonkeyPatch) -> None:
    place = {"RANK": 0, "LOCAL_RANK": 0, "WORLD_SIZE": 1, "MASTER_PORT": plan_memory.free_port()}
    for name, value in place.items():
        monkeypatch.setenv(name, str(value))
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    for case, measured in plan_memory.measured(plan_memory.FEW).items():
        estimate = plan_memory.estimated(case)
        print(plan_memory.row(case, estimate, measured))
        assert estimate == pytest.approx(measured, rel=0.15), case.name


def test_checkpointing_keeps_inputs_and_one_layer(tmp_path: Path) -> None:
    model = on_meta(model_config(run_file(write_shape(tmp_path, "llama-2-7b"))))
    method = run_file("local").method
    whole, less = (activations(model, method, "bfloat16", 4096, on) for on in (False, True))
    layer = 2 * (4 + 4) * 4096 + 2 * 5 * 4096 + 8 * 11_008  # two norms, attention, FFN
    assert whole.kept == 4096 * 32 * layer
    assert less.kept == 4096 * 32 * 2 * 4096
    assert whole.passing == 4096 * (10 * 4096 + 12 * 16_000)  # 2 chunks of 2**26 logits at most
    assert less.passing > 4096 * layer


def test_what_is_recommended_fits_and_little_memory_takes_more(tmp_path: Path) -> None:
    settings: dict[str, Any] = {
        "precision": "bfloat16",
        "data": {"max_length": 4096},
        "optimization": {"batch_size": 128},
    }
    asked = run_file(write_shape(tmp_path, "llama-3-8b"), "su", **settings)
    model = on_meta(model_config(asked))
    counts = count(model, asked.method)
    large, middle, small = (recommended(model, asked, 8, m * 1e9, counts) for m in (800, 80, 24))
    assert large is not None and (large.zero_stage, large.activation_checkpointing) == (2, False)
    assert middle is not None and middle.total <= 0.9 * 80e9 and middle.zero_stage == 3
    assert small is not None and small.offload != "none"
    assert recommended(model, asked, 8, 1e9, counts) is None


def test_steps_come_from_max_steps_or_are_asked_for(tmp_path: Path) -> None:
    folder = write_shape(tmp_path, "danube2-1.8b")
    execution = {"storage": str(tmp_path / "runs")}
    unknown = plan(run_file(folder, execution=execution), PlanOptions())
    assert unknown.steps is None and "--tokens" in unknown.steps_from
    assert all(each.cost.hours is None for each in unknown.on)
    capped = plan(run_file(folder, execution=execution, optimization={"max_steps": 7}), PlanOptions())
    assert (capped.steps, capped.tokens) == (7, 7 * 8 * 512)


def test_steps_of_encoded_instructions_are_those_that_training_takes(
    pico: Path, data_folder: Path, tmp_path: Path
) -> None:
    from raymoe import stages
    from raymoe.data.instructions import Encoded
    from raymoe.data.packing import epoch_sequences
    from raymoe.storage.store import Store

    settings: dict[str, Any] = {
        "data": {"train": str(data_folder), "max_length": 256},
        "execution": {"storage": str(tmp_path)},
        "optimization": {"batch_size": 4},
    }
    asked = run_file(pico, **settings)
    context = stages.Context(Store(str(tmp_path)), asked.execution, lambda _: None)
    encoded = stages.make(stages.instructions(asked.run()), context).fetch() / "train"
    windows = epoch_sequences(Encoded.load(encoded), 256, seed=0, epoch=0)
    assert plan(asked, PlanOptions()).steps == len(windows) // 4


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--gpu", "abacus"], "--gpu: unknown GPU 'abacus'"),
        (["--mfu", "1.5"], "--mfu: expected a share"),
        (["--tokens", "many"], "--tokens: expected a number above 0 (got 'many')"),
        (["--gpus", "3"], "--gpus: 3 can't share optimization.batch_size 8 evenly"),
        (["--model", "nobody/nothing"], "'nobody/nothing' is not in Hugging Face's cache"),
    ],
)
def test_wrong_input_is_one_line(
    arguments: list[str], expected: str, capsys: pytest.CaptureFixture[str]
) -> None:
    if arguments[0] == "--model":
        arguments = ["--model.name", arguments[1]]
    with pytest.raises(SystemExit) as exit_:
        main(["plan", *arguments])
    error = capsys.readouterr().err
    assert exit_.value.code == 2 and error.count("\n") == 1 and expected in error


def test_a_folder_without_a_config_is_an_input_error(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"has no config\.json"):
        model_config(run_file(tmp_path))


def test_a_sweep_costs_what_its_trials_cost(tmp_path: Path, pico: Path) -> None:
    trials = {
        name: run_file(pico, name, execution={"storage": str(tmp_path)}, precision="bfloat16")
        for name in ("dense", "su")
    }
    options = PlanOptions(gpus=4, tokens=10**9)
    made = plan_sweep(trials, options)
    each = [plan(j, replace(options, gpu="l40s")).on[0].cost for j in trials.values()]
    assert made.hours == pytest.approx(sum(e.hours or 0 for e in each))
    assert made.hours is not None
    dollars = INSTANCES[CLUSTER_INSTANCE][2]
    assert made.price == pytest.approx(made.hours * dollars)
    assert [t.trial for t in made.trials] == ["dense", "su"]
    unknown = plan_sweep(trials, PlanOptions(gpus=4))
    assert unknown.hours is None and unknown.price is None


def test_a_sweep_is_planned_on_the_instances_of_the_cluster_file() -> None:
    nodes = yaml.safe_load((ROOT / "cluster.yaml").read_text())["available_node_types"]
    assert CLUSTER_INSTANCE in {node["node_config"]["InstanceType"] for node in nodes.values()}


def test_the_command_line_plans_a_sweep(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    file = ROOT / "sweeps" / "num_experts.py"
    arguments = ["--sweep", str(file), "--tokens", "1_000_000", "--execution.storage", str(tmp_path)]
    with pytest.raises(SystemExit) as exit_:
        main(["plan", *arguments, "--price-per-gpu-hour", "2", "--json"])
    made = json.loads(capsys.readouterr().out)
    assert exit_.value.code == 0
    assert made["gpu"] == "l40s" and len(made["trials"]) > 1
    assert made["price"] == pytest.approx(2 * made["hours"])


def test_elastic_workers_may_share_unevenly(pico: Path) -> None:
    asked = run_file(pico, execution={"workers": (2, 3)})
    assert parse_options({}, asked).gpus == 3
    assert plan(asked, parse_options({"tokens": "1_000_000"}, asked)).gpus == 3


def test_the_command_line_prints_json(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    arguments = ["--json", "--gpu", "H100", "--tokens", "1_000_000", "--execution.storage", str(tmp_path)]
    with pytest.raises(SystemExit) as exit_:
        main(["plan", *arguments])
    made = json.loads(capsys.readouterr().out)
    assert exit_.value.code == 0
    assert (made["model"], made["method"], made["steps"]) == ("local", "su", 244)
    assert [each["gpu"] for each in made["on"]] == ["h100"]


@pytest.mark.parametrize("case", PLANS, ids=lambda case: case["arguments"])
def test_json_is_what_commit_6ca74ed_printed(
    case: dict[str, Any], capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in PAPERS:
        (tmp_path / name).mkdir()
        write_shape(tmp_path / name, name)
    monkeypatch.chdir(tmp_path)
    ours = ("configs/", "sweeps/")
    arguments = [str(ROOT / w) if w.startswith(ours) else w for w in case["arguments"].split()]
    with pytest.raises(SystemExit, match="^0$"):
        main(["plan", *arguments, "--json"])
    made = json.loads(capsys.readouterr().out)
    assert (list(made), made) == (list(case["plan"]), case["plan"])
