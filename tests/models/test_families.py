"""The record of every family against transformers' own classes, the tests' tiny models and the documentation."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from support.models import FAMILIES, GATINGS, IMPOSSIBLE, SPARSE, pico_model
from torch import nn
from transformers import AutoConfig

from raymoe.methods import SparseUpcycling
from raymoe.models import families
from raymoe.models.dense import check_supported
from raymoe.models.families import Layout, family_of, layout_of, logits_divisor, sparse_config
from raymoe.models.moe import GATINGS as ALL_GATINGS
from raymoe.models.moe import upcycle_model
from raymoe.models.simoe import interpolate
from raymoe.schema import InputError

DOCUMENTATION = Path(__file__).parents[2] / "docs" / "models.md"
REFUSED = [(family, setting) for family in FAMILIES for setting in families.FAMILIES[family].refused]


def method(gating: str) -> SparseUpcycling:
    return SparseUpcycling(num_experts=4, top_k=2, gating=gating)


def norms(model: nn.Module) -> dict[str, nn.Module]:
    """Name within its layer -> norm, of the first layer."""
    layer = model.get_decoder().layers[0]
    return {name: m for name, m in layer.named_modules() if name.rsplit(".", 1)[-1].endswith("norm")}


def test_every_family_has_a_tiny_model_and_every_gating_an_answer() -> None:
    assert list(FAMILIES) == list(families.FAMILIES)
    assert set(GATINGS) == set(ALL_GATINGS)
    for name, family in families.FAMILIES.items():
        assert family.model_type == name == pico_model(name).config.model_type
        assert set(family.sparse) == set(ALL_GATINGS)


@pytest.mark.parametrize(("family", "gating"), SPARSE)
def test_the_sparse_class_is_in_transformers_and_knows_its_settings(family: str, gating: str) -> None:
    dense = pico_model(family).config
    config = sparse_config(dense, method(gating))
    layout = layout_of(dense, method(gating))
    assert issubclass(getattr(transformers, layout.architecture), transformers.PreTrainedModel)
    assert config.architectures == [layout.architecture]
    # A head of another width is the one setting that classes without a name for it read nevertheless.
    known = {*type(config)().to_dict(), *type(config).attribute_map, "head_dim"}
    assert set(layout.settings(dense, method(gating))) <= known


@pytest.mark.parametrize("family", FAMILIES)
def test_the_norms_are_where_the_record_says(family: str) -> None:
    """Beside hook points: which modules are there, and when they round."""
    model, record = pico_model(family), families.FAMILIES[family]
    found = norms(model)
    assert ({"self_attn.q_norm", "self_attn.k_norm"} <= set(found)) == record.query_key_norms
    assert ("input_layernorm" in found) == (record.points is families.PRE_NORM)
    assert ("post_feedforward_layernorm" in found) == (record.points is families.POST_NORM)
    for point in record.points.values():
        assert isinstance(model.get_decoder().layers[0].get_submodule(point.module), nn.Module)
    norm = found["post_attention_layernorm"].to(torch.bfloat16)
    x = torch.randn(64, 32, generator=torch.Generator().manual_seed(0)).bfloat16()
    y = x.float() * torch.rsqrt(x.float().square().mean(-1, keepdim=True) + norm.variance_epsilon)
    late = (norm.weight.float() * y).bfloat16()
    early = norm.weight * y.bfloat16()
    assert not torch.equal(late, early)
    assert torch.equal(norm(x), late if record.norms_scale_in_fp32 else early)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_logits_divisor_is_what_the_head_is_divided_by(family: str) -> None:
    model, ids = pico_model(family), torch.arange(12)[None]
    with torch.no_grad():
        head = model.get_output_embeddings()(model.base_model(ids).last_hidden_state)
        torch.testing.assert_close(model(ids).logits, head / logits_divisor(model.config))


def line_of(call: Any, *arguments: Any) -> str:
    with pytest.raises(InputError) as caught:
        call(*arguments)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize(("family", "gating"), IMPOSSIBLE)
def test_a_gating_that_no_class_computes_is_refused_with_the_reason(family: str, gating: str) -> None:
    model, reason = pico_model(family), families.FAMILIES[family].sparse[gating]
    expected = f"method.gating: {gating} is not possible with {family}: {reason}; choose from "
    for call, arguments in (
        (sparse_config, (model.config, method(gating))),
        (upcycle_model, (model, torch.zeros(2, 4, 32), method(gating))),
    ):
        line = line_of(call, *arguments)
        assert line == expected + "straight_through, renormalized"
    assert isinstance(model.get_decoder().layers[0].mlp.gate_proj, nn.Linear)  # nothing was replaced


def test_what_could_not_be_exported_is_not_trained() -> None:
    windows = {"layer_types": ["full_attention", "sliding_attention"], "use_sliding_window": True}
    model = pico_model("qwen3", **windows)
    line = line_of(upcycle_model, model, torch.zeros(2, 4, 32), method("renormalized"))
    assert line == "model: Qwen3-MoE can't hold a sliding window in some layers only"


@pytest.mark.parametrize(("family", "setting"), REFUSED)
def test_a_setting_that_no_class_holds_is_refused_with_the_reason(family: str, setting: str) -> None:
    config = AutoConfig.for_model(family)
    check_supported(config)
    family_of(config)
    setattr(config, setting, True)
    reason = families.FAMILIES[family].refused[setting]
    assert line_of(family_of, config) == f"model: {reason} ({setting})"
    line = line_of(check_supported, config)
    assert line == f"model.name: {family} with {setting} is not supported: {reason}"


def test_other_models_are_refused_by_name() -> None:
    config = AutoConfig.for_model("gpt2", n_embd=32, n_head=4, n_layer=1)
    model = transformers.AutoModelForCausalLM.from_config(config)
    assert line_of(upcycle_model, model, torch.zeros(1, 4, 32), method("softmax")).startswith(
        "model: can't upcycle 'gpt2', only "
    )
    with pytest.raises(InputError):
        interpolate(model)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_documentation_says_what_the_record_says(family: str) -> None:
    """One row per family: its name, the class of each gating or `-`, and then what sets it apart."""
    text = DOCUMENTATION.read_text()
    record = families.FAMILIES[family]
    (row,) = [line for line in text.splitlines() if line.startswith(f"| `{family}` |")]
    cells = [cell.strip() for cell in row.strip("|").split("|")]
    classes = [record.sparse[gating] for gating in ("renormalized", "softmax")]
    assert cells[1:3] == [f"`{c.model_type}`" if isinstance(c, Layout) else "-" for c in classes]
    words = " ".join(text.split())
    reasons = [*record.refused.values(), *(r for r in record.sparse.values() if isinstance(r, str))]
    for said in (record.about, *reasons, *(f"`{setting}`" for setting in record.refused)):
        assert said in words
    assert set(re.findall(r"^\| `(\w+)` \|", text, re.M)) == set(families.FAMILIES)
