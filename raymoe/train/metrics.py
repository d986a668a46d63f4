"""Metrics of training steps: those of several steps are reduced over workers and read from the device at once.

The same reduction carries what the first worker's clock decides for all, such as that a checkpoint is due.
"""

from __future__ import annotations

import math
import resource
import time
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from raymoe.models.collectives import summed
from raymoe.train.extension import Extension
from raymoe.train.session import Session
from raymoe.train.spec import TrainingFailed

LONGEST_WAIT = 5.0
"""Longest time between reductions, in seconds: clouds announce the loss of a node only 30 to 120 s ahead."""

Sums = dict[str, Tensor]


class StepMetrics:
    """Collects the metrics of steps, reduces them together and logs them."""

    def __init__(
        self,
        session: Session,
        extension: Extension,
        *,
        every: int,
        flops_per_second: float,
        flops_per_token: float,
        due: Callable[[], Mapping[str, bool]],
    ) -> None:
        """`every`: steps between reductions. `due`: called at each; all get the first worker's `decided`."""
        self._session, self._extension, self._every, self._due = session, extension, every, due
        self._utilisation = flops_per_token, flops_per_second
        self._pending: list[tuple[dict[str, float], Sums]] = []
        self._wait, self._seconds_per_step = 1, 1.0
        self._clock = self._began = time.perf_counter()
        self.decided: dict[str, bool] = {}
        """Answers of the last reduction by name; whoever acts on one removes it."""

    def add(self, known: dict[str, float], sums: Sums) -> None:
        """Add the metrics of a step: those the host knows, and those on the device, to be summed over workers."""
        self._pending.append((known, sums))
        if len(self._pending) >= self._wait:
            self.flush()

    def flush(self) -> None:
        """Reduce the pending metrics over the workers, read them (one synchronisation) and log them.

        Raises:
            TrainingFailed: the loss is not a number.
        """
        if not self._pending:
            return
        pending, self._pending = self._pending, []
        *steps, answers = _reduced([*(sums for _, sums in pending), self._answers()])
        self._wait = int(answers.pop("wait"))
        self.decided = {what: bool(value) for what, value in answers.items()}
        now = time.perf_counter()
        self._seconds_per_step, self._clock = (now - self._clock) / len(pending), now
        for sums, (known, _) in zip(steps, pending, strict=True):
            self._log(known, sums, now)

    def restart_clock(self) -> None:
        """Exclude the time since the last reduction from the throughput, as it was not spent on steps."""
        self._clock = time.perf_counter()

    def _log(self, known: dict[str, float], sums: Sums, now: float) -> None:
        step = int(known.pop("step"))
        rate, (per_token, per_second) = known.pop("step_tokens") / self._seconds_per_step, self._utilisation
        metrics = {
            **self._extension.named(sums),
            **known,
            "system/tokens_per_second": rate,
            "system/mfu": rate * per_token / per_second,
            "system/peak_memory_bytes": peak_memory(self._session.device),
            "system/workers": self._session.world_size,
            "system/seconds": now - self._began,
        }
        self._extension.read(step, metrics)
        if self._session.rank == 0:
            self._session.log(step, metrics)
        if not math.isfinite(metrics["train/loss"]):
            raise TrainingFailed(f"the loss is {metrics['train/loss']} at step {step}")

    def _answers(self) -> Sums:
        """Return the steps until the next reduction and what is due on the first worker, zeros on the others."""
        first, device = self._session.rank == 0, self._session.device
        wait = min(self._every, max(1, int(LONGEST_WAIT / self._seconds_per_step)))
        answers = {"wait": wait, **self._due()}
        return {k: torch.tensor(float(v if first else 0), device=device) for k, v in answers.items()}


def add_up(total: Sums, more: Mapping[str, Tensor]) -> None:
    """Add `more` to `total`, in place."""
    for name, value in more.items():
        total[name] = total[name] + value if name in total else value


def peak_memory(device: torch.device) -> float:
    """Return the peak memory so far, in bytes: allocated on a GPU, resident in this process on a CPU."""
    if device.type == "cuda":
        return float(torch.cuda.max_memory_allocated(device))
    return 1024.0 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def _reduced(steps: Sequence[Mapping[str, Tensor]]) -> list[Sums]:
    """Sum every metric of every step over the workers in one all-reduce, and copy all to the host at once."""
    flat = summed(torch.cat([v.float().flatten() for metrics in steps for v in metrics.values()]))
    parts = iter(torch.split(flat.cpu(), [v.numel() for metrics in steps for v in metrics.values()]))
    return [{name: next(parts).view(value.shape) for name, value in metrics.items()} for metrics in steps]
