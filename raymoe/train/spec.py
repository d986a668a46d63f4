"""What a training worker is asked to do. Light to import: the processes that only pass it on import no torch."""

from __future__ import annotations

from dataclasses import dataclass

from raymoe.config import Execution, Run
from raymoe.storage.location import Location


@dataclass(frozen=True)
class WorkerSpec:
    """Everything a worker needs, as locations that every node reaches."""

    run: Run
    execution: Execution
    dense: Location
    """Hugging Face folder of the dense model."""
    recipe: Location | None
    """Router rows to upcycle with (None: train the dense model itself)."""
    data: Location
    """Encoded instructions: `train/` and `validation/`."""
    out: Location
    """Gets `model/`, `evaluations.json`."""
    prompts: Location | None = None
    """Representations of all prompts, for SIMoE's router: `train.npy`, `validation.npy`."""
    log_every: int = 1
    """Steps whose metrics are read from the device together: one synchronisation."""


FIRST_STEPS = 0.1
"""Share of training in which SIMoE's gates should not saturate."""
FAILURE = "failure"
"""Under this name a trial's last result says why it failed."""
STOPPED_EARLY = "stopped early"
"""Why a trial ended that its scheduler gave up on."""


def stop_flag(checkpoints: Location, name: str) -> Location:
    """The file that asks the run `name` to end at its next milestone."""
    return checkpoints / name / "stop"


class TrainingFailed(Exception):
    """Training can't go on and trying again would not help (a loss that is not a number)."""
