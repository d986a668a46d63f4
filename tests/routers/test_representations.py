"""Representations against hooks on transformers' own forward pass, one sequence at a time."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from safetensors.torch import load_file
from support.models import FAMILIES
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

from raymoe.data.instructions import Encoded
from raymoe.methods import ContextRepresentations, TaskRepresentations
from raymoe.routers.actors import load_model
from raymoe.routers.representations import Tokens, choose, extract, extract_all, packs
from raymoe.schema import InputError

POINTS = ("ffn_input", "attention_output", "attention_residual")
LENGTHS = np.array([9, 30, 4, 17, 2, 21, 12, 6, 40, 5])
DOMAINS = ("code", "math", "text", "code", "math", "code", "code", "text", "math", "code")


@pytest.fixture(scope="module")
def encoded() -> Encoded:
    generator = np.random.default_rng(0)
    offsets = np.concatenate([[0], np.cumsum(LENGTHS)])
    tokens = generator.integers(0, 256, offsets[-1], dtype=np.int32)
    ids = tuple(map(str, range(len(LENGTHS))))
    return Encoded(tokens, offsets, (LENGTHS // 2).astype(np.int32), ids, DOMAINS, DOMAINS)


@pytest.fixture(scope="module")
def scores(encoded: Encoded, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Perplexities that fall with the record."""
    file = tmp_path_factory.mktemp("scores") / "scores.parquet"
    records = np.arange(len(encoded))
    columns = {"record": records, "domain": DOMAINS, "task": DOMAINS, "perplexity": 100.0 - records}
    pq.write_table(pa.table(columns), file)
    return file


def plain_representations(model: PreTrainedModel, ids: Tensor) -> dict[str, Tensor]:
    """Each point's [L, T, D] of a batch of one, with hooks of the test's own.

    The residual after attention is what the norm of the FFN gets, or, if norms come after, the sum written out.
    """
    taken: dict[str, list[Tensor]] = {name: [] for name in POINTS}
    handles = []
    post_norm = not hasattr(model.model.layers[0], "input_layernorm")
    inputs: list[Tensor] = []
    for layer in model.model.layers:
        residual = (
            layer.post_attention_layernorm.register_forward_hook(
                lambda m, x, y: taken["attention_residual"].append(inputs[-1] + y[0])
            )
            if post_norm
            else layer.post_attention_layernorm.register_forward_pre_hook(
                lambda m, x: taken["attention_residual"].append(x[0][0])
            )
        )
        handles += [
            residual,
            layer.register_forward_pre_hook(lambda m, x: inputs.append(x[0][0])),
            layer.mlp.register_forward_pre_hook(lambda m, x: taken["ffn_input"].append(x[0][0])),
            layer.self_attn.o_proj.register_forward_hook(
                lambda m, x, y: taken["attention_output"].append(y[0])
            ),
        ]
    with torch.no_grad():
        model(ids[None])
    for handle in handles:
        handle.remove()
    return {name: torch.stack(layers) for name, layers in taken.items()}


def expected_representations(folder: Path, encoded: Encoded, tokens: Tokens, point: str) -> Tensor:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    columns = []
    for record, position in zip(tokens.record.tolist(), tokens.position.tolist(), strict=True):
        ids = torch.from_numpy(encoded.example(record)).long()
        columns.append(plain_representations(model, ids)[point][:, position])
    return torch.stack(columns, dim=1)


@pytest.mark.parametrize("point", POINTS)
@pytest.mark.parametrize("family", FAMILIES)
def test_equal_to_a_plain_forward_and_independent_of_packing(
    dense_models: dict[str, Path], encoded: Encoded, family: str, point: str
) -> None:
    tokens = choose(encoded, ContextRepresentations(token_fraction=0.2), None, seed=0)
    model = load_model(dense_models[family], "float32")
    for budget in (1, 40, 10_000):
        parts = [extract(model, encoded, tokens[a:b], point) for a, b in packs(tokens, budget)]
        for name in {"ffn_input", point}:
            actual = torch.cat([part[name] for part in parts], dim=1)
            expected = expected_representations(dense_models[family], encoded, tokens, name)
            torch.testing.assert_close(actual, expected, atol=1e-4, rtol=0)


