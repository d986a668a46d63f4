"""Sources: read instructions from wherever they are, whatever their columns are called.

    data = Data(train=[Source(name="a.jsonl"), Source(name="org/name", domain="math", max_examples=1000)])
    reading = read(data, "train", corpus=None, seed=0)

A source is a JSONL or parquet file, a folder of them or a Hugging Face id. A row is a conversation
(`messages`, or ShareGPT's `conversations`), whose last assistant message is the completion, or a pair of
columns: those that the source names, else one of `PAIRS`. `id`, `domain`, `task` and a system prompt are
optional.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Set
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, NamedTuple, Protocol

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from raymoe.config import Data, Source
from raymoe.schema import InputError

Split = Literal["train", "validation"]
Messages = tuple[tuple[str, str], ...]

SUFFIXES = (".jsonl", ".parquet")
SPLIT_NAMES = {
    "train": "train",
    "dev": "dev",
    "validation": "validation",
    "valid": "validation",
    "val": "validation",
    "test": "test",
}
HELD_OUT = ("dev", "validation", "test")
"""Splits to measure with, the preferred one first."""
SHARD = re.compile(r"-\d+-of-\d+$")
READ_ROWS = 8192
"""Rows of a parquet file or of a Hugging Face data set that are in memory as Python objects."""
DRAW_SEED = 0
"""Of the held-out shares and of sources' samples: runs of other seeds are measured on the same examples."""
HALF_PAIRS = re.compile(rb"\\u[dD][89a-fA-F]")
"""Escapes of JSON that stand for half of a character."""
HUB_SECONDS = 10.0
"""How long the Hugging Face Hub may take to say that it is there."""


class Pair(NamedTuple):
    """Columns of a prompt and of its completion, as they are called in the wild."""

    prompt: str
    completion: str
    more: tuple[str, ...] = ()
    """Columns that go on with the prompt where a row has them."""
    unless: tuple[str, ...] = ()
    """Columns beside which the prompt is no whole one: such rows are not guessed at."""


PAIRS = (
    Pair("prompt", "completion"),
    Pair("instruction", "output", more=("input",)),  # Alpaca
    Pair("instruction", "response", more=("context", "input")),  # Dolly, Evol-Instruct
    Pair("question", "response", unless=("context",)),  # OpenOrca
    Pair("question", "answer", unless=("context", "choices", "options")),  # GSM8K
    Pair("query", "response"),  # MetaMathQA
    Pair("problem", "solution"),  # OSS-Instruct
)
SYSTEM = ("system", "system_prompt")
"""Columns that hold a system prompt."""
SPEAKERS = {"system": "system", "human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant"}
"""Roles of ShareGPT's `from`."""


@dataclass(frozen=True)
class Instruction:
    """One example: messages (role, content) to answer, and the answer to learn."""

    id: str
    domain: str
    task: str
    prompt: Messages
    completion: str
    source: str
    """`file:line`, for messages about it."""


@dataclass(frozen=True)
class Reading:
    """What was read."""

    instructions: list[Instruction]
    skipped: list[str]
    """`file:line: reason` of the rows left out (`on_bad_row: skip`)."""
    sources: list[dict[str, Any]]
    """Lineage: per file its path, split, bytes and sha256, or the hub's id, subset, revision and split."""
    held_out: int = 0
    """Training rows left out because a held-out example has their prompt, a share that is held out included."""


class BadRow(Exception):
    """A row that can't be used, and why."""


def refused(where: str, reason: str, data: Data) -> str:
    """`where: reason` of a row that is skipped, or an InputError where bad rows are errors."""
    if data.on_bad_row == "error":
        raise InputError(f"{where}: {reason} (data.on_bad_row skip leaves such rows out)")
    return f"{where}: {reason}"


def read(data: Data, split: Split, corpus: Path | None, seed: int) -> Reading:
    """The examples of `split`.

    Held-out examples are `data.validation`, else for each source and domain its dev, else validation, else
    test split, else a share of its training rows, which is the same for every `seed`. No prompt of a
    held-out example is in the training split, whichever source it is from.

    Args:
        data: where they are, and what to do with bad rows.
        split: `train` or `validation`.
        corpus: folder that the source `local` stands for.
        seed: of the sample of `data.max_examples`.

    Raises:
        InputError: nothing there, an empty source, a row that can't be used (`file:line: reason`), a domain
            of which nothing can be held out, or nothing to train on beside the held-out examples.
    """
    if split == "validation" and data.validation is not None:
        return _given(data, corpus)
    mixture = [_parts(source, data, corpus) for source in data.sources("train")]
    held_out = _given(data, corpus) if data.validation is not None else _measured(mixture, data)
    return held_out if split == "validation" else _trained(mixture, held_out, data, seed)


