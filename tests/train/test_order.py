from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from transformers import (
    get_constant_schedule_with_warmup,
    get_cosine_schedule_with_warmup,
    get_linear_schedule_with_warmup,
)

from raymoe.config import Optimization
from raymoe.data.instructions import Encoded
from raymoe.train.order import Order, learning_rate, micro_batches, milestone_steps

MAX_LENGTH = 32


def examples(lengths: list[int]) -> Encoded:
    labels = tuple(str(i) for i in range(len(lengths)))
    return Encoded(
        tokens=np.zeros(sum(lengths), dtype=np.int32),
        offsets=np.cumsum([0, *lengths], dtype=np.int64),
        prompt_lengths=np.ones(len(lengths), dtype=np.int32),
        ids=labels,
        domains=labels,
        tasks=labels,
    )


def varied(count: int = 200) -> Encoded:
    return examples(np.random.default_rng(0).integers(2, MAX_LENGTH + 1, count).tolist())


def order(encoded: Encoded, seed: int = 0, **settings: Any) -> Order:
    return Order(encoded, MAX_LENGTH, Optimization(**settings), seed)


def batches(order: Order) -> list[list[tuple[int, ...]]]:
    """Return the examples of every packed sequence of every step."""
    return [[tuple(packed.tolist()) for packed in order.sequences(step)] for step in range(order.total_steps)]


def sequences(order: Order) -> list[tuple[int, ...]]:
    return [packed for batch in batches(order) for packed in batch]


# ---- what a step trains on


def test_a_step_is_a_function_of_seed_and_step_alone() -> None:
    whole = batches(order(varied(), batch_size=8, num_epochs=2.5))
    resumed = order(varied(), batch_size=8, num_epochs=2.5)
    for step in reversed(range(len(whole))):  # in any order
        assert [tuple(packed.tolist()) for packed in resumed.sequences(step)] == whole[step]
    assert batches(order(varied(), seed=1, batch_size=8, num_epochs=2.5)) != whole


def test_the_batch_size_does_not_change_the_order_of_sequences() -> None:
    one = sequences(order(varied(), batch_size=1, num_epochs=2))
    for size in (2, 3, 8):
        some = sequences(order(varied(), batch_size=size, num_epochs=2))
        assert some == one[: len(some)]
        assert len(one) - len(some) < size


@pytest.mark.parametrize("workers", [1, 2, 3, 4, 6, 12])
def test_workers_share_the_global_batch_whatever_their_number(workers: int) -> None:
    data = order(varied(), batch_size=12)
    for micro_batch in (1, 2, 5, 100):
        size, passes = micro_batches(12, workers, micro_batch)
        for step in range(data.total_steps):
            batch = data.sequences(step)
            shares = [batch[rank::workers] for rank in range(workers)]
            assert max(len(share) for share in shares) <= size * passes < max(map(len, shares)) + passes
            assert Counter(id(packed) for share in shares for packed in share) == Counter(map(id, batch))


def test_every_epoch_trains_on_every_example_once_in_another_order() -> None:
    encoded = varied()
    data = sequences(order(encoded, batch_size=1, num_epochs=3))
    epochs, seen = [], Counter[int]()
    for packed in data:
        assert sum(encoded.lengths[list(packed)]) <= MAX_LENGTH
        if not seen or sum(seen.values()) == len(encoded):
            seen = Counter()
            epochs.append((seen, []))
        seen.update(packed)
        epochs[-1][1].extend(packed)
    assert len(epochs) == 3
    for counts, _ in epochs:
        assert counts == Counter(range(len(encoded)))
    assert len({tuple(ordered) for _, ordered in epochs}) == 3


# ten examples that fill a sequence each: an epoch is ten steps of one sequence
@pytest.mark.parametrize(
    ("epochs", "steps"), [(1, 10), (0.5, 5), (0.05, 1), (0.31, 4), (1.1, 11), (2.2, 22), (2.25, 23), (3, 30)]
)
def test_a_partial_epoch_trains_on_its_share(epochs: float, steps: int) -> None:
    encoded = examples([MAX_LENGTH] * 10)
    data = sequences(order(encoded, batch_size=1, num_epochs=epochs))
    assert len(data) == steps == math.ceil(round(10 * epochs, 6))
    counts = Counter(example for packed in data for example in packed)
    assert max(counts.values()) - min(counts.get(i, 0) for i in range(10)) <= 1


