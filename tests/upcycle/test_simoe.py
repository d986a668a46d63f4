from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from support.models import FAMILIES, write_pico
from torch import Tensor
from torch.func import functional_call
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from raymoe.config import Data
from raymoe.data.columns import Instruction
from raymoe.data.instructions import encode
from raymoe.methods import SparseInterpolation
from raymoe.models.gates import PromptRouter, live_columns
from raymoe.models.generate import generate
from raymoe.models.packed_attention import PACKED_ATTENTION
from raymoe.models.simoe import Interpolated, interpolate
from raymoe.schema import InputError
from raymoe.upcycle.simoe import (
    Masks,
    SIMoE,
    export_simoe,
    generate_simoe,
    is_simoe,
    load_simoe,
    merge,
    prompt_tokens,
    simoe_config,
    write_simoe,
)

DTYPES = [torch.float32, torch.bfloat16]
IDS = torch.randint(0, 256, (2, 20), generator=torch.Generator().manual_seed(0))
WEIGHTS_SM = torch.tensor([[0.2, 0.7, 0.1], [0.05, 0.15, 0.8]])
DOMAINS = {"math": [0.5, 0.25, 0.25], "code": [0.0, 0.125, 0.875]}
PROMPTS = [np.frombuffer(text, dtype=np.uint8).astype(np.int32) for text in (b"2 + 2 =", b"Say it.", b"f")]
DEAD_LAYER = "model.layers.1.self_attn.k_proj"


def trained(
    dense: Path, dtype: torch.dtype, scale: float = 0.1, **settings: Any
) -> tuple[Interpolated, Masks]:
    """Return a SIMoE model as after training: random deltas, most columns dead, one layer entirely."""
    model = AutoModelForCausalLM.from_pretrained(dense, dtype=dtype)
    interpolated = interpolate(model)
    random = torch.Generator().manual_seed(1)
    for layer in interpolated.layers:
        layer.delta.data.normal_(0, scale, generator=random)
    method = SparseInterpolation(num_experts=3, **settings)
    gates = torch.rand(3, interpolated.layout.size, generator=random)
    gates[:, torch.rand(gates.shape[1], generator=random) < 0.6] = 0
    gates[torch.rand(gates.shape, generator=random) < 0.3] = 0
    (dead,) = (span for span in interpolated.layout.spans if span.name == DEAD_LAYER)
    gates[:, dead.start : dead.start + dead.width] = 0
    router = PromptRouter(method, model.config.hidden_size, seed=2)
    router.norm.weight.data.normal_(1, 0.2, generator=random)
    return interpolated, Masks(method, gates, router.state_dict(), DOMAINS)


def written(out: Path, dense: Path, dtype: torch.dtype = torch.float32, **settings: Any) -> Path:
    interpolated, masks = trained(dense, dtype, **settings)
    write_simoe(out, dense, masks, interpolated.model.named_parameters(), dtype)
    return out


def formula(interpolated: Interpolated, masks: Masks, weights_M: Tensor) -> dict[str, Tensor]:
    """Return theta_pre + sum_m a_m (z_m * theta_delta) of every interpolated layer, in float64."""
    whole = {}
    for span, layer in zip(interpolated.layout.spans, interpolated.layers, strict=True):
        z_MI = masks.gates_MG[:, span.start : span.start + span.width].double()
        weight, delta = layer.weight.detach().double(), layer.delta.detach().double()
        for a, z_I in zip(weights_M.double(), z_MI, strict=True):
            weight = weight + (a * z_I * delta if delta.dim() == 1 else a * (z_I[:, None] * delta).T)
        whole[f"{span.name}.weight"] = weight
    return whole


@torch.no_grad()
def expected_logits(dense: Path, weights: dict[str, Tensor], ids: Tensor, dtype: torch.dtype) -> Tensor:
    """Return the logits of stock transformers with `weights` in place of the dense ones."""
    model = AutoModelForCausalLM.from_pretrained(dense, dtype=dtype)
    rounded = {name: weight.to(dtype) for name, weight in weights.items()}
    logits: Tensor = functional_call(model, rounded, (ids,)).logits
    return logits


