"""Shared by all benchmarks: options, rounds in which the contestants take turns, one JSON line per figure."""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import time
from collections.abc import Callable, Mapping
from pathlib import Path

import torch


def parser(doc: str | None, rounds: int = 5) -> argparse.ArgumentParser:
    """Return a parser with the options of every benchmark; `doc` is its module's docstring."""
    options = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--rounds", type=int, default=rounds)
    options.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    options.add_argument(
        "--size", choices=("normal", "tiny"), default="normal", help="tiny: only that it runs"
    )
    return options


class Rounds:
    """Seconds of each contestant in each round."""

    def __init__(self, seconds: Mapping[str, list[float]]) -> None:
        self.seconds = seconds

    def median(self, name: str) -> float:
        """Return a contestant's median seconds."""
        return statistics.median(self.seconds[name])

    def ratio(self, name: str, peer: str) -> float:
        """Return the median over rounds of the time relative to the peer's: what slows both cancels out."""
        pairs = zip(self.seconds[name], self.seconds[peer], strict=True)
        return statistics.median(own / other for own, other in pairs)


def interleaved(work: Mapping[str, Callable[[], object]], rounds: int) -> Rounds:
    """Time each of `work` in turn, `rounds` times after a warm-up round."""
    seconds: dict[str, list[float]] = {name: [] for name in work}
    for _ in range(rounds + 1):
        for name, run in work.items():
            seconds[name].append(timed(run))
    return Rounds({name: values[1:] for name, values in seconds.items()})


def timed(run: Callable[[], object]) -> float:
    """Return the seconds until the device is done, synchronising only before and after."""
    _finish()
    started = time.perf_counter()
    run()
    _finish()
    return time.perf_counter() - started


def _finish() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def figure(
    name: str,
    peer: str,
    ratio: float,
    goal: float,
    floor_ratio: float | None,
    device: str,
    more_is_better: bool = False,
    **details: object,
) -> None:
    """Print one figure; `floor_ratio` is None if there is no floor."""
    line = {
        "name": name,
        "peer": peer,
        "ratio": round(ratio, 4),
        "goal": goal,
        "met": ratio >= goal if more_is_better else ratio <= goal,
        "floor_ratio": floor_ratio and round(floor_ratio, 4),
        "device": device_name(device),
        "commit": commit(),
        **details,
    }
    print(json.dumps(line), flush=True)


def device_name(device: str) -> str:
    """Return the name of the hardware behind `cuda` or `cpu`; any other name unchanged."""
    if device == "cuda":
        return torch.cuda.get_device_name()
    return f"{torch.get_num_threads()} CPU threads" if device == "cpu" else device


def commit() -> str:
    """Return the short hash of the checkout, with a + if it has changes."""
    command = ["git", "describe", "--always", "--dirty=+", "--exclude=*"]
    run = subprocess.run(command, cwd=Path(__file__).parent, capture_output=True, text=True)
    return run.stdout.strip() or "unknown"