# Which rows are read.


class _Rows(Protocol):
    """Where the rows of a table come from."""

    def count(self) -> int:
        """Number of rows."""

    def read(self, chosen: NDArray[np.int64] | None) -> Iterator[tuple[int, Any]]:
        """(line, row or the BadRow that it is) of all rows, or of the `chosen` ones (rising, from 0).

        Lines count from 1.
        """

    def lineage(self) -> dict[str, Any]:
        """What identifies their content."""


@dataclass(frozen=True)
class _Table:
    """One file, or one split on the hub."""

    name: str
    domain: str
    split: str
    source: Source
    rows: _Rows
    chosen: NDArray[np.int64] | None = None
    """Rows to read, from 0 and rising; by default all."""


@dataclass(frozen=True, eq=False)
class _Part:
    """What one source has of one domain, read when it is asked for."""

    train: list[_Table]
    held_out: list[_Table]
    data: Data

    @cached_property
    def trained(self) -> Reading:
        """Its training rows."""
        return _collect(self.train, self.data)

    @cached_property
    def own(self) -> Reading:
        """The rows of its held-out split."""
        return _collect(self.held_out, self.data)

    def measured(self, shares: Set[Messages]) -> Reading:
        """Its held-out examples: of its own split, else its training rows with a prompt in `shares`."""
        if self.held_out:
            return self.own
        known = self.trained
        return replace(known, instructions=[x for x in known.instructions if x.prompt in shares])


def _parts(source: Source, data: Data, corpus: Path | None) -> list[_Part]:
    """The training tables of `source`, cut down to its `max_examples`, and its held-out ones."""
    tables = _tables(source, "data.train", corpus)
    held_out = {domain: _held_out(some) for domain, some in _by_domain(tables).items()}
    limit = source.max_examples
    if limit and data.validation is None and not all(held_out.values()):
        # the share that will be held out comes on top
        limit = math.ceil(limit / (1 - data.validation_fraction))
    train = _by_domain(_drawn([t for t in tables if t.split == "train"], limit, stream=3))
    return [_Part(train.get(domain, []), some, data) for domain, some in held_out.items()]


def _given(data: Data, corpus: Path | None) -> Reading:
    """The examples of `data.validation`."""
    tables: list[_Table] = []
    for source in data.sources("validation"):
        domains = _by_domain(_tables(source, "data.validation", corpus)).values()
        held_out = [t for some in domains for t in (_held_out(some) or some)]
        tables += _drawn(held_out, source.max_examples, stream=4)  # not the rows that training draws
    return _collect(tables, data)


def _by_domain(tables: Sequence[_Table]) -> dict[str, list[_Table]]:
    domains: dict[str, list[_Table]] = defaultdict(list)
    for table in tables:
        domains[table.domain].append(table)
    return domains


def _held_out(tables: Sequence[_Table]) -> list[_Table]:
    """The tables of the preferred held-out split of a domain, if it has one."""
    return next((found for name in HELD_OUT if (found := [t for t in tables if t.split == name])), [])


def _drawn(tables: list[_Table], limit: int | None, stream: int) -> list[_Table]:
    """`tables` cut down to a draw of `limit` rows from all of them together; other rows for another `stream`."""
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
    """The held-out examples of sources that none are given for."""
    parts = [part for some in mixture for part in some]
    shares = _shares(parts, data.validation_fraction)
    return _concatenated(part.measured(shares) for part in parts)


