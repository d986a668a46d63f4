"""What is asked of the planner beside the run: which GPUs, how many, how well used, at what price."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from raymoe.config import RunFile
from raymoe.plan.cost import GPUS
from raymoe.schema import InputError


@dataclass(frozen=True)
class PlanOptions:
    """Options of `raymoe plan`."""

    gpu: str | None = None
    """A key of `GPUS`; None for all of them."""
    gpus: int = 1
    mfu: float = 0.4
    """Model FLOPs utilization: assumed share of the vendor's peak."""
    tokens: int | None = None
    price_per_gpu_hour: float | None = None

    def check(self, run_file: RunFile) -> None:
        """Refuse options that do not fit each other or `run_file`.

        Raises:
            InputError: an unknown GPU, an MFU that is no share, or workers that can't share the batch.
        """
        if self.gpu is not None and self.gpu not in GPUS:
            raise InputError(f"--gpu: unknown GPU {self.gpu!r}: choose from {', '.join(GPUS)}")
        if not (0 < self.mfu <= 1 and math.isfinite(self.mfu)):
            raise InputError(f"--mfu: expected a share in (0, 1] (got {self.mfu:g})")
        batch = run_file.optimization.batch_size
        if batch % self.gpus and not isinstance(run_file.execution.workers, tuple):
            raise InputError(f"--gpus: {self.gpus} can't share optimization.batch_size {batch} evenly")


def parse_options(texts: Mapping[str, str], run_file: RunFile) -> PlanOptions:
    """Parse options as they are typed; GPUs are by default as many as `execution.workers` at most, else one.

    Raises:
        InputError: not a number, or one that can't be.
    """
    gpu = texts.get("gpu")
    return PlanOptions(
        gpu=gpu.lower() if gpu else None,
        gpus=_whole("gpus", texts) or run_file.execution.most_workers or 1,
        mfu=_positive("mfu", texts) or PlanOptions.mfu,
        tokens=_whole("tokens", texts),
        price_per_gpu_hour=_positive("price_per_gpu_hour", texts),
    )


def _positive(name: str, texts: Mapping[str, str]) -> float | None:
    if name not in texts:
        return None
    try:
        value = float(texts[name])
    except ValueError:
        value = math.nan
    if not (value > 0 and math.isfinite(value)):
        option = f"--{name.replace('_', '-')}"
        raise InputError(f"{option}: expected a number above 0 (got {texts[name]!r})")
    return value


def _whole(name: str, texts: Mapping[str, str]) -> int | None:
    value = _positive(name, texts)
    if value is not None and value != int(value):
        raise InputError(f"--{name}: expected a whole number (got {texts[name]!r})")
    return None if value is None else int(value)
