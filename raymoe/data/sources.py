"""Sources: read instructions from files, folders and the hub, mix them, and hold some out.

    data = Data(train=[Source(name="a.jsonl"), Source(name="org/name", domain="math", max_examples=1000)])
    reading = read(data, "train", corpus=None, seed=0)

A source is a JSONL or parquet file, a folder of them or a Hugging Face id. raymoe.data.rows and raymoe.data.hub
read its rows, raymoe.data.columns turns them into instructions.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence, Set
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import numpy as np

from raymoe.config import Data, Source
from raymoe.data.columns import Instruction, Messages, instruction
from raymoe.data.hub import hub_tables
from raymoe.data.rows import SUFFIXES, BadRow, Table, file_table
from raymoe.schema import InputError

Split = Literal["train", "validation"]

HELD_OUT = ("dev", "validation", "test")
"""Splits to evaluate on, in order of preference."""
DRAW_SEED = 0
"""Seed of held-out shares and of sources' samples: runs with any seed are evaluated on the same instructions."""


@dataclass(frozen=True)
class Reading:
    """The instructions of one split, and where they came from."""

    instructions: list[Instruction]
    skipped: list[str]
    """`file:line: reason` of each skipped row (`on_bad_row: skip`)."""
    sources: list[dict[str, Any]]
    """Lineage: per file its path, split, bytes and sha256, or the hub's id, subset, revision and split."""
    held_out: int = 0
    """Training instructions dropped because their prompt is held out, the held-out share included."""


def refused(where: str, reason: str, data: Data) -> str:
    """Return `where: reason` for a skipped row; raises InputError if `data.on_bad_row` is `error`."""
    if data.on_bad_row == "error":
        raise InputError(f"{where}: {reason} (set data.on_bad_row to skip to leave such rows out)")
    return f"{where}: {reason}"


def read(data: Data, split: Split, corpus: Path | None, seed: int) -> Reading:
    """Read the instructions of `split`.

    Held out are `data.validation`, else for each source and domain its dev, else validation, else test split,
    else a share of its training rows that is the same for every `seed`. No held-out prompt is in the training
    split, whichever source it comes from.

    Args:
        data: the sources, and what to do with bad rows.
        split: `train` or `validation`.
        corpus: folder that the source `local` stands for.
        seed: seed of the sample of `data.max_examples`.

    Raises:
        InputError: a source is missing or empty, a row can't be used (`file:line: reason`), nothing of a domain
            can be held out, or nothing is left to train on.
    """
    if split == "validation" and data.validation is not None:
        return _given(data, corpus)
    mixture = [_parts(source, data, corpus) for source in data.sources("train")]
    held_out = _given(data, corpus) if data.validation is not None else _measured(mixture, data)
    return held_out if split == "validation" else _trained(mixture, held_out, data, seed)


@dataclass(frozen=True, eq=False)
class _Part:
    """The tables of one source and one domain, read on first use."""

    train: list[Table]
    held_out: list[Table]
    data: Data

    @cached_property
    def trained(self) -> Reading:
        """The instructions of its training rows."""
        return _collect(self.train, self.data)

    @cached_property
    def own(self) -> Reading:
        """The instructions of its own held-out split."""
        return _collect(self.held_out, self.data)

    def measured(self, shares: Set[Messages]) -> Reading:
        """Return its own held-out split, else its training instructions with a prompt in `shares`."""
        if self.held_out:
            return self.own
        known = self.trained
        return replace(known, instructions=[x for x in known.instructions if x.prompt in shares])


def _parts(source: Source, data: Data, corpus: Path | None) -> list[_Part]:
    """Return the training tables of `source`, cut to its `max_examples`, and its held-out ones, by domain."""
    tables = _tables(source, "data.train", corpus)
    held_out = {domain: _held_out(some) for domain, some in _by_domain(tables).items()}
    limit = source.max_examples
    if limit and data.validation is None and not all(held_out.values()):
        # draw enough for the share that will be held out, too
        limit = math.ceil(limit / (1 - data.validation_fraction))
    train = _by_domain(_drawn([t for t in tables if t.split == "train"], limit, stream=3))
    return [_Part(train.get(domain, []), some, data) for domain, some in held_out.items()]