def _shares(parts: Sequence[_Part], fraction: float) -> set[Messages]:
    """Prompts to hold out of the parts that have no split of their own.

    A domain of which no part has enough prompts has a share of what all of them have.
    """
    shared = [part.trained.instructions for part in parts if not part.held_out]
    known = [x for some in shared for x in some]
    shares = {prompt for some in shared for prompt in _share(some, fraction)}
    own = _domains(x for part in parts for x in part.own.instructions)
    missing = _domains(known) - own - _domains(x for x in known if x.prompt in shares)
    shares.update(_share([x for x in known if x.domain in missing], fraction))
    if lost := missing - _domains(x for x in known if x.prompt in shares):
        raise InputError(
            f"data.train: domain {', '.join(sorted(lost))} has a single prompt, so that none can be held out: "
            "add prompts or give data.validation"
        )
    return shares


def _domains(instructions: Iterable[Instruction]) -> set[str]:
    return {x.domain for x in instructions}


def _share(instructions: Sequence[Instruction], fraction: float) -> Iterator[Messages]:
    """Of each domain a `fraction` of its distinct prompts, at least one of two."""
    prompts: dict[str, dict[Messages, None]] = defaultdict(dict)
    for x in instructions:
        prompts[x.domain][x.prompt] = None
    for distinct in prompts.values():
        known = list(distinct)
        count = min(max(1, round(fraction * len(known))), len(known) - 1)
        yield from (known[i] for i in np.random.default_rng([DRAW_SEED, 1]).permutation(len(known))[:count])


def _trained(mixture: Sequence[Sequence[_Part]], held_out: Reading, data: Data, seed: int) -> Reading:
    """The training examples whose prompts are not held out."""
    prompts = {x.prompt for x in held_out.instructions}
    readings = []
    for source, parts in zip(data.sources("train"), mixture, strict=True):
        kept = _without(_concatenated(part.trained for part in parts), prompts)
        readings.append(_sampled(kept, source.max_examples, DRAW_SEED))
    whole = _concatenated(readings)
    if not whole.instructions:
        names = ", ".join(source.name for source in data.sources("train"))
        raise InputError(f"data.train: {names}: every prompt is held out too, which leaves none to train on")
    return _sampled(whole, data.max_examples, seed)


def _without(reading: Reading, prompts: Set[Messages]) -> Reading:
    """`reading` without the examples that have one of `prompts`, which are counted."""
    kept = [x for x in reading.instructions if x.prompt not in prompts]
    return replace(reading, instructions=kept, held_out=len(reading.instructions) - len(kept))


def _sampled(reading: Reading, limit: int | None, seed: int) -> Reading:
    """`reading` with a seeded sample of at most `limit` of its examples, in their order."""
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


def _collect(tables: Sequence[_Table], data: Data) -> Reading:
    """The rows of `tables`."""
    return _concatenated(_table_reading(table, data) for table in tables)


def _table_reading(table: _Table, data: Data) -> Reading:
    usable: list[Instruction] = []
    skipped: list[str] = []
    for line, row in table.rows.read(table.chosen):
        try:
            usable.append(_instruction(row, table, line))
        except BadRow as reason:
            skipped.append(refused(f"{table.name}:{line}", str(reason), data))
    if not usable:
        first = f", the first: {skipped[0]}" if skipped else ""
        raise InputError(f"{table.name}: no usable rows ({len(skipped)} skipped{first})")
    lineage = {**table.rows.lineage(), "split": table.split, "rows": len(usable), "skipped": len(skipped)}
    return Reading(usable, skipped, [lineage])


# Where they come from.


def _tables(source: Source, key: str, corpus: Path | None) -> list[_Table]:
    """The files or splits that `source`, a value of `key`, stands for."""
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
        return [replace(_file(path, source), split="train")]
    if path.suffix in SUFFIXES or source.name.startswith((".", "/", "~")) or source.name.count("/") > 1:
        raise InputError(f"{key}: {path} does not exist")
    return _hub(source, key)


def _folder(folder: Path, source: Source, key: str) -> list[_Table]:
    files = sorted(f for f in folder.iterdir() if f.suffix in SUFFIXES and f.is_file())
    if not files:
        raise InputError(f"{key}: no {' or '.join(SUFFIXES)} file in {folder}")
    tables = [_file(file, source) for file in files]
    trained = {t.domain for t in tables if t.split == "train"}
    if key == "data.train" and (lone := {t.domain for t in tables} - trained):
        raise InputError(f"{key}: {folder} has no training file for {', '.join(sorted(lone))}")
    return tables


