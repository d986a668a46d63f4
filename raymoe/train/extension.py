"""Training extensions: the losses, parameters, metrics and model format that a method adds to training.

The base class adds nothing; it trains the dense baseline. A method overrides what it needs and names its class in
`raymoe.methods.SEAMS`. The worker calls, in this order:

    start            the constructor, before the engine is made: may change the model and add parameters to it
    every step       begin; for each micro batch apply, penalties (inside the forward pass), sums; end; named
    a milestone      held_out around each forward pass, finite, measure
    a checkpoint     finite, save; load on resumption
    the end          write
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from raymoe.config import Run
from raymoe.data.instructions import Encoded
from raymoe.data.packing import Batch
from raymoe.methods import resolve, seam
from raymoe.models.causal_loss import LossOutput, Routed, load_balance
from raymoe.storage.location import local
from raymoe.train.flops import stored_and_active
from raymoe.train.spec import WorkerSpec
from raymoe.upcycle.checkpoint import write_model


@dataclass(frozen=True)
class Setting:
    """The run that an extension is part of."""

    spec: WorkerSpec
    model: PreTrainedModel
    """The model before its first step: the dense model, or the sparse one expanded from the recipe."""
    train: Encoded
    held_out: Encoded
    total_steps: int
    world_size: int
    device: torch.device
    partition: Callable[[nn.Module], None] | None
    """Under ZeRO-3: partitions a new module's parameters over the workers as soon as it is made."""

    @property
    def run(self) -> Run:
        """Everything that determines the result."""
        return self.spec.run


def extension_of(setting: Setting) -> Extension:
    """Return the extension of the run's method."""
    kind: type[Extension] = resolve(seam(setting.run.method).extension)
    return kind(setting)


class Extension:
    """Base class, which adds nothing. Every worker has an instance and calls the same methods in the same order."""

    penalty_weights: Mapping[str, float] = {}
    """Name of a penalty -> its weight in the loss."""

    def __init__(self, setting: Setting) -> None:
        self.setting = setting

    # ---- a step

    def learning_rate(self, rate: float, schedule: float) -> float:
        """Return the engine's learning rate, given the run's; `schedule` in [0, 1] is its share of the peak."""
        return rate

    def begin(self, step: int) -> None:
        """Prepare `step`, 0-based, before its first micro batch."""

    def apply(self, batch: Batch) -> None:
        """Prepare the model for the forward pass of a micro batch."""

    def penalties(self, batch: Batch, routed: Routed | None) -> dict[str, Tensor]:
        """Return the losses beside the likelihood: scalars with their graph, averaged over the tokens of `batch`.

        Called inside the forward pass: under ZeRO-3 only the model's own parameters are gathered here. Each is logged
        as `train/<name>` and weighted by `penalty_weights` and the batch's share of the step's tokens.
        """
        return load_balance(batch, routed)

    def sums(self, output: LossOutput, share: float, counts: float) -> dict[str, Tensor]:
        """Return further metrics of a micro batch, to be summed over the step's micro batches and workers.

        Args:
            output: result of the forward pass.
            share: the micro batch's share of the step's tokens, for means; 0 if it does not count.
            counts: 1, or 0 for a pass that only keeps this worker in step with the others.
        """
        return {}

    def end(self, step: int, schedule: float) -> dict[str, Tensor]:
        """Update the extension's own parameters after the last micro batch of `step`; return metrics to sum."""
        return {}

    def known(self, step: int) -> dict[str, float]:
        """Return the metrics of `step` that the host knows without reading the device."""
        return {}

    def named(self, sums: Mapping[str, Tensor]) -> dict[str, float]:
        """Return a step's metrics as they are logged, given the sums over workers, which are on the host."""
        return {name: float(value) for name, value in sums.items()}

    def read(self, step: int, metrics: Mapping[str, float]) -> None:
        """Take note of the metrics of a finished step, some steps later."""

    # ---- milestones

    def held_out(self, examples: Sequence[int], batch: Batch | None) -> AbstractContextManager[None]:
        """Within the block, set the model up for these held-out examples: packed in `batch`, else one per row."""
        return nullcontext()

    def measure(self) -> dict[str, float]:
        """Return a milestone's metrics of the model itself: parameters in total, and active per token."""
        stored, active = stored_and_active(self.setting.model, self.setting.run.method.ffns_per_token)
        return {"model/parameters": float(stored), "model/active_parameters": float(active)}

    def finite(self) -> bool:
        """True if the extension's own parameters are finite on all workers; all get the same answer."""
        return True

    # ---- checkpoints and the result

    def save(self, folder: Path) -> None:
        """Write the extension's own state, which is replicated on all workers; called on the first one."""

    def load(self, folder: Path) -> None:
        """Restore what `save` wrote."""

    def write(self, out: Path, tensors: Iterable[tuple[str, Tensor]], dtype: torch.dtype) -> None:
        """Write the trained model to `out / "model"`, in `dtype`; called on the first worker.

        `tensors`: name and full value of every parameter, in the model's order; each is valid until the next one.
        """
        write_model(out / "model", local(self.setting.spec.dense), None, tensors, dtype)
