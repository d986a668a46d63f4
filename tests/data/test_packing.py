"""Packing and collating, against formulas written out."""

from __future__ import annotations

import json
from collections.abc import Sequence

import numpy as np
import pytest
import torch

from raymoe.data.instructions import Encoded
from raymoe.data.packing import collate, epoch_sequences, pack


@pytest.mark.parametrize("capacity", [40, 100, 512])
def test_every_example_is_packed_once_and_sequences_are_full(capacity: int) -> None:
    generator = np.random.default_rng(0)
    lengths = np.minimum(generator.lognormal(3.0, 0.7, 20_000).astype(np.int64) + 2, capacity)
    order = generator.permutation(len(lengths))
    sequences = pack(lengths, capacity, order)
    assert sorted(np.concatenate(sequences).tolist()) == list(range(len(lengths)))
    assert max(lengths[sequence].sum() for sequence in sequences) <= capacity
    assert lengths.sum() / (len(sequences) * capacity) > 0.95
    again = pack(lengths, capacity, order)
    assert all(np.array_equal(a, b) for a, b in zip(sequences, again, strict=True))


def test_an_example_longer_than_a_sequence_is_refused() -> None:
    with pytest.raises(ValueError, match="12 tokens does not fit a sequence of 10"):
        pack(np.array([3, 12]), 10, np.arange(2))


def random_encoded(lengths: Sequence[int], seed: int = 0) -> Encoded:
    generator = np.random.default_rng(seed)
    offsets = np.concatenate([[0], np.cumsum(lengths)])
    tokens = generator.integers(0, 256, offsets[-1], dtype=np.int32)
    prompts = generator.integers(1, np.asarray(lengths)).astype(np.int32)
    labels = tuple(map(str, range(len(lengths))))
    return Encoded(tokens, offsets, prompts, labels, labels, labels)


def test_the_order_of_an_epoch_is_a_function_of_seed_and_epoch() -> None:
    encoded = random_encoded(np.random.default_rng(0).integers(2, 30, 300).tolist())
    orders = {
        key: [w.tolist() for w in epoch_sequences(encoded, 64, *key)] for key in ((0, 0), (0, 1), (1, 0))
    }
    assert [w.tolist() for w in epoch_sequences(encoded, 64, 0, 0)] == orders[0, 0]
    assert len({json.dumps(order) for order in orders.values()}) == 3
    for order in orders.values():
        assert sorted(example for sequence in order for example in sequence) == list(range(300))
        halves = [sum(map(len, half)) for half in (order[: len(order) // 2], order[len(order) // 2 :])]
        assert max(halves) < 1.2 * min(halves)  # the emptier sequences are not all at the end


def test_a_batch_spelled_out() -> None:
    encoded = Encoded(
        tokens=np.array([10, 11, 12, 13, 20, 21, 30, 31, 32], dtype=np.int32),
        offsets=np.array([0, 4, 6, 9]),
        prompt_lengths=np.array([2, 1, 1], dtype=np.int32),
        ids=("a", "b", "c"),
        domains=("d",) * 3,
        tasks=("t",) * 3,
    )
    batch = collate(encoded, [np.array([2, 1]), np.array([0])], 6)
    assert batch.input_ids.tolist() == [[30, 31, 32, 20, 21, 0], [10, 11, 12, 13, 0, 0]]
    assert batch.labels.tolist() == [[31, 32, -100, 21, -100, -100], [-100, 12, 13, -100, -100, -100]]
    assert batch.position_ids.tolist() == [[0, 1, 2, 0, 1, 0], [0, 1, 2, 3, 0, 0]]
    assert batch.mask.tolist() == [[True] * 5 + [False], [True] * 4 + [False] * 2]
    assert batch.targets.tolist() == [0, 1, 3, 7, 8]
    assert batch.documents == ((0, 3), (3, 5), (6, 10))
    assert batch.completion_lengths == (2, 1, 2)
    assert batch.num_tokens == 9
    assert batch.to("cpu").labels.equal(batch.labels)
    with pytest.raises(ValueError, match="sequence 0 has 7 tokens, more than 6"):
        collate(encoded, [np.array([0, 2])], 6)


def test_labels_are_the_next_tokens_of_the_completion_and_nothing_else() -> None:
    encoded = random_encoded([9, 4, 17, 2, 12, 6, 21, 3])
    sequences = epoch_sequences(encoded, 32, seed=0, epoch=0)
    batch = collate(encoded, sequences, 32)
    ids, labels = batch.input_ids.flatten(), batch.labels.flatten()
    expected = torch.full_like(labels, -100)
    examples = [int(example) for sequence in sequences for example in sequence]
    for (start, end), example in zip(batch.documents, examples, strict=True):
        assert ids[start:end].tolist() == encoded.example(example).tolist()
        for position in range(start + int(encoded.prompt_lengths[example]), end):
            expected[position - 1] = ids[position]
    assert torch.equal(labels, expected)
    assert torch.equal(batch.targets, torch.nonzero(labels != -100).flatten())
