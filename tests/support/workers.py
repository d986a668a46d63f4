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


def rows_of_workers(specs: Sequence[WorkerSpec], world: int = 2) -> list[Rows]:
    """Train every spec, one after the other, with the same `world` processes: importing takes longer than training.

    ZeRO-3 changes torch for the rest of a process: put its specs last.
    """
    mp.spawn(_worker, (world, free_port(), specs), nprocs=world)  # type: ignore[attr-defined,no-untyped-call]
    return [json.loads(_file(spec).read_text()) for spec in specs]


def _file(spec: WorkerSpec) -> Path:
    return Path(str(spec.out)) / "rows.json"


def _worker(rank: int, world: int, port: int, specs: Sequence[WorkerSpec]) -> None:
    environment(os.environ.__setitem__, rank, world, port)
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", rank=rank, world_size=world)
    for spec in specs:
        session = LocalSession()
        session.rank, session.world_size = rank, world
        train(spec, session)
        if rank == 0:
            _file(spec).write_text(json.dumps(session.rows))
    torch.distributed.barrier()  # neither leaves while the other still needs it
    torch.distributed.destroy_process_group()
