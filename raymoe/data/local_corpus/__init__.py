"""The local corpus: code, text and math instructions, made offline from this Python installation.

code: documented functions of the standard library, to write or to complete.
text: prose of the language reference (`pydoc_data.topics`) and of module, class and function docstrings.
math: generated word problems with a worked solution.

The same Python writes the same bytes. No source (a module, a reference topic, one set of numbers) is in two
splits.
"""

from __future__ import annotations

import hashlib
import json
import platform
import random
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from raymoe.data.local_corpus.library import library_files, library_folder, library_rows
from raymoe.data.local_corpus.math_problems import math_rows
from raymoe.data.local_corpus.row import REVISION, Row, usable
from raymoe.schema import InputError

DOMAINS = ("code", "text", "math")
SPLITS = ("train", "dev", "test")
TRAIN_ROWS = {"code": 2200, "text": 2200, "math": 3600}
SEED_FRACTION = 0.7
"""Share of the training rows that the embedded dense model learns from."""
HELD_OUT_ROWS = {"code": 220, "text": 220, "math": 220}
"""Rows of each domain in dev, and again in test."""


def identity() -> dict[str, Any]:
    """Return what determines the content: this package's revision, the Python version, the library's files."""
    library = library_folder()
    listing = "\n".join(
        f"{file.relative_to(library).as_posix()} {file.stat().st_size}" for file in library_files(library)
    )
    return {
        "local_corpus": REVISION,
        "python": f"{platform.python_implementation()} {platform.python_version()}",
        "library": hashlib.sha256(listing.encode()).hexdigest(),
    }


def write(folder: Path) -> dict[str, Any]:
    """Write `instruct/{domain}.{split}.jsonl` and `seed/{domain}.train.jsonl` into `folder`.

    Runs train on and are evaluated with `instruct`; the embedded dense model learns from `seed`, whose
    instructions are disjoint from it.

    Returns:
        `records`: number of rows by file name; `sha256`: over all files, in the order of their names.

    Raises:
        InputError: this Python installation has no standard library sources.
    """
    splits = _split([*library_rows(library_folder()), *math_rows()])
    files: dict[str, list[Row]] = {}
    for domain in DOMAINS:
        of_domain = {split: [r for r in splits[split] if r.domain == domain] for split in SPLITS}
        for_seed = round(len(of_domain["train"]) * SEED_FRACTION)
        files[f"seed/{domain}.train.jsonl"] = of_domain["train"][:for_seed]
        of_domain["train"] = of_domain["train"][for_seed:]
        files |= {f"instruct/{domain}.{split}.jsonl": of_domain[split] for split in SPLITS}
    if not all(files.values()):
        library = library_folder()
        raise InputError(f"data.train: no local corpus: {library} lacks the standard library's sources")
    checksum = hashlib.sha256()
    for name, rows in sorted(files.items()):
        content = "".join(json.dumps(asdict(r), ensure_ascii=False) + "\n" for r in rows).encode()
        checksum.update(content)
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)
    return {
        "records": {name: len(rows) for name, rows in files.items()},
        "sha256": checksum.hexdigest(),
    }


def _split(candidates: Iterable[Row]) -> dict[str, list[Row]]:
    """Assign each source's usable, distinct rows to one split, and shuffle each split."""
    sources: dict[str, list[Row]] = {}
    for row in _distinct(filter(usable, candidates)):
        sources.setdefault(row.source, []).append(row)
    rng = random.Random(f"splits {REVISION}")
    counts: dict[str, Counter[str]] = {split: Counter() for split in SPLITS}
    splits: dict[str, list[Row]] = {split: [] for split in SPLITS}
    for source in rng.sample(sorted(sources), len(sources)):
        size = Counter(row.domain for row in sources[source])
        split = next((s for s in ("test", "dev") if _wanted(counts[s], size)), "train")
        counts[split] += size
        splits[split] += sources[source]
    for rows in splits.values():
        rng.shuffle(rows)
    limits = {"train": TRAIN_ROWS, "dev": HELD_OUT_ROWS, "test": HELD_OUT_ROWS}
    return {split: _first(rows, limits[split]) for split, rows in splits.items()}


def _wanted(count: Mapping[str, int], size: Mapping[str, int]) -> bool:
    """True if a source is to be held out: its domains still lack held-out rows, and it is small."""
    missing = any(count[domain] < HELD_OUT_ROWS[domain] for domain in size)
    return missing and all(n <= HELD_OUT_ROWS[domain] // 5 for domain, n in size.items())


def _first(rows: Iterable[Row], limits: Mapping[str, int]) -> list[Row]:
    seen: Counter[str] = Counter()
    kept = []
    for row in rows:
        seen[row.domain] += 1
        if seen[row.domain] <= limits[row.domain]:
            kept.append(row)
    return kept


def _distinct(rows: Iterable[Row]) -> Iterator[Row]:
    """Drop repeated prompts and, except in math, repeated completions (the library holds copies of itself)."""
    prompts, completions = set(), set()
    for row in rows:
        completion = row.prompt if row.domain == "math" else " ".join(row.completion.split())
        if row.prompt not in prompts and completion not in completions:
            prompts.add(row.prompt)
            completions.add(completion)
            yield row
