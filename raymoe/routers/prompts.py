"""Prompt representations: the SIMoE router's input, computed once per prompt with the frozen dense model.

    represent_all(encoded_folder, model_folder, out, kind="last_hidden", dtype="float32", actors=2, gpu=False,
                  tokens_per_batch=2048)                                  # out/train.npy, out/validation.npy
    prompts_SD = represent(model, [encoded.prompt(i) for i in examples], "last_hidden")

A representation is a mean over the prompt's tokens. Only prompts are run, packed without padding and attending
to themselves alone, so neither completions nor neighbours influence it. `represent` is the computation, without
Ray; `represent_all` runs it in a pool of Ray Data actors.

Shape letters: n prompts, N packed tokens, D model width.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from transformers import PreTrainedModel

from raymoe.data.instructions import Encoded
from raymoe.models.dense import dimensions
from raymoe.models.packed_attention import PACKED_ATTENTION
from raymoe.routers.actors import consecutive_packs, load_model, run_actors
from raymoe.schema import InputError
from raymoe.storage.location import Location, delete, local, writing

Kind = Literal["last_hidden", "embedding"]

SPLITS = ("train", "validation")
PARTS = "parts"
TOKENS_PER_BATCH = 8192
PROMPTS_PER_PART = 1024
"""Most prompts that an actor holds and writes at a time: 16 MiB at D = 4096."""
PARTS_PER_ACTOR = 4


@torch.no_grad()
def represent(
    model: PreTrainedModel,
    prompts: Sequence[NDArray[np.int32]],
    kind: Kind,
    tokens_per_batch: int = TOKENS_PER_BATCH,
) -> Tensor:
    """Return the mean over each prompt's tokens, in the order of `prompts`.

    Args:
        model: the dense model. Without packed attention it is run on one prompt at a time.
        prompts: token ids of each prompt, without padding.
        kind: `last_hidden`: the last hidden state, after the final norm; `embedding`: the token embeddings,
            for which no layer is run.
        tokens_per_batch: tokens of one forward pass; a longer prompt gets a pass of its own.

    Returns:
        [n, D], float32, on the CPU.

    Raises:
        InputError: a prompt without tokens.
    """
    lengths = np.asarray([len(prompt) for prompt in prompts], dtype=np.int64)
    if not lengths.all():
        raise InputError(f"prompt {int(lengths.argmin())} has no tokens to represent")
    packs_documents = kind == "embedding" or model.config._attn_implementation == PACKED_ATTENTION
    packs = consecutive_packs(lengths, tokens_per_batch if packs_documents else 0)
    means = [_means(model, prompts[first:last], kind) for first, last in packs]
    return torch.cat([*means, torch.empty(0, model.config.hidden_size)])


def _means(model: PreTrainedModel, prompts: Sequence[NDArray[np.int32]], kind: Kind) -> Tensor:
    """Return the means [n, D] of one pack, each summed by itself in fp32: its neighbours change nothing."""
    tokens = torch.from_numpy(np.concatenate(prompts).astype(np.int64)).to(model.device)
    lengths = [len(prompt) for prompt in prompts]
    states_ND = (
        model.get_input_embeddings()(tokens) if kind == "embedding" else _last_hidden(model, tokens, lengths)
    )
    return torch.stack([part.float().mean(0) for part in states_ND.split(lengths)]).cpu()


def _last_hidden(model: PreTrainedModel, tokens: Tensor, lengths: Sequence[int]) -> Tensor:
    """Run one packed pass and return its last hidden states [N, D]."""
    ends = np.cumsum(lengths).tolist()
    positions = torch.cat([torch.arange(length) for length in lengths])
    states_1ND: Tensor = model.base_model(
        input_ids=tokens[None],
        position_ids=positions[None].to(model.device),
        attention_mask=None,
        use_cache=False,
        documents=tuple(zip([0, *ends[:-1]], ends, strict=True)),
    ).last_hidden_state
    return states_1ND[0]


# All prompts of a data set.


def represent_all(
    encoded_folder: Location,
    model_folder: Location,
    out: Location,
    *,
    kind: Kind,
    dtype: str,
    actors: int | None,
    gpu: bool,
    tokens_per_batch: int,
) -> dict[str, Any]:
    """Write the prompts' representations as `out/train.npy` and `out/validation.npy`.

    Both are float32 [n, D]; row i is example i.

    Args:
        encoded_folder: output of `raymoe.data.instructions.prepare`, where all nodes reach it.
        model_folder: Hugging Face folder of the dense model, likewise.
        out: where the files go, likewise.
        kind: as in `represent`.
        dtype: the model's, `float32` or `bfloat16`.
        actors: number of model copies; None: one per GPU, or one on CPUs.
        gpu: give each copy a GPU.
        tokens_per_batch: tokens of one forward pass.

    Returns:
        Width, number of prompts in each split, and number of tokens in all prompts.
    """
    splits = [Encoded.load(local(encoded_folder) / split) for split in SPLITS]
    sizes = [len(encoded) for encoded in splits]
    rows = _parts(sizes, PARTS_PER_ACTOR * (actors or 1))
    arguments = {
        "encoded_folder": encoded_folder,
        "model_folder": model_folder,
        "out": out,
        "kind": kind,
        "dtype": dtype,
        "tokens_per_batch": tokens_per_batch,
    }
    run_actors(rows, Representer, arguments, actors=actors, gpu=gpu, what="prompt representations")
    width = dimensions(local(model_folder))[1]
    parts = local(out / PARTS)
    with writing(out) as folder:
        for i, (split, size) in enumerate(zip(SPLITS, sizes, strict=True)):
            _join(parts, folder, split, [row for row in rows if row["split"] == i], (size, width))
    delete(out / PARTS)
    return {
        "width": width,
        **{f"{split}_prompts": size for split, size in zip(SPLITS, sizes, strict=True)},
        "tokens": sum(int(encoded.prompt_lengths.sum()) for encoded in splits),
    }


def _parts(sizes: Sequence[int], at_least: int) -> list[dict[str, int]]:
    """Cut each split into ranges [first, last) of examples: small, and enough of them to share."""
    step = max(1, min(PROMPTS_PER_PART, -(-sum(sizes) // at_least)))
    return [
        {"split": split, "first": first, "last": min(first + step, size)}
        for split, size in enumerate(sizes)
        for first in range(0, size, step)
    ]


def _part_file(parts: Path, split: str, first: int) -> Path:
    return parts / f"{split}-{first:09d}.npy"


def _join(
    parts: Path, out: Path, split: str, rows: Sequence[Mapping[str, int]], shape: tuple[int, int]
) -> None:
    """Write `out/<split>.npy` from its parts, with one part in memory at a time."""
    joined = np.lib.format.open_memmap(out / f"{split}.npy", mode="w+", dtype=np.float32, shape=shape)
    for row in rows:
        first, last = row["first"], row["last"]
        part = np.load(_part_file(parts, split, first), allow_pickle=False)
        if part.shape != (last - first, shape[1]) or not np.isfinite(part).all():
            raise RuntimeError(
                f"the representations of {split} prompts {first} to {last - 1} are missing or not finite"
            )
        joined[first:last] = part
    joined.flush()


class Representer:
    """Ray Data's actor: one model copy that writes parts."""

    def __init__(
        self,
        encoded_folder: Location,
        model_folder: Location,
        out: Location,
        kind: Kind,
        dtype: str,
        tokens_per_batch: int,
    ) -> None:
        self.splits = [Encoded.load(local(encoded_folder) / split) for split in SPLITS]
        self.model = load_model(model_folder, dtype)
        self.out, self.kind, self.tokens_per_batch = out, kind, tokens_per_batch

    def __call__(self, rows: Mapping[str, NDArray[np.int64]]) -> dict[str, NDArray[np.int64]]:
        """Write the parts of `rows`; repeating a call writes the same bytes."""
        columns = zip(*(rows[name].tolist() for name in ("split", "first", "last")), strict=True)
        with writing(self.out / PARTS) as parts:
            for split, first, last in columns:
                prompts = [self.splits[split].prompt(index) for index in range(first, last)]
                means_nD = represent(self.model, prompts, self.kind, self.tokens_per_batch)
                np.save(_part_file(parts, SPLITS[split], first), means_nD.numpy(), allow_pickle=False)
        return {"first": rows["first"]}
