"""The data and learning rate of every optimizer step, as pure functions of the step.

So a resumed run continues with exactly the next sequence, on any number of workers.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from raymoe.config import Optimization
from raymoe.data.instructions import Encoded
from raymoe.data.packing import epoch_sequences

PackedSequence = np.ndarray  # indices of the examples packed into one sequence


class Order:
    """The packed sequences of all steps of a run, `optimization.batch_size` per step."""

    def __init__(self, encoded: Encoded, max_length: int, optimization: Optimization, seed: int) -> None:
        self.batch_size = optimization.batch_size
        self._sequences = _all_sequences(encoded, max_length, optimization, seed)
        steps = max(1, len(self._sequences) // self.batch_size)
        self.total_steps = min(steps, optimization.max_steps or steps)

    def sequences(self, step: int) -> Sequence[PackedSequence]:
        """Return the sequences of `step`, in an order independent of the number of workers."""
        start = step * self.batch_size
        return [self._sequences[i % len(self._sequences)] for i in range(start, start + self.batch_size)]


def _all_sequences(
    encoded: Encoded, max_length: int, optimization: Optimization, seed: int
) -> list[PackedSequence]:
    """Return the sequences of all epochs in order; of a last, partial epoch only its share."""
    sequences: list[PackedSequence] = []
    remaining = optimization.num_epochs
    enough = (optimization.max_steps or 10**12) * optimization.batch_size
    for epoch in range(math.ceil(remaining)):
        if len(sequences) >= enough:
            break
        of_epoch = epoch_sequences(encoded, max_length, seed, epoch)
        share = min(1.0, round(remaining - epoch, 9))  # 1.1 - 1 is a little more than 0.1
        sequences += of_epoch[: math.ceil(round(len(of_epoch) * share, 6))]
    return sequences


def learning_rate(step: int, total_steps: int, optimization: Optimization) -> float:
    """Return the learning rate of `step` (0-based): linear warm-up, then the schedule."""
    peak, warmup = optimization.learning_rate, round(optimization.warmup_fraction * total_steps)
    if step < warmup:
        return peak * (step + 1) / (warmup + 1)
    progress = (step - warmup) / max(1, total_steps - warmup)
    if optimization.schedule == "cosine":
        return peak * 0.5 * (1 + math.cos(math.pi * progress))
    if optimization.schedule == "linear":
        return peak * (1 - progress)
    return peak


def milestone_steps(milestones: Sequence[float], total_steps: int) -> list[int]:
    """Return the numbers of finished steps at which the shares of training are reached, sorted and distinct."""
    return sorted({round(share * total_steps) for share in milestones})


def micro_batches(batch_size: int, workers: int, micro_batch: int) -> tuple[int, int]:
    """Return (sequences per forward pass, passes per step) of a worker: the fewest passes, of equal size.

    If the batch does not divide evenly, some workers have fewer sequences or none in their last pass.
    """
    share = math.ceil(batch_size / workers)
    passes = math.ceil(share / micro_batch)
    return math.ceil(share / passes), passes
