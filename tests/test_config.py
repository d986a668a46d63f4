from __future__ import annotations

import re
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
import yaml
from pydantic import ValidationError
from transformers import LlamaConfig
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS
from transformers.models.llama.modeling_llama import LlamaMLP

from raymoe.cli.options import help_text, parse_overrides
from raymoe.config import Evaluation, Execution, Run, RunFile, load, replace, validate
from raymoe.keys import parts_of
from raymoe.methods import METHODS, ContextRepresentations, SparseUpcycling, TaskRepresentations
from raymoe.models.moe import SparseMoE
from raymoe.schema import Config, InputError


def written(folder: Path, values: Any) -> Path:
    file = folder / "run.yaml"
    file.write_text(values if isinstance(values, str) else yaml.safe_dump(values))
    return file


def command_line(text: str, file: Path | None = None) -> RunFile:
    return load(RunFile, file, parse_overrides(text.split()))


def problems(values: dict[str, Any]) -> list[str]:
    with pytest.raises(InputError) as caught:
        validate(RunFile, values)
    return str(caught.value).splitlines()


# ---- precedence


def test_command_line_wins_over_yaml_over_default(tmp_path: Path) -> None:
    file = written(tmp_path, {"seed": 3, "optimization": {"batch_size": 16, "weight_decay": 0.5}})
    run_file = command_line("--seed 4 --optimization.weight-decay 0.25", file)
    assert (run_file.seed, run_file.optimization.weight_decay) == (4, 0.25)
    assert run_file.optimization.batch_size == 16
    assert run_file.optimization.num_epochs == RunFile().optimization.num_epochs


def test_a_method_named_in_yaml_keeps_its_settings_under_overrides(tmp_path: Path) -> None:
    file = written(tmp_path, {"method": {"name": "trsu", "num_experts": 6, "tasks": ["a", "b", "c"]}})
    method = command_line("--method.load-balance-alpha 0.5", file).method
    expected = TaskRepresentations(num_experts=6, tasks=("a", "b", "c"), load_balance_alpha=0.5)
    assert method == expected


def test_naming_another_method_drops_the_settings_of_the_one_before(tmp_path: Path) -> None:
    file = written(tmp_path, {"method": {"name": "trsu", "tasks": ["a", "b"]}})
    assert command_line("--method crsu", file).method == ContextRepresentations()


@pytest.mark.parametrize("given", [{"name": "su", "num_experts": 4}, {"num_experts": 4}])
def test_naming_the_same_method_keeps_its_settings(tmp_path: Path, given: dict[str, Any]) -> None:
    assert command_line("--method su", written(tmp_path, {"method": given})).method.num_experts == 4


@pytest.mark.parametrize("line", ["--method crsu --num-experts 4", "--num-experts 4 --method crsu"])
def test_the_order_of_options_does_not_matter(line: str) -> None:
    assert command_line(line).method == ContextRepresentations(num_experts=4)


def test_storage_defaults_to_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAYMOE_STORAGE", "/shared/runs")
    assert Execution().storage == "/shared/runs"
    assert Execution(storage="here").storage == "here"


# ---- what a command line means


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ("--method.num-experts 4 --seed=1", {"method.num_experts": 4, "seed": 1}),
        ("--dry-run", {"dry_run": True}),
        ("--no-gpu", {"gpu": False}),
        ("--execution.no-gpu", {"execution.gpu": False}),
        ("--milestones 0 0.5 1", {"milestones": [0, 0.5, 1]}),
        ("--tasks [code,math]", {"tasks": ["code", "math"]}),
        ("--revision null", {"revision": None}),
        ("--seed -1", {"seed": -1}),
        ("--train *.jsonl", {"train": "*.jsonl"}),
        ("--train a=b.jsonl", {"train": "a=b.jsonl"}),
        ("--train=a=b.jsonl", {"train": "a=b.jsonl"}),
        ("--data.revision 2024-01-31", {"data.revision": "2024-01-31"}),
        ("--seed 1 --seed 2", {"seed": 2}),
        ("", {}),
    ],
)
def test_options(words: str, expected: dict[str, Any]) -> None:
    assert parse_overrides(words.split()) == expected


def test_a_word_that_belongs_to_no_option() -> None:
    with pytest.raises(InputError, match="unexpected argument 'oops'"):
        parse_overrides(["oops", "--seed", "1"])


