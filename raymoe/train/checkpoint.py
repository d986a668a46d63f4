"""What a checkpoint of an unfinished run holds besides model and optimizer, and who may go on from it."""

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
    """How far training has come."""

    step: int = 0
    """Finished optimizer steps."""
    tokens: int = 0
    """Tokens trained on."""
    evaluations: list[dict[str, float]] = field(default_factory=list)
    """Metrics of the milestones passed."""


def layout(spec: WorkerSpec, zero_stage: int, workers: int) -> dict[str, Any]:
    """How the checkpoints of a run are spread over files, and whose they are."""
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
    """The layout of the checkpoint in `folder`.

    Raises:
        TrainingFailed: a run with the layout `ours` can't go on from it.
    """
    written: dict[str, Any] = json.loads((folder / LAYOUT).read_text())
    if written["run"] != ours["run"]:
        raise TrainingFailed(f"the checkpoint {folder} is of another run or another model: remove it")
    if _partitioned(written["zero_stage"]) != _partitioned(ours["zero_stage"]):
        raise TrainingFailed(
            f"its checkpoint was written with execution.zero_stage {written['zero_stage']}, this run has "
            f"{ours['zero_stage']}: go on with {written['zero_stage']}"
        )
    return written


def _partitioned(zero_stage: int) -> str:
    """What of a checkpoint DeepSpeed partitions: stages 1 and 2 write the same."""
    return ("nothing", "optimizer", "optimizer", "parameters")[zero_stage]
