"""The dense start against transformers' own configurations, loaders and the Hugging Face cache layout."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path
from typing import Any

import huggingface_hub.constants
import pytest
import torch
from safetensors.torch import load_file
from support.models import GATINGS, SPARSE
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

from raymoe.config import LocalModel, Model
from raymoe.methods import SparseUpcycling
from raymoe.models import dense as seed
from raymoe.schema import InputError
from raymoe.storage.store import digest

SHAPE = LocalModel(vocab_size=384, hidden_size=32, intermediate_size=48, num_layers=2, num_heads=4)
TEXTS = [
    "def f(x):\n    return x * 12",
    "What is 307 + 45?",
    "Ein Gruß, 你好 \u200b — ½ €",
    "### Response:\n#### -17",
]


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("corpus")
    for domain in ("code", "text"):
        rows = [
            {
                "prompt": f"Say {domain} number {i} again",
                "completion": f"again {domain} {i * 7}, and so it goes on",
            }
            for i in range(200)
        ]
        lines = [json.dumps(row) for row in rows]
        (folder / f"{domain}.train.jsonl").write_text("\n".join(lines) + "\n")
        (folder / f"{domain}.test.jsonl").write_text(
            '{"prompt": "zyzzyva zyzzyva", "completion": "zyzzyva"}\n' * 500
        )
    return folder


@pytest.fixture(scope="module")
def initial(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("initial")
    seed.write_initial(folder, corpus, SHAPE, max_length=64, seed=3)
    return folder


def error(call: Any, *arguments: Any) -> str:
    """The one line that `call` refuses its arguments with."""
    with pytest.raises(InputError) as caught:
        call(*arguments)
    line = str(caught.value)
    assert line.startswith("model.name: ") and "\n" not in line
    return line


# ---- the local model ----


def test_same_arguments_write_the_same_files(corpus: Path, initial: Path, tmp_path: Path) -> None:
    torch.manual_seed(0)
    expected = torch.rand(1)
    torch.manual_seed(0)
    seed.write_initial(tmp_path / "same", corpus, SHAPE, max_length=64, seed=3)
    assert torch.equal(torch.rand(1), expected)  # the caller's random numbers are as they would have been
    names = sorted(file.name for file in initial.iterdir())
    assert names == sorted(file.name for file in (tmp_path / "same").iterdir())
    assert all((initial / name).read_bytes() == (tmp_path / "same" / name).read_bytes() for name in names)


def test_another_seed_changes_the_weights_alone(corpus: Path, initial: Path, tmp_path: Path) -> None:
    seed.write_initial(tmp_path, corpus, SHAPE, max_length=64, seed=4)
    weights, others = load_file(initial / "model.safetensors"), load_file(tmp_path / "model.safetensors")
    assert all(torch.equal(w, others[n]) == ("norm" in n) for n, w in weights.items())
    assert (initial / "tokenizer.json").read_bytes() == (tmp_path / "tokenizer.json").read_bytes()


def test_initial_model_is_a_stock_llama(initial: Path) -> None:
    seed.check_folder(initial)
    model = AutoModelForCausalLM.from_pretrained(initial)
    d, f, v = 32, 48, 384
    assert type(model).__name__ == "LlamaForCausalLM"
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert sum(p.numel() for p in model.parameters()) == 2 * v * d + 2 * (4 * d * d + 3 * d * f + 2 * d) + d
    assert model.config.max_position_embeddings >= 2 * 64
    tokens = torch.arange(v).view(4, 96)
    assert model(tokens, labels=tokens).loss.item() == pytest.approx(math.log(v), abs=0.1)


def test_tokenizer_is_lossless_and_splits_digits(initial: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(initial)
    assert isinstance(tokenizer, PreTrainedTokenizerFast)
    for text in TEXTS:
        ids = tokenizer.encode(text)
        assert tokenizer.decode(ids) == text
        single = [t for t in tokenizer.convert_ids_to_tokens(ids) if any(c in "0123456789" for c in t)]
        assert single == [c for c in text if c in "0123456789"]


def test_tokenizer_has_special_tokens_and_no_template(initial: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(initial)
    model = AutoConfig.from_pretrained(initial)
    for name, token in {"pad": "<pad>", "bos": "<s>", "eos": "</s>"}.items():
        assert getattr(tokenizer, f"{name}_token") == token
        assert getattr(tokenizer, f"{name}_token_id") == getattr(model, f"{name}_token_id")
        assert tokenizer.encode(token) == [getattr(tokenizer, f"{name}_token_id")]
    assert tokenizer.chat_template is None
    assert tokenizer.decode(tokenizer.encode("<s>a</s>"), skip_special_tokens=True) == "a"


def test_tokenizer_learns_from_the_training_files_alone(initial: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(initial)
    assert len(tokenizer.tokenize(" again")) == 1
    assert len(tokenizer.tokenize("### Instruction:\n")) == 4
    assert len(tokenizer.tokenize(" zyzzyva")) > 4


# ---- what is supported ----


def test_dense_families_are_supported(dense_models: dict[str, Path]) -> None:
    for family, folder in dense_models.items():
        config = AutoConfig.from_pretrained(folder)
        seed.check_supported(config)
        seed.check_supported(json.loads((folder / "config.json").read_text()))
        assert seed.resolve(Model(name=str(folder))) == folder
        assert seed.dimensions(folder) == (config.num_hidden_layers, config.hidden_size), family


@pytest.mark.parametrize(
    "kind", ["mixtral", "qwen2_moe", "qwen3_moe", "olmoe", "deepseek_v3", "phimoe", "granitemoe", "gpt_oss"]
)
def test_moe_models_are_refused(kind: str) -> None:
    config = AutoConfig.for_model(kind)
    assert "already a Mixture-of-Experts" in error(seed.check_supported, config)
    assert "already a Mixture-of-Experts" in error(seed.check_supported, config.to_dict())


@pytest.mark.parametrize("kind", ["gpt2", "gemma2", "bert", "t5"])
def test_other_architectures_are_named_with_the_supported_ones(kind: str) -> None:
    line = error(seed.check_supported, AutoConfig.for_model(kind))
    assert f"architecture {kind} is not supported" in line
    assert line.endswith("choose from llama, mistral, qwen2, qwen3, olmo2, granite, ernie4_5")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"attention_bias": True}, "llama with attention_bias is not supported"),
        ({"mlp_bias": True}, "llama with mlp_bias is not supported"),
        ({"architectures": ["LlamaForSequenceClassification"]}, "is not a causal language model"),
        ({"quantization_config": {"quant_method": "gptq", "bits": 4}}, "the weights are quantised"),
    ],
)
def test_llamas_that_cannot_be_exported_are_refused(settings: dict[str, Any], message: str) -> None:
    config = AutoConfig.for_model("llama").to_dict()
    seed.check_supported(config)
    assert message in error(seed.check_supported, {**config, **settings})


def test_whether_a_method_can_be_exported_is_known_from_the_folder(dense_models: dict[str, Path]) -> None:
    for family, folder in dense_models.items():
        for gating in GATINGS:
            method = SparseUpcycling(gating=gating)
            if (family, gating) in SPARSE:
                seed.check_upcycling(folder, method)
            else:
                with pytest.raises(
                    InputError, match=f"{gating} is not possible with {family}: .* renormalizes"
                ):
                    seed.check_upcycling(folder, method)


# ---- folders ----


@pytest.fixture
def folder(pico: Path, tmp_path: Path) -> Path:
    """A copy of the pico Llama, to be spoilt."""
    return Path(shutil.copytree(pico, tmp_path / "pico"))


def test_incomplete_folders_are_refused(folder: Path) -> None:
    (folder / "tokenizer.json").unlink()
    assert "has no tokenizer" in error(seed.check_folder, folder)
    (folder / "config.json").write_text("{")
    assert "config.json can't be read" in error(seed.check_folder, folder)
    (folder / "config.json").write_text("[]")
    assert "is not a model's configuration" in error(seed.check_folder, folder)
    (folder / "config.json").unlink()
    assert "has no config.json" in error(seed.check_folder, folder)


def test_pickled_weights_are_refused(folder: Path) -> None:
    weights = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    assert "has no weights: give *.safetensors" in error(seed.check_folder, folder)
    torch.save(weights, folder / "pytorch_model.bin")
    assert "has only pickled weights, which raymoe never loads" in error(seed.check_folder, folder)


def test_damaged_weights_are_refused(folder: Path) -> None:
    file = folder / "model.safetensors"
    whole = file.read_bytes()
    for damaged in (whole[: len(whole) // 2], b"version https://git-lfs.github.com/spec/v1\n", b""):
        file.write_bytes(damaged)
        assert "is cut off or no safetensors file" in error(seed.check_folder, folder)


def test_a_missing_shard_is_named(pico: Path, folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    AutoModelForCausalLM.from_pretrained(pico).save_pretrained(folder, max_shard_size="20KB")
    seed.check_folder(folder)
    first = min(folder.glob("model-*.safetensors"))
    first.unlink()
    assert f"lacks 1 of its shards, the first is {first.name}" in error(seed.check_folder, folder)


@pytest.mark.parametrize(
    "name",
    [
        "no/such/folder",
        "./missing",
        "/missing/model",
        "~/missing",
        "a b",
        "",
        "a//b",
        "~nobody/x",
        "x/" * 3000,
    ],
)
def test_names_that_are_nothing_are_refused(name: str) -> None:
    line = error(seed.resolve, Model(name=name))
    assert line == f"model.name: {name!r} is neither a folder nor a Hugging Face id"
    assert error(seed.identity, Model(name=name)) == line


def test_a_file_is_no_model(folder: Path) -> None:
    assert "is neither a folder" in error(seed.resolve, Model(name=str(folder / "config.json")))


@pytest.mark.parametrize("name", ["local", "initial"])
def test_stages_are_not_resolved_here(name: str) -> None:
    for function in (seed.resolve, seed.identity):
        with pytest.raises(ValueError, match="is a stage's output"):
            function(Model(name=name))


# ---- the hub ----


@pytest.fixture
def hub_cache(pico: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A hub cache that holds the pico Llama as `org/pico`, revision v1, and a machine that is offline."""
    commit = "0123456789abcdef0123456789abcdef01234567"
    repository = tmp_path / "hub" / "models--org--pico"
    shutil.copytree(pico, repository / "snapshots" / commit)
    (repository / "refs").mkdir()
    (repository / "refs" / "v1").write_text(commit)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    return repository / "snapshots" / commit