def test_a_padded_batch_would_give_other_rows_than_ours(pico: Path, encoded: Encoded) -> None:
    """The trap: hooks over a padded batch see pads, and left pads shift positions unless they are masked."""
    everything = choose(encoded, ContextRepresentations(token_fraction=1.0), None, seed=0)
    ours = extract(load_model(pico, "float32"), encoded, everything, "ffn_input")["ffn_input"]
    assert ours.shape[1] == (LENGTHS - 1).sum()  # every real token but the first ones, and no pad
    model = AutoModelForCausalLM.from_pretrained(pico, dtype=torch.float32)
    padded = torch.full((len(LENGTHS), LENGTHS.max()), 258)
    for row, length in enumerate(LENGTHS):
        padded[row, :length] = torch.from_numpy(encoded.example(row))
    taken: list[Tensor] = []
    hook = model.model.layers[0].mlp.register_forward_pre_hook(lambda m, x: taken.append(x[0]))
    with torch.no_grad():
        model(padded, attention_mask=(padded != 258).long())
    hook.remove()
    real = torch.arange(LENGTHS.max()) < torch.from_numpy(LENGTHS)[:, None]
    real[:, 0] = False
    torch.testing.assert_close(ours[0], taken[0][real], atol=1e-4, rtol=0)
    with_pads = taken[0].flatten(0, 1).mean(0)
    assert (ours[0].mean(0) - with_pads).abs().max() > 0.05  # what averaging over pads would have made of it


def test_crsu_samples_its_share_of_all_tokens_and_no_first_one(encoded: Encoded) -> None:
    drawn = [choose(encoded, ContextRepresentations(token_fraction=0.1), None, seed) for seed in range(400)]
    total = int(LENGTHS.sum())
    counts: dict[tuple[int, int], int] = {}
    for tokens in drawn:
        pairs = list(zip(tokens.record.tolist(), tokens.position.tolist(), strict=True))
        assert len(pairs) == len(set(pairs)) == round(0.1 * total)
        assert pairs == sorted(pairs)
        for pair in pairs:
            counts[pair] = counts.get(pair, 0) + 1
    assert set(counts) == {(r, p) for r, n in enumerate(LENGTHS.tolist()) for p in range(1, n)}
    mean = 400 * round(0.1 * total) / len(counts)
    chi_square = sum((count - mean) ** 2 / mean for count in counts.values())
    assert chi_square < 2 * len(counts)  # uniform: about 1 per token
    again = choose(encoded, ContextRepresentations(token_fraction=0.1), None, seed=3)
    assert again.record.tolist() == drawn[3].record.tolist()
    few = choose(encoded, ContextRepresentations(token_fraction=1.0, max_tokens=7), None, seed=0)
    assert len(few) == 7


def test_trsu_takes_all_tokens_of_each_tasks_most_perplexing_instances(
    encoded: Encoded, scores: Path
) -> None:
    method = TaskRepresentations(tasks=("math", "code"), perplexity_top_fraction=0.4)
    tokens = choose(encoded, method, scores, seed=0)
    chosen = {(r, g) for r, g in zip(tokens.record.tolist(), tokens.group.tolist(), strict=True)}
    assert chosen == {(1, 0), (0, 1), (3, 1)}  # 0.4 of 3 math and of 5 code instances
    assert len(tokens) == (LENGTHS - 1)[[0, 1, 3]].sum()
    assert tokens.position.min() == 1
    limited = choose(encoded, method.model_copy(update={"max_tokens": 20}), scores, seed=0)
    assert np.bincount(limited.group).tolist() == [10, 10]


def test_an_unknown_task_is_named_with_the_known_ones(encoded: Encoded, scores: Path) -> None:
    with pytest.raises(
        InputError, match=r"method.tasks: 'cod' is no domain .*: choose from code, math, text"
    ):
        choose(encoded, TaskRepresentations(tasks=("cod", "math")), scores, seed=0)


@pytest.mark.slow
def test_the_actors_write_every_chosen_token_once(
    local_ray: None, pico: Path, encoded: Encoded, scores: Path, tmp_path: Path
) -> None:
    encoded.save(tmp_path / "encoded")
    method = TaskRepresentations(
        tasks=("code", "text"), perplexity_top_fraction=0.6, representation="attention_output"
    )
    info = extract_all(
        tmp_path / "encoded",
        pico,
        tmp_path / "out",
        method,
        scores=scores,
        seed=0,
        dtype="float32",
        actors=2,
        gpu=False,
        tokens_per_batch=25,
    )
    tokens = choose(encoded, method, scores, seed=0)
    shards = [load_file(file) for file in sorted((tmp_path / "out").glob("shard-*.safetensors"))]
    assert len(shards) == info["shards"] > 1
    assert {key: info[key] for key in ("layers", "width", "tokens")} == {
        "layers": 2,
        "width": 32,
        "tokens": len(tokens),
    }
    assert info["groups"] == np.bincount(tokens.group).tolist()
    for name in ("record", "position", "group"):
        actual = torch.cat([shard[name] for shard in shards])
        assert torch.equal(actual, torch.from_numpy(getattr(tokens, name)))
    for name in ("ffn_input", "attention_output"):
        actual = torch.cat([shard[name] for shard in shards], dim=1)
        expected = expected_representations(pico, encoded, tokens, name)
        torch.testing.assert_close(actual, expected, atol=1e-4, rtol=0)
