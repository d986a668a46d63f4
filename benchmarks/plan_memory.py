"""The planner's memory estimate against what training allocates.

    python benchmarks/plan_memory.py [--only su/zero2] [--size tiny]

A small Llama is trained on the CPU by raymoe's own worker with a real DeepSpeed engine: dense, upcycled and SIMoE,
under every ZeRO stage, with and without activation checkpointing, by one and by two workers. Measured is the peak of
bytes held by torch's allocator in the second of two steps of two micro batches each, free of the noise of a process's
resident memory. DeepSpeed's gradient bucket under ZeRO-1, 2 and 3 is excluded on both sides: it is the same 1 or
2 GB for every model, and would make every ratio here 1.
"""

from __future__ import annotations

import gc
import json
import os
import socket
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.multiprocessing as mp
from harness import figure, parser
from overhead import LocalSession, alone
from tokenizers import Tokenizer, models
from torch.profiler import ProfilerActivity, profile
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from raymoe.analysis.size import WEIGHT_BYTES, count, on_meta
from raymoe.config import Data, Evaluation, Execution, Model, Optimization, Run, RunFile
from raymoe.data.instructions import Encoded
from raymoe.methods import Dense, SparseInterpolation, SparseUpcycling
from raymoe.plan.memory import BUCKET, settings
from raymoe.train.spec import WorkerSpec
from raymoe.train.worker import Trainer
from raymoe.upcycle import router, write_recipe