def test_hub_models_come_from_the_cache(hub_cache: Path) -> None:
    model = Model(name="org/pico", revision="v1")
    assert seed.resolve(model) == hub_cache
    assert seed.identity(model) == {"name": "org/pico", "revision": "v1"}


def test_hub_models_that_cannot_be_had_are_one_line(hub_cache: Path) -> None:
    for model in (Model(name="org/other"), Model(name="org/pico", revision="v2"), Model(name="gpt2")):
        assert f"{model.name!r}: not a folder here, and can't be downloaded: " in error(seed.resolve, model)


def test_an_unreachable_hub_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", "http://127.0.0.1:9")  # nothing listens there
    assert "can't be downloaded" in error(seed.resolve, Model(name="org/pico", revision="v1"))


def test_hub_models_are_checked_too(hub_cache: Path) -> None:
    (hub_cache / "model.safetensors").unlink()
    assert "has no weights" in error(seed.resolve, Model(name="org/pico", revision="v1"))


# ---- identity ----


def test_identity_of_a_folder_changes_with_its_files(folder: Path) -> None:
    def now() -> str:
        return digest(seed.identity(Model(name=str(folder))))

    seen = [now()]
    assert now() == seen[0]
    (folder / "README.md").write_text("a note")
    assert now() == seen[0]
    config = folder / "config.json"
    config.write_text(config.read_text().replace('"rms_norm_eps": 1e-06', '"rms_norm_eps": 1e-05'))
    seen.append(now())
    (folder / "chat_template.jinja").write_text("{{ messages }}")
    seen.append(now())
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes())
    seen.append(now())
    assert len(set(seen)) == len(seen)


def test_identity_does_not_depend_on_the_path(folder: Path) -> None:
    before = seed.fingerprint(folder)
    moved = folder.rename(folder.with_name("moved"))
    assert seed.fingerprint(moved) == before