def test_a_bare_key_is_the_only_part_that_has_it() -> None:
    run_file = command_line("--num-experts 4 --micro-batch 2 --train x.jsonl --hidden-size 64 --no-gpu")
    assert run_file.method == SparseUpcycling(num_experts=4)
    assert run_file.execution == Execution(micro_batch=2, gpu=False)
    assert (run_file.data.train, run_file.model.local.hidden_size) == ("x.jsonl", 64)


def test_one_value_for_a_list_is_a_list_of_one() -> None:
    run_file = command_line("--method trsu --tasks code --generation-domains math --milestones 1")
    assert isinstance(run_file.method, TaskRepresentations)
    assert run_file.method.tasks == ("code",)
    assert run_file.evaluation == Evaluation(generation_domains=("math",), milestones=(1.0,))


def test_numbers_as_yaml_writes_them() -> None:
    # PyYAML reads 1e-5 as text
    assert command_line("--optimization.learning-rate 1e-5").optimization.learning_rate == 1e-5


@pytest.mark.parametrize("option", ["--max-steps", "--workers", "--zero-stage", "--weight-decay"])
def test_an_option_without_its_number_is_not_one(option: str) -> None:
    with pytest.raises(InputError, match="got 'true'"):
        command_line(option)


# ---- errors


def test_every_problem_is_one_line_and_all_come_at_once() -> None:
    lines = problems(
        {
            "seed": "x",
            "precision": "float16",
            "optimization": {"learning_rate": -1, "shedule": "cosine"},
            "method": {"name": "crsu", "num_experts": 1, "tokn_fraction": 0.5},
            "execution": {"offload": "parameters"},
            "learning_rate": 1,
        }
    )
    expected = {
        "seed": ["integer", "'x'"],
        "precision": ["'float32' or 'bfloat16'", "'float16'"],
        "optimization.learning_rate": ["greater than 0", "-1"],
        "optimization.shedule": ["unknown key", "schedule"],
        "method.num_experts": ["greater than or equal to 2", "1"],
        "method.tokn_fraction": ["unknown key", "token_fraction"],
        "execution": ["offload parameters needs zero_stage 3"],
        "learning_rate": ["ambiguous", "model.local.learning_rate", "optimization.learning_rate"],
    }
    assert {line.split(":")[0] for line in lines} == set(expected)
    assert len(lines) == len(expected)
    for line in lines:
        key, message = line.split(": ", 1)
        for part in expected[key]:
            assert part in message, line


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("--method simoe --top-k 2", "method.top_k: simoe has no top_k (su, trsu, crsu, drop have)"),
        (
            "--sparsity-target 0.5 --method trsu",
            "method.sparsity_target: trsu has no sparsity_target (simoe has)",
        ),
        ("--method.tasks math", "method.tasks: su has no tasks (trsu has)"),
    ],
)
def test_a_setting_of_another_method(line: str, message: str) -> None:
    with pytest.raises(InputError) as caught:
        command_line(line)
    assert str(caught.value) == message


def test_ambiguous_bare_keys_come_with_the_other_problems() -> None:
    with pytest.raises(InputError) as caught:
        command_line("--learning-rate 1 --revision main --num-expert 3")
    lines = str(caught.value).splitlines()
    assert lines == [
        "learning_rate: ambiguous, choose from model.local.learning_rate, optimization.learning_rate",
        "revision: ambiguous, choose from data.revision, model.revision",
        "num_expert: unknown key, did you mean num_experts?",
    ]


