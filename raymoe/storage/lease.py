"""Leases: of several sweeps with the same run, one trains it and the others wait for its result.

The holder renews `lease.json` every few seconds. A lease ends when it is released, when its holder is a dead
process on this machine, or when nobody has renewed it for a minute; then a waiting process takes it and resumes
from the last checkpoint.
"""

from __future__ import annotations

import errno
import json
import os
import socket
import sys
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import cache
from pathlib import Path
from typing import Any

from raymoe.storage.location import Location, Remote, padded, read_file, replace_file

FILE = "lease.json"
RENEWED_EVERY = 10.0
STALE_AFTER = 60.0
"""Seconds without renewal after which a watched lease has ended."""
SURELY_STALE_AFTER = 600.0
"""Seconds, more than any two machines' clocks differ: a lease renewed longer ago has ended without watching it."""
POLL = 1.0
NO_LINKS = (errno.EPERM, errno.ENOTSUP, errno.ENOSYS, errno.EMLINK)
"""Errors of file systems without hard links."""
SETTLE = 2.0
"""Seconds in which two processes that take the same lease on an object store notice each other."""


@contextmanager
def held(folder: Location, done: Callable[[], bool], say: Callable[[str], None]) -> Iterator[str | None]:
    """Hold the lease in `folder` within the block and yield its id; waits for another holder, saying so once.

    Yields None, without the lease, once `done()` is true: the holder waited for has left nothing to do.
    """
    me = {"host": _host(), "pid": os.getpid(), "started": _started(os.getpid()), "id": uuid.uuid4().hex}
    if not _acquired(folder / FILE, me, done, say):
        yield None
        return
    stop = threading.Event()
    thread = threading.Thread(target=_renew, args=(folder / FILE, me, stop), name="lease", daemon=True)
    thread.start()
    try:
        yield str(me["id"])
    finally:
        stop.set()
        thread.join()
        _give_up(folder / FILE, me)


def holder(folder: Location) -> str | None:
    """Return who holds the lease in `folder`, for people to read; None if nobody seems to."""
    lease = _read(folder / FILE)
    if lease is None or _is_over(lease) or time.time() - lease["time"] > STALE_AFTER:
        return None
    return _name(lease)


def _acquired(
    file: Location, me: dict[str, Any], done: Callable[[], bool], say: Callable[[str], None]
) -> bool:
    seen: dict[str, Any] | None = None
    since, waited = time.monotonic(), False
    while True:
        lease = _read(file)
        if lease != seen:
            seen, since = lease, time.monotonic()
        if waited and done():
            return False
        if lease is None or _is_over(lease) or time.monotonic() - since > STALE_AFTER:
            if _take(file, lease, me):
                return True
        elif not waited:
            say(f"waiting: {_name(lease)} is training it")
            waited = True
        time.sleep(POLL)


def _take(file: Location, over: dict[str, Any] | None, me: dict[str, Any]) -> bool:
    """Try to become the holder; returns False if another process was faster."""
    if isinstance(file, Remote):
        replace_file(file, _signed(me))
        time.sleep(SETTLE)
        return bool((_read(file) or {}).get("id") == me["id"])
    file.parent.mkdir(parents=True, exist_ok=True)
    if over is not None:
        _set_aside(file, over)
    fresh = file.with_name(f".{FILE}.{me['id']}")
    try:
        fresh.write_bytes(_signed(me))
        os.link(fresh, file)  # fails if the file exists: only one process can win
    except FileExistsError:
        return False
    except OSError as error:
        if error.errno not in NO_LINKS:
            raise
        return _created(file, _signed(me))
    finally:
        fresh.unlink(missing_ok=True)
    return True


def _created(file: Path, content: bytes) -> bool:
    try:
        with file.open("xb") as stream:
            stream.write(content)
    except FileExistsError:
        return False
    return True


def _set_aside(file: Path, over: dict[str, Any]) -> None:
    """Remove the ended lease `over`, but not one taken since it was read."""
    aside = file.with_name(f".{FILE}.{uuid.uuid4().hex}")
    with suppress(FileNotFoundError):
        file.rename(aside)
        if (_read(aside) or over).get("id") != over.get("id"):
            try:
                os.link(aside, file)
            except FileExistsError:
                pass
            except OSError as error:
                if error.errno not in NO_LINKS:
                    raise
                _created(file, aside.read_bytes())
        aside.unlink()


def _renew(file: Location, me: dict[str, Any], stop: threading.Event) -> None:
    while not stop.wait(RENEWED_EVERY):
        try:
            now = _read(file)
            if now is not None and now["id"] != me["id"]:
                print(f"{file}: taken over by {_name(now)}", file=sys.stderr)
                return
            replace_file(file, _signed(me))
        except OSError:
            continue  # the storage does not answer: retry until others may consider us dead


def _give_up(file: Location, me: dict[str, Any]) -> None:
    with suppress(OSError):
        if (_read(file) or {}).get("id") == me["id"]:
            file.unlink(missing_ok=True)


def is_held_by(folder: Location, lease_id: str) -> bool:
    """True if nobody else has taken the lease in `folder` that was held under `lease_id`."""
    lease = _read(folder / FILE)
    return lease is None or lease["id"] == lease_id


def _read(file: Location) -> dict[str, Any] | None:
    """Read the lease in `file`, None if there is none; a damaged one counts as nobody's, long ended."""
    text = read_file(file)
    if text is None:
        return None
    nobody = {"id": "", "host": "", "pid": 0, "time": 0.0}
    try:
        lease = json.loads(text)
    except ValueError:
        return nobody
    return lease if isinstance(lease, dict) and nobody.keys() <= lease.keys() else nobody


def _signed(me: dict[str, Any]) -> bytes:
    return padded(json.dumps({**me, "time": time.time()})).encode()


def _name(lease: dict[str, Any]) -> str:
    return f"process {lease['pid']} on {str(lease['host']).split('/')[0]}"


def _is_over(lease: dict[str, Any]) -> bool:
    """True if the lease is provably dead."""
    if lease["host"] == _host() and _started(lease["pid"]) != lease.get("started"):
        return True
    return bool(time.time() - lease["time"] > SURELY_STALE_AFTER)


@cache
def _host() -> str:
    """Identify this machine and this boot of it; a container with its own name counts as another machine."""
    boot = Path("/proc/sys/kernel/random/boot_id")
    space = Path(
        "/proc/self/ns/pid"
    )  # containers may share the machine's name, with process ids of their own
    return (
        f"{socket.gethostname()}/{boot.read_text().strip() if boot.is_file() else ''}"
        f"/{os.readlink(space) if space.exists() else ''}"
    )


def _started(pid: int) -> str | None:
    """Return when a process on this machine started, in clock ticks since boot; None if it is not running."""
    try:
        state, *fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        return None if state == "Z" else fields[18]
    except FileNotFoundError:
        pass
    except ProcessLookupError:
        return None
    if Path("/proc/self/stat").exists():
        return None
    try:  # without /proc, knowing that it runs has to do
        os.kill(pid, 0)
    except ProcessLookupError:
        return None
    except PermissionError:
        return "runs"
    return "runs"