SHAPE = {
    "vocab_size": 2048,
    "hidden_size": 256,
    "intermediate_size": 768,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
LENGTH, DOCUMENT, MICRO_BATCH = 512, 256, 2
METHODS: dict[str, Any] = {
    "dense": Dense(),
    "su": SparseUpcycling(num_experts=4, top_k=2),
    "simoe": SparseInterpolation(num_experts=8),
}


@dataclass(frozen=True)
class Case:
    """One way to train."""

    method: str
    zero_stage: int
    precision: str = "float32"
    checkpointing: bool = False
    workers: int = 1

    @property
    def name(self) -> str:
        """Describe the case."""
        words = [self.method, f"zero{self.zero_stage}", self.precision]
        words += ["checkpointing"] if self.checkpointing else []
        return "/".join([*words, f"{self.workers} workers"])


FEW = [
    Case("dense", 0),
    Case("su", 1, checkpointing=True),
    Case("simoe", 2, "bfloat16"),
    Case("dense", 3, "bfloat16", workers=2),
]
"""Each method, stage, precision, and number of workers at least once."""


def every() -> Iterator[Case]:
    """Return all cases; bfloat16 below ZeRO-2 runs as ZeRO-2."""
    for method in METHODS:
        for stage in range(4):
            for precision in ("float32", "bfloat16")[: 1 if stage < 2 else 2]:
                for checkpointing in (False, True):
                    yield Case(method, stage, precision, checkpointing)
                yield Case(method, stage, precision, workers=2)


class Place(LocalSession):
    """One of several workers without Ray."""

    def __init__(self, rank: int, workers: int) -> None:
        super().__init__("cpu")
        self.rank, self.world_size = rank, workers


def prepare(case: Case, root: Path) -> WorkerSpec:
    """Write the worker's inputs, with random tokens."""
    write_dense(root / "dense")
    batch = 2 * MICRO_BATCH * case.workers
    for split, sequences in {"train": 2 * batch, "validation": 1}.items():
        examples = sequences * LENGTH // DOCUMENT
        instructions(examples).save(root / "data" / split)
        (root / "prompts").mkdir(exist_ok=True)
        np.save(root / "prompts" / f"{split}.npy", np.ones((examples, SHAPE["hidden_size"]), np.float32))
    method = METHODS[case.method]
    if case.method == "su":
        rows = router(
            method, num_layers=SHAPE["num_hidden_layers"], width=SHAPE["hidden_size"], clusters=None, seed=0
        )
        write_recipe(root / "recipe", root / "dense", method, rows)
    run = Run(
        model=Model(name=str(root / "dense")),
        data=Data(max_length=LENGTH),
        method=method,
        optimization=Optimization(batch_size=batch, schedule="constant", warmup_fraction=0),
        evaluation=Evaluation(milestones=(1.0,)),
        precision=case.precision,
    )
    execution = Execution(
        micro_batch=MICRO_BATCH, zero_stage=case.zero_stage, activation_checkpointing=case.checkpointing
    )
    recipe, prompts = (root / name if (root / name).exists() else None for name in ("recipe", "prompts"))
    return WorkerSpec(run, execution, root / "dense", recipe, root / "data", root / "out", prompts)


def write_dense(folder: Path) -> None:
    """Write a model and a tokenizer."""
    torch.manual_seed(0)
    LlamaForCausalLM(LlamaConfig(**SHAPE)).save_pretrained(folder)
    tokenizer = Tokenizer(models.BPE({"<s>": 0, "</s>": 1, "a": 2}, []))
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>")
    fast.save_pretrained(folder)


def instructions(examples: int) -> Encoded:
    """Documents of one token of prompt each: nearly every position has logits, as the planner assumes."""
    tokens = np.random.default_rng(0).integers(0, SHAPE["vocab_size"], examples * DOCUMENT, dtype=np.int32)
    offsets, labels = np.arange(examples + 1, dtype=np.int64) * DOCUMENT, ("",) * examples
    return Encoded(tokens, offsets, np.ones(examples, np.int32), labels, labels, labels)


def measured(cases: Sequence[Case]) -> dict[Case, int]:
    """Return the peak bytes of each case's first worker; workers are started once per number of workers."""
    found: dict[Case, int] = {}
    with tempfile.TemporaryDirectory() as folder:
        specs = {case: prepare(case, Path(folder) / str(i)) for i, case in enumerate(cases)}
        for workers in sorted({case.workers for case in cases}):
            some = {case: spec for case, spec in specs.items() if case.workers == workers}
            if workers == 1:
                found |= {case: peak(spec, Place(0, 1)) for case, spec in some.items()}
                continue
            arguments = (workers, free_port(), list(some.values()), Path(folder) / "peaks.json")
            mp.spawn(_worker, arguments, nprocs=workers)  # type: ignore[attr-defined,no-untyped-call]
            found |= zip(some, json.loads((Path(folder) / "peaks.json").read_text()), strict=True)
    return found


def _worker(rank: int, workers: int, port: int, specs: Sequence[WorkerSpec], out: Path) -> None:
    place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": workers, "MASTER_PORT": port}
    os.environ.update({name: str(value) for name, value in place.items()}, MASTER_ADDR="127.0.0.1")
    torch.set_num_threads(1)
    peaks = [peak(spec, Place(rank, workers)) for spec in specs]
    if rank == 0:
        out.write_text(json.dumps(peaks))


def free_port() -> int:
    """On 127.0.0.1."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def peak(spec: WorkerSpec, session: Place) -> int:
    """The most bytes in the second step."""
    gc.collect()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        trainer = Trainer(spec, session)
        trainer.step()
        started = time.time_ns()
        trainer.step()
    bucket = BUCKET * WEIGHT_BYTES[spec.run.precision]
    events = sorted(
        (event.start_ns(), event.nbytes())
        for event in recorded.profiler.kineto_results.events()
        if event.name() == "[memory]" and abs(event.nbytes()) != bucket
    )
    live = accumulate(size for _, size in events)
    return int(max(level for level, (when, _) in zip(live, events, strict=True) if when > started))


def estimated(case: Case) -> int:
    """Return the planner's estimate."""
    model, method = on_meta(LlamaConfig(**SHAPE)), METHODS[case.method]
    run_file = RunFile(
        method=method,
        data=Data(max_length=LENGTH),
        optimization=Optimization(batch_size=2 * MICRO_BATCH * case.workers),
        precision=case.precision,
    )
    found = settings(model, run_file, case.workers, MICRO_BATCH, count(model, method))
    wanted = (case.zero_stage, "none", case.checkpointing)
    setting = next(s for s in found if (s.zero_stage, s.offload, s.activation_checkpointing) == wanted)
    bucket = BUCKET * WEIGHT_BYTES[case.precision] if case.zero_stage else 0
    return replace(setting, buffers=setting.buffers - bucket).total


def row(case: Case, estimate: int, bytes_: int) -> str:
    """Format one line of the table: MB estimated, MB measured, their ratio."""
    return f"{case.name:42}{estimate / 1e6:8.1f}{bytes_ / 1e6:8.1f}{estimate / bytes_:7.3f}"


def main() -> None:
    options = parser(__doc__)
    options.add_argument("--only", default="", help="part of the settings' names")
    o = options.parse_args()
    cases = [case for case in (FEW[:1] if o.size == "tiny" else every()) if o.only in case.name]
    alone()
    worst = 1.0
    for case, bytes_ in measured(cases).items():
        estimate = estimated(case)
        print(row(case, estimate, bytes_), flush=True)
        worst = max(worst, estimate / bytes_, bytes_ / estimate)
    figure("plan_memory_vs_measured", "torch's allocator", worst, 1.15, None, o.device, settings=len(cases))


if __name__ == "__main__":
    main()
