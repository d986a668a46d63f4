"""Perplexity: score every example's completion with the dense model; keep the most perplexing per task.

    score_all(encoded_folder, model_folder, out, dtype="float32", actors=2, gpu=False, tokens_per_batch=2048)
    records = select_top(pq.read_table(out / "scores.parquet"), fraction=0.05)

Instances are packed without padding and attend only to themselves, so a score does not depend on what it was
computed with. `score` is the computation, `score_all` a pool of Ray Data actors around it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import torch
from numpy.typing import NDArray
from transformers import PreTrainedModel

from raymoe.data.instructions import Encoded
from raymoe.data.packing import Batch, collate
from raymoe.models.packed_attention import completion_losses
from raymoe.routers.actors import consecutive_packs, load_model, run_actors
from raymoe.storage.location import Location, local, writing

SCORES = "scores.parquet"


@torch.inference_mode()
def score(model: PreTrainedModel, batch: Batch) -> tuple[NDArray[np.float64], NDArray[np.int64]]:
    """Score one packed batch.

    Returns:
        Sum of the completion tokens' negative log-likelihoods (nats) and their number, per document, in the
        batch's order.
    """
    counts = np.asarray(batch.completion_lengths, dtype=np.int64)
    nll = completion_losses(model, batch).cpu().double().numpy()
    return np.add.reduceat(nll, np.cumsum(counts) - counts), counts


def score_all(
    encoded_folder: Location,
    model_folder: Location,
    out: Location,
    *,
    dtype: str,
    actors: int | None,
    gpu: bool,
    tokens_per_batch: int,
) -> dict[str, Any]:
    """Score every example and write `out/scores.parquet`, sorted by record.

    Its columns: record, id, domain, task, tokens, completion_tokens, nll (sum over the completion, nats) and
    perplexity (exp of nll per completion token).

    Args:
        encoded_folder: what `Encoded.save` wrote, where all nodes reach it.
        model_folder: Hugging Face folder of the dense model, likewise.
        out: gets the file.
        dtype: `float32` or `bfloat16`.
        actors: model copies; None: one per GPU, on CPUs one.
        gpu: whether each of them takes a GPU.
        tokens_per_batch: tokens of one forward pass.

    Returns:
        Number of examples, tokens and passes, and the mean nll per completion token.
    """
    encoded = Encoded.load(local(encoded_folder))
    packs = consecutive_packs(encoded.lengths, tokens_per_batch)
    rows = [{"first": first, "last": last} for first, last in packs]
    arguments = {"encoded_folder": encoded_folder, "model_folder": model_folder, "dtype": dtype}
    scored = run_actors(rows, Scorer, arguments, actors=actors, gpu=gpu, what="perplexity")
    nll = np.full(len(encoded), np.nan)
    nll[scored["record"]] = scored["nll"]
    table = _scores(encoded, nll)
    with writing(out) as folder:
        pq.write_table(table, folder / SCORES)
    return {
        "examples": len(encoded),
        "tokens": int(encoded.offsets[-1]),
        "passes": len(packs),
        "mean_nll": float(nll.sum() / (encoded.lengths - encoded.prompt_lengths).sum()),
    }


def _scores(encoded: Encoded, nll: NDArray[np.float64]) -> pa.Table:
    if missing := int(np.isnan(nll).sum()):
        raise RuntimeError(f"{missing} of {len(nll)} examples have no perplexity (or one that is no number)")
    completion_tokens = encoded.lengths - encoded.prompt_lengths
    return pa.table(
        {
            "record": np.arange(len(encoded)),
            "id": list(encoded.ids),
            "domain": list(encoded.domains),
            "task": list(encoded.tasks),
            "tokens": encoded.lengths,
            "completion_tokens": completion_tokens,
            "nll": nll,
            "perplexity": np.exp(nll / completion_tokens),
        }
    )


def select_top(scores: pa.Table, fraction: float, by: str = "task") -> NDArray[np.int64]:
    """Records of the `fraction` of each group with the highest perplexity, at least one; rising.

    Args:
        scores: columns `record`, `perplexity` and `by`.
        fraction: in (0, 1].
        by: the column whose values are the groups.
    """
    record, perplexity = (scores[name].to_numpy() for name in ("record", "perplexity"))
    _, group = np.unique(np.asarray(scores[by].to_pylist(), dtype=str), return_inverse=True)
    order = np.lexsort((record, -perplexity, group))  # by group, then most perplexing first
    sizes = np.bincount(group)
    rank = np.arange(len(order)) - np.repeat(np.cumsum(sizes) - sizes, sizes)
    keep = np.maximum(1, np.round(fraction * sizes)).astype(np.int64)
    return np.sort(record[order][rank < np.repeat(keep, sizes)])


def summarize(scores: pa.Table, fraction: float, by: str = "task") -> list[dict[str, Any]]:
    """Per group: examples, how many of them are the top `fraction`, and where their perplexities lie."""
    kept = set(select_top(scores, fraction, by).tolist())
    rows = []
    for group in sorted(set(scores[by].to_pylist())):
        of_group = scores.filter(pc.equal(scores[by], group))
        records, perplexity = of_group["record"].to_pylist(), of_group["perplexity"].to_numpy()
        median, p95 = np.quantile(perplexity, [0.5, 0.95])
        rows.append(
            {
                by: group,
                "examples": len(records),
                "kept": len(kept.intersection(records)),
                "lowest kept": min(p for r, p in zip(records, perplexity, strict=True) if r in kept),
                "median": median,
                "p95": p95,
            }
        )
    return rows


class Scorer:
    """Ray Data's actor: one model copy that scores ranges of records."""

    def __init__(self, encoded_folder: Location, model_folder: Location, dtype: str) -> None:
        self.encoded = Encoded.load(local(encoded_folder))
        self.model = load_model(model_folder, dtype)

    def __call__(self, rows: Mapping[str, NDArray[np.int64]]) -> dict[str, NDArray[Any]]:
        """Score the records [first, last) of each row."""
        ranges = zip(rows["first"].tolist(), rows["last"].tolist(), strict=True)
        scored = [self._score(np.arange(first, last)) for first, last in ranges]
        records, nll = zip(*scored, strict=True)
        return {"record": np.concatenate(records), "nll": np.concatenate(nll)}

    def _score(self, records: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
        total = int(self.encoded.offsets[records[-1] + 1] - self.encoded.offsets[records[0]])
        batch = collate(self.encoded, [records], total).to(self.model.device)
        return records, score(self.model, batch)[0]
