"""Locations: folders, or addresses on an object store (S3, GCS), and functions that work on either.

A *location* is a `Path`, or a `Remote` with the subset of pathlib's methods that raymoe uses. Code that reads or
writes files takes any location and asks for a folder:

    with writing(out) as folder: ...                    # `out` itself, or a temporary folder that is uploaded
    model = from_pretrained(local(location))            # the folder itself, or this node's copy of it

Objects are written whole or not at all. Local copies are downloaded once per node, into $RAYMOE_CACHE
(~/.cache/raymoe), so what `local` is asked for must not change afterwards.
"""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import socket
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from fnmatch import fnmatch
from functools import cache
from pathlib import Path
from typing import Any, TypeVar

from raymoe.schema import InputError

SCHEMES = ("s3", "gs")
ATTEMPTS = 7
"""Attempts per S3 request, with doubling pauses: outages of up to 20 s go unnoticed."""
READS = 3
PADDED = 2048
CHUNK = 64 * 1024 * 1024

Result = TypeVar("Result")


class StorageError(OSError):
    """An object store that refuses or does not answer, after retries. The message is one line."""


@dataclass(frozen=True)
class Remote:
    """A prefix on an object store. Cheap to create and to pickle: it connects on first use in each process."""

    base: str
    """`s3://bucket/prefix`"""
    query: str = ""
    """`endpoint_override=host:port&scheme=http`"""

    def __str__(self) -> str:
        return f"{self.base}?{self.query}" if self.query else self.base

    def __truediv__(self, below: str) -> Remote:
        return Remote(f"{self.base}/{below}", self.query)

    @property
    def name(self) -> str:
        """Last component of the address."""
        return self.base.rpartition("/")[2]

    @property
    def suffix(self) -> str:
        """`.png` of `a.png`."""
        return Path(self.name).suffix

    @property
    def parent(self) -> Remote:
        """Address without its last component."""
        return Remote(self.base.rpartition("/")[0], self.query)

    @property
    def path(self) -> str:
        """`bucket/prefix`, as `filesystem` expects it."""
        return self.base.partition("://")[2]

    @property
    def filesystem(self) -> Any:
        """pyarrow's file system for the bucket."""
        return _filesystem("/".join(self.base.split("/")[:3]), self.query)

    def is_file(self) -> bool:
        """True if there is an object of this name."""
        return bool(self._info().is_file)

    def exists(self) -> bool:
        """True if there is an object of this name, or any below it."""
        return bool(self._info().type)

    def modified(self) -> tuple[float, int]:
        """Return modification time (seconds since 1970) and size; zeros if the object is missing."""
        info = self._info()
        return (info.mtime.timestamp(), info.size) if info.is_file else (0.0, 0)

    def read_bytes(self) -> bytes:
        """Read the object; raises FileNotFoundError if it is missing.

        pyarrow asks for the size first, so an object replaced in between by a longer or shorter one is read again,
        a few times. Objects with several writers should be `padded`.
        """

        def read() -> bytes:
            with self.filesystem.open_input_stream(self.path) as stream:
                return stream.read()  # type: ignore[no-any-return]

        for _ in range(READS):
            content = self._tried(read)
            if self._info().size == len(content):
                break
        return content

    def read_text(self) -> str:
        """Read the object as UTF-8."""
        return self.read_bytes().decode()

    def write_bytes(self, content: bytes) -> None:
        """Write the object, all or nothing; a later writer replaces an earlier one."""

        def write() -> None:
            with self.filesystem.open_output_stream(self.path) as stream:
                stream.write(content)

        self._tried(write)

    def write_text(self, content: str) -> None:
        """Write the object as UTF-8."""
        self.write_bytes(content.encode())

    def touch(self) -> None:
        """Create an empty object."""
        self.write_bytes(b"")

    def unlink(self, missing_ok: bool = False) -> None:
        """Remove the object."""
        try:
            self._tried(lambda: self.filesystem.delete_file(self.path))
        except FileNotFoundError:
            if not missing_ok:
                raise

    def glob(self, pattern: str) -> list[Remote]:
        """Return what is directly below and matches, sorted; empty if the address is missing."""
        return sorted(
            (self / i.base_name for i in self.objects() if fnmatch(i.base_name, pattern)),
            key=lambda r: r.base,
        )

    def objects(self, recursive: bool = False) -> list[Any]:
        """Return pyarrow's descriptions of what is below."""
        from pyarrow.fs import FileSelector

        selector = FileSelector(self.path, allow_not_found=True, recursive=recursive)
        return self._tried(lambda: self.filesystem.get_file_info(selector))

    def remove_all(self) -> None:
        """Remove everything below; does nothing if the address is missing."""
        try:
            self._tried(lambda: self.filesystem.delete_dir(self.path))
        except FileNotFoundError:
            return

    def upload(self, folder: Path) -> None:
        """Copy the content of the local `folder` below this address; complete only if it returns."""
        from pyarrow.fs import copy_files

        # uploads on several threads may hang (arrow#32372)
        options = {"chunk_size": CHUNK, "use_threads": False}
        target = self.filesystem
        self._tried(lambda: copy_files(str(folder), self.path, destination_filesystem=target, **options))

    def download(self, target: Path) -> None:
        """Copy the object, or everything below this address, to `target`.

        Raises:
            FileNotFoundError: nothing is there.
        """
        from pyarrow.fs import FileType, copy_files

        source, kind = self.filesystem, self._info().type
        if kind == FileType.NotFound:
            raise FileNotFoundError(f"{self}: not there")
        if kind == FileType.Directory:
            target.mkdir(parents=True)
        self._tried(lambda: copy_files(self.path, str(target), source_filesystem=source, chunk_size=CHUNK))

    def _info(self) -> Any:
        return self._tried(lambda: self.filesystem.get_file_info(self.path))

    def _tried(self, work: Callable[[], Result]) -> Result:
        """Return the result of `work`, whose requests pyarrow retries; raises its failure as one line."""
        try:
            return work()
        except FileNotFoundError:
            raise
        except (OSError, ValueError) as error:  # pyarrow's ArrowInvalid is a ValueError
            lines = str(error).splitlines() or [type(error).__name__]
            raise StorageError(f"{self}: {lines[0].partition(' (Request ID')[0]}") from None


