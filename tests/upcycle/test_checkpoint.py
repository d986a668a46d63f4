from __future__ import annotations

import json
import os
import resource
import shutil
import struct
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.models import FAMILIES, SPARSE, write_pico
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from raymoe.methods import SparseUpcycling
from raymoe.models.moe import FFN, upcycle_model
from raymoe.schema import InputError
from raymoe.upcycle import expand
from raymoe.upcycle.checkpoint import materialize, write_model
from raymoe.upcycle.shards import ShardWriter, Slot

ROWS = torch.randn(2, 4, 32, generator=torch.Generator().manual_seed(1))
IDS = torch.randint(0, 256, (2, 40), generator=torch.Generator().manual_seed(0))


def method(gating: str = "straight_through", top_k: int = 1) -> SparseUpcycling:
    return SparseUpcycling(num_experts=4, top_k=top_k, gating=gating, load_balance_alpha=0.04)


def stock(folder: Path, **keywords: Any) -> PreTrainedModel:
    """Load the folder with stock transformers; no weight is missing (but those of size 0) and none unknown."""
    model, info = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True, **keywords)
    parameters = dict(model.named_parameters())
    assert not [name for name in info["missing_keys"] if parameters[name].numel()]
    assert not info["unexpected_keys"]
    assert not info["mismatched_keys"]
    return model.eval()


def logits(model: PreTrainedModel) -> Tensor:
    with torch.no_grad():
        return model(IDS).logits


def tensors_on_disk(folder: Path) -> dict[str, Tensor]:
    return {name: t for file in folder.glob("*.safetensors") for name, t in load_file(file).items()}


@pytest.mark.parametrize("top_k", [1, 2])
@pytest.mark.parametrize(("family", "gating"), SPARSE)
def test_stock_transformers_computes_the_upcycled_model(
    dense_models: dict[str, Path], tmp_path: Path, family: str, gating: str, top_k: int
) -> None:
    dense, upcycling = dense_models[family], method(gating, top_k)
    materialize(dense, ROWS, upcycling, tmp_path / "moe")
    actual = logits(stock(tmp_path / "moe"))
    if gating == "softmax":
        expected = logits(expand(dense, ROWS, upcycling, torch.float32).eval())
        torch.testing.assert_close(actual, expected, atol=1e-6, rtol=0)
    else:
        expected = logits(AutoModelForCausalLM.from_pretrained(dense))
        torch.testing.assert_close(actual, expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    ("family", "gating", "model_type"),
    [
        ("llama", "straight_through", "mixtral"),
        ("mistral", "renormalized", "mixtral"),
        ("llama", "softmax", "qwen2_moe"),
        ("qwen2", "renormalized", "qwen2_moe"),
        ("qwen3", "softmax", "qwen3_moe"),
        ("olmo2", "straight_through", "flex_olmo"),
        ("granite", "straight_through", "granitemoe"),
        ("ernie4_5", "renormalized", "ernie4_5_moe"),
    ],
)
def test_names_on_disk_are_those_of_save_pretrained(
    dense_models: dict[str, Path], tmp_path: Path, family: str, gating: str, model_type: str
) -> None:
    materialize(dense_models[family], ROWS, method(gating), tmp_path / "moe")
    model = stock(tmp_path / "moe")
    model.save_pretrained(tmp_path / "theirs")
    theirs = {name: t for name, t in tensors_on_disk(tmp_path / "theirs").items() if t.numel()}
    mine = tensors_on_disk(tmp_path / "moe")
    assert model.config.model_type == model_type
    assert mine.keys() == theirs.keys()
    assert all(torch.equal(mine[name], theirs[name]) for name in mine)
    settings = [json.loads((tmp_path / f / "config.json").read_text()) for f in ("moe", "theirs")]
    assert settings[0] == settings[1]


@pytest.mark.parametrize("family", FAMILIES)
def test_a_bfloat16_folder_has_the_dtypes_of_save_pretrained(tmp_path: Path, family: str) -> None:
    """Ernie's router is float32 on disk; routing and outputs are those of the model in memory."""
    dense = write_pico(tmp_path / "float", family)
    AutoModelForCausalLM.from_pretrained(dense, dtype=torch.bfloat16).save_pretrained(tmp_path / "dense")
    materialize(tmp_path / "dense", ROWS, method("straight_through"), tmp_path / "moe")
    model = stock(tmp_path / "moe")
    model.save_pretrained(tmp_path / "theirs")
    mine, theirs = tensors_on_disk(tmp_path / "moe"), tensors_on_disk(tmp_path / "theirs")
    assert all(theirs[name].dtype == t.dtype and torch.equal(theirs[name], t) for name, t in mine.items())
    assert {t.dtype for t in mine.values()} <= {torch.bfloat16, torch.float32}
    expected = expand(tmp_path / "dense", ROWS, method("straight_through"), torch.bfloat16).eval()
    assert torch.equal(logits(model), logits(expected))