@torch.no_grad()
def logits(model: PreTrainedModel, ids: Tensor = IDS, **keywords: Any) -> Tensor:
    result: Tensor = model(ids, **keywords).logits
    return result


def same(actual: Tensor, expected: Tensor, tolerance: float = 1e-5) -> None:
    torch.testing.assert_close(actual, expected, atol=tolerance, rtol=0)


# ---- loading


@pytest.mark.parametrize("family", FAMILIES)
def test_the_loaded_model_is_the_formula_over_whole_weights(
    dense_models: dict[str, Path], tmp_path: Path, family: str
) -> None:
    dense = dense_models[family]
    folder = written(tmp_path / "simoe", dense)
    simoe = load_simoe(folder, torch.float32)
    same(logits(simoe.model), logits(AutoModelForCausalLM.from_pretrained(dense)), 0)  # nothing is set
    interpolated, masks = trained(dense, torch.float32)
    simoe.interpolated.set(WEIGHTS_SM @ simoe.gates_MG)
    each = [formula(interpolated, masks, weights_M) for weights_M in WEIGHTS_SM]
    rows = zip(each, IDS.split(1), strict=True)
    expected = torch.cat([expected_logits(dense, whole, row, torch.float32) for whole, row in rows])
    same(logits(simoe.model), expected)
    for i, whole in enumerate(each):
        with simoe.interpolated.merged(WEIGHTS_SM[i] @ simoe.gates_MG):
            same(logits(simoe.model), expected_logits(dense, whole, IDS, torch.float32))