def test_steps_end_with_the_epochs_or_before() -> None:
    encoded = examples([MAX_LENGTH] * 10)
    assert order(encoded, batch_size=4).total_steps == 2
    assert order(encoded, batch_size=4, num_epochs=2).total_steps == 5
    assert order(encoded, batch_size=4, num_epochs=100, max_steps=3).total_steps == 3
    assert order(encoded, batch_size=4, max_steps=30).total_steps == 2
    limited = batches(order(encoded, batch_size=4, num_epochs=100, max_steps=3))
    assert limited == batches(order(encoded, batch_size=4, num_epochs=100))[:3]


def test_fewer_sequences_than_a_batch_are_repeated() -> None:
    data = order(examples([MAX_LENGTH] * 3), batch_size=8)
    assert data.total_steps == 1
    counts = Counter(sequences(data))
    assert set(counts) == {(0,), (1,), (2,)}
    assert sorted(counts.values()) == [2, 3, 3]


# ---- learning rate


def reference(schedule: str, warmup: int, total: int, peak: float) -> list[float]:
    """Return transformers' learning rate before each of `total` optimizer steps."""
    makers: dict[str, Callable[[Any], Any]] = {
        "cosine": lambda o: get_cosine_schedule_with_warmup(o, warmup, total),
        "linear": lambda o: get_linear_schedule_with_warmup(o, warmup, total),
        "constant": lambda o: get_constant_schedule_with_warmup(o, warmup),
    }
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=peak)
    scheduler = makers[schedule](optimizer)
    rates = []
    for _ in range(total):
        rates.append(scheduler.get_last_lr()[0])
        optimizer.step()
        scheduler.step()
    return rates


@pytest.mark.parametrize("schedule", ["cosine", "linear", "constant"])
@pytest.mark.parametrize(("fraction", "total"), [(0.0, 10), (0.05, 100), (0.3, 7), (0.5, 2), (0.05, 1)])
def test_schedules_are_those_of_transformers_without_its_idle_first_step(
    schedule: str, fraction: float, total: int
) -> None:
    """Equal after the warm-up; within it, step s of w has (s + 1) / (w + 1) of the peak where transformers has s / w.

    So the rates are those of transformers from its second step on, with one more step of warm-up and in total.
    """
    warmup = round(fraction * total)
    settings = Optimization(learning_rate=3e-4, schedule=schedule, warmup_fraction=fraction)  # type: ignore[arg-type]
    rates = [learning_rate(step, total, settings) for step in range(total)]
    assert rates == pytest.approx(reference(schedule, warmup + 1, total + 1, 3e-4)[1:], rel=1e-12)
    assert rates[warmup:] == pytest.approx(reference(schedule, warmup, total, 3e-4)[warmup:], rel=1e-12)
    assert min(rates) > 0
    assert max(rates) == rates[warmup] == 3e-4


# ---- milestones and micro batches


def test_milestones_are_the_nearest_steps() -> None:
    shares = (0.0, 0.25, 0.5, 0.75, 1.0)
    assert milestone_steps(shares, 8) == [0, 2, 4, 6, 8]
    assert milestone_steps((0.5,), 7) in ([3], [4])
    assert milestone_steps((), 8) == []
    for total in range(1, 50):
        steps = milestone_steps(shares, total)
        assert steps == sorted(set(steps))
        assert (steps[0], steps[-1]) == (0, total)
        for share in shares:
            assert min(abs(step - share * total) for step in steps) <= 0.5
        assert all(min(abs(step - share * total) for share in shares) <= 0.5 for step in steps)


def test_micro_batches_are_as_few_as_fit() -> None:
    for batch_size in range(1, 25):
        for workers in range(1, 9):
            for limit in range(1, 26):
                size, passes = micro_batches(batch_size, workers, limit)
                share = -(-batch_size // workers)  # of the worker with the most sequences
                assert size <= limit and share <= size * passes < share + passes
                assert (passes - 1) * limit < share
