"""The store: one folder per stage output, named `<stage>-<hash of its identity>`, written once.

On a disk, a stage writes into a hidden partial folder; its marker `stage.json` is written last, then the folder is
renamed into place. On an object store nothing can be renamed: every writer has its own folder below the stage's,
and the marker, written last, names one of them. Either way a killed stage leaves nothing that looks finished, a
finished stage is never made again, and of two writers one wins and both can go on.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import platform
import shutil
import time
import uuid
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

from raymoe.schema import InputError
from raymoe.storage.location import (
    HOST,
    Location,
    Remote,
    StorageError,
    check_reachable,
    delete,
    local,
    location,
    padded,
    read_file,
    runs,
)

MARKER = "stage.json"
ABANDONED = 24 * 3600.0
"""Seconds after which unfinished output on an object store is removed."""


def digest(identity: Any) -> str:
    """Hash a JSON value to twelve hexadecimal digits, whatever the order of its keys."""
    text = json.dumps(identity, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def versions() -> dict[str, str]:
    """Return the versions of Python and of the packages that compute the stages."""
    packages = ("raymoe", "torch", "transformers", "ray", "deepspeed")
    found = {"python": platform.python_version()}
    for package in packages:
        with contextlib.suppress(metadata.PackageNotFoundError):
            found[package] = metadata.version(package)
    return found


@dataclass(frozen=True)
class Output:
    """A finished stage: its location and its marker (identity, info, seconds, versions)."""

    location: Location
    marker: Mapping[str, Any]

    def fetch(self) -> Path:
        """Return its folder on this machine, downloaded if missing."""
        return local(self.location)

    @property
    def info(self) -> Mapping[str, Any]:
        """What the stage recorded about itself: counts, tokens, measurements."""
        return self.marker["info"]  # type: ignore[no-any-return]


class Store:
    """Stage outputs below one root: a folder that every node of the cluster sees, or an address."""

    def __init__(self, root: str | Path | Remote) -> None:
        """Raise InputError if `root` is an address that can't be used or does not answer."""
        try:
            self.root = location(root)
            if isinstance(self.root, Remote):
                check_reachable(self.root)
        except InputError as error:
            raise InputError(f"execution.storage: {error}") from None

    @property
    def checkpoints(self) -> Location:
        """Location of the checkpoints of runs that are training."""
        return self.root / "checkpoints"

    def check_writable(self) -> None:
        """Raise InputError if nothing can be written below the root."""
        probe = self.root / f".probe-{uuid.uuid4().hex}"
        try:
            if isinstance(self.root, Path):
                self.root.mkdir(parents=True, exist_ok=True)
            probe.write_bytes(b"\0" * 4096)
            probe.unlink()
        except OSError as error:
            reason = error.strerror or str(error)
            raise InputError(f"execution.storage: can't write to {self.root}: {reason}") from None

    def place(self, stage: str, identity: Mapping[str, Any]) -> Location:
        """Return where the marker of `stage` made from `identity` is, or will be."""
        return self.root / f"{stage}-{digest(identity)}"

    def path(self, stage: str, identity: Mapping[str, Any]) -> Location:
        """Return where the output of `stage` made from `identity` is; on a disk, also where it will be.

        Raises:
            LookupError: on an object store, if it is not there yet.
        """
        if isinstance(place := self.place(stage, identity), Path):
            return place
        if found := self.at(place):
            return found.location
        raise LookupError(f"{place}: not in the store")

    def find(self, stage: str, identity: Mapping[str, Any]) -> Output | None:
        """Return the finished output, or None."""
        return self.at(self.place(stage, identity))

    def at(self, place: Location) -> Output | None:
        """Return the finished output whose marker is in `place`, or None."""
        text = read_file(place / MARKER)
        if text is None:
            return None
        marker = json.loads(text)
        return Output(place / marker["folder"] if "folder" in marker else place, marker)

    def make(
        self, stage: str, identity: Mapping[str, Any], build: Callable[[Any], Mapping[str, Any]]
    ) -> Output:
        """Return the finished output, made by `build` if it is not there yet.

        `build` gets an empty location to write into (a folder if the store is one) and returns the stage's info
        as JSON values.
        """
        final = self.place(stage, identity)
        if found := self.at(final):
            return found

        def described(info: Mapping[str, Any], seconds: float) -> dict[str, Any]:
            said = {"stage": stage, "identity": identity, "info": info, "seconds": seconds}
            return {**said, "versions": versions()}

        if isinstance(final, Path):
            self._make_folder(final, build, described)
        else:
            _make_remote(self, final, build, described)
        return self.at(final) or _vanished(final)

    def _make_folder(self, final: Path, build: Callable[[Any], Mapping[str, Any]], described: Any) -> None:
        self._remove_abandoned(final.name)
        partial = final.parent / f".partial-{final.name}-{HOST}-{os.getpid()}-{uuid.uuid4().hex[:6]}"
        partial.mkdir(parents=True)
        started = time.time()
        try:
            marker = described(build(partial), time.time() - started)
            (partial / MARKER).write_text(json.dumps(marker, indent=1))
            _publish(partial, final)
        finally:
            shutil.rmtree(partial, ignore_errors=True)

    def _remove_abandoned(self, name: str) -> None:
        """Remove what killed processes on this host left of the stage `name`."""
        assert isinstance(self.root, Path)
        for partial in self.root.glob(f".partial-{name}-{HOST}-*"):
            if not runs(int(partial.name.split("-")[-2])):
                shutil.rmtree(partial, ignore_errors=True)


def _publish(partial: Path, final: Path) -> None:
    try:
        partial.rename(final)
    except OSError:
        if not (final / MARKER).is_file():  # a real error, not another writer's finished output
            raise


def _make_remote(
    store: Store, final: Remote, build: Callable[[Any], Mapping[str, Any]], described: Any
) -> None:
    """Build in this writer's own folder, then write the marker that names it, unless another has done so.

    Two writers that check at the same moment both write a marker: the later one counts, and both outputs are whole.
    """
    _remove_old(final)
    mine = final / uuid.uuid4().hex[:12]
    started = time.time()
    try:
        marker = described(build(mine), time.time() - started) | {"folder": mine.name}
        text = padded(json.dumps(marker, indent=1))
        lost = store.at(final) is not None
    except BaseException:
        delete(mine)
        raise
    if lost:
        delete(mine)
    else:
        (final / MARKER).write_text(text)  # a failed write may still have arrived: keep `mine`


def _remove_old(final: Remote) -> None:
    """Remove old output below `final` of writers that never finished."""
    with contextlib.suppress(StorageError):  # not essential: the next writer tries again
        newest: dict[str, float] = {}
        for found in final.objects(recursive=True):
            below = found.path.removeprefix(final.path + "/").split("/")[0]
            if found.is_file:
                newest[below] = max(newest.get(below, 0.0), found.mtime.timestamp())
        for name, written in newest.items():
            if time.time() - written > ABANDONED:
                delete(final / name)


def _vanished(final: Location) -> Output:
    raise RuntimeError(f"{final} was removed while it was being published")