Location = Path | Remote


@cache
def _filesystem(bucket: str, query: str) -> Any:
    from pyarrow.fs import AwsStandardS3RetryStrategy, FileSystem, S3FileSystem

    found, _ = FileSystem.from_uri(f"{bucket}?{query}" if query else bucket)
    if not isinstance(found, S3FileSystem):
        return found

    class Patient(S3FileSystem):  # type: ignore[misc]
        def __reduce__(self) -> Any:  # pyarrow's own drops the retry strategy
            return _filesystem, (bucket, query)

    _, (options,) = found.__reduce__()[:2]  # everything from the address and the environment
    more = {"retry_strategy": AwsStandardS3RetryStrategy(max_attempts=ATTEMPTS), "connect_timeout": 5.0}
    if "allow_delayed_open" in options:
        more["allow_delayed_open"] = True  # a small file is one request instead of three
    return Patient(**{**options, **more})


def location(text: str | Path | Remote) -> Location:
    """Return the location that `text` names: a folder, made absolute, or an address.

    Raises:
        InputError: an address that raymoe can't use, or one with credentials in it.
    """
    if isinstance(text, Remote):
        return text
    scheme, separator, rest = str(text).partition("://")
    if not separator:
        return Path(text).expanduser().absolute()
    if scheme == "file" and rest.startswith("/"):
        return Path(rest)
    address, _, query = rest.partition("?")
    address = address.strip("/")
    if scheme not in SCHEMES or not address:
        known = ", ".join(f"{s}://bucket/prefix" for s in SCHEMES)
        raise InputError(f"expected a folder, {known} (got {str(text)!r})")
    if "@" in address or ":" in address.split("/")[0]:  # a secret key may contain slashes
        raise InputError(
            f"credentials belong in the environment (AWS_ACCESS_KEY_ID, ...), not in {scheme}://..."
        )
    return Remote(f"{scheme}://{address}", query)


