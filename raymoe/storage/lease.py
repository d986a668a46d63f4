"""A lease on a run's training: of several sweeps with the same run one trains it, the others wait for its result.

The holder writes `lease.json` anew every few seconds. A lease is over when it is given up, when its holder is a
dead process of this machine, or when nothing has renewed it for a minute: then whoever waits takes it and goes on
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
"""Seconds without a sign of life."""
SURELY_STALE_AFTER = 600.0
"""Seconds by which no two machines' clocks differ: a lease renewed so long ago is not watched for a minute."""
POLL = 1.0
NO_LINKS = (errno.EPERM, errno.ENOTSUP, errno.ENOSYS, errno.EMLINK)
"""What file systems without hard links answer."""
SETTLE = 2.0
"""Seconds in which two that take a lease at an address at the same moment see each other."""


@contextmanager
def held(folder: Location, done: Callable[[], bool], say: Callable[[str], None]) -> Iterator[str | None]:
    """Hold the lease in `folder` within the block, under the id that it gives; waits for another's, saying so once.

    None, without the lease, as soon as `done()` says that the one waited for left nothing to do.
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
    """Who holds the lease in `folder`, as a person is told; None if nobody does as far as can be seen at once."""
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
            say(f"waits: {_name(lease)} is training it")
            waited = True
        time.sleep(POLL)


def _take(file: Location, over: dict[str, Any] | None, me: dict[str, Any]) -> bool:
    """Try to become the holder; False if somebody else was faster."""
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
        os.link(fresh, file)  # fails where there is one: of two, one gets it
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
    """Remove the lease `over`, and not one that somebody took since it was looked at."""
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
            continue  # a storage that does not answer: once more, until others have reason to think us dead


def _give_up(file: Location, me: dict[str, Any]) -> None:
    with suppress(OSError):
        if (_read(file) or {}).get("id") == me["id"]:
            file.unlink(missing_ok=True)


def is_held_by(folder: Location, identity: str) -> bool:
    """Whether nobody else has taken the lease in `folder` from the holder `identity`."""
    lease = _read(folder / FILE)
    return lease is None or lease["id"] == identity


def _read(file: Location) -> dict[str, Any] | None:
    """The lease in `file`, None if there is none; a damaged one is nobody's, of long ago."""
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
    """Whether it is to be seen at once that nobody holds it any more."""
    if lease["host"] == _host() and _started(lease["pid"]) != lease.get("started"):
        return True
    return bool(time.time() - lease["time"] > SURELY_STALE_AFTER)


@cache
def _host() -> str:
    """This machine, and this start of it; a container with a name of its own is another."""
    boot = Path("/proc/sys/kernel/random/boot_id")
    space = Path(
        "/proc/self/ns/pid"
    )  # containers on one machine may have its name, and process ids of their own
    return (
        f"{socket.gethostname()}/{boot.read_text().strip() if boot.is_file() else ''}"
        f"/{os.readlink(space) if space.exists() else ''}"
    )


def _started(pid: int) -> str | None:
    """When a process of this machine started, in ticks of the machine; None if it does not run."""
    try:
        state, *fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        return None if state == "Z" else fields[18]
    except FileNotFoundError:
        pass
    except ProcessLookupError:
        return None
    if Path("/proc/self/stat").exists():
        return None
    try:  # no /proc: that it runs has to do
        os.kill(pid, 0)
    except ProcessLookupError:
        return None
    except PermissionError:
        return "runs"
    return "runs"
