"""Training state and layout stored in a checkpoint beside model and optimizer; the check before resuming."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from raymoe.storage.location import local
from raymoe.storage.store import digest
from raymoe.train.spec import TrainingFailed, WorkerSpec

LAYOUT = "layout.json"


@dataclass
class State:
    """Progress of a run."""

    step: int = 0
    """Optimizer steps done."""
    tokens: int = 0
    """Tokens trained on."""
    evaluations: list[dict[str, float]] = field(default_factory=list)
    """Metrics of the milestones passed."""


def layout(spec: WorkerSpec, zero_stage: int, workers: int) -> dict[str, Any]:
    """Return how a run's checkpoints are partitioned, and the identity of the run they belong to."""
    dense = (local(spec.dense) / "config.json").read_text()
    return {
        "zero_stage": zero_stage,
        "workers": workers,
        "run": digest([spec.run.identity(), dense]),
    }


def write_layout(folder: Path, ours: Mapping[str, Any]) -> None:
    """Write the layout into the checkpoint `folder`."""
    (folder / LAYOUT).write_text(json.dumps(ours))


def read_layout(folder: Path, ours: Mapping[str, Any]) -> dict[str, Any]:
    """Return the layout of the checkpoint in `folder`.

    Raises:
        TrainingFailed: a run with the layout `ours` can't resume from it.
    """
    written: dict[str, Any] = json.loads((folder / LAYOUT).read_text())
    if written["run"] != ours["run"]:
        raise TrainingFailed(f"the checkpoint {folder} belongs to another run or another model: remove it")
    if _partitioned(written["zero_stage"]) != _partitioned(ours["zero_stage"]):
        raise TrainingFailed(
            f"its checkpoint was written with execution.zero_stage {written['zero_stage']}, this run has "
            f"{ours['zero_stage']}: resume with {written['zero_stage']}"
        )
    return written


def _partitioned(zero_stage: int) -> str:
    """Return which part of a checkpoint DeepSpeed partitions; stages 1 and 2 write the same files."""
    return ("nothing", "optimizer", "optimizer", "parameters")[zero_stage]