@pytest.mark.parametrize(
    ("family", "settings"),
    [
        ("olmo2", {"attention_bias": True, "head_dim": 16}),
        ("granite", {"attention_bias": True, "head_dim": 16, "tie_word_embeddings": False}),
        ("ernie4_5", {"head_dim": 8, "tie_word_embeddings": False}),
    ],
)
def test_settings_that_a_class_holds_are_carried(
    tmp_path: Path, family: str, settings: dict[str, Any]
) -> None:
    dense = write_pico(tmp_path / "dense", family, **settings)
    materialize(dense, ROWS, method(top_k=2), tmp_path / "moe")
    config = stock(tmp_path / "moe").config
    assert (config.num_experts_per_tok, config.router_aux_loss_coef) == (2, pytest.approx(0.04 / 2))
    expected = logits(AutoModelForCausalLM.from_pretrained(dense))
    torch.testing.assert_close(logits(stock(tmp_path / "moe")), expected, atol=1e-5, rtol=0)


def different(ffn: FFN, layer: int, expert: int) -> FFN:
    """Return an expert that differs from all others."""
    return FFN(*(weight * (1 + layer + expert / 8 + i / 4) for i, weight in enumerate(ffn)))


@pytest.mark.parametrize("family", FAMILIES)
def test_experts_that_are_no_copies_are_written_in_their_places(
    dense_models: dict[str, Path], tmp_path: Path, family: str
) -> None:
    dense, upcycling = dense_models[family], method(top_k=2)
    materialize(dense, ROWS, upcycling, tmp_path / "moe", max_shard_bytes=30_000, start=different)
    model = upcycle_model(AutoModelForCausalLM.from_pretrained(dense), ROWS, upcycling, start=different)
    actual = logits(stock(tmp_path / "moe"))
    torch.testing.assert_close(actual, logits(model.eval()), atol=1e-5, rtol=0)
    assert (actual - logits(AutoModelForCausalLM.from_pretrained(dense))).abs().max() > 0.1


def test_settings_are_carried_and_mapped(tmp_path: Path) -> None:
    rope = {
        "rope_type": "llama3",
        "rope_theta": 500.0,
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 32,
    }
    dense = write_pico(
        tmp_path / "dense",
        "llama",
        rope_parameters=rope,
        head_dim=16,
        tie_word_embeddings=True,
        rms_norm_eps=1e-3,
    )
    original = AutoModelForCausalLM.from_pretrained(dense)
    for gating in ("renormalized", "softmax"):
        materialize(dense, ROWS, method(gating, top_k=2), tmp_path / gating)
        config = stock(tmp_path / gating).config
        assert config.rope_parameters == rope
        assert (config.head_dim, config.tie_word_embeddings, config.rms_norm_eps) == (16, True, 1e-3)
        assert (config.bos_token_id, config.eos_token_id, config.pad_token_id) == (256, 257, 258)
        assert (config.num_experts, config.num_experts_per_tok) == (4, 2)
        assert config.router_aux_loss_coef == pytest.approx(0.04 / 2)
        assert config.dtype == torch.float32
    actual = logits(stock(tmp_path / "renormalized"))
    torch.testing.assert_close(actual, logits(original), atol=1e-5, rtol=0)
    in_memory = expand(dense, ROWS, method("softmax", top_k=2), torch.float32).eval()
    torch.testing.assert_close(logits(stock(tmp_path / "softmax")), logits(in_memory), atol=1e-6, rtol=0)


def test_the_tokenizer_comes_along(pico: Path, tmp_path: Path) -> None:
    dense = shutil.copytree(pico, tmp_path / "dense")
    (dense / "LICENSE").write_text("as the dense model's")
    materialize(dense, ROWS, method(), tmp_path / "moe")
    text = "def f(x): return x\n"
    mine, theirs = (AutoTokenizer.from_pretrained(folder) for folder in (tmp_path / "moe", pico))
    assert mine(text)["input_ids"] == theirs(text)["input_ids"] == [256, *theirs(text)["input_ids"][1:]]
    assert mine.decode(mine(text)["input_ids"], skip_special_tokens=True) == text
    assert (tmp_path / "moe" / "generation_config.json").is_file()
    assert (tmp_path / "moe" / "LICENSE").read_text() == "as the dense model's"


