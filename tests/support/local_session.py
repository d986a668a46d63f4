"""A worker's `Session` without Ray, and small runs for it."""

from __future__ import annotations

import socket
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AutoModelForCausalLM

from raymoe.config import Evaluation, Execution, Model, Optimization, Run
from raymoe.data.instructions import Encoded
from raymoe.methods import Dense, SparseInterpolation
from raymoe.models.packed_attention import PACKED_ATTENTION
from raymoe.routers.prompts import represent
from raymoe.train.spec import WorkerSpec
from raymoe.upcycle import router, write_recipe

LENGTH = 128


class LocalSession:
    """One worker without Ray: rows and reports in memory, checkpoints in a folder."""

    def __init__(
        self, folder: Path | None = None, resume: bool = False, stop_after: int | None = None
    ) -> None:
        self.rank, self.world_size, self.device = 0, 1, torch.device("cpu")
        self.folder, self.resume, self.stop_after = folder, resume, stop_after
        self.rows: list[tuple[int, dict[str, float]]] = []

    def checkpoint(self) -> Path | None:
        return self.folder if self.resume else None

    def stop_requested(self) -> bool:
        return False

    def leaving(self) -> bool:
        return False

    def resumed(self, step: int) -> None:
        self.resumed_at = step

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        self.rows.append((step, dict(metrics)))

    def report(self, metrics: Mapping[str, float], save: Callable[[Path], None] | None) -> None:
        if save and self.folder:
            save(self.folder)
        if metrics["step"] == self.stop_after:
            raise KeyboardInterrupt

    def losses(self) -> dict[int, float]:
        return {step: m["train/loss"] for step, m in self.rows if "train/loss" in m}


def environment(put: Callable[[str, str], Any], rank: int, world: int, port: int) -> None:
    for name, value in {
        "RANK": rank,
        "LOCAL_RANK": rank,
        "WORLD_SIZE": world,
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": port,
    }.items():
        put(name, str(value))


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def small_run(pico: Path, data: Path, method: Any = None, **optimization: Any) -> Run:
    values = {"learning_rate": 1e-2, "batch_size": 4, "max_steps": 6, "num_epochs": 3, **optimization}
    return Run(
        model=Model(name=str(pico)),
        data={"train": str(data), "max_length": LENGTH},
        method=method or Dense(),
        optimization=Optimization(**values),
        evaluation=Evaluation(milestones=(0, 0.5, 1), generation_examples=2, max_new_tokens=4),
    )


def small_spec(run: Run, pico: Path, encoded: Path, out: Path, **execution: Any) -> WorkerSpec:
    out.mkdir(parents=True, exist_ok=True)
    recipe = prompts = None
    if isinstance(run.method, SparseInterpolation):
        prompts = write_prompts(pico, encoded, out / "prompts")
    elif not isinstance(run.method, Dense):
        recipe = out / "recipe"
        rows = router(run.method, num_layers=2, width=32, clusters=None, seed=0)
        write_recipe(recipe, pico, run.method, rows)
    options = {"micro_batch": 2, "zero_stage": 0, **execution}
    return WorkerSpec(run, Execution(**options), pico, recipe, encoded, out, prompts)


def write_prompts(dense: Path, encoded: Path, out: Path) -> Path:
    """Write the output of the prompts stage without Ray; return its folder."""
    model = AutoModelForCausalLM.from_pretrained(dense, attn_implementation=PACKED_ATTENTION)
    out.mkdir(parents=True, exist_ok=True)
    for split in ("train", "validation"):
        data = Encoded.load(encoded / split)
        rows = represent(model, [data.prompt(i) for i in range(len(data))], "last_hidden")
        np.save(out / f"{split}.npy", rows.numpy(), allow_pickle=False)
    return out
