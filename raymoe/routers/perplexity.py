"""Perplexity: score every example's completion with the dense model; keep each task's most perplexing.

    score_all(encoded_folder, model_folder, out, dtype="float32", actors=2, gpu=False, tokens_per_batch=2048)
    examples = select_top(pq.read_table(out / "scores.parquet"), fraction=0.05)

Examples are packed without padding and attend only to themselves, so a score does not depend on its neighbours.
`score` is the computation; `score_all` runs it in a pool of Ray Data actors.
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
        Per document, in the batch's order: the sum of its completion tokens' negative log-likelihoods (nats),
        and their number.
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
    """Score every example and write `out/scores.parquet`, in the order of the examples.

    Its columns: record (the example's index), id, domain, task, tokens, completion_tokens, nll (sum over the
    completion, nats) and perplexity (exp of nll per completion token).

    Args:
        encoded_folder: output of `Encoded.save`, where all nodes reach it.
        model_folder: Hugging Face folder of the dense model, likewise.
        out: where the file goes.
        dtype: `float32` or `bfloat16`.
        actors: number of model copies; None: one per GPU, or one on CPUs.
        gpu: give each copy a GPU.
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
    nll[scored["example"]] = scored["nll"]
    table = _scores(encoded, nll)
    with writing(out) as folder:
        pq.write_table(table, folder / SCORES)
    return {
        "instances": len(encoded),  # the key that stores already hold
        "tokens": int(encoded.offsets[-1]),
        "passes": len(packs),
        "mean_nll": float(nll.sum() / (encoded.lengths - encoded.prompt_lengths).sum()),
    }


def _scores(encoded: Encoded, nll: NDArray[np.float64]) -> pa.Table:
    if missing := int(np.isnan(nll).sum()):
        raise RuntimeError(
            f"{missing} of {len(nll)} examples have no perplexity, or one that is not a number"
        )
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
    """Return, ascending, the examples of highest perplexity: a `fraction` of each group, at least one.

    Args:
        scores: columns `record`, `perplexity` and `by`.
        fraction: in (0, 1].
        by: the column whose values are the groups.
    """
    example, perplexity = (scores[name].to_numpy() for name in ("record", "perplexity"))
    _, group = np.unique(np.asarray(scores[by].to_pylist(), dtype=str), return_inverse=True)
    order = np.lexsort((example, -perplexity, group))  # by group, then most perplexing first
    sizes = np.bincount(group)
    rank = np.arange(len(order)) - np.repeat(np.cumsum(sizes) - sizes, sizes)
    keep = np.maximum(1, np.round(fraction * sizes)).astype(np.int64)
    return np.sort(example[order][rank < np.repeat(keep, sizes)])


def summarize(scores: pa.Table, fraction: float, by: str = "task") -> list[dict[str, Any]]:
    """Summarise each group: its examples, how many are in the top `fraction`, and their perplexities."""
    kept = set(select_top(scores, fraction, by).tolist())
    rows = []
    for group in sorted(set(scores[by].to_pylist())):
        of_group = scores.filter(pc.equal(scores[by], group))
        examples, perplexity = of_group["record"].to_pylist(), of_group["perplexity"].to_numpy()
        median, p95 = np.quantile(perplexity, [0.5, 0.95])
        rows.append(
            {
                by: group,
                "examples": len(examples),
                "kept": len(kept.intersection(examples)),
                "lowest kept": min(p for i, p in zip(examples, perplexity, strict=True) if i in kept),
                "median": median,
                "p95": p95,
            }
        )
    return rows


class Scorer:
    """Ray Data's actor: one model copy that scores ranges of examples."""

    def __init__(self, encoded_folder: Location, model_folder: Location, dtype: str) -> None:
        self.encoded = Encoded.load(local(encoded_folder))
        self.model = load_model(model_folder, dtype)

    def __call__(self, rows: Mapping[str, NDArray[np.int64]]) -> dict[str, NDArray[Any]]:
        """Score the examples [first, last) of each row."""
        ranges = zip(rows["first"].tolist(), rows["last"].tolist(), strict=True)
        scored = [self._score(np.arange(first, last)) for first, last in ranges]
        examples, nll = zip(*scored, strict=True)
        return {"example": np.concatenate(examples), "nll": np.concatenate(nll)}

    def _score(self, examples: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
        total = int(self.encoded.offsets[examples[-1] + 1] - self.encoded.offsets[examples[0]])
        batch = collate(self.encoded, [examples], total).to(self.model.device)
        return examples, score(self.model, batch)[0]
