"""Rows: read the rows of JSONL and parquet files as plain Python objects.

A table is one file, or one split of a data set on the hub (raymoe.data.hub). Its rows may still be unusable:
raymoe.data.columns turns them into instructions.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from raymoe.config import Source
from raymoe.schema import InputError

SUFFIXES = (".jsonl", ".parquet")
SPLIT_NAMES = {
    "train": "train",
    "dev": "dev",
    "validation": "validation",
    "valid": "validation",
    "val": "validation",
    "test": "test",
}
SHARD = re.compile(r"-\d+-of-\d+$")
READ_ROWS = 8192
"""Rows of a parquet file or of a Hugging Face data set held in memory as Python objects."""
HALF_PAIRS = re.compile(rb"\\u[dD][89a-fA-F]")
"""JSON escapes that encode half of a surrogate pair."""


class BadRow(Exception):
    """A row that can't be used, and why."""


class Rows(Protocol):
    """The rows of a table, wherever they are."""

    def count(self) -> int:
        """Return the number of rows."""

    def read(self, chosen: NDArray[np.int64] | None) -> Iterator[tuple[int, Any]]:
        """Yield (line, row or BadRow) for all rows, or for the `chosen` ones (ascending, from 0).

        Lines count from 1.
        """

    def lineage(self) -> dict[str, Any]:
        """Return what identifies the content."""


@dataclass(frozen=True)
class Table:
    """One file, or one split on the hub."""

    name: str
    domain: str
    split: str
    source: Source
    rows: Rows
    chosen: NDArray[np.int64] | None = None
    """Rows to read, ascending from 0; None: all."""


def file_table(path: Path, source: Source) -> Table:
    """Return the table of one file; its name tells domain and split."""
    domain, split = _domain_and_split(path.stem)
    rows = _JsonLines(path) if path.suffix == ".jsonl" else _Parquet(path)
    return Table(str(path), domain, split, source, rows)


def _domain_and_split(stem: str) -> tuple[str, str]:
    """Parse `math.dev` as (math, dev), `math` as (math, train), `train-00000-of-00001` as (all, train)."""
    *domain, last = SHARD.sub("", stem).split(".")
    if last in SPLIT_NAMES:
        return ".".join(domain) or "all", SPLIT_NAMES[last]
    return SHARD.sub("", stem), "train"


@dataclass(frozen=True)
class _JsonLines:
    """The rows of a JSONL file; blank lines are skipped."""

    path: Path

    def count(self) -> int:
        """Return the number of rows."""
        with self.path.open("rb") as file:
            return sum(1 for raw in file if raw.strip())

    def read(self, chosen: NDArray[np.int64] | None) -> Iterator[tuple[int, Any]]:
        """Yield lines and their rows."""
        wanted = None if chosen is None else set(chosen.tolist())
        with self.path.open("rb") as file:
            rows = ((line, raw) for line, raw in enumerate(file, start=1) if raw.strip())
            for number, (line, raw) in enumerate(rows):
                if wanted is None or number in wanted:
                    yield line, _parsed(raw)

    def lineage(self) -> dict[str, Any]:
        """Return path, size and checksum."""
        return _file_lineage(self.path)


def _parsed(raw: bytes) -> Any:
    try:
        row = json.loads(raw.decode("utf-8-sig"))
        if HALF_PAIRS.search(raw):
            json.dumps(row, ensure_ascii=False).encode()
    except UnicodeDecodeError:
        return BadRow("not UTF-8")
    except UnicodeEncodeError:
        return BadRow("not valid Unicode: half of a surrogate pair")
    except RecursionError:
        return BadRow("nested too deeply")
    except json.JSONDecodeError as error:
        return BadRow(f"not valid JSON: {error.msg} at column {error.colno}")
    except ValueError as error:  # a number with thousands of digits
        return BadRow(f"not valid JSON: {error}")
    return row


@dataclass(frozen=True)
class _Parquet:
    """The rows of a parquet file."""

    path: Path

    def count(self) -> int:
        """Return the number of rows."""
        with self._readable() as file:
            return int(file.metadata.num_rows)

    def read(self, chosen: NDArray[np.int64] | None) -> Iterator[tuple[int, Any]]:
        """Yield lines and their rows."""
        with self._readable() as file:
            yield from batch_rows(file.iter_batches(batch_size=READ_ROWS), chosen)

    def lineage(self) -> dict[str, Any]:
        """Return path, size and checksum."""
        return _file_lineage(self.path)

    @contextmanager
    def _readable(self) -> Iterator[Any]:
        try:
            with pq.ParquetFile(self.path) as file:
                yield file
        except (pa.ArrowInvalid, OSError) as error:
            reason = " ".join(str(error).split())
            raise InputError(f"{self.path}: not a readable parquet file: {reason}") from None


def batch_rows(batches: Iterable[Any], chosen: NDArray[np.int64] | None) -> Iterator[tuple[int, Any]]:
    """Yield lines and rows of consecutive Arrow batches, or only the `chosen` rows."""
    start = 0
    for batch in batches:
        end = start + batch.num_rows
        if chosen is None:
            yield from enumerate(batch.to_pylist(), start + 1)
        else:
            some = chosen[slice(*np.searchsorted(chosen, [start, end]))]
            yield from zip((some + 1).tolist(), batch.take(pa.array(some - start)).to_pylist(), strict=True)
        start = end


def _file_lineage(path: Path) -> dict[str, Any]:
    checksum = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(2**20):
            checksum.update(block)
    return {"path": str(path), "bytes": path.stat().st_size, "sha256": checksum.hexdigest()}