def test_shards_hold_what_a_single_file_holds(tmp_path: Path) -> None:
    dense = write_pico(tmp_path / "dense", "llama", max_shard_size="20KB")
    assert len(list(dense.glob("*.safetensors"))) > 2
    materialize(dense, ROWS, method(), tmp_path / "one")
    materialize(dense, ROWS, method(), tmp_path / "many", max_shard_bytes=30_000)
    one, many = tensors_on_disk(tmp_path / "one"), tensors_on_disk(tmp_path / "many")
    files = sorted(f.name for f in (tmp_path / "many").glob("*.safetensors"))
    index = json.loads((tmp_path / "many" / "model.safetensors.index.json").read_text())
    assert one.keys() == many.keys() == index["weight_map"].keys()
    assert all(torch.equal(one[name], many[name]) for name in one)
    assert sorted(set(index["weight_map"].values())) == files
    assert files[0] == f"model-00001-of-{len(files):05d}.safetensors"
    assert index["metadata"]["total_size"] == sum(t.nbytes for t in one.values())
    for file in files:
        content = load_file(tmp_path / "many" / file).values()
        assert len(content) == 1 or sum(t.nbytes for t in content) <= 30_000
    expected = logits(AutoModelForCausalLM.from_pretrained(dense))
    torch.testing.assert_close(logits(stock(tmp_path / "many")), expected, atol=1e-5, rtol=0)