@pytest.mark.parametrize(
    ("values", "line"),
    [
        ({"sead": 1}, "sead: unknown key, did you mean seed?"),
        ({"num_experts": 4}, "num_experts: unknown key, choose from method.num_experts"),
        ({"method": {"top-k": 1}}, "method.top-k: unknown key, did you mean top_k?"),
        (
            {"method": {"name": "dense", "top_k": 1}},
            "method.top_k: dense has no top_k (su, trsu, crsu, drop have)",
        ),
        (
            {"method": {"name": "simoe", "load_balance_alpha": 0.1}},
            "method.load_balance_alpha: simoe has no load_balance_alpha (su, trsu, crsu, drop have)",
        ),
        (
            {"method": {"sparsity_target": 0.5}},
            "method.sparsity_target: su has no sparsity_target (simoe has)",
        ),
        (
            {"method": {"name": "simoe", "sparsity_traget": 0.5}},
            "method.sparsity_traget: unknown key, did you mean sparsity_target?",
        ),
        (
            {"model": {"local": {"hiden_size": 1}}},
            "model.local.hiden_size: unknown key, did you mean hidden_size?",
        ),
        ({"trsu": {"num_experts": 4}}, "trsu: unknown key"),
        ({"method": {"dense": 1}}, "method.dense: unknown key"),
        (
            {"method": {"name": "rsu"}},
            f"method.name: 'rsu' is not a method: choose from {', '.join(METHODS)}",
        ),
        ({"seed": {"x": 1}}, "seed: Input should be a valid integer (got {'x': 1})"),
        ({"data": "x.jsonl"}, "data: Input should be a valid dictionary or instance of Data (got 'x.jsonl')"),
    ],
)
def test_messages(values: dict[str, Any], line: str) -> None:
    assert problems(values) == [line]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("a: [1", "not valid YAML"),
        ("- 1\n- 2", "expected keys and values, found list"),
        ("", "expected keys and values, found NoneType"),
        ("seed: !!python/object/apply:os.system [true]", "not valid YAML"),
    ],
)
def test_a_file_that_is_no_configuration(tmp_path: Path, content: str, message: str) -> None:
    file = written(tmp_path, content)
    with pytest.raises(InputError) as caught:
        load(RunFile, file)
    assert str(caught.value).startswith(f"{file}: {message}")
    assert "\n" not in str(caught.value)


