"""The metrics of one training run as JSON lines in the store, which MLflow's writer reads."""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from raymoe.storage.location import Location, Remote, StorageError, read_file

MARKS = ("eval/loss", "train/loss")
"""Metrics that tell the two kinds of row apart, evaluations and training steps: every row has one of them."""

REMOTE_PAUSE = 5.0
"""Seconds between two looks at an object, and the fewest between two writes of it."""


class MetricLog:
    """Metrics of one training run, one JSON line per row, written by worker 0.

    A file is appended to. An object can only be written anew: that is done every few seconds, and by `flush`.
    """

    def __init__(self, file: Location, resume_after: int | None = None) -> None:
        """Open for appending. Rows after the step `resume_after` are dropped: a resumed run writes them again."""
        self.file = file
        kept = [r for r in read_rows(file) if resume_after is not None and r["step"] <= resume_after]
        self._seen = {(row["step"], kind_of_row(row["metrics"])) for row in kept}
        self._lines = [json.dumps(row) + "\n" for row in kept]
        self._unwritten, self._next = True, 0.0
        if isinstance(file, Remote):
            self.flush()
            return
        file.parent.mkdir(parents=True, exist_ok=True)
        # Replaced, not truncated: the reader sees another file and starts from its beginning.
        fresh = file.with_suffix(".new")
        fresh.write_text("".join(self._lines))
        fresh.replace(file)

    def append(self, step: int, metrics: Mapping[str, float]) -> None:
        """Append a row, unless the step has one of the same kind already."""
        key = (step, kind_of_row(metrics))
        if key in self._seen:
            return
        self._seen.add(key)
        line = json.dumps({"step": step, "time": int(time.time() * 1000), "metrics": dict(metrics)}) + "\n"
        if isinstance(self.file, Path):
            with self.file.open("a") as stream:
                stream.write(line)
            return
        self._lines.append(line)
        self._unwritten = True
        if time.monotonic() > self._next:
            with contextlib.suppress(StorageError):  # no reason to end training: `flush` tries again
                self.flush()

    def flush(self) -> None:
        """Write what is not in the object yet; raises StorageError."""
        if isinstance(self.file, Path) or not self._unwritten:
            return
        started = time.monotonic()
        try:
            self.file.write_text("".join(self._lines))
            self._unwritten = False
        finally:  # long logs and slow storage take at most a twentieth of the training's time
            self._next = time.monotonic() + max(REMOTE_PAUSE, 20 * (time.monotonic() - started))


def metric_log(checkpoints: Location, name: str) -> Location:
    """Return where the metrics of the run `name` are while it trains."""
    return checkpoints / name / "metrics.jsonl"


def read_rows(file: Location) -> list[dict[str, Any]]:
    """Return all whole rows of a metric log; none if there is no such file."""
    text = (read_file(file) or b"").decode()
    return [json.loads(line) for line in text.splitlines(keepends=True) if line.endswith("\n")]


def kind_of_row(metrics: Mapping[str, float]) -> str:
    """Return the metric of MARKS that tells what kind of row this is."""
    return next((mark for mark in MARKS if mark in metrics), MARKS[-1])