def check_reachable(root: Remote) -> None:
    """Raise InputError if nothing answers at `root`, access is denied, or the bucket does not exist."""
    bucket = Remote("/".join(root.base.split("/")[:3]), root.query)
    try:
        found = root.exists() or bucket.exists()
    except StorageError as error:
        if root == bucket or "ACCESS_DENIED" not in str(error):
            raise InputError(str(error)) from None
        found = True  # listing may be restricted: writing will tell
    if not found:
        raise InputError(f"{root}: there is no bucket {bucket.path!r}")


def ray_storage(where: Location) -> dict[str, Any]:
    """Return the arguments that give a location to Ray's RunConfig."""
    if isinstance(where, Path):
        return {"storage_path": str(where)}
    return {"storage_path": where.path, "storage_filesystem": where.filesystem}


# ---- on any location


def cache_folder() -> Path:
    """Return the folder of this node's copies of remote locations: $RAYMOE_CACHE or ~/.cache/raymoe."""
    return Path(os.environ.get("RAYMOE_CACHE") or "~/.cache/raymoe").expanduser().absolute()


def local(where: Location) -> Path:
    """Return `where` as a local path: itself, or this node's copy, downloaded if missing.

    Processes of a node that ask at the same time download once.
    """
    if isinstance(where, Path):
        return where
    from filelock import FileLock

    digest = hashlib.sha256(str(where).encode()).hexdigest()[:20]
    copy = cache_folder() / digest / where.name
    if copy.exists():
        return copy
    copy.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(copy.parent / ".lock"):
        if not copy.exists():
            partial = copy.parent / ".partial"
            _remove(partial)  # left by a killed process
            try:
                where.download(partial)
                partial.rename(copy)
            finally:
                _remove(partial)
    return copy


@contextmanager
def writing(where: Location) -> Iterator[Path]:
    """Yield a folder to write to: `where` itself, or a temporary folder that is uploaded to it at the end.

    Nothing is uploaded if the block fails.
    """
    if isinstance(where, Path):
        where.mkdir(parents=True, exist_ok=True)
        yield where
        return
    with scratch() as folder:
        yield folder
        where.upload(folder)


@contextmanager
def scratch() -> Iterator[Path]:
    """Yield a temporary folder next to this node's copies, where models and checkpoints have room."""
    folder = cache_folder() / "scratch"
    for left in folder.glob(f"{HOST}-*"):
        if not runs(int(left.name.split("-")[1])):
            shutil.rmtree(left, ignore_errors=True)
    mine = folder / f"{HOST}-{os.getpid()}-{uuid.uuid4().hex[:6]}"
    mine.mkdir(parents=True)
    try:
        yield mine
    finally:
        shutil.rmtree(mine, ignore_errors=True)


def delete(where: Location) -> None:
    """Remove `where` and everything below, as far as possible."""
    if isinstance(where, Path):
        shutil.rmtree(where, ignore_errors=True)
        return
    try:
        where.remove_all()
    except StorageError:
        return  # whoever finds old left-overs removes them


def replace_file(file: Location, content: bytes) -> None:
    """Write a small file atomically: readers see all of the old or all of the new content."""
    if isinstance(file, Remote):
        file.write_bytes(content)
        return
    file.parent.mkdir(parents=True, exist_ok=True)
    fresh = file.with_name(f".{file.name}.{os.getpid()}.{time.monotonic_ns()}")
    try:
        fresh.write_bytes(content)
        fresh.replace(file)
    finally:
        fresh.unlink(missing_ok=True)


def padded(text: str) -> str:
    """Pad `text` with trailing spaces, which JSON allows, so that all versions of a small file are equally long."""
    return text.ljust(-(-len(text) // PADDED) * PADDED)


def read_file(file: Location) -> bytes | None:
    """Return the content of a small file; None if it is missing."""
    try:
        return file.read_bytes()
    except (FileNotFoundError, NotADirectoryError, IsADirectoryError):
        return None


HOST = re.sub(r"[^A-Za-z0-9]", "", socket.gethostname())


def runs(pid: int) -> bool:
    """True if the process is running on this machine."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)
