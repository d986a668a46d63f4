"""Packing: whole examples into packed sequences, and packed sequences into batches.

    sequences = epoch_sequences(encoded, data.max_length, seed=0, epoch=0)
    batch = collate(encoded, sequences[:8], data.max_length)

Shapes: n examples, W packed sequences, T tokens of a sequence, C completion tokens of a batch. Within a batch an
example is called a document, as in document masking: it attends to itself alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from raymoe.data.instructions import Encoded

Documents = tuple[tuple[int, int], ...]
"""(start, end) of each document (a packed example) in the flattened tokens of a batch."""

OPEN_SEQUENCES = 64
"""Sequences that packing fills at the same time."""


def pack(
    lengths: NDArray[np.integer[Any]], capacity: int, order: NDArray[np.integer[Any]]
) -> list[NDArray[np.int64]]:
    """Pack every example, whole and exactly once, into sequences of at most `capacity` tokens.

    Best fit in the given order: of `OPEN_SEQUENCES` open sequences, each example goes where it leaves the least
    room; if none has room, the fullest is closed and a new one opened.

    Args:
        lengths: tokens of each example [n].
        capacity: tokens of a sequence.
        order: indices of the examples in the order they are placed [n].

    Returns:
        Indices of the examples in each sequence, sequences in the order they were closed.
    """
    if len(lengths) and int(np.max(lengths)) > capacity:
        raise ValueError(f"an example of {int(np.max(lengths))} tokens does not fit a sequence of {capacity}")
    room = np.full(OPEN_SEQUENCES, capacity, dtype=np.int64)
    sequences: list[list[int]] = [[] for _ in range(OPEN_SEQUENCES)]
    closed: list[list[int]] = []
    for example, length in zip(order.tolist(), lengths[order].tolist(), strict=True):
        slot = int(np.where(room >= length, room, capacity + 1).argmin())
        if room[slot] < length:
            slot = int(room.argmin())
            closed.append(sequences[slot])
            sequences[slot], room[slot] = [], capacity
        sequences[slot].append(example)
        room[slot] -= length
    closed.extend(sequence for sequence in sequences if sequence)
    return [np.asarray(sequence, dtype=np.int64) for sequence in closed]


def epoch_sequences(encoded: Encoded, max_length: int, seed: int, epoch: int) -> list[NDArray[np.int64]]:
    """Return one epoch's packed sequences in training order: a pure function of (seed, epoch) and the data."""
    generator = np.random.default_rng([seed, epoch])
    sequences = pack(encoded.lengths, max_length, generator.permutation(len(encoded)))
    # the last sequences that packing closes are the emptiest: spread them out
    return [sequences[i] for i in generator.permutation(len(sequences))]


@dataclass(frozen=True, eq=False)
class Batch:
    """Packed sequences as tensors."""

    input_ids: Tensor
    """[W, T]"""
    labels: Tensor
    """[W, T] the token to predict AT each position (already shifted); -100: no loss."""
    position_ids: Tensor
    """[W, T] counted from 0 in each document."""
    mask: Tensor
    """[W, T] True for tokens, False for padding."""
    targets: Tensor
    """[C] positions in the flattened batch that have a label, ascending."""
    documents: Documents
    """(start, end) of each document in the flattened batch."""
    completion_lengths: tuple[int, ...]
    """Number of labels of each document."""
    examples: tuple[int, ...]
    """Index of the example that each document is."""

    @property
    def num_tokens(self) -> int:
        """Number of tokens, padding excluded."""
        return sum(end - start for start, end in self.documents)

    def to(self, device: torch.device | str) -> Batch:
        """Return the batch on `device`; copies to a GPU are asynchronous."""
        target = torch.device(device)
        names = ("input_ids", "labels", "position_ids", "mask", "targets")
        moved: dict[str, Any] = {name: _moved(getattr(self, name), target) for name in names}
        return replace(self, **moved)


def _moved(tensor: Tensor, device: torch.device) -> Tensor:
    if device.type == "cuda" and not tensor.is_cuda:
        return tensor.pin_memory().to(device, non_blocking=True)
    return tensor.to(device)


def collate(encoded: Encoded, sequences: Sequence[NDArray[np.integer[Any]]], max_length: int) -> Batch:
    """Make one batch of width T = `max_length` from packed sequences of example indices, in their order.

    No label crosses the end of a document; a completion's first label is at the prompt's last token.
    """
    starts, examples = _placement(encoded, sequences, max_length)
    input_ids, position_ids = (np.zeros(len(sequences) * max_length, dtype=np.int64) for _ in range(2))
    labels = np.full(len(sequences) * max_length, -100, dtype=np.int64)
    mask = np.zeros(len(sequences) * max_length, dtype=np.bool_)
    documents, completions = [], []
    for start, index in zip(starts, examples, strict=True):
        tokens, prompt = encoded.example(index), int(encoded.prompt_lengths[index])
        end = start + len(tokens)
        input_ids[start:end] = tokens
        position_ids[start:end] = np.arange(len(tokens))
        labels[start + prompt - 1 : end - 1] = tokens[prompt:]
        mask[start:end] = True
        documents.append((start, end))
        completions.append(len(tokens) - prompt)
    shape = (len(sequences), max_length)
    return Batch(
        input_ids=torch.from_numpy(input_ids).view(shape),
        labels=torch.from_numpy(labels).view(shape),
        position_ids=torch.from_numpy(position_ids).view(shape),
        mask=torch.from_numpy(mask).view(shape),
        targets=torch.from_numpy(np.flatnonzero(labels != -100)),
        documents=tuple(documents),
        completion_lengths=tuple(completions),
        examples=tuple(examples),
    )


def _placement(
    encoded: Encoded, sequences: Sequence[NDArray[np.integer[Any]]], max_length: int
) -> tuple[list[int], list[int]]:
    """Return where each document starts in the flattened batch, and its example's index."""
    starts, examples = [], []
    for number, sequence in enumerate(sequences):
        position = first = number * max_length
        for example in sequence.tolist():
            starts.append(position)
            examples.append(example)
            position += int(encoded.offsets[example + 1] - encoded.offsets[example])
        if position - first > max_length:
            raise ValueError(f"sequence {number} has {position - first} tokens, more than {max_length}")
    return starts, examples
