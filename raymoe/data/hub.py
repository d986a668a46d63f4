"""Data sets on the Hugging Face Hub, or their copies in its cache where the hub can't be reached."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from raymoe.config import Source
from raymoe.data.rows import READ_ROWS, SPLIT_NAMES, Table, batch_rows
from raymoe.schema import InputError

HUB_SECONDS = 10.0
"""How long the Hugging Face Hub may take to answer."""


@dataclass(frozen=True)
class _HubRows:
    """The rows of one split of a data set on the hub."""

    source: Source
    commit: str
    rows: Any
    """The `datasets.Dataset`."""

    def count(self) -> int:
        """Return the number of rows."""
        return len(self.rows)

    def read(self, chosen: NDArray[np.int64] | None) -> Iterator[tuple[int, Any]]:
        """Yield lines and their rows."""
        yield from batch_rows(self.rows.with_format("arrow").iter(READ_ROWS), chosen)

    def lineage(self) -> dict[str, Any]:
        """Return id, subset, requested revision and resolved commit."""
        given = self.source
        return {"hub": given.name, "subset": given.subset, "revision": given.revision, "commit": self.commit}


def hub_tables(source: Source, key: str) -> list[Table]:
    """Return the splits of a data set on the hub, or of its cached copy if the hub can't be reached."""
    import datasets

    unreachable = _unreachable(source, key)
    try:
        with _cached_only() if unreachable else nullcontext():
            splits = datasets.load_dataset(source.name, source.subset, revision=source.revision)
    except Exception as error:  # the hub's client raises many kinds; all mean no rows
        reason = (
            f"can't be reached ({unreachable})" if unreachable else f"did not serve it: {_one_line(error)}"
        )
        raise InputError(f"{key}: {source.name!r} is not a file, and the Hugging Face Hub {reason}") from None
    commit = _commit(splits)
    if unreachable and source.revision and not commit.startswith(source.revision):
        raise InputError(
            f"{key}: the Hugging Face Hub can't be reached ({unreachable}), and the copy of {source.name!r} "
            f"in the cache is commit {commit}, which may not be revision {source.revision}"
        )
    return _tables(source, key, commit, splits)


def _tables(source: Source, key: str, commit: str, splits: Mapping[str, Any]) -> list[Table]:
    known = {name: SPLIT_NAMES[str(name)] for name in splits if str(name) in SPLIT_NAMES}
    if not known or (key == "data.train" and "train" not in known.values()):
        wanted = "train split" if key == "data.train" else "dev, validation or test split"
        raise InputError(f"{key}: {source.name!r} has no {wanted}: it has {', '.join(map(str, splits))}")
    return [
        Table(f"{source.name}[{name}]", "all", split, source, _HubRows(source, commit, splits[name]))
        for name, split in known.items()
    ]


def _unreachable(source: Source, key: str) -> str | None:
    """Return why the hub can't be reached, None if it can; one request, as its client retries for half a minute.

    Raises:
        InputError: the hub answers, and has no such data set or revision.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError, RevisionNotFoundError

    try:
        HfApi().dataset_info(source.name, revision=source.revision, timeout=HUB_SECONDS)
    except RevisionNotFoundError:
        reason = f"has no revision {source.revision!r} of it"
    except GatedRepoError:
        reason = "has it gated: request access on its page, then log in (`hf auth login`)"
    except RepositoryNotFoundError:
        reason = "has no such data set (or a private one: `hf auth login`)"
    except Exception as error:  # connection, proxy, certificate, time-out, a server's error
        return _one_line(error)
    else:
        return None
    raise InputError(f"{key}: {source.name!r} is not a file, and the Hugging Face Hub {reason}")


@contextmanager
def _cached_only() -> Iterator[None]:
    """Restrict `datasets` to its cache within the block."""
    from datasets import config

    before, config.HF_HUB_OFFLINE = config.HF_HUB_OFFLINE, True
    try:
        yield
    finally:
        config.HF_HUB_OFFLINE = before


def _commit(splits: Mapping[str, Any]) -> str:
    """Return the commit of loaded splits: the name of their folder in the cache."""
    folders = {Path(file["filename"]).parent.name for split in splits.values() for file in split.cache_files}
    return ", ".join(sorted(folders))


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__
