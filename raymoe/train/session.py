"""The interface between a worker's loop and its surroundings, so that the loop knows nothing of Ray."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Protocol

import torch


class Session(Protocol):
    """A worker's rank, where it reports to, and the checkpoint it resumes from."""

    rank: int
    world_size: int
    device: torch.device

    def checkpoint(self) -> Path | None:
        """Return the folder of the checkpoint to resume from; None if there is none."""

    def resumed(self, step: int) -> None:
        """Note that training resumes after `step`, from the checkpoint."""

    def stop_requested(self) -> bool:
        """True if the run is to end at this milestone."""

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Log the metrics of a step. Called on the first worker only; never blocks."""

    def report(self, metrics: Mapping[str, float], save: Callable[[Path], None] | None) -> None:
        """Report metrics, with a checkpoint that `save(folder)` writes if given; a barrier over the workers."""

    def leaving(self) -> bool:
        """True if a node of the workers is about to be taken away; a barrier over the workers."""
