"""What a method adds to training: losses, parameters beside the engine, metrics, the model's form on disk.

`Extension` adds nothing: it trains the dense baseline. A method overrides what it needs and names its class in
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
    """As it starts training: the dense model, or the sparse one that its recipe describes."""
    train: Encoded
    held_out: Encoded
    total_steps: int
    rank: int
    world_size: int
    device: torch.device
    partition: Callable[[nn.Module], None] | None
    """Under ZeRO-3: spreads a new module's parameters over the workers as soon as it is made."""

    @property
    def run(self) -> Run:
        """All that decides the result."""
        return self.spec.run


def extension_of(setting: Setting) -> Extension:
    """The extension of the run's method."""
    kind: type[Extension] = resolve(seam(setting.run.method).extension)
    return kind(setting)


class Extension:
    """Adds nothing; the base of what does. Every worker has one, and calls its methods alike."""

    penalty_weights: Mapping[str, float] = {}
    """Weight of each of `penalties` in the loss."""

    def __init__(self, setting: Setting) -> None:
        self.setting = setting

    @property
    def top_k(self) -> int:
        """FFNs that a token passes through in a layer."""
        return self.setting.run.method.ffns_per_token

    # ---- a step

    def learning_rate(self, rate: float, schedule: float) -> float:
        """The engine's learning rate where `rate` is the run's; `schedule` in [0, 1] is its share of the peak."""
        return rate

    def begin(self, step: int) -> None:
        """Prepare `step`, 0-based, before its first micro batch."""

    def apply(self, batch: Batch) -> None:
        """Prepare the model for a micro batch."""

    def penalties(self, batch: Batch, routed: Routed | None) -> dict[str, Tensor]:
        """Losses beside the likelihood: scalars, means over the tokens of `batch`, with their graph.

        Called inside the forward pass, so a parameter used here is gathered only if it is the model's. Each is logged
        as `train/<name>` and weighted by `penalty_weights` and the batch's share of the step's tokens.
        """
        return load_balance(batch, routed)

    def sums(self, output: LossOutput, share: float, counts: float) -> dict[str, Tensor]:
        """Further metrics of a micro batch, to be added up over the step's micro batches and workers.

        Args:
            output: of the forward pass.
            share: its share of the step's tokens, for means; 0 if it does not count.
            counts: 1, or 0 for a pass that only keeps this worker in step with the others.
        """
        return {}

    def end(self, step: int, schedule: float) -> dict[str, Tensor]:
        """Update the extension's own parameters after the last micro batch of `step`; returns metrics to sum."""
        return {}

    def known(self, step: int) -> dict[str, float]:
        """Metrics of `step` that the host knows without asking the device."""
        return {}

    def named(self, sums: Mapping[str, Tensor]) -> dict[str, float]:
        """A step's metrics under the names they are logged by, from the sums over workers, on the host."""
        return {name: float(value) for name, value in sums.items()}

    def read(self, step: int, metrics: Mapping[str, float]) -> None:
        """See the metrics of a finished step, some steps later."""

    # ---- milestones

    def held_out(self, examples: Sequence[int], batch: Batch | None) -> AbstractContextManager[None]:
        """Within the block the model is the one for these held-out examples: packed in `batch`, else a row each."""
        return nullcontext()

    def measure(self) -> dict[str, float]:
        """What a milestone says of the model itself: parameters stored, and met by one token."""
        stored, active = stored_and_active(self.setting.model, self.top_k)
        return {"model/parameters": float(stored), "model/active_parameters": float(active)}

    def finite(self) -> bool:
        """True if the extension's own parameters are numbers on all workers; all get the same answer."""
        return True

    # ---- checkpoints and the result

    def save(self, folder: Path) -> None:
        """Write the extension's own state, which all workers have alike; called on the first worker."""

    def load(self, folder: Path) -> None:
        """Go on from what `save` wrote."""

    def write(self, out: Path, tensors: Iterable[tuple[str, Tensor]], dtype: torch.dtype) -> None:
        """Write the trained model to `out / "model"`, in `dtype`; called on the first worker.

        `tensors`: name and value of every parameter in the order of the model, whole, each valid until the next.
        """
        write_model(out / "model", local(self.setting.spec.dense), None, tensors, dtype)