def _file(path: Path, source: Source) -> _Table:
    domain, split = _domain_and_split(path.stem)
    rows = _JsonLines(path) if path.suffix == ".jsonl" else _Parquet(path)
    return _Table(str(path), domain, split, source, rows)


def _domain_and_split(stem: str) -> tuple[str, str]:
    """`math.dev` -> (math, dev); `math` -> (math, train); `train-00000-of-00001` -> (all, train)."""
    *domain, last = SHARD.sub("", stem).split(".")
    if last in SPLIT_NAMES:
        return ".".join(domain) or "all", SPLIT_NAMES[last]
    return SHARD.sub("", stem), "train"


@dataclass(frozen=True)
class _JsonLines:
    """A JSONL file; blank lines are no rows."""

    path: Path

    def count(self) -> int:
        """Number of rows."""
        with self.path.open("rb") as file:
            return sum(1 for raw in file if raw.strip())

    def read(self, chosen: NDArray[np.int64] | None) -> Iterator[tuple[int, Any]]:
        """Lines and their rows."""
        wanted = None if chosen is None else set(chosen.tolist())
        with self.path.open("rb") as file:
            rows = ((line, raw) for line, raw in enumerate(file, start=1) if raw.strip())
            for number, (line, raw) in enumerate(rows):
                if wanted is None or number in wanted:
                    yield line, _parsed(raw)

    def lineage(self) -> dict[str, Any]:
        """Path and checksum."""
        return _file_lineage(self.path)


def _parsed(raw: bytes) -> Any:
    try:
        row = json.loads(raw.decode("utf-8-sig"))
        if HALF_PAIRS.search(raw):
            json.dumps(row, ensure_ascii=False).encode()
    except UnicodeDecodeError:
        return BadRow("not UTF-8")
    except UnicodeEncodeError:
        return BadRow("not Unicode: half of a surrogate pair")
    except RecursionError:
        return BadRow("nested too deeply")
    except json.JSONDecodeError as error:
        return BadRow(f"not valid JSON: {error.msg} at column {error.colno}")
    except ValueError as error:  # a number of thousands of digits
        return BadRow(f"not valid JSON: {error}")
    return row


@dataclass(frozen=True)
class _Parquet:
    """A parquet file."""

    path: Path

    def count(self) -> int:
        """Number of rows."""
        with self._readable() as file:
            return int(file.metadata.num_rows)

    def read(self, chosen: NDArray[np.int64] | None) -> Iterator[tuple[int, Any]]:
        """Lines and their rows."""
        with self._readable() as file:
            yield from _batch_rows(file.iter_batches(batch_size=READ_ROWS), chosen)

    def lineage(self) -> dict[str, Any]:
        """Path and checksum."""
        return _file_lineage(self.path)

    @contextmanager
    def _readable(self) -> Iterator[Any]:
        try:
            with pq.ParquetFile(self.path) as file:
                yield file
        except (pa.ArrowInvalid, OSError) as error:
            reason = " ".join(str(error).split())
            raise InputError(f"{self.path}: not a readable parquet file: {reason}") from None


def _batch_rows(batches: Iterable[Any], chosen: NDArray[np.int64] | None) -> Iterator[tuple[int, Any]]:
    """Lines and rows of consecutive Arrow batches, or of the `chosen` rows among them."""
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


# The Hugging Face Hub.


@dataclass(frozen=True)
class _HubRows:
    """One split of a data set on the hub."""

    source: Source
    commit: str
    rows: Any
    """The `datasets.Dataset`."""

    def count(self) -> int:
        """Number of rows."""
        return len(self.rows)

    def read(self, chosen: NDArray[np.int64] | None) -> Iterator[tuple[int, Any]]:
        """Lines and their rows."""
        yield from _batch_rows(self.rows.with_format("arrow").iter(READ_ROWS), chosen)

    def lineage(self) -> dict[str, Any]:
        """Id, subset, revision that was asked for and the commit that it was."""
        given = self.source
        return {"hub": given.name, "subset": given.subset, "revision": given.revision, "commit": self.commit}


