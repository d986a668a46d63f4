"""Representations: what the dense model's layers make of chosen tokens, which the routers are clustered from.

    extract_all(encoded_folder, model_folder, out, method, scores=None, seed=0, dtype="float32", actors=2,
                gpu=False, tokens_per_batch=2048)

The tokens are chosen beforehand (`choose`), so only documents that hold one are run, each up to its last
chosen token, packed: there is no padding anywhere. Positions 0 are never chosen: a first token (BOS) is an
attention sink whose representation says nothing of the text. `extract` is the computation, `extract_all` a
pool of Ray Data actors around it.

Shape letters: L layers, n chosen tokens, N packed tokens, D model width.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, cast

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from numpy.typing import NDArray
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import AutoConfig, PreTrainedModel

from raymoe.data.instructions import Encoded
from raymoe.data.packing import Documents
from raymoe.methods import ContextRepresentations, TaskRepresentations
from raymoe.models.families import Point, family_of
from raymoe.routers.actors import consecutive_packs, load_model, run_actors
from raymoe.routers.perplexity import select_top
from raymoe.schema import InputError
from raymoe.storage.location import Location, local, writing

SHARD_BYTES = 2**28
"""Size of a shard, and what an actor holds in memory beside the model."""
SHARDS_PER_ACTOR = 4

Method = TaskRepresentations | ContextRepresentations


@dataclass(frozen=True, eq=False)
class Tokens:
    """Chosen tokens, rising by record, then position."""

    record: NDArray[np.int64]
    """[n]"""
    position: NDArray[np.int32]
    """[n] within the record, from 1."""
    group: NDArray[np.int32]
    """[n] index in `method.tasks`; 0 for CRSU."""

    def __len__(self) -> int:
        return len(self.record)

    def __getitem__(self, part: slice) -> Tokens:
        return Tokens(self.record[part], self.position[part], self.group[part])


def choose(encoded: Encoded, method: Method, scores: Path | None, seed: int) -> Tokens:
    """The tokens whose representations are clustered.

    CRSU: `token_fraction` of all tokens, uniformly without replacement. TRSU: of each task's domain all
    tokens of its most perplexing examples (the top fraction within each `task` column), or a uniform sample
    of them. Never more than `max_tokens` together (TRSU: the same share for every task), never a first token.

    Args:
        encoded: the training examples.
        method: TRSU's or CRSU's settings.
        scores: TRSU's scores.parquet.
        seed: of the sample.

    Raises:
        InputError: a task that is no domain of the data.
    """
    if not method.domains:
        return _random_share(encoded, cast(ContextRepresentations, method), seed)
    if scores is None:
        raise ValueError("TRSU chooses tokens by their examples' perplexity: it needs scores")
    return _most_perplexing(encoded, cast(TaskRepresentations, method), scores, seed)


def _random_share(encoded: Encoded, method: ContextRepresentations, seed: int) -> Tokens:
    """A uniform sample of all tokens (CRSU)."""
    wanted = max(1, round(method.token_fraction * int(encoded.offsets[-1])))
    everything = np.arange(len(encoded), dtype=np.int64)
    return _uniform(encoded, everything, min(wanted, method.max_tokens), 0, seed)


def _most_perplexing(encoded: Encoded, method: TaskRepresentations, scores: Path, seed: int) -> Tokens:
    """Tokens of each task's most perplexing examples (TRSU)."""
    table, domains = pq.read_table(scores), np.asarray(encoded.domains)
    _check_tasks(method.tasks, domains)
    limit = max(1, method.max_tokens // len(method.tasks))
    groups = []
    for group, task in enumerate(method.tasks):
        top = select_top(table.filter(pa.array(domains == task)), method.perplexity_top_fraction)
        groups.append(_uniform(encoded, top, limit, group, seed))
    return _sorted(groups)


def _check_tasks(tasks: Sequence[str], domains: NDArray[Any]) -> None:
    known = sorted(set(domains.tolist()))
    for task in tasks:
        if task not in known:
            raise InputError(
                f"method.tasks: {task!r} is no domain of the data: choose from {', '.join(known)}"
            )


def _uniform(encoded: Encoded, records: NDArray[np.int64], count: int, group: int, seed: int) -> Tokens:
    """At most `count` tokens of `records` (rising), uniformly without replacement, first tokens left out."""
    eligible = encoded.lengths[records] - 1
    ends = np.cumsum(eligible)
    generator = np.random.default_rng([seed, group])
    flat = np.sort(generator.choice(int(ends[-1]), min(count, int(ends[-1])), replace=False))
    document = np.searchsorted(ends, flat, side="right")
    position = flat - (ends - eligible)[document] + 1
    return Tokens(records[document], position.astype(np.int32), np.full(len(flat), group, dtype=np.int32))


def _sorted(groups: Sequence[Tokens]) -> Tokens:
    record, position, group = (
        np.concatenate([getattr(tokens, name) for tokens in groups])
        for name in ("record", "position", "group")
    )
    order = np.lexsort((position, record))
    return Tokens(record[order], position[order], group[order])


# The forward pass over one pack.


@torch.inference_mode()
def extract(model: PreTrainedModel, encoded: Encoded, tokens: Tokens, point: str) -> dict[str, Tensor]:
    """Representations of `tokens` from one packed pass over their documents.

    Args:
        model: the dense model, loaded with packed attention.
        encoded: where the documents are.
        tokens: chosen tokens.
        point: `ffn_input` (what a router sees), `attention_output` (of o_proj) or `attention_residual`
            (the residual stream after attention).

    Returns:
        `ffn_input` [L, n, D] and, where it is another, the tensor at `point` under its name; float32, CPU.
    """
    records, first = np.unique(tokens.record, return_index=True)
    lengths = tokens.position[np.append(first[1:], len(tokens)) - 1] + 1  # up to the last chosen token
    starts = np.cumsum(lengths) - lengths
    examples = [encoded.example(r)[:n] for r, n in zip(records.tolist(), lengths.tolist(), strict=True)]
    rows = torch.from_numpy(starts[np.searchsorted(records, tokens.record)] + tokens.position)
    documents = tuple(zip(starts.tolist(), (starts + lengths).tolist(), strict=True))
    with _recording(model, point, rows.to(model.device)) as taken:
        _forward(model, np.concatenate(examples), documents)
    return {name: torch.stack(layers).float().cpu() for name, layers in taken.items()}


def _forward(model: PreTrainedModel, tokens: NDArray[np.int32], documents: Documents) -> None:
    """Run the model's layers over packed `tokens` [N]."""
    positions = np.concatenate([np.arange(end - start) for start, end in documents])
    model.base_model(
        input_ids=torch.from_numpy(tokens.astype(np.int64))[None].to(model.device),
        position_ids=torch.from_numpy(positions)[None].to(model.device),
        attention_mask=None,
        use_cache=False,
        documents=documents,
    )


@contextmanager
def _recording(model: PreTrainedModel, point: str, rows: Tensor) -> Iterator[dict[str, list[Tensor]]]:
    """Within the block every pass appends, per layer, the chosen `rows` [n] of `ffn_input` and of `point`."""
    points = family_of(model.config).points
    taken: dict[str, list[Tensor]] = {name: [] for name in ("ffn_input", point)}

    def take(name: str, x: Tensor) -> None:
        taken[name].append(x.flatten(0, -2).index_select(0, rows))

    with ExitStack() as hooks:
        for layer in model.base_model.layers:
            for name in taken:
                hooks.callback(_hook(layer, points[name], partial(take, name)).remove)
        yield taken


def _hook(
    layer: nn.Module, point: Point, take: Callable[[Tensor], None]
) -> torch.utils.hooks.RemovableHandle:
    """Hand `take` what passes through `point` of a decoder layer."""
    module = layer.get_submodule(point.module)
    if point.side == "output":
        return module.register_forward_hook(lambda _module, _inputs, out: take(out))
    return module.register_forward_pre_hook(lambda _module, inputs: take(inputs[0]))


# All of them.


def extract_all(
    encoded_folder: Location,
    model_folder: Location,
    out: Location,
    method: Method,
    *,
    scores: Location | None,
    seed: int,
    dtype: str,
    actors: int | None,
    gpu: bool,
    tokens_per_batch: int,
) -> dict[str, Any]:
    """Write the chosen tokens' representations as `out/shard-*.safetensors`, rising by record.

    A shard holds `ffn_input` [L, n, D] (always: it is what the router will see), the tensor of another
    `method.representation` under its name, both float32, and `group` [n] int32, `record` [n] int64 and
    `position` [n] int32.

    Args:
        encoded_folder: training examples, where all nodes reach them.
        model_folder: Hugging Face folder of the dense model, likewise.
        out: gets the shards, likewise.
        method: which tokens, and where in each layer.
        scores: scores.parquet (TRSU).
        seed: of the sample of tokens.
        dtype: `float32` or `bfloat16`, what the model computes in.
        actors: model copies; None: one per GPU, on CPUs one.
        gpu: whether each of them takes a GPU.
        tokens_per_batch: tokens of one forward pass.

    Returns:
        Number of layers, width, tokens, shards, and tokens of each group.

    Raises:
        InputError: a task that is no domain of the data.
    """
    encoded, config = Encoded.load(local(encoded_folder)), AutoConfig.from_pretrained(local(model_folder))
    tokens = choose(encoded, method, local(scores) if scores else None, seed)
    point = method.representation
    bytes_per_token = 4 * config.num_hidden_layers * config.hidden_size * len({"ffn_input", point})
    shards = _shards(tokens, bytes_per_token, SHARDS_PER_ACTOR * (actors or 1))
    arguments = {
        "encoded_folder": encoded_folder,
        "model_folder": model_folder,
        "out": out,
        "tokens": tokens,
        "point": point,
        "dtype": dtype,
        "tokens_per_batch": tokens_per_batch,
    }
    rows = [{"shard": i, "first": first, "last": last} for i, (first, last) in enumerate(shards)]
    done = run_actors(rows, Extractor, arguments, actors=actors, gpu=gpu, what="representations")
    if sorted(done["shard"].tolist()) != list(range(len(shards))):
        raise RuntimeError(f"{len(done['shard'])} of {len(shards)} shards were written")
    return {
        "layers": config.num_hidden_layers,
        "width": config.hidden_size,
        "tokens": len(tokens),
        "shards": len(shards),
        "groups": np.bincount(tokens.group).tolist(),
    }


def _shards(tokens: Tokens, bytes_per_token: int, at_least: int) -> list[tuple[int, int]]:
    """Ranges of chosen tokens, cut between records: at most SHARD_BYTES each, and enough of them to share."""
    _, counts = np.unique(tokens.record, return_counts=True)
    largest = min(SHARD_BYTES // bytes_per_token, -(-len(tokens) // at_least))
    return _token_ranges(counts, consecutive_packs(counts, max(1, largest)))


def _token_ranges(
    counts: NDArray[np.integer[Any]], packs: Sequence[tuple[int, int]]
) -> list[tuple[int, int]]:
    """Ranges of documents -> ranges of their tokens, of which document i has `counts[i]`."""
    bounds = np.concatenate([[0], np.cumsum(counts)]).tolist()
    return [(bounds[first], bounds[last]) for first, last in packs]


class Extractor:
    """Ray Data's actor: one model copy that writes shards."""

    def __init__(
        self,
        encoded_folder: Location,
        model_folder: Location,
        out: Location,
        tokens: Tokens,
        point: str,
        dtype: str,
        tokens_per_batch: int,
    ) -> None:
        self.encoded = Encoded.load(local(encoded_folder))
        self.model = load_model(model_folder, dtype)
        self.out, self.tokens, self.point = out, tokens, point
        self.tokens_per_batch = tokens_per_batch

    def __call__(self, rows: Mapping[str, NDArray[np.int64]]) -> dict[str, NDArray[np.int64]]:
        """Write the shards of `rows`, the same again if asked again."""
        columns = zip(*(rows[name].tolist() for name in ("shard", "first", "last")), strict=True)
        for shard, first, last in columns:
            self._write(shard, self.tokens[first:last])
        return {"shard": rows["shard"]}

    def _write(self, shard: int, tokens: Tokens) -> None:
        parts = [
            extract(self.model, self.encoded, tokens[first:last], self.point)
            for first, last in packs(tokens, self.tokens_per_batch)
        ]
        tensors = {name: torch.cat([part[name] for part in parts], dim=1) for name in parts[0]}
        for name in ("group", "record", "position"):
            tensors[name] = torch.from_numpy(getattr(tokens, name).copy())
        with writing(self.out) as folder:
            save_file(tensors, folder / f"shard-{shard:05d}.safetensors")


def packs(tokens: Tokens, tokens_per_batch: int) -> list[tuple[int, int]]:
    """Ranges of chosen tokens whose documents, each up to its last chosen token, make one forward pass."""
    _, first, counts = np.unique(tokens.record, return_index=True, return_counts=True)
    lengths = tokens.position[first + counts - 1] + 1
    return _token_ranges(counts, consecutive_packs(lengths, tokens_per_batch))
