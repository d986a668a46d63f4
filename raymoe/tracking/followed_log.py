"""A metric log as its reader sees it: a file or an object that grows, and may be replaced by another one."""

from __future__ import annotations

import time
from dataclasses import dataclass

from raymoe.storage.location import Location, Remote, read_file
from raymoe.tracking.metric_log import REMOTE_PAUSE


@dataclass(frozen=True)
class Fresh:
    """Whole lines that a log has got since lines were last taken from it."""

    lines: list[bytes]
    offset: int
    """Position of the first one."""
    version: tuple[float, int] = (0.0, 0)


@dataclass
class FollowedLog:
    """A metric log that is read as it grows. Lines count as read once they are taken."""

    file: Location | None
    offset: int = 0
    tail: bytes = b""
    """The line that ends at `offset`; if another one does, the file was replaced."""
    looked: float = 0.0
    """Time of the last look at an object."""
    version: tuple[float, int] = (0.0, 0)
    """Version of the object that was read last."""

    def fresh(self, last: bool = False) -> Fresh | None:
        """Return the lines since the last ones taken; None if there is no reason to look.

        An object is looked at every few seconds, with `last` at once.
        """
        if isinstance(self.file, Remote):
            return self._fresh_of_object(self.file, last)
        if self.file is None or not self.file.is_file():
            return None
        with self.file.open("rb") as stream:
            start = max(0, self.offset - len(self.tail))
            stream.seek(start)
            offset = self.offset if stream.read(self.offset - start) == self.tail else 0
            stream.seek(offset)
            return Fresh(_whole_lines(stream.read()), offset)

    def _fresh_of_object(self, file: Remote, last: bool) -> Fresh | None:
        if not last and time.monotonic() - self.looked < REMOTE_PAUSE:
            return None
        self.looked = time.monotonic()
        if (version := file.modified()) == self.version and not last:
            return None
        content = read_file(file) or b""
        start = max(0, self.offset - len(self.tail))
        offset = self.offset if content[start : self.offset] == self.tail else 0
        return Fresh(_whole_lines(content[offset:]), offset, version)

    def take(self, fresh: Fresh) -> None:
        """Count these lines as read."""
        self.offset = fresh.offset + sum(map(len, fresh.lines))
        if fresh.lines:
            self.tail = fresh.lines[-1]
        elif not fresh.offset:
            self.tail = b""
        self.version = fresh.version


def _whole_lines(content: bytes) -> list[bytes]:
    return [line for line in content.splitlines(keepends=True) if line.endswith(b"\n")]
