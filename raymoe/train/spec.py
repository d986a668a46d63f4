"""The specification of a training worker. Imports no torch, for the processes that only pass it on."""

from __future__ import annotations

from dataclasses import dataclass

from raymoe.config import Execution, Run
from raymoe.storage.location import Location


@dataclass(frozen=True)
class WorkerSpec:
    """Everything a worker needs, as locations that every node can reach."""

    run: Run
    execution: Execution
    dense: Location
    """Hugging Face folder of the dense model."""
    recipe: Location | None
    """Recipe to upcycle with; None: train the dense model itself."""
    data: Location
    """Encoded instructions: `train/` and `validation/`."""
    out: Location
    """Receives `model/` and `evaluations.json`."""
    prompts: Location | None = None
    """Representations of all prompts, for SIMoE's router: `train.npy`, `validation.npy`."""
    log_every: int = 1
    """Number of steps whose metrics are read from the device at once, in one synchronisation."""


FIRST_STEPS = 0.1
"""Initial share of training in which SIMoE's gates should not saturate."""
FAILURE = "failure"
"""Key in a trial's last result that holds the reason of its failure."""
STOPPED_EARLY = "stopped early"
"""Failure reason of a trial that its scheduler stopped."""


def stop_flag(checkpoints: Location, name: str) -> Location:
    """Return the file whose existence asks the run `name` to end at its next milestone."""
    return checkpoints / name / "stop"


class TrainingFailed(Exception):
    """Training failed for a reason that a retry would not remove, such as a loss that is not a number."""