def _given(data: Data, corpus: Path | None) -> Reading:
    """Read `data.validation`."""
    tables: list[Table] = []
    for source in data.sources("validation"):
        domains = _by_domain(_tables(source, "data.validation", corpus)).values()
        held_out = [t for some in domains for t in (_held_out(some) or some)]
        tables += _drawn(held_out, source.max_examples, stream=4)  # not the rows that training draws
    return _collect(tables, data)


def _by_domain(tables: Sequence[Table]) -> dict[str, list[Table]]:
    domains: dict[str, list[Table]] = defaultdict(list)
    for table in tables:
        domains[table.domain].append(table)
    return domains


def _held_out(tables: Sequence[Table]) -> list[Table]:
    """Return the tables of a domain's preferred held-out split, if it has one."""
    return next((found for name in HELD_OUT if (found := [t for t in tables if t.split == name])), [])


def _drawn(tables: list[Table], limit: int | None, stream: int) -> list[Table]:
    """Cut `tables` to `limit` rows drawn from all of them together; another `stream` draws other rows."""
    if limit is None:
        return tables
    ends = np.cumsum([table.rows.count() for table in tables])
    if ends[-1] <= limit:
        return tables
    generator = np.random.default_rng([DRAW_SEED, stream])
    rows = np.sort(generator.choice(ends[-1], limit, replace=False, shuffle=False))
    starts = np.concatenate([[0], ends[:-1]])
    drawn = np.split(rows, np.searchsorted(rows, ends[:-1]))
    return [
        replace(t, chosen=some - start)
        for t, some, start in zip(tables, drawn, starts, strict=True)
        if len(some)
    ]


def _measured(mixture: Sequence[Sequence[_Part]], data: Data) -> Reading:
    """Return what is held out of the training sources when there is no `data.validation`."""
    parts = [part for some in mixture for part in some]
    shares = _shares(parts, data.validation_fraction)
    return _concatenated(part.measured(shares) for part in parts)


def _shares(parts: Sequence[_Part], fraction: float) -> set[Messages]:
    """Return the prompts to hold out of the parts that have no split of their own.

    Where no part has enough prompts of a domain, the share is taken from all parts together.
    """
    shared = [part.trained.instructions for part in parts if not part.held_out]
    known = [x for some in shared for x in some]
    shares = {prompt for some in shared for prompt in _share(some, fraction)}
    own = _domains(x for part in parts for x in part.own.instructions)
    missing = _domains(known) - own - _domains(x for x in known if x.prompt in shares)
    shares.update(_share([x for x in known if x.domain in missing], fraction))
    if lost := missing - _domains(x for x in known if x.prompt in shares):
        raise InputError(
            f"data.train: domain {', '.join(sorted(lost))} has a single prompt, so none can be held out: "
            "add prompts or set data.validation"
        )
    return shares


def _domains(instructions: Iterable[Instruction]) -> set[str]:
    return {x.domain for x in instructions}


def _share(instructions: Sequence[Instruction], fraction: float) -> Iterator[Messages]:
    """Draw a `fraction` of each domain's distinct prompts: at least one, and never all."""
    prompts: dict[str, dict[Messages, None]] = defaultdict(dict)
    for x in instructions:
        prompts[x.domain][x.prompt] = None
    for distinct in prompts.values():
        known = list(distinct)
        count = min(max(1, round(fraction * len(known))), len(known) - 1)
        yield from (known[i] for i in np.random.default_rng([DRAW_SEED, 1]).permutation(len(known))[:count])