def test_a_file_that_is_not_there_or_not_text(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="No such file"):
        load(RunFile, tmp_path / "none.yaml")
    with pytest.raises(InputError, match="directory"):
        load(RunFile, tmp_path)
    (tmp_path / "binary.yaml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(InputError, match="not valid YAML"):
        load(RunFile, tmp_path / "binary.yaml")


def test_a_key_below_a_value_is_refused() -> None:
    with pytest.raises(InputError, match=r"train\.file: train is 'x', not a group of keys"):
        load(RunFile, None, {"data.train": "x", "data.train.file": "y"})


# ---- rules between settings


@pytest.mark.parametrize(
    ("method", "message"),
    [
        ({"name": "trsu", "num_experts": 3}, "num_experts 3 is not a multiple of the 2 tasks"),
        ({"name": "trsu", "num_experts": 2, "tasks": ["a", "b", "c"]}, "not a multiple of the 3 tasks"),
        ({"name": "trsu", "tasks": ["code", "code"]}, "names one twice"),
        ({"name": "su", "num_experts": 2, "top_k": 3}, "top_k 3 is larger than num_experts 2"),
    ],
)
def test_methods_refuse_what_can_not_be(method: dict[str, Any], message: str) -> None:
    (line,) = problems({"method": method})
    assert line.startswith("method: ")
    assert message in line


def test_methods_take_what_can_be() -> None:
    assert TaskRepresentations(num_experts=6, tasks=("a", "b", "c")).num_experts == 6
    assert SparseUpcycling(num_experts=2, top_k=2).top_k == 2


@pytest.mark.parametrize("milestones", [[0.5, 0.2], [0.5, 0.5], [0, 1.1], [-0.1]])
def test_milestones_rise_within_training(milestones: list[float]) -> None:
    assert problems({"evaluation": {"milestones": milestones}}) == [
        f"evaluation: milestones {[float(m) for m in milestones]} must rise within [0, 1]"
    ]


@pytest.mark.parametrize("milestones", [[], [0, 0.5]])
def test_the_last_milestone_is_the_end(milestones: list[float]) -> None:
    assert problems({"evaluation": {"milestones": milestones}}) == [
        f"evaluation: milestones {[float(m) for m in milestones]}: the last must be 1.0, the end of training"
    ]


def test_seeds_are_not_negative() -> None:
    assert problems({"seed": -1}) == ["seed: Input should be greater than or equal to 0 (got -1)"]


def test_confidence_is_above_chance_where_it_scales() -> None:
    method = {"name": "crsu", "num_experts": 4, "router_confidence": 0.25}
    assert problems({"method": method}) == [
        "method: router_confidence 0.25 must be above 1/num_experts, chance, which is 0.25"
    ]
    for more in ({"router_confidence": 0.26}, {"router_rows": "raw"}, {"settings": "paper"}):
        assert validate(RunFile, {"method": {**method, **more}})


def test_experts_implementations_are_those_of_transformers_and_compute_the_same() -> None:
    offered = get_args(Execution.model_fields["experts_implementation"].annotation)
    assert {*offered, "deepgemm", "sonicmoe"} == {"eager", *ALL_EXPERTS_FUNCTIONS.keys()}
    config = LlamaConfig(hidden_size=16, intermediate_size=24, num_attention_heads=2)
    rows = torch.randn(3, 16, generator=torch.Generator().manual_seed(0))
    x = torch.randn(1, 9, 16, generator=torch.Generator().manual_seed(1))
    torch.manual_seed(2)
    mlp, results = LlamaMLP(config), []
    for name in offered:
        moe = SparseMoE.from_dense(mlp, rows, SparseUpcycling(num_experts=3, top_k=2), name)
        y = moe(x)
        y.square().sum().backward()
        results.append([y, *(p.grad for p in moe.parameters())])
    for other in results[1:]:
        torch.testing.assert_close(other, results[0])
    (line,) = problems({"execution": {"experts_implementation": "sonicmoe"}})
    assert line.startswith("execution.experts_implementation: Input should be 'grouped_mm', 'batched_mm' or")


@pytest.mark.parametrize("name", ["trsu", "crsu"])
def test_paper_settings_are_the_papers_unless_given(name: str) -> None:
    paper = validate(RunFile, {"method": {"name": name, "settings": "paper"}}).method
    got = (paper.representation, paper.router_rows, paper.gating, paper.spherical)  # type: ignore[union-attr]
    assert got == ("attention_output", "raw", "softmax", False)
    mixed = validate(
        RunFile, {"method": {"name": name, "settings": "paper", "gating": "renormalized"}}
    ).method
    assert (mixed.gating, mixed.router_rows) == ("renormalized", "raw")  # type: ignore[union-attr]


# ---- replace


def test_replace_keeps_given_settings_between_methods() -> None:
    base = Run(method=TaskRepresentations(num_experts=6, tasks=("a", "b"), gating="softmax"))
    assert replace(base, {"method.name": "crsu"}).method == ContextRepresentations(
        num_experts=6, gating="softmax"
    )
    assert replace(base, {"method.name": "dense"}).method == METHODS["dense"]()
    there_and_back = replace(replace(base, {"method.name": "su"}), {"method.name": "trsu"})
    assert there_and_back.method == TaskRepresentations(num_experts=6, gating="softmax")


@pytest.mark.parametrize("name", METHODS)
def test_replace_leaves_a_method_made_in_code_what_it_is(name: str) -> None:
    run = Run(method=METHODS[name]())  # type: ignore[arg-type]
    assert replace(run, {"seed": 7}) == run.model_copy(update={"seed": 7})


def test_replace_validates_and_leaves_the_original() -> None:
    base = Run()
    assert replace(base, {"method.num_experts": 8}).method == SparseUpcycling(num_experts=8)
    assert base == Run()
    with pytest.raises(InputError, match=r"method\.num_experts: .*greater than or equal to 2.*got 1"):
        replace(base, {"method.num_experts": 1})


# ---- round trip, freezing, help


RUN_FILES = [
    RunFile(),
    validate(
        RunFile,
        {
            "model": {"name": "some/model", "revision": "abc"},
            "data": {"train": "x.jsonl", "max_examples": 7, "chat_template": "plain"},
            "method": {"name": "trsu", "num_experts": 6, "tasks": ["a", "b", "c"], "settings": "paper"},
            "optimization": {"learning_rate": 1e-5, "schedule": "linear", "max_steps": 3},
            "evaluation": {"milestones": [1], "generation_domains": []},
            "precision": "bfloat16",
            "seed": 3,
            "execution": {"zero_stage": 3, "offload": "parameters", "gpu": True, "storage": "/x: y #z"},
        },
    ),
    *(validate(RunFile, {"method": {"name": name}}) for name in METHODS),
]


@pytest.mark.parametrize("run_file", RUN_FILES)
def test_a_run_file_dumped_to_yaml_and_loaded_is_the_same(tmp_path: Path, run_file: RunFile) -> None:
    text = yaml.safe_dump(run_file.model_dump(mode="json"), sort_keys=False)
    loaded = load(RunFile, written(tmp_path, text))
    assert loaded == run_file
    assert loaded.run() == run_file.run()
    assert loaded.model_dump(mode="json") == run_file.model_dump(mode="json")


def test_run_is_the_run_file_without_its_execution() -> None:
    run_file = RUN_FILES[1]
    assert run_file.run().model_dump() == {k: v for k, v in run_file.model_dump().items() if k != "execution"}
    assert type(run_file.run()) is Run


def test_configurations_are_frozen() -> None:
    run = Run()
    with pytest.raises(ValidationError, match="frozen"):
        run.seed = 1  # type: ignore[misc]
    with pytest.raises(ValidationError, match="frozen"):
        run.method.num_experts = 3  # type: ignore[union-attr, misc]


def groups(text: str) -> dict[str, dict[str, str]]:
    """Title -> option -> its text, of what `--help` shows."""
    found: dict[str, dict[str, str]] = {}
    for group in text.split("\n\n")[1:]:
        title, *options = re.split(r"\n  --", group)
        entries = (" ".join(option.split()).split(" ", 1) for option in options)
        found[title.split(":")[0]] = {name: about for name, about in entries}
        assert len(found[title.split(":")[0]]) == len(options)
    return found


def test_help_names_every_key_that_the_command_line_takes() -> None:
    shown = groups(help_text())
    options = [name for group in shown.values() for name in group]
    assert {"method", "seed", "data.max-length", "model.local.num-layers"} <= set(options)
    assert {"method.tasks", "method.token-fraction", "execution.zero-stage"} <= set(options)
    several = {name for name in options if options.count(name) > 1}
    assert several == {"method.num-experts"}  # two meanings, two defaults
    for key in [option.replace("-", "_") for option in options if option != "method"]:
        assert any(known(key, method) for method in METHODS), key
    assert not known("method.no_such_key", "crsu")


def test_help_is_grouped_by_part_and_method() -> None:
    titles = list(groups(help_text()))
    parts = ["run", "model", "model.local", "data", "method"]
    methods = ["su, trsu, crsu, drop", "su, drop", "trsu, crsu", "trsu", "crsu", "drop", "simoe"]
    assert titles == [
        *parts,
        *(f"method {names}" for names in methods),
        "optimization",
        "evaluation",
        "execution",
    ]


@pytest.mark.parametrize("method", METHODS)
def test_help_tells_each_methods_own_text_and_default(method: str) -> None:
    shown = groups(help_text())
    own = {
        name: about
        for title, group in shown.items()
        if title.startswith("method ") and method in title.removeprefix("method ").split(", ")
        for name, about in group.items()
    }
    fields = {name: field for name, field in METHODS[method].model_fields.items() if name != "name"}
    assert set(own) == {f"method.{name.replace('_', '-')}" for name in fields}
    for name, field in fields.items():
        about = own[f"method.{name.replace('_', '-')}"]
        assert field.description is not None
        assert about.startswith(" ".join(field.description.split()))
        default = field.get_default()
        if isinstance(default, int | float) and not isinstance(default, bool):
            assert about.endswith(f"default: {default:g})")


@pytest.mark.parametrize("method", [None, *METHODS])
def test_help_fits_100_columns(method: str | None) -> None:
    assert max(map(len, help_text(method).splitlines())) <= 100


def test_defaults_in_help_are_values_that_the_command_line_takes() -> None:
    """Every default that help shows, given as it is shown, changes nothing."""
    words = {}
    for title, group in groups(help_text()).items():
        if not title.startswith("method"):
            words |= {
                name: m[1] for name, text in group.items() if (m := re.search(r"default: ([^;]*)\)$", text))
            }
    given = [
        f"--{name} {value}" for name, value in words.items() if value != "none" or name.endswith("offload")
    ]
    assert len(given) > 40
    assert command_line(" ".join(given)).model_dump() == RunFile().model_dump()


@pytest.mark.parametrize(("prefix", "part"), list(parts_of(RunFile)), ids=lambda value: str(value))
def test_every_field_has_a_docstring(prefix: str, part: type[Config]) -> None:
    fields = {name: f for name, f in part.model_fields.items() if (prefix, name) != ("method.", "name")}
    assert [name for name, field in fields.items() if not field.description] == []


def known(key: str, method: str) -> bool:
    with pytest.raises(InputError) as caught:  # nothing takes this value
        load(RunFile, None, {"method.name": method, key: object()})
    return "unknown key" not in str(caught.value)