def _hub(source: Source, key: str) -> list[_Table]:
    """The splits of a data set on the hub, or of its copy in the cache where the hub can't be reached."""
    import datasets

    unreachable = _unreachable(source, key)
    try:
        with _cached_only() if unreachable else nullcontext():
            splits = datasets.load_dataset(source.name, source.subset, revision=source.revision)
    except Exception as error:  # the hub's client raises many kinds; all mean that there are no rows
        reason = (
            f"can't be reached ({unreachable})" if unreachable else f"did not give it: {_one_line(error)}"
        )
        raise InputError(f"{key}: {source.name!r} is no file, and the Hugging Face Hub {reason}") from None
    commit = _commit(splits)
    if unreachable and source.revision and not commit.startswith(source.revision):
        raise InputError(
            f"{key}: the Hugging Face Hub can't be reached ({unreachable}), and the copy of {source.name!r} "
            f"in the cache is of commit {commit}, not known to be revision {source.revision}"
        )
    return _hub_tables(source, key, commit, splits)


def _hub_tables(source: Source, key: str, commit: str, splits: Mapping[str, Any]) -> list[_Table]:
    known = {name: SPLIT_NAMES[str(name)] for name in splits if str(name) in SPLIT_NAMES}
    if not known or (key == "data.train" and "train" not in known.values()):
        wanted = "train split" if key == "data.train" else "dev, validation or test split"
        raise InputError(f"{key}: {source.name!r} has no {wanted}: it has {', '.join(map(str, splits))}")
    return [
        _Table(f"{source.name}[{name}]", "all", split, source, _HubRows(source, commit, splits[name]))
        for name, split in known.items()
    ]


