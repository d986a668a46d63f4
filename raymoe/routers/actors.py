"""A pool of Ray Data actors that each hold a copy of the dense model."""

from __future__ import annotations

import logging
import sys
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from transformers import AutoModelForCausalLM, PreTrainedModel

from raymoe.models.packed_attention import PACKED_ATTENTION
from raymoe.schema import InputError
from raymoe.storage.location import Location, local

if TYPE_CHECKING:
    import ray


BLOCKS_PER_ACTOR = 16
"""Shares of the work that each actor fetches in turn: small enough to balance load and to retry."""


def consecutive_packs(lengths: NDArray[np.integer[Any]], tokens_per_batch: int) -> list[tuple[int, int]]:
    """Return ranges [first, last) of consecutive examples, each of at most `tokens_per_batch` tokens.

    A longer example gets a range of its own.
    """
    ends = np.cumsum(lengths)
    packs, first, done = [], 0, 0
    while first < len(ends):
        last = max(first + 1, int(np.searchsorted(ends, done + tokens_per_batch, side="right")))
        packs.append((first, last))
        first, done = last, int(ends[last - 1])
    return packs


def load_model(folder: Location, dtype: str) -> PreTrainedModel:
    """Load a dense model for packed forward passes, onto this process's GPU if it has one."""
    model = AutoModelForCausalLM.from_pretrained(
        local(folder),
        dtype=getattr(torch, dtype),
        attn_implementation=PACKED_ATTENTION,
        local_files_only=True,
    )
    return model.eval().to("cuda" if torch.cuda.is_available() else "cpu")


# The pool of actors.


def run_actors(
    rows: Sequence[Mapping[str, int]],
    actor: type[Any],
    arguments: Mapping[str, Any],
    *,
    actors: int | None,
    gpu: bool,
    what: str,
) -> dict[str, NDArray[Any]]:
    """Pass `rows`, one at a time, to a pool of `actor(**arguments)` and gather the columns they return.

    Rows are a few integers each and come back in any order; data belongs on disk, where actors read it.
    """
    import ray  # here: `score` and `represent` work without it

    from raymoe.cluster.capacity import capacity

    have = capacity()  # with an autoscaler, nodes that have not started are included
    if gpu and have.final and have.total("GPU") < 1:
        raise InputError("execution.gpu: the cluster has no GPU")
    gpus = have.largest("GPU") if have.autoscaler else have.total("GPU")  # no more nodes than training uses
    count = min(actors or (max(1, int(gpus)) if gpu else 1), len(rows))
    cpus = max(1.0, have.total("CPU"))
    threads = max(1, min(int(cpus) // count, int(have.largest("CPU"))))
    with ray.data.DataContext.current(_quiet_context()):
        results = ray.data.from_items(
            [dict(row) for row in rows], override_num_blocks=min(len(rows), BLOCKS_PER_ACTOR * count)
        ).map_batches(
            _on_threads(actor),
            fn_constructor_args=(threads,),
            fn_constructor_kwargs=dict(arguments),
            batch_size=1,
            compute=ray.data.ActorPoolStrategy(size=count),
            # actors that hold all CPUs would leave none for Ray Data's own tasks, and hang
            num_cpus=min(1.0, round(cpus / (count + 1), 2)),
            num_gpus=1 if gpu else 0,
        )
        results.set_name(what)
        return _columns(results.iter_batches(batch_size=None, batch_format="numpy"))


def _on_threads(actor: type[Any]) -> type[Any]:
    """Return `actor` with one more constructor argument, the first: how many threads torch may use."""

    class Threaded(actor):  # type: ignore[misc]
        def __init__(self, threads: int, **arguments: Any) -> None:
            torch.set_num_threads(threads)
            super().__init__(**arguments)

    Threaded.__name__ = actor.__name__
    return Threaded


def _quiet_context() -> ray.data.DataContext:
    """Return a context with progress bars only on a terminal and no plan in the log."""
    import ray

    context = ray.data.DataContext.get_current().copy()
    context.enable_progress_bars = sys.stderr.isatty()
    context.enable_operator_progress_bars = False
    context.print_on_execution_start = False
    if not context.enable_progress_bars:  # it would say so on every run
        logging.getLogger("ray.data").setLevel(logging.ERROR)
    return context


def _columns(batches: Iterable[Mapping[str, NDArray[Any]]]) -> dict[str, NDArray[Any]]:
    gathered = list(batches)
    return {name: np.concatenate([batch[name] for batch in gathered]) for name in gathered[0]}
