"""The plan of a run and of a sweep, and both as plain values for JSON."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from raymoe.analysis.size import Counts
from raymoe.plan.cost import Cost
from raymoe.plan.memory import Setting


@dataclass(frozen=True)
class GpuPlan:
    """A run on GPUs of one kind."""

    gpu: str
    memory: int
    """Bytes that one has."""
    cost: Cost
    instances: tuple[str, ...]
    """Of AWS, with just as many of them."""
    recommended: Setting | None
    """The fastest setting that fits; None if none does."""
    why: str
    """In words, for that setting."""

    def as_json(self) -> dict[str, Any]:
        """Return it as plain values."""
        return {
            "gpu": self.gpu,
            "memory": self.memory,
            **asdict(self.cost),
            "instances": list(self.instances),
            "recommended": self.recommended.as_json() if self.recommended else None,
            "why": self.why,
        }


@dataclass(frozen=True)
class Plan:
    """A run: how large it is, what it takes in any setting, and what it costs on each kind of GPU."""

    model: str
    method: str
    precision: str
    counts: Counts
    gpus: int
    memory: tuple[Setting, ...]
    """Every setting with the run's own micro batch."""
    steps: int | None
    """Optimizer steps; None if unknown."""
    steps_from: str
    """Where `steps` comes from, or what is missing to know it."""
    tokens: int | None
    flops_per_token: float
    mfu: float
    prices: str
    """`given` by the user, or `examples`."""
    on: tuple[GpuPlan, ...]

    def as_json(self) -> dict[str, Any]:
        """Return it as plain values: bytes, tokens, hours."""
        return {
            "model": self.model,
            "method": self.method,
            "precision": self.precision,
            "parameters": _parameters(self.counts),
            "gpus": self.gpus,
            "memory": [setting.as_json() for setting in self.memory],
            "steps": self.steps,
            "steps_from": self.steps_from,
            "tokens": self.tokens,
            "flops_per_token": self.flops_per_token,
            "mfu": self.mfu,
            "prices": self.prices,
            "on": [each.as_json() for each in self.on],
        }


@dataclass(frozen=True)
class TrialPlan:
    """One trial of a sweep; those that are in the store take nothing."""

    trial: str
    in_store: bool
    counts: Counts
    hours: float | None
    price: float | None
    recommended: Setting | None

    def as_json(self) -> dict[str, Any]:
        """Return it as plain values."""
        return {
            "trial": self.trial,
            "in_store": self.in_store,
            **_parameters(self.counts),
            "hours": self.hours,
            "price": self.price,
            "recommended": self.recommended.as_json() if self.recommended else None,
        }


@dataclass(frozen=True)
class SweepPlan:
    """All trials of a sweep, one after another on the same GPUs; stages that they share are not counted."""

    gpu: str
    gpus: int
    mfu: float
    trials: tuple[TrialPlan, ...]
    prices: str
    """`given` by the user, or `examples`."""

    @property
    def hours(self) -> float | None:
        """Hours of all trials; None if those of any are unknown."""
        return _total([trial.hours for trial in self.trials])

    @property
    def price(self) -> float | None:
        """Price of all trials; None if that of any is unknown."""
        return _total([trial.price for trial in self.trials])

    def as_json(self) -> dict[str, Any]:
        """Return it as plain values."""
        return {
            "gpu": self.gpu,
            "gpus": self.gpus,
            "mfu": self.mfu,
            "trials": [trial.as_json() for trial in self.trials],
            "hours": self.hours,
            "price": self.price,
            "prices": self.prices,
        }


def _parameters(counts: Counts) -> dict[str, int]:
    return {"total": counts.total, "active": counts.active, "trained": counts.trained}


def _total(numbers: list[float | None]) -> float | None:
    known = [number for number in numbers if number is not None]
    return sum(known) if len(known) == len(numbers) else None