def _unreachable(source: Source, key: str) -> str | None:
    """Why the hub can't be reached, found out with one request; its client retries each for half a minute.

    Raises:
        InputError: it can, and has no such data set or revision.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError, RevisionNotFoundError

    try:
        HfApi().dataset_info(source.name, revision=source.revision, timeout=HUB_SECONDS)
    except RevisionNotFoundError:
        reason = f"has no revision {source.revision!r} of it"
    except GatedRepoError:
        reason = "gives it only to whom access was granted on its page: then log in (`hf auth login`)"
    except RepositoryNotFoundError:
        reason = "has no such data set (or a private one: `hf auth login`)"
    except Exception as error:  # connection, proxy, certificate, time-out, a server's error
        return _one_line(error)
    else:
        return None
    raise InputError(f"{key}: {source.name!r} is no file, and the Hugging Face Hub {reason}")


@contextmanager
def _cached_only() -> Iterator[None]:
    """Have `datasets` look into its cache alone."""
    from datasets import config

    before, config.HF_HUB_OFFLINE = config.HF_HUB_OFFLINE, True
    try:
        yield
    finally:
        config.HF_HUB_OFFLINE = before


def _commit(splits: Mapping[str, Any]) -> str:
    """The commit that loaded splits are of: the name of their folder in the cache."""
    folders = {Path(file["filename"]).parent.name for split in splits.values() for file in split.cache_files}
    return ", ".join(sorted(folders))


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__


# What a row means.


def _instruction(row: Any, table: _Table, line: int) -> Instruction:
    if isinstance(row, BadRow):
        raise row
    if not isinstance(row, Mapping):
        raise BadRow(f"expected an object with keys, found {type(row).__name__}")
    prompt, completion = _with_system(row, *_prompt_and_completion(row, table.source), table.source)
    if not completion.strip():
        raise BadRow("empty completion")
    if not any(content.strip() for role, content in prompt if role != "system"):
        raise BadRow("empty prompt")
    domain = table.source.domain or _label(row, "domain", table.domain)
    task = table.source.task or _task(row, table.source.task_column, domain)
    name = _label(row, "id", f"{Path(table.name).name}:{line}")
    return Instruction(name, domain, task, prompt, completion, f"{table.name}:{line}")


def _task(row: Mapping[str, Any], column: str | None, domain: str) -> str:
    if column is not None and column not in row:
        raise BadRow(f"no column {column}, which task_column names")
    return _label(row, column or "task", domain)


def _label(row: Mapping[str, Any], key: str, default: str) -> str:
    value = row.get(key)
    if value is None or value == "":
        return default
    if not isinstance(value, str | int):
        raise BadRow(f"{key} is {type(value).__name__}, not text")
    return str(value)


def _prompt_and_completion(row: Mapping[str, Any], source: Source) -> tuple[Messages, str]:
    if source.prompt is not None and source.completion is not None:
        return _pair(row, Pair(source.prompt, source.completion))
    for column, turns in CONVERSATIONS.items():
        if row.get(column) is not None:
            return _split_conversation(turns(row[column], column))
    return _pair(row, _known_pair(row))


def _known_pair(row: Mapping[str, Any]) -> Pair:
    """The only one of `PAIRS` that `row` has."""
    has = {key for key, value in row.items() if value is not None}
    found = [p for p in PAIRS if {p.prompt, p.completion} <= has and not has & set(p.unless)]
    if len(found) == 1:
        return found[0]
    if found:
        choices = " or ".join(f"{p.prompt} and {p.completion}" for p in found)
        raise BadRow(f"{choices}? Name the columns: prompt and completion of the source")
    known = [*CONVERSATIONS, *(f"{p.prompt} and {p.completion}" for p in PAIRS)]
    raise BadRow(
        f"no known columns among {', '.join(map(str, row)) or 'none'}: expected {', '.join(known)}, or name "
        "others with prompt and completion of the source"
    )


def _pair(row: Mapping[str, Any], pair: Pair) -> tuple[Messages, str]:
    question, answer = (_column(row, name) for name in (pair.prompt, pair.completion))
    more = [_text(row[name], name) for name in pair.more if row.get(name)]
    if more:
        question = "\n\n".join(part for part in (_text(question, pair.prompt), *more) if part)
    prompt = _messages_or_text(question, pair.prompt, "user")
    return _split_conversation(prompt + _messages_or_text(answer, pair.completion, "assistant"))


def _column(row: Mapping[str, Any], name: str) -> Any:
    if name not in row:
        raise BadRow(f"no column {name}; its columns are {', '.join(map(str, row)) or 'none'}")
    return row[name]


def _with_system(
    row: Mapping[str, Any], prompt: Messages, completion: str, source: Source
) -> tuple[Messages, str]:
    """The prompt with the system prompt of a column before it, unless it has one."""
    if any(role == "system" for role, _ in prompt):
        return prompt, completion
    if source.system is not None:
        text = _text(_column(row, source.system) or "", source.system)
    else:
        text = next((row[c] for c in SYSTEM if isinstance(row.get(c), str)), "")
    return ((("system", text), *prompt) if text.strip() else prompt), completion


def _split_conversation(messages: Messages) -> tuple[Messages, str]:
    """Everything before the last assistant message, and that message."""
    last = max((i for i, (role, _) in enumerate(messages) if role == "assistant"), default=None)
    if last is None:
        raise BadRow("no assistant message")
    return messages[:last], messages[last][1]


def _messages_or_text(value: Any, key: str, role: str) -> Messages:
    return ((role, value),) if isinstance(value, str) else _messages(value, key)


def _messages(value: Any, key: str) -> Messages:
    return _turns(value, key, "role", "content")


def _sharegpt(value: Any, key: str) -> Messages:
    """ShareGPT's turns, or messages under its name."""
    if isinstance(value, Sequence) and value and isinstance(value[0], Mapping) and "from" not in value[0]:
        return _messages(value, key)
    turns = _turns(value, key, "from", "value")
    if unknown := {speaker for speaker, _ in turns} - SPEAKERS.keys():
        raise BadRow(f"{key}.from is {sorted(unknown)[0]!r}: expected one of {', '.join(SPEAKERS)}")
    return tuple((SPEAKERS[speaker], text) for speaker, text in turns)


def _turns(value: Any, key: str, role: str, content: str) -> Messages:
    if not isinstance(value, Sequence) or isinstance(value, str) or not value:
        raise BadRow(f"{key} is {type(value).__name__}, not text or a list of messages")
    for turn in value:
        if not isinstance(turn, Mapping) or not {role, content} <= turn.keys():
            raise BadRow(f"{key} holds something that has no {role} and {content}")
    return tuple((_text(t[role], f"{key}.{role}"), _text(t[content], f"{key}.{content}")) for t in value)


def _text(value: Any, key: str) -> str:
    if not isinstance(value, str):
        raise BadRow(f"{key} is {type(value).__name__}, not text")
    return value


CONVERSATIONS: dict[str, Callable[[Any, str], Messages]] = {"messages": _messages, "conversations": _sharegpt}
"""Columns that hold a whole conversation, and how its turns are written."""
