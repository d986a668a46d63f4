"""Watch a cluster while a sweep runs: keep a timeline of nodes and trials, end reservations that nobody can use.

    with Watch(folder, left=lambda: 3, total=4, say=print) as watch: ...
    watch.artifacts                                    # timeline.jsonl and, with more than one node, timeline.png

A thread of the driver asks Ray's control store every two seconds; nothing runs where models train.
"""

from __future__ import annotations

import contextlib
import io
import json
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import ray
from ray import PlacementGroupID
from ray.util.placement_group import PlacementGroup, remove_placement_group

from raymoe.cluster import ray_internals
from raymoe.cluster.capacity import TRIAL_SLOT
from raymoe.cluster.ray_internals import HEAD
from raymoe.storage.location import Location, read_file, replace_file

TIMELINE = "timeline.jsonl"
INTERVAL = 2.0
"""Seconds between two looks."""
WRITE_EVERY = 10.0
"""Seconds between two writes of a timeline that changes."""
LEAK_AFTER = 10.0
"""Seconds for which a placement group may outlive its maker: Ray's own cleaner takes some."""


@dataclass(frozen=True)
class Group:
    """A placement group, placed or waiting for room."""

    id: str
    bundles: tuple[Mapping[str, float], ...]
    placed: bool
    lost: bool
    """True if its maker has ended, so that nobody will use or remove it."""
    ours: bool
    """True if it was made in this job."""
    detached: bool
    """True if it was made to outlive its job, which raymoe never does."""

    @property
    def of_workers(self) -> bool:
        """True if it is for a trial's training workers, not for its driver."""
        return all(b.get("CPU", 0) >= 1 or b.get("GPU", 0) >= 1 for b in self.bundles) and not any(
            TRIAL_SLOT in b for b in self.bundles
        )

    @property
    def holds(self) -> str:
        """What it reserves: `2 CPU, 1 GPU`."""
        total: Counter[str] = Counter()
        for bundle in self.bundles:
            total.update(bundle)
        return ", ".join(f"{amount:g} {name}" for name, amount in sorted(total.items()))


class Watch:
    """Keeps the timeline of a sweep while its block lasts, and ends placement groups that have leaked.

    Args:
        folder: folder of the sweep for the timeline; that of an earlier attempt is continued.
        left: returns how many trials have not ended yet.
        total: number of trials of this attempt.
        say: takes a line for the user.
        interval: seconds between two looks.
        leak_after: seconds for which a placement group may outlive its maker.
    """

    def __init__(
        self,
        folder: Location,
        left: Callable[[], int],
        total: int,
        say: Callable[[str], None],
        interval: float = INTERVAL,
        leak_after: float = LEAK_AFTER,
    ) -> None:
        self.artifacts: dict[str, str | bytes] = {}
        self._file, self._left, self._total, self.say = folder / TIMELINE, left, total, say
        self._picture = folder / "timeline.png"
        self._interval, self._leak_after = interval, leak_after
        self._before, self._rows = "", list[dict[str, Any]]()
        self._written = 0.0
        self._lost = dict[str, float]()
        self._told = set[str]()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._work, name="watch", daemon=True)

    def __enter__(self) -> Watch:
        text = (read_file(self._file) or b"").decode()
        self._before = text[: text.rfind("\n") + 1]
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join(10)  # Ray may be gone
        try:
            self._finish()
        except Exception as error:  # what was trained is worth more than its pictures
            self.say(f"timeline of the sweep: {type(error).__name__}: {error}")

    # ---- in the thread

    def _work(self) -> None:
        ending = False
        while True:
            with contextlib.suppress(Exception):  # Ray or the storage does not answer: the next look may
                self._look(time.time())
            if ending:
                return
            ending = self._stop.wait(self._interval)

    def _look(self, now: float) -> None:
        groups = placement_groups()
        self._end_leaks([group for group in groups if group.lost], now)
        row = {**sample(groups, self._left(), self._total), "leaked": sorted(self._told)}
        last = self._rows[-1] if self._rows else {}
        if row != {name: value for name, value in last.items() if name != "time"}:
            self._rows.append({"time": round(now, 2), **row})
            if now - self._written > WRITE_EVERY:
                self._write(now)

    def _end_leaks(self, lost: Iterable[Group], now: float) -> None:
        """Remove groups that nobody can use any more: else the next trial waits for them for ever.

        Ray Train's controller leaves its group behind if it is killed together with Ray's own cleaner.
        """
        since = {group.id: self._lost.get(group.id, now) for group in lost}
        for group in lost:
            if now - since[group.id] >= self._leak_after and group.id not in self._told:
                if not group.detached:
                    remove_placement_group(PlacementGroup(PlacementGroupID.from_hex(group.id)))
                self._told.add(group.id)
                self.say(
                    f"placement group {group.id} belongs to no running trial and keeps {group.holds}: "
                    + ("it outlives the job that made it" if group.detached else "removed")
                )
        self._lost = since

    def _write(self, now: float) -> None:
        replace_file(self._file, self._text().encode())
        self._written = now

    def _text(self) -> str:
        return self._before + "".join(json.dumps(row) + "\n" for row in self._rows)

    # ---- at the end

    def _finish(self) -> None:
        if not self._rows:
            return
        self._rows.append({**self._rows[-1], "time": round(time.time(), 2)})
        self._write(time.time())
        self.artifacts[TIMELINE] = self._text()
        if any(set(row["nodes"]) - {"head"} for row in self._rows):  # one machine's timeline is a line
            self._picture.write_bytes(picture := drawn(self._rows))
            self.artifacts["timeline.png"] = picture


def sample(groups: Sequence[Group], left: int, total: int) -> dict[str, Any]:
    """Return living nodes by type, trials that train, wait and have ended, and this job's placement groups."""
    training = min(left, sum(group.ours and group.placed and group.of_workers for group in groups))
    return {
        "nodes": dict(sorted(Counter(_type(n) for n in ray.nodes() if n["Alive"]).items())),
        "training": training,
        "waiting": left - training,
        "ended": total - left,
        "groups": sum(group.ours for group in groups),
    }


def _type(node: Mapping[str, Any]) -> str:
    if HEAD in node["Resources"]:
        return "head"
    return str(node["Labels"].get("ray.io/node-group", "node"))


def placement_groups() -> list[Group]:
    """Return the placement groups of all jobs, without removed ones."""
    job = ray.get_runtime_context().get_job_id()
    return [_group(data, job) for data in ray_internals.placement_group_table()]


def _group(data: Any, job: str) -> Group:
    """Read a record: a group outlives the actor that made it until its job ends, a detached one the job, too."""
    by_driver = not data.creator_actor_id.strip(b"\xff")  # no actor made it
    ours = data.creator_job_id.hex() == job
    nobody = data.creator_job_dead and (by_driver or data.creator_actor_dead)
    return Group(
        id=data.placement_group_id.hex(),
        bundles=tuple(dict(bundle.unit_resources) for bundle in data.bundles),
        placed=data.state == data.CREATED,
        lost=nobody or (ours and not by_driver and data.creator_actor_dead),
        ours=ours,
        detached=data.is_detached,
    )


def drawn(rows: Sequence[Mapping[str, Any]]) -> bytes:
    """Return the picture of a timeline, as PNG."""
    from raymoe.analysis.figures import DPI, timeline

    stream = io.BytesIO()
    timeline(rows).savefig(stream, dpi=DPI)
    return stream.getvalue()