def test_bytes_are_the_same_where_the_kernel_can_not_copy(
    pico: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    materialize(pico, ROWS, method(), tmp_path / "kernel")
    monkeypatch.delattr(os, "copy_file_range")
    materialize(pico, ROWS, method(), tmp_path / "python")
    kernel, python = (tmp_path / f / "model.safetensors" for f in ("kernel", "python"))
    assert kernel.read_bytes() == python.read_bytes()


def trained(dense: Path, gating: str, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    """Return an upcycled model as after training: no two experts alike."""
    model = expand(dense, ROWS, method(gating, top_k=2), dtype).eval()
    generator = torch.Generator().manual_seed(7)
    for parameter in model.parameters():
        parameter.data += torch.randn(parameter.shape, generator=generator) * 0.05
    return model


@pytest.mark.parametrize(("family", "gating"), SPARSE)
def test_a_trained_model_is_the_same_in_stock_transformers(
    dense_models: dict[str, Path], tmp_path: Path, family: str, gating: str
) -> None:
    dense = dense_models[family]
    model = trained(dense, gating)
    write_model(
        tmp_path / "moe",
        dense,
        method(gating, top_k=2),
        model.named_parameters(),
        torch.float32,
        max_shard_bytes=50_000,
    )
    torch.testing.assert_close(logits(stock(tmp_path / "moe")), logits(model), atol=1e-6, rtol=0)


def test_a_trained_model_is_written_in_the_dtype_asked_for(pico: Path, tmp_path: Path) -> None:
    model = trained(pico, "straight_through", torch.bfloat16)
    write_model(tmp_path / "moe", pico, method(top_k=2), model.state_dict().items(), torch.bfloat16)
    loaded = stock(tmp_path / "moe")
    assert {p.dtype for p in loaded.parameters()} == {torch.bfloat16}
    assert torch.equal(logits(loaded), logits(model))


@pytest.mark.parametrize("family", FAMILIES)
def test_a_trained_dense_model_keeps_its_class(
    dense_models: dict[str, Path], tmp_path: Path, family: str
) -> None:
    dense = dense_models[family]
    model = AutoModelForCausalLM.from_pretrained(dense)
    for parameter in model.parameters():
        parameter.data *= 1.1
    write_model(tmp_path / "out", dense, None, model.state_dict().items(), torch.float32)
    loaded = stock(tmp_path / "out")
    assert loaded.config.model_type == family
    assert torch.equal(logits(loaded), logits(model))


def test_a_tied_head_that_the_dense_folder_repeats_is_written_twice(tmp_path: Path) -> None:
    dense = write_pico(tmp_path / "dense", "qwen3")
    weights = load_file(dense / "model.safetensors")
    weights["lm_head.weight"] = weights["model.embed_tokens.weight"].clone()
    save_file(weights, dense / "model.safetensors", metadata={"format": "pt"})
    model = trained(dense, "softmax")
    write_model(tmp_path / "moe", dense, method("softmax", 2), model.named_parameters(), torch.float32)
    torch.testing.assert_close(logits(stock(tmp_path / "moe")), logits(model), atol=1e-6, rtol=0)


def test_missing_and_unknown_tensors_are_refused(pico: Path, tmp_path: Path) -> None:
    parameters = dict(trained(pico, "softmax").named_parameters())
    unknown = {**parameters, "model.extra": torch.zeros(1)}
    norm = parameters.pop("model.norm.weight")
    wrong = {**parameters, "model.norm.weight": norm[:5]}
    for tensors, message in [
        (parameters, "never written, such as model.norm.weight"),
        (unknown, "model.extra has shape"),
        (wrong, r"model.norm.weight has shape \(5,\), the model on disk \(32,\)"),
    ]:
        with pytest.raises(ValueError, match=message):
            write_model(tmp_path / "out", pico, method("softmax"), tensors.items(), torch.float32)
    assert not list(tmp_path.iterdir())


def test_a_stacked_tensor_without_one_of_its_experts_is_refused(tmp_path: Path) -> None:
    weight = torch.arange(12.0).view(2, 2, 3)
    plan = {"stacked": Slot.of(torch.float32, 4, 2, 3, parts=4)}
    (tmp_path / "short").mkdir()
    with (
        pytest.raises(ValueError, match="1 tensors were never written, such as stacked"),
        ShardWriter(tmp_path / "short", plan) as writer,
    ):
        for part in (0, 3, 1):
            writer.write("stacked", weight[0], part)
    with ShardWriter(tmp_path, plan) as writer:
        with pytest.raises(ValueError, match=r"stacked has shape \(2, 2, 3\), the model on disk \(2, 3\)"):
            writer.write("stacked", weight, 1)
        for part in (3, 1, 0, 2):
            writer.write("stacked", weight[part % 2] + part, part)
    written = load_file(tmp_path / "model.safetensors")["stacked"]
    assert torch.equal(written, torch.stack([weight[part % 2] + part for part in range(4)]))


def test_what_is_there_is_never_overwritten(pico: Path, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    materialize(pico, ROWS, method(), tmp_path / "empty")
    with pytest.raises(InputError, match="not an empty folder"):
        materialize(pico, ROWS, method(), tmp_path / "empty")
    (tmp_path / "file").write_text("mine")
    with pytest.raises(InputError, match="not an empty folder"):
        materialize(pico, ROWS, method(), tmp_path / "file")
    assert sorted(os.listdir(tmp_path)) == ["empty", "file"]
    stock(tmp_path / "empty")


@contextmanager
def largest_file(num_bytes: int) -> Iterator[None]:
    """Make writes beyond `num_bytes` of a file fail, as on a full disk."""
    _, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, hard))


def test_a_failing_disk_leaves_nothing_behind(pico: Path, tmp_path: Path) -> None:
    with (
        largest_file(60_000),
        pytest.raises(InputError, match="can't write the model: File too large") as error,
    ):
        materialize(pico, ROWS, method(), tmp_path / "moe")
    assert "\n" not in str(error.value)
    assert not list(tmp_path.iterdir())


def test_a_model_larger_than_the_disk_is_refused_at_once(pico: Path, tmp_path: Path) -> None:
    """The weights are one sparse file that claims more bytes than the disk has left."""
    dense = tmp_path / "dense"
    shutil.copytree(pico, dense)
    name, rows = "model.layers.0.mlp.down_proj.weight", shutil.disk_usage(tmp_path).free // 4 // 48
    with (dense / "model.safetensors").open("rb+") as file:
        (length,) = struct.unpack("<Q", file.read(8))
        header = json.loads(file.read(length))
        end = max(entry["data_offsets"][1] for entry in header.values() if "shape" in entry)
        header[name] |= {"shape": [rows, 48], "data_offsets": [end, end + 4 * rows * 48]}
        text = json.dumps(header).encode()
        file.seek(0)
        file.write(struct.pack("<Q", len(text)) + text)
        file.truncate(8 + len(text) + end + 4 * rows * 48)
    with pytest.raises(InputError, match="the model needs .* GB, the disk has"):
        materialize(dense, ROWS, method(), tmp_path / "moe")
    assert os.listdir(tmp_path) == ["dense"]


@pytest.mark.parametrize(
    ("family", "settings", "gating", "message"),
    [
        ("llama", {"attention_bias": True}, "softmax", "attention biases"),
        ("llama", {"mlp_bias": True}, "renormalized", "FFN has biases"),
        ("olmo2", {"mlp_bias": True}, "softmax", "FFN has biases"),
        ("granite", {}, "softmax", "GraniteMoE always renormalizes"),
        ("granite", {"mlp_bias": True}, "renormalized", "FFN has biases"),
        ("ernie4_5", {}, "softmax", "Ernie 4.5 MoE always renormalizes"),
        ("ernie4_5", {"use_bias": True}, "renormalized", "FFN has biases"),
        (
            "qwen3",
            {"layer_types": ["full_attention", "sliding_attention"], "use_sliding_window": True},
            "softmax",
            "sliding window in some layers only",
        ),
    ],
)
def test_what_no_standard_class_computes_is_refused(
    tmp_path: Path, family: str, settings: dict[str, Any], gating: str, message: str
) -> None:
    dense = write_pico(tmp_path / "dense", family, **settings)
    with pytest.raises(InputError, match=message):
        materialize(dense, ROWS, method(gating), tmp_path / "moe")
    assert os.listdir(tmp_path) == ["dense"]


def test_folders_that_are_no_dense_model_are_refused(pico: Path, tmp_path: Path) -> None:
    empty = tmp_path / "empty"
    empty.mkdir()
    with pytest.raises(InputError, match="only safetensors"):
        materialize(empty, ROWS, method(), tmp_path / "moe")
    broken = shutil.copytree(pico, tmp_path / "broken")
    weights = (broken / "model.safetensors").read_bytes()
    for content in (b"", b"\xff" * 64, weights[:-1]):
        (broken / "model.safetensors").write_bytes(content)
        with pytest.raises(InputError, match="not a safetensors file"):
            materialize(broken, ROWS, method(), tmp_path / "moe")
    (broken / "model.safetensors.index.json").write_text('{"weight_map": {"a": "../../secret"}}')
    with pytest.raises(InputError, match="outside of its folder"):
        materialize(broken, ROWS, method(), tmp_path / "moe")
    for config, message in (
        ("{}", "not a model's config"),
        ('{"model_type": "gpt2"}', "can't upcycle 'gpt2'"),
    ):
        other = shutil.copytree(pico, tmp_path / message[:5])
        (other / "config.json").write_text(config)
        with pytest.raises(InputError, match=message):
            materialize(other, ROWS, method(), tmp_path / "moe")
    with pytest.raises(InputError, match="do not fit"):
        materialize(pico, ROWS[:, :2], method(), tmp_path / "moe")


def mergekit_python() -> str | None:
    """Return an interpreter that has mergekit: $RAYMOE_MERGEKIT_PYTHON, or this one."""
    installed = sys.executable if find_spec("mergekit") else None
    return os.environ.get("RAYMOE_MERGEKIT_PYTHON", installed)


@pytest.mark.skipif(
    mergekit_python() is None, reason="needs mergekit, installed or at RAYMOE_MERGEKIT_PYTHON"
)
@pytest.mark.parametrize("family", ["llama", "mistral", "qwen3"])
def test_mergekit_makes_the_same_model(dense_models: dict[str, Path], tmp_path: Path, family: str) -> None:
    """All parameters but the router's are equal. mergekit upcycles Qwen2 only with a shared expert."""
    dense = dense_models[family]
    recipe = {
        "base_model": str(dense),
        "gate_mode": "random",
        "dtype": "float32",
        "experts_per_token": 1,
        "experts": [{"source_model": str(dense)}] * 4,
    }
    (tmp_path / "mergekit.yaml").write_text(json.dumps(recipe))
    command = [mergekit_python() or "", "-m", "mergekit.scripts.moe", "mergekit.yaml", "theirs"]
    flag = "--i-understand-this-is-not-useful-without-training"
    subprocess.run([*command, flag], cwd=tmp_path, check=True, capture_output=True)
    materialize(dense, ROWS, method("renormalized"), tmp_path / "mine")
    mine, theirs = (stock(tmp_path / f).state_dict() for f in ("mine", "theirs"))
    assert mine.keys() == theirs.keys()
    assert all(torch.equal(mine[name], theirs[name]) for name in mine if ".gate.weight" not in name)