@pytest.mark.parametrize("form", ["factored", "merged"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("family", FAMILIES)
def test_packed_documents_get_the_logits_of_the_model_in_training(
    dense_models: dict[str, Path], tmp_path: Path, family: str, dtype: torch.dtype, form: Any
) -> None:
    dense = dense_models[family]
    folder = written(tmp_path / "simoe", dense, dtype)
    simoe = load_simoe(folder, dtype, attn_implementation=PACKED_ATTENTION)
    interpolated, masks = trained(dense, dtype)
    interpolated.model.set_attn_implementation(PACKED_ATTENTION)
    documents = ((0, 7), (7, 32))
    keywords = {
        "documents": documents,
        "position_ids": torch.cat([torch.arange(7), torch.arange(25), torch.arange(8)]).view(2, 20),
    }
    assert torch.equal(simoe.gates_MG, masks.gates_MG)
    live = live_columns(masks.gates_MG, interpolated.layout)
    for each, skipped in ((interpolated, live), (simoe.interpolated, None)):
        each.set(WEIGHTS_SM @ masks.gates_MG, documents, 40, live=skipped, form=form)
    expected = logits(interpolated.model, **keywords)[:, :12]
    same(logits(simoe.model, **keywords)[:, :12], expected, 1e-5 if dtype == torch.float32 else 0.05)


@pytest.mark.parametrize("family", FAMILIES)
def test_bfloat16_computes_bit_by_bit_what_training_did(
    dense_models: dict[str, Path], tmp_path: Path, family: str
) -> None:
    dense = dense_models[family]
    simoe = load_simoe(written(tmp_path / "simoe", dense, torch.bfloat16), torch.bfloat16)
    interpolated, masks = trained(dense, torch.bfloat16)
    live = live_columns(masks.gates_MG, interpolated.layout)
    assert sum(columns is not None for columns in live) == 14  # all linears
    interpolated.set(WEIGHTS_SM @ masks.gates_MG, live=live)
    simoe.interpolated.set(WEIGHTS_SM @ simoe.gates_MG)
    assert torch.equal(logits(simoe.model), logits(interpolated.model))


def test_live_columns_alone_are_on_disk_and_in_memory(pico: Path, tmp_path: Path) -> None:
    folder = written(tmp_path / "simoe", pico)
    interpolated, masks = trained(pico, torch.float32)
    tensors = load_file(folder / "simoe.safetensors")
    alive = (masks.gates_MG != 0).any(0).split(interpolated.layout.widths)
    for span, layer, alive_I in zip(interpolated.layout.spans, interpolated.layers, alive, strict=True):
        columns = tensors.pop(f"{span.name}.columns")
        assert columns.dtype == torch.int32
        assert torch.equal(columns, alive_I.nonzero()[:, 0].int())
        assert torch.equal(tensors.pop(f"{span.name}.delta"), layer.delta[alive_I])
        gates = masks.gates_MG[:, span.start : span.start + span.width]
        assert torch.equal(tensors.pop(f"{span.name}.gates"), gates[:, alive_I])
    assert {n.removeprefix("router."): t.shape for n, t in tensors.items()} == {
        n: t.shape for n, t in masks.router.items()
    }
    dense = sum(p.numel() for p in AutoModelForCausalLM.from_pretrained(pico).parameters())
    spans = list(zip(interpolated.layout.spans, alive, strict=True))
    delta = sum(int(a.sum()) * span.owned for span, a in spans)
    norms = sum(int((~a).sum()) for span, a in spans if span.kind == "norm")  # kept whole: they are small
    assert simoe_config(folder).parameters == {
        "dense": dense,
        "delta": delta,
        "gates": 3 * int(torch.cat(alive).sum()),
        "router": sum(t.numel() for t in masks.router.values()),
    }
    loaded = load_simoe(folder, torch.float32)
    assert sum(p.numel() for p in loaded.model.parameters()) == dense + delta + norms
    assert not any(p.requires_grad for p in [*loaded.model.parameters(), *loaded.router.parameters()])


def test_what_it_says_about_itself(pico: Path, tmp_path: Path) -> None:
    folder = written(tmp_path / "simoe", pico, torch.bfloat16, sparsity_target=0.6)
    config = simoe_config(folder)
    assert config.method == SparseInterpolation(num_experts=3, sparsity_target=0.6)
    assert (config.dense, config.dtype) == (pico, torch.bfloat16)
    assert config.domains == {name: tuple(weights) for name, weights in DOMAINS.items()}
    assert is_simoe(folder) and not is_simoe(pico)
    with pytest.raises((OSError, ValueError)):  # not loaded as if it were its dense model
        AutoModelForCausalLM.from_pretrained(folder)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["simoe"]


def test_a_relative_dense_folder_is_written_absolute(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, pico: Path
) -> None:
    shutil.copytree(pico, tmp_path / "dense")
    monkeypatch.chdir(tmp_path)
    written(Path("simoe"), Path("dense"))
    monkeypatch.chdir("/")
    assert simoe_config(tmp_path / "simoe").dense == tmp_path / "dense"
    load_simoe(tmp_path / "simoe", torch.float32)


# ---- the router


@torch.no_grad()
def expected_weights(dense: Path, masks: Masks, prompt: np.ndarray) -> Tensor:
    """softmax(Linear(SiLU(Linear(LayerNorm(mean of the dense model's states over the prompt)))))."""
    model = AutoModelForCausalLM.from_pretrained(dense)
    ids = torch.from_numpy(prompt.astype(np.int64))[None]
    if masks.method.prompt_representation == "embedding":
        x = model.get_input_embeddings()(ids)[0].mean(0)
    else:
        x = model(ids, output_hidden_states=True).hidden_states[-1][0].mean(0)
    state = masks.router
    x = (x - x.mean()) / (x.var(unbiased=False) + 1e-5).sqrt() * state["norm.weight"] + state["norm.bias"]
    x = state["layers.0.weight"] @ x + state["layers.0.bias"]
    if "layers.1.weight" in state:
        x = state["layers.1.weight"] @ (x * torch.sigmoid(x)) + state["layers.1.bias"]
    return x.exp() / x.exp().sum()


@pytest.mark.parametrize("attention", [None, PACKED_ATTENTION])
@pytest.mark.parametrize("hidden", [None, 7])
@pytest.mark.parametrize("kind", ["last_hidden", "embedding"])
def test_expert_weights_are_those_of_the_dense_model_whatever_is_set(
    pico: Path, tmp_path: Path, kind: str, hidden: int | None, attention: str | None
) -> None:
    settings = {"prompt_representation": kind, "router_hidden_size": hidden}
    simoe = load_simoe(written(tmp_path / "simoe", pico, **settings), torch.float32, "cpu", attention)
    _, masks = trained(pico, torch.float32, **settings)
    expected = torch.stack([expected_weights(pico, masks, prompt) for prompt in PROMPTS])
    same(simoe.expert_weights(PROMPTS), expected)
    simoe.interpolated.set(WEIGHTS_SM @ simoe.gates_MG)
    before = simoe.interpolated.blend
    with simoe.interpolated.merged(WEIGHTS_SM[0] @ simoe.gates_MG):
        merged = logits(simoe.model) if attention is None else None
        same(simoe.coefficients(PROMPTS), expected @ masks.gates_MG)
        assert merged is None or torch.equal(logits(simoe.model), merged)  # unchanged
    assert simoe.interpolated.blend is before


# ---- merging


def stock(folder: Path, **keywords: Any) -> PreTrainedModel:
    model, info = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True, **keywords)
    assert not any(info[name] for name in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    return model.eval()


@pytest.mark.parametrize("family", FAMILIES)
def test_a_merged_folder_is_the_simoe_model_in_stock_transformers(
    dense_models: dict[str, Path], tmp_path: Path, family: str
) -> None:
    dense = dense_models[family]
    folder = written(tmp_path / "simoe", dense)
    assert merge(folder, tmp_path / "plain", WEIGHTS_SM[0]) == pytest.approx(1, abs=1e-5)
    model = stock(tmp_path / "plain")
    assert type(model) is type(AutoModelForCausalLM.from_pretrained(dense))
    interpolated, masks = trained(dense, torch.float32)
    whole = formula(interpolated, masks, WEIGHTS_SM[0])
    same(logits(model), expected_logits(dense, whole, IDS, torch.float32))
    simoe = load_simoe(folder, torch.float32)
    simoe.interpolated.set((WEIGHTS_SM[:1] @ simoe.gates_MG).expand(2, -1))
    same(logits(model), logits(simoe.model))
    settings = [json.loads((each / "config.json").read_text()) for each in (dense, tmp_path / "plain")]
    assert settings[0] == settings[1]
    assert {p.name for p in (tmp_path / "plain").iterdir()} == {p.name for p in dense.iterdir()}
    AutoTokenizer.from_pretrained(tmp_path / "plain")


@pytest.mark.parametrize("family", FAMILIES)
def test_a_merged_folder_keeps_every_tensors_dtype_and_rounds_once(tmp_path: Path, family: str) -> None:
    dense = write_pico(tmp_path / "dense", family, max_shard_size="20KB")
    halved = {}
    for file in dense.glob("*.safetensors"):  # bfloat16 except for the norms
        tensors = {n: t if "norm" in n else t.bfloat16() for n, t in load_file(file).items()}
        save_file(tensors, file, {"format": "pt"})
        halved |= tensors
    folder = written(tmp_path / "simoe", dense, torch.bfloat16)
    share = merge(folder, tmp_path / "plain", DOMAINS["math"])
    merged = load_file(tmp_path / "plain" / "model.safetensors")
    assert merged.keys() == halved.keys()
    interpolated, masks = trained(dense, torch.bfloat16)
    for span, layer in zip(interpolated.layout.spans, interpolated.layers, strict=True):
        layer.weight = torch.nn.Parameter(halved[f"{span.name}.weight"])
    whole = formula(interpolated, masks, torch.tensor(DOMAINS["math"]))
    kept = wanted = 0.0
    for name, weight in merged.items():
        assert weight.dtype == halved[name].dtype
        expected = whole.get(name, halved[name].double()).to(weight.dtype)
        ulps = (
            (weight.view(torch.int16) - expected.view(torch.int16)).abs()
            if weight.dtype == torch.bfloat16
            else None
        )
        if ulps is None:
            same(weight, expected, 1e-6)
        else:  # fp32 and fp64 round differently halfway between two bfloat16 values
            assert ulps.max() <= 1 and ulps.float().mean() < 1e-3
        if name in whole:
            change = whole[name] - halved[name].double()
            kept += float(((weight.double() - halved[name].double()) * change).sum())
            wanted += float(change.square().sum())
        else:
            assert torch.equal(weight, halved[name])
    assert share == pytest.approx(kept / wanted, abs=1e-5)


def test_the_share_that_survives_rounding(tmp_path: Path) -> None:
    dense = write_pico(tmp_path / "dense", "llama")
    tensors = load_file(dense / "model.safetensors")
    save_file({n: t.bfloat16() for n, t in tensors.items()}, dense / "model.safetensors", {"format": "pt"})
    for scale, low, high in ((1e-5, -0.1, 0.4), (0.1, 0.97, 1.03)):
        folder = written(tmp_path / f"{scale}", dense, torch.bfloat16, scale=scale)
        assert low < merge(folder, tmp_path / f"plain {scale}", DOMAINS["math"]) < high
    folder = written(tmp_path / "zero", dense, torch.bfloat16, scale=0.0)
    assert merge(folder, tmp_path / "plain zero", DOMAINS["math"]) == 1
    merged = load_file(tmp_path / "plain zero" / "model.safetensors")
    assert all(torch.equal(merged[name], tensors[name].bfloat16()) for name in tensors)


def test_generation_is_that_of_each_prompts_merged_model(pico: Path, tmp_path: Path) -> None:
    folder = written(tmp_path / "simoe", pico, scale=0.3)
    simoe, tokenizer = load_simoe(folder, torch.float32), AutoTokenizer.from_pretrained(pico)
    prompts = [PROMPTS[0], PROMPTS[1], PROMPTS[0], PROMPTS[2]]
    expected = []
    for i, prompt in enumerate(prompts):
        (weights_M,) = simoe.expert_weights([prompt])
        merge(folder, tmp_path / f"plain{i}", weights_M)
        expected += generate(stock(tmp_path / f"plain{i}"), tokenizer, [prompt], 8)
    assert len(set(expected)) == 3
    assert generate_simoe(simoe, tokenizer, prompts, 8) == expected
    assert simoe.interpolated.blend is None and simoe.interpolated.layers[0].merged is None


# ---- a folder that needs nothing else


def test_an_exported_folder_needs_nothing_else(tmp_path: Path) -> None:
    dense = write_pico(tmp_path / "dense", "qwen3", max_shard_size="20KB")
    (dense / "original.bin").write_text("not needed")
    folder = written(tmp_path / "simoe", dense)
    before = load_simoe(folder, torch.float32)
    export_simoe(folder, tmp_path / "out")
    assert (dense / "model.safetensors.index.json").is_file()
    files = {p.name for p in dense.iterdir()} - {"original.bin"}
    assert {p.name for p in (tmp_path / "out" / "dense").iterdir()} == files
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == [
        "dense",
        "simoe.json",
        "simoe.safetensors",
    ]
    shutil.rmtree(dense)
    shutil.rmtree(folder)
    (tmp_path / "out").rename(tmp_path / "moved")
    after = load_simoe(tmp_path / "moved", torch.float32)
    for each in (before, after):
        each.interpolated.set(WEIGHTS_SM @ each.gates_MG)
    assert torch.equal(logits(after.model), logits(before.model))
    assert AutoTokenizer.from_pretrained(after.config.dense).vocab_size
    merge(tmp_path / "moved", tmp_path / "plain", DOMAINS["code"])
    export_simoe(tmp_path / "moved", tmp_path / "again")
    load_simoe(tmp_path / "again", torch.float32)


# ---- prompts as text


@pytest.mark.parametrize("own_template", [False, True])
def test_a_prompt_is_rendered_as_data_are(pico: Path, own_template: bool) -> None:
    tokenizer = AutoTokenizer.from_pretrained(pico)
    if own_template:
        tokenizer.chat_template = (
            "{% for m in messages %}<{{ m.role }}>{{ m.content }}</s>{% endfor %}"
            "{% if add_generation_prompt %}<assistant>{% endif %}"
        )
    text = "What is 3 + 4? " * 40  # longer than data.max_length
    example = Instruction("a", "math", "sum", (("user", text),), "7\n#### 7", "file:1")
    data = Data(max_length=64, on_bad_row="skip")
    expected = encode([example], tokenizer, Data(max_length=10**4)).prompt(0)
    assert np.array_equal(prompt_tokens(text, tokenizer, data), expected)
    for chat_template in ("plain", "tokenizer"):
        spelled = tokenizer.decode(prompt_tokens("Hi", tokenizer, Data(chat_template=chat_template)))
        own = own_template and chat_template == "tokenizer"
        assert spelled == ("<user>Hi</s><assistant>" if own else "<s>### Instruction:\nHi\n\n### Response:\n")


# ---- bad input


def edited(**changes: Any) -> Callable[[Path, Path], None]:
    def edit(folder: Path, dense: Path) -> None:
        values = json.loads((folder / "simoe.json").read_text())
        (folder / "simoe.json").write_text(json.dumps({**values, **changes}))

    return edit


def retensored(name: str, change: Callable[[Tensor], Tensor | None]) -> Callable[[Path, Path], None]:
    def edit(folder: Path, dense: Path) -> None:
        tensors = load_file(folder / "simoe.safetensors")
        changed = change(tensors.pop(name))
        save_file({**tensors, **({} if changed is None else {name: changed})}, folder / "simoe.safetensors")

    return edit


def no_key(folder: Path, dense: Path) -> None:
    values = json.loads((folder / "simoe.json").read_text())
    del values["layers"][3]["live"]
    (folder / "simoe.json").write_text(json.dumps(values))


def cut_off(folder: Path, dense: Path) -> None:
    file = folder / "simoe.safetensors"
    file.write_bytes(file.read_bytes()[:-100])


def other_weights(folder: Path, dense: Path) -> None:
    tensors = load_file(dense / "model.safetensors")
    tensors["model.layers.1.mlp.up_proj.weight"][0, 0] += 1
    save_file(tensors, dense / "model.safetensors", {"format": "pt"})


def other_shape(folder: Path, dense: Path) -> None:
    shutil.rmtree(dense)
    write_pico(dense, "llama", intermediate_size=40)


Q = "model.layers.0.self_attn.q_proj"
DAMAGED: dict[str, tuple[Callable[[Path, Path], None], str]] = {
    "no json": (lambda f, d: (f / "simoe.json").unlink(), "no SIMoE model here"),
    "not json": (lambda f, d: (f / "simoe.json").write_text("{") and None, "damaged (JSONDecodeError"),
    "a list": (lambda f, d: (f / "simoe.json").write_text("[]") and None, "damaged (TypeError"),
    "version": (edited(format=2), "format 2, but this version of raymoe reads only 1"),
    "setting": (edited(method={"name": "simoe", "temperature": 1}), "damaged (InputError: temperature"),
    "dtype": (edited(dtype="int8"), "damaged (KeyError: 'int8'"),
    "domains": (edited(domains={"math": [1.0]}), "math has not one weight per expert"),
    "key": (no_key, "damaged (KeyError: 'live'"),
    "no tensors": (lambda f, d: (f / "simoe.safetensors").unlink(), "simoe.safetensors is missing"),
    "cut off": (cut_off, "simoe.safetensors: damaged: "),
    "tensor": (retensored(f"{Q}.gates", lambda t: None), f"{Q}.gates"),
    "shape": (retensored(f"{Q}.delta", lambda t: t[:-1].clone()), f"{Q}.delta is ["),
    "columns": (retensored(f"{Q}.columns", lambda t: t.flip(0)), f"{Q}.columns do not rise"),
    "width": (retensored(f"{Q}.columns", lambda t: t + 32), f"{Q}.columns do not rise from 0 to 31"),
    "moved": (lambda f, d: d.rename(d.parent / "elsewhere") and None, "its dense model is no longer in "),
    "weights": (other_weights, "made for other weights"),
    "other": (other_shape, "model.layers.0.mlp.gate_proj.weight is [48, 32]; in "),
}  # fmt: skip


@pytest.mark.parametrize("damage", DAMAGED)
def test_what_can_not_be_used_is_said_in_one_line(pico: Path, tmp_path: Path, damage: str) -> None:
    dense = Path(shutil.copytree(pico, tmp_path / "dense"))
    folder = written(tmp_path / "simoe", dense)
    edit, message = DAMAGED[damage]
    edit(folder, dense)
    uses: list[Callable[[], Any]] = [
        lambda: load_simoe(folder, torch.float32),
        lambda: merge(folder, tmp_path / "plain", DOMAINS["math"]),
    ]
    if damage not in ("tensor", "shape", "columns", "width"):  # found on loading
        uses.append(lambda: export_simoe(folder, tmp_path / "out"))
    for use in uses:
        with pytest.raises(InputError) as caught:
            use()
        assert message in str(caught.value)
        assert "\n" not in str(caught.value)
        assert str(folder) in str(caught.value)
    if damage == "moved":
        assert str(dense) in str(caught.value)
    left = {p.name for p in tmp_path.iterdir()}
    assert left - {"elsewhere", "dense"} == {"simoe"}


def without_last(parameters: Iterator[tuple[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
    *some, _ = [(n, p) for n, p in parameters if n.endswith(".delta")]
    yield from some


def crashing(parameters: Iterator[tuple[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
    yield from without_last(parameters)
    raise RuntimeError("a worker was lost")


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (without_last, ValueError, "1 tensors were never written"),
        (crashing, RuntimeError, "a worker was lost"),
        (lambda ps: (("x" + n, p) for n, p in ps), ValueError, "is no delta of this model"),
        (lambda ps: ((n, p[..., :-1]) for n, p in ps), ValueError, "has shape"),
    ],
)
def test_a_folder_appears_whole_or_not_at_all(
    pico: Path, tmp_path: Path, change: Callable[[Any], Any], error: type[Exception], message: str
) -> None:
    interpolated, masks = trained(pico, torch.float32)
    parameters = interpolated.model.named_parameters()
    with pytest.raises(error, match=message):
        write_simoe(tmp_path / "simoe", pico, masks, change(parameters), torch.float32)
    assert not list(tmp_path.iterdir())


def test_masks_of_another_model_are_refused(dense_models: dict[str, Path], tmp_path: Path) -> None:
    interpolated, masks = trained(dense_models["llama"], torch.float32)
    with pytest.raises(ValueError, match="gates"):
        parameters = interpolated.model.named_parameters()
        write_simoe(tmp_path / "simoe", dense_models["qwen3"], masks, parameters, torch.float32)
    assert not list(tmp_path.iterdir())


def test_what_is_there_is_not_overwritten(pico: Path, tmp_path: Path) -> None:
    folder = written(tmp_path / "simoe", pico)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine").touch()
    interpolated, masks = trained(pico, torch.float32)
    parameters = interpolated.model.named_parameters
    for write in (
        lambda out: write_simoe(out, pico, masks, parameters(), torch.float32),
        lambda out: merge(folder, out, DOMAINS["math"]),
        lambda out: export_simoe(folder, out),
    ):
        with pytest.raises(InputError, match="exists already"):
            write(tmp_path / "full")
    assert [p.name for p in (tmp_path / "full").iterdir()] == ["mine"]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["full", "simoe"]
    with pytest.raises(ValueError, match=r"\[2\] expert weights for 3"):
        merge(folder, tmp_path / "out", [0.5, 0.5])


def test_a_loaded_model_is_a_simoe(pico: Path, tmp_path: Path) -> None:
    simoe = load_simoe(written(tmp_path / "simoe", pico), torch.float32)
    assert isinstance(simoe, SIMoE) and not simoe.model.training
