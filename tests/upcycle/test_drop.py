"""Drop-Upcycling against the paper's section 3 and, in its other variant, the authors' conversion."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from raymoe.methods import DropUpcycling
from raymoe.models.moe import FFN
from raymoe.upcycle import expand, expert_start, router
from raymoe.upcycle.checkpoint import materialize
from raymoe.upcycle.drop import expert

WIDTH, FFN_WIDTH, RATIO = 64, 400, 0.3
DENSE = FFN(
    *(
        torch.randn(shape, generator=torch.Generator().manual_seed(i)) * 0.1 * (i + 1) + 0.2
        for i, shape in enumerate([(FFN_WIDTH, WIDTH), (FFN_WIDTH, WIDTH), (WIDTH, FFN_WIDTH)])
    )
)


def made(variant: str, seed: int = 0) -> FFN:
    method = DropUpcycling(drop_ratio=RATIO, variant=variant)  # type: ignore[arg-type]
    return expert(method, DENSE, torch.Generator().manual_seed(seed))


def by_column(ffn: FFN) -> tuple[Tensor, Tensor, Tensor]:
    return ffn.gate_proj, ffn.up_proj, ffn.down_proj.T


def origin(new_FD: Tensor, dense_FD: Tensor) -> list[int | None]:
    """Return, for each new column, the dense column that it equals; None: redrawn."""
    where = {tuple(row): i for i, row in enumerate(dense_FD.tolist())}
    return [where.get(tuple(row)) for row in new_FD.tolist()]


def origins(ffn: FFN) -> list[list[int | None]]:
    return [origin(new, old) for new, old in zip(by_column(ffn), by_column(DENSE), strict=True)]


@pytest.mark.parametrize("variant", ["paper", "official"])
def test_a_share_of_the_columns_is_drawn_from_the_statistics_of_those_it_replaces(variant: str) -> None:
    ffn = made(variant)
    for new_FD, old_FD, kept in zip(by_column(ffn), by_column(DENSE), origins(ffn), strict=True):
        dropped = torch.tensor([k is None for k in kept])
        assert int(dropped.sum()) == int(RATIO * FFN_WIDTH)
        lost = old_FD[sorted(set(range(FFN_WIDTH)) - {k for k in kept if k is not None})]
        drawn, error = new_FD[dropped], float(lost.std()) / lost.numel() ** 0.5
        assert float(drawn.mean()) == pytest.approx(float(lost.mean()), abs=5 * error)
        assert float(drawn.std()) == pytest.approx(float(lost.std()), abs=5 * error)


def test_paper_draws_the_same_columns_of_all_three_matrices_and_moves_none() -> None:
    gate, up, down = origins(made("paper"))
    assert gate == up == down
    assert all(kept in (None, place) for place, kept in enumerate(gate))


def test_official_permutes_all_alike_and_draws_columns_of_each_matrix_by_themselves() -> None:
    gate, up, down = origins(made("official"))
    assert len({tuple(k is None for k in each) for each in (gate, up, down)}) == 3
    places = [{k for k in at if k is not None} for at in zip(gate, up, down, strict=True)]
    assert all(
        len(kept) <= 1 for kept in places
    )  # the kept entries of a column are all from one column of the dense FFN
    moved = [place for place, kept in enumerate(places) if kept and kept != {place}]
    assert len(moved) > 0.9 * FFN_WIDTH


@pytest.mark.parametrize("variant", ["paper", "official"])
def test_experts_differ_and_are_decided_by_seed_layer_and_number(variant: str) -> None:
    start = expert_start(DropUpcycling(drop_ratio=RATIO, variant=variant), seed=3)  # type: ignore[arg-type]
    assert start is not None
    assert torch.equal(start(DENSE, 1, 2).gate_proj, start(DENSE, 1, 2).gate_proj)
    others = [start(DENSE, layer, number).gate_proj for layer, number in ((1, 2), (1, 3), (0, 2))]
    assert not torch.equal(others[0], others[1]) and not torch.equal(others[0], others[2])


@pytest.mark.parametrize("variant", ["paper", "official"])
def test_training_starts_from_what_is_written(variant: str, pico: Path, tmp_path: Path) -> None:
    method = DropUpcycling(num_experts=4, drop_ratio=0.25, variant=variant)  # type: ignore[arg-type]
    rows = router(method, num_layers=2, width=32, clusters=None, seed=3)
    materialize(pico, rows, method, tmp_path / "moe", start=expert_start(method, 3))
    stock = AutoModelForCausalLM.from_pretrained(tmp_path / "moe").eval()
    assert type(stock).__name__ == "MixtralForCausalLM"
    ids = torch.arange(40)[None]
    with torch.no_grad():
        logits = stock(ids).logits
        ours = expand(pico, rows, method, torch.float32, seed=3).eval()(ids).logits
        dense = AutoModelForCausalLM.from_pretrained(pico).eval()(ids).logits
    torch.testing.assert_close(ours, logits)
    assert not torch.allclose(logits, dense, atol=1e-2)


def test_every_expert_on_disk_redraws_another_quarter_of_the_columns(pico: Path, tmp_path: Path) -> None:
    method = DropUpcycling(num_experts=4, drop_ratio=0.25)
    rows = router(method, num_layers=2, width=32, clusters=None, seed=3)
    materialize(pico, rows, method, tmp_path / "moe", start=expert_start(method, 3))
    moe, dense = load_file(tmp_path / "moe" / "model.safetensors"), load_file(pico / "model.safetensors")
    masks = []
    for layer, number in ((layer, number) for layer in range(2) for number in range(4)):
        new = moe[f"model.layers.{layer}.block_sparse_moe.experts.{number}.w1.weight"]
        changed_F = (new != dense[f"model.layers.{layer}.mlp.gate_proj.weight"]).any(1)
        masks.append(tuple(changed_F.tolist()))
    assert {sum(mask) for mask in masks} == {int(0.25 * len(masks[0]))}
    assert len(set(masks)) == len(masks)
