"""What surrounds a worker's loop, so that the loop knows nothing of Ray."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Protocol

import torch


class Session(Protocol):
    """A worker's place among the others, where it reports, and what it goes on from."""

    rank: int
    world_size: int
    device: torch.device

    def checkpoint(self) -> Path | None:
        """Return the folder of the checkpoint to go on from, if there is one."""

    def resumed(self, step: int) -> None:
        """Note that training goes on after `step`, from the checkpoint."""

    def stop_requested(self) -> bool:
        """Return True if the run is to end at this milestone."""

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Log the metrics of a step; first worker only, never waits."""

    def report(self, metrics: Mapping[str, float], save: Callable[[Path], None] | None) -> None:
        """Report to all, a barrier over the workers; `save(folder)` writes a checkpoint where it is not None."""

    def leaving(self) -> bool:
        """Return True if a node that a worker is on is about to be taken away; a barrier over the workers."""
