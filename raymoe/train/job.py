"""What a training worker is asked to do. Light to import: the processes that only pass it on import no torch."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from raymoe.config import Execution, Run


@dataclass(frozen=True)
class TrainJob:
    """Everything a worker needs, as paths that every node sees."""

    run: Run
    execution: Execution
    dense: Path
    """Hugging Face folder of the dense model."""
    recipe: Path | None
    """Router rows to upcycle with (None: train the dense model itself)."""
    data: Path
    """Encoded instructions: `train/` and `validation/`."""
    out: Path
    """Gets `model/`, `evaluations.json`."""
    prompts: Path | None = None
    """Representations of all prompts, for SIMoE's router: `train.npy`, `validation.npy`."""
    log_every: int = 1
    """Steps whose metrics are read from the device together: one synchronisation."""


FIRST_STEPS = 0.1
"""Share of training in which SIMoE's gates should not saturate."""
STOPPED_EARLY = "stopped early"
"""Why a trial ended that its scheduler gave up on."""


def stop_flag(checkpoints: Path, name: str) -> Path:
    """The file that asks the run `name` to end at its next milestone."""
    return checkpoints / name / "stop"


class TrainingFailed(Exception):
    """Training can't go on and trying again would not help (a loss that is not a number)."""
