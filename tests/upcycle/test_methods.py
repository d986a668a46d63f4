from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM

from raymoe.methods import (
    METHODS,
    SEAMS,
    ContextRepresentations,
    Experts,
    MethodConfig,
    SparseUpcycling,
    TaskRepresentations,
    resolve,
)
from raymoe.models.moe import sparse_layers
from raymoe.schema import InputError
from raymoe.stages import REVISIONS
from raymoe.train.extension import Extension
from raymoe.upcycle import expand, load_recipe, router, write_recipe


@pytest.mark.parametrize("kind", METHODS.values())
def test_every_method_has_a_row_whose_references_exist(kind: type[MethodConfig]) -> None:
    row = SEAMS[kind]
    assert (row.router is not None) == issubclass(kind, Experts) == ("upcycle" in row.stages)
    assert issubclass(resolve(row.extension), Extension)
    assert all(callable(resolve(reference)) for reference in (row.router, row.expert) if reference)
    assert set(row.stages) <= set(REVISIONS)


def test_su_draws_from_the_normal_distribution_asked_for() -> None:
    method = SparseUpcycling(num_experts=8, router_std=0.02)
    rows = router(method, num_layers=4, width=512, clusters=None, seed=3)
    assert rows.shape == (4, 8, 512)
    assert float(rows.mean()) == pytest.approx(0, abs=5 * 0.02 / rows.numel() ** 0.5)
    assert float(rows.std()) == pytest.approx(0.02, rel=0.02)
    again, other = (router(method, num_layers=4, width=512, clusters=None, seed=s) for s in (3, 4))
    assert torch.equal(rows, again)
    assert not torch.equal(rows, other)


@pytest.mark.parametrize("method", [TaskRepresentations(), ContextRepresentations()])
def test_representation_methods_take_the_rows_of_the_clusters(method: Experts, tmp_path: Path) -> None:
    rows = torch.randn(3, 2, 16)
    save_file({"router": rows, "centroids": torch.zeros(1)}, tmp_path / "router.safetensors")
    assert torch.equal(router(method, num_layers=3, width=16, clusters=tmp_path, seed=0), rows)
    with pytest.raises(InputError, match=r"rows of shape \(3, 2, 16\), expected \(4, 2, 16\)"):
        router(method, num_layers=4, width=16, clusters=tmp_path, seed=0)
    with pytest.raises(InputError, match="no router rows"):
        router(method, num_layers=3, width=16, clusters=tmp_path / "missing", seed=0)
    with pytest.raises(InputError, match="needs the clusters"):
        router(method, num_layers=3, width=16, clusters=None, seed=0)


def test_a_recipe_expands_to_the_model_that_it_describes(pico: Path, tmp_path: Path) -> None:
    method = SparseUpcycling(num_experts=3, gating="renormalized")
    rows = router(method, num_layers=2, width=32, clusters=None, seed=0)
    write_recipe(tmp_path / "recipe", pico, method, rows)
    recipe, loaded = load_recipe(tmp_path / "recipe")
    assert recipe.method == method
    model = expand(Path(recipe.dense), loaded, recipe.method, torch.float32)
    dense = AutoModelForCausalLM.from_pretrained(pico)
    ids = torch.arange(20)[None]
    torch.testing.assert_close(model(ids).logits, dense(ids).logits, atol=1e-5, rtol=0)
    torch.testing.assert_close(torch.stack([layer.gate.weight for layer in sparse_layers(model)]), rows)
    assert sum(f.stat().st_size for f in (tmp_path / "recipe").iterdir()) < 2000 + rows.nbytes


@pytest.mark.parametrize(
    "content", [None, "{", '{"dense": "x"}', '{"dense": "x", "method": {"name": "dense"}}']
)
def test_what_is_no_recipe_is_refused(content: str | None, tmp_path: Path) -> None:
    save_file({"router": torch.zeros(1)}, tmp_path / "router.safetensors")
    if content is not None:
        (tmp_path / "recipe.json").write_text(content)
    with pytest.raises(InputError, match="not a recipe"):
        load_recipe(tmp_path)
