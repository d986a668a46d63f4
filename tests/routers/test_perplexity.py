"""Scores against transformers' own forward pass, one sequence at a time."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
import torch.nn.functional as F
from support.models import FAMILIES
from transformers import AutoModelForCausalLM

from raymoe.data.instructions import Encoded
from raymoe.data.packing import collate
from raymoe.routers.actors import consecutive_packs, load_model
from raymoe.routers.perplexity import score, score_all, select_top


@pytest.fixture(scope="module")
def encoded() -> Encoded:
    generator = np.random.default_rng(0)
    lengths = np.array([9, 30, 4, 17, 2, 21, 12, 6, 40, 5])
    offsets = np.concatenate([[0], np.cumsum(lengths)])
    tokens = generator.integers(0, 256, offsets[-1], dtype=np.int32)
    prompts = generator.integers(1, lengths).astype(np.int32)
    ids = tuple(f"row {i}" for i in range(len(lengths)))
    domains = tuple("code" if i % 3 else "math" for i in range(len(lengths)))
    return Encoded(tokens, offsets, prompts, ids, domains, tuple(f"{d}/{len(d)}" for d in domains))


def plain_nll(folder: Path, encoded: Encoded) -> list[float]:
    """Return each example's summed completion loss, from transformers alone, without packing."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    sums = []
    for example, prompt in enumerate(encoded.prompt_lengths.tolist()):
        ids = torch.from_numpy(encoded.example(example)).long()
        with torch.no_grad():
            logits = model(ids[None]).logits[0]
        sums.append(F.cross_entropy(logits[prompt - 1 : -1], ids[prompt:], reduction="sum").item())
    return sums


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("tokens_per_batch", [1, 50, 10_000])
def test_scores_equal_a_plain_forward_whatever_the_batch(
    dense_models: dict[str, Path], encoded: Encoded, family: str, tokens_per_batch: int
) -> None:
    model = load_model(dense_models[family], "float32")
    sums: list[float] = []
    for first, last in consecutive_packs(encoded.lengths, tokens_per_batch):
        total = int(encoded.lengths[first:last].sum())
        nll, counts = score(model, collate(encoded, [np.arange(first, last)], total).to(model.device))
        assert counts.tolist() == (encoded.lengths - encoded.prompt_lengths)[first:last].tolist()
        sums += nll.tolist()
    np.testing.assert_allclose(sums, plain_nll(dense_models[family], encoded), atol=1e-4, rtol=0)


def test_packs_cover_all_examples_in_order_within_the_budget() -> None:
    lengths = np.array([5, 5, 5, 30, 1, 9, 10, 3])
    packs = consecutive_packs(lengths, 10)
    assert packs == [(0, 2), (2, 3), (3, 4), (4, 6), (6, 7), (7, 8)]
    assert consecutive_packs(np.array([], dtype=np.int64), 10) == []


def test_the_top_fraction_of_each_task_is_selected_and_at_least_one() -> None:
    tasks = ["a"] * 20 + ["b"] * 3
    perplexity = np.arange(23)[::-1].astype(float)
    order = np.random.default_rng(0).permutation(23)
    scores = pa.table({"record": order, "task": [tasks[i] for i in order], "perplexity": perplexity[order]})
    assert select_top(scores, 0.1).tolist() == [0, 1, 20]
    assert select_top(scores, 1.0).tolist() == list(range(23))
    everything = scores.append_column("domain", pa.array(["all"] * 23))
    assert select_top(everything, 0.1, by="domain").tolist() == [0, 1]


@pytest.mark.slow
def test_the_actors_write_every_score_in_order(
    local_ray: None, pico: Path, encoded: Encoded, tmp_path: Path
) -> None:
    encoded.save(tmp_path / "encoded")
    info = score_all(
        tmp_path / "encoded",
        pico,
        tmp_path / "out",
        dtype="float32",
        actors=2,
        gpu=False,
        tokens_per_batch=45,
    )
    table = pq.read_table(tmp_path / "out" / "scores.parquet")
    expected = np.array(plain_nll(pico, encoded))
    counts = encoded.lengths - encoded.prompt_lengths
    assert table["record"].to_pylist() == list(range(len(encoded)))
    assert table["id"].to_pylist() == list(encoded.ids)
    assert table["tokens"].to_pylist() == encoded.lengths.tolist()
    assert table["completion_tokens"].to_pylist() == counts.tolist()
    np.testing.assert_allclose(table["nll"].to_numpy(), expected, atol=1e-4, rtol=0)
    np.testing.assert_allclose(table["perplexity"].to_numpy(), np.exp(expected / counts), rtol=1e-4)
    assert info["instances"] == len(encoded)
    assert info["mean_nll"] == pytest.approx(expected.sum() / counts.sum(), abs=1e-5)
