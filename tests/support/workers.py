"""Several workers of a training as processes with a process group, as Ray Train starts them, without Ray."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path

import torch
import torch.multiprocessing as mp

from raymoe.train.spec import WorkerSpec
from raymoe.train.worker import train
from support.local_session import LocalSession, environment, free_port

Rows = list[tuple[int, dict[str, float]]]


def rows_of_workers(jobs: Sequence[WorkerSpec], world: int = 2) -> list[Rows]:
    """Train every job, one after the other, with the same `world` processes: importing takes longer than training.

    ZeRO-3 changes torch for the rest of a process: put its jobs last.
    """
    mp.spawn(_worker, (world, free_port(), jobs), nprocs=world)  # type: ignore[attr-defined,no-untyped-call]
    return [json.loads(_file(job).read_text()) for job in jobs]


def _file(job: WorkerSpec) -> Path:
    return Path(str(job.out)) / "rows.json"


def _worker(rank: int, world: int, port: int, jobs: Sequence[WorkerSpec]) -> None:
    environment(os.environ.__setitem__, rank, world, port)
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", rank=rank, world_size=world)
    for job in jobs:
        session = LocalSession()
        session.rank, session.world_size = rank, world
        train(job, session)
        if rank == 0:
            _file(job).write_text(json.dumps(session.rows))
    torch.distributed.barrier()  # neither leaves while the other still needs it
    torch.distributed.destroy_process_group()