def _trained(mixture: Sequence[Sequence[_Part]], held_out: Reading, data: Data, seed: int) -> Reading:
    """Return the training instructions whose prompts are not held out."""
    prompts = {x.prompt for x in held_out.instructions}
    readings = []
    for source, parts in zip(data.sources("train"), mixture, strict=True):
        kept = _without(_concatenated(part.trained for part in parts), prompts)
        readings.append(_sampled(kept, source.max_examples, DRAW_SEED))
    whole = _concatenated(readings)
    if not whole.instructions:
        names = ", ".join(source.name for source in data.sources("train"))
        raise InputError(f"data.train: {names}: every prompt is also held out, which leaves none to train on")
    return _sampled(whole, data.max_examples, seed)


def _without(reading: Reading, prompts: Set[Messages]) -> Reading:
    """Drop, and count, the instructions whose prompt is in `prompts`."""
    kept = [x for x in reading.instructions if x.prompt not in prompts]
    return replace(reading, instructions=kept, held_out=len(reading.instructions) - len(kept))


def _sampled(reading: Reading, limit: int | None, seed: int) -> Reading:
    """Keep a seeded sample of at most `limit` instructions, in their order."""
    known = reading.instructions
    if limit is None or len(known) <= limit:
        return reading
    chosen = np.sort(np.random.default_rng([seed, 2]).permutation(len(known))[:limit])
    return replace(reading, instructions=[known[i] for i in chosen])


def _concatenated(readings: Iterable[Reading]) -> Reading:
    some = list(readings)
    return Reading(
        instructions=[x for reading in some for x in reading.instructions],
        skipped=[x for reading in some for x in reading.skipped],
        sources=[x for reading in some for x in reading.sources],
        held_out=sum(reading.held_out for reading in some),
    )


def _collect(tables: Sequence[Table], data: Data) -> Reading:
    """Read `tables`."""
    return _concatenated(_table_reading(table, data) for table in tables)


def _table_reading(table: Table, data: Data) -> Reading:
    usable: list[Instruction] = []
    skipped: list[str] = []
    for line, row in table.rows.read(table.chosen):
        try:
            usable.append(instruction(row, table, line))
        except BadRow as reason:
            skipped.append(refused(f"{table.name}:{line}", str(reason), data))
    if not usable:
        first = f", the first: {skipped[0]}" if skipped else ""
        raise InputError(f"{table.name}: no usable rows ({len(skipped)} skipped{first})")
    lineage = {**table.rows.lineage(), "split": table.split, "rows": len(usable), "skipped": len(skipped)}
    return Reading(usable, skipped, [lineage])


# From a source to its tables.


def _tables(source: Source, key: str, corpus: Path | None) -> list[Table]:
    """Return the files or splits that `source`, a value of `key`, stands for."""
    if source.name == "local":
        if corpus is None:
            raise InputError(f"{key}: the local corpus has not been made")
        return _folder(corpus, source, key)
    path = Path(source.name).expanduser()
    if path.exists() and source.subset:
        raise InputError(f"{key}: {path} has no subset {source.subset!r}: only Hugging Face ids have")
    if path.is_dir():
        return _folder(path, source, key)
    if path.is_file():
        if path.suffix not in SUFFIXES:
            raise InputError(f"{key}: {path} is neither {' nor '.join(SUFFIXES)}")
        return [replace(file_table(path, source), split="train")]
    if path.suffix in SUFFIXES or source.name.startswith((".", "/", "~")) or source.name.count("/") > 1:
        raise InputError(f"{key}: {path} does not exist")
    return hub_tables(source, key)


def _folder(folder: Path, source: Source, key: str) -> list[Table]:
    files = sorted(f for f in folder.iterdir() if f.suffix in SUFFIXES and f.is_file())
    if not files:
        raise InputError(f"{key}: no {' or '.join(SUFFIXES)} file in {folder}")
    tables = [file_table(file, source) for file in files]
    trained = {t.domain for t in tables if t.split == "train"}
    if key == "data.train" and (lone := {t.domain for t in tables} - trained):
        raise InputError(f"{key}: {folder} has no training file for {', '.join(sorted(lone))}")
    return tables
