"""How much does raymoe's training loop cost per step over a bare PyTorch loop?

    python benchmarks/overhead.py [--device cuda] [--rounds 15]

Both train the same dense Llama on the same sequences, taking turns step by step: raymoe with its DeepSpeed engine
(ZeRO 0, one worker, no Ray), collation and metrics, all read at every step; the bare loop with batches collated
beforehand, backward, clipping and torch's fused AdamW, its loss read at every step. The bare loop is the floor.
"""

from __future__ import annotations

import os
import socket
import tempfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from harness import figure, interleaved, parser
from tokenizers import Tokenizer, models
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from raymoe.config import Data, Evaluation, Execution, Model, Optimization, Run
from raymoe.data.instructions import Encoded
from raymoe.data.packing import Batch, collate
from raymoe.methods import Dense
from raymoe.models.causal_loss import CausalLoss
from raymoe.train.spec import WorkerSpec
from raymoe.train.worker import Trainer, starting_model

SHAPES = {  # width, FFN width, layers, vocabulary, tokens of a sequence, sequences of a step
    "cpu": (512, 1408, 4, 2048, 256, 8),
    "cuda": (2048, 5632, 16, 32000, 1024, 8),
    "tiny": (32, 48, 2, 64, 32, 2),
}
DOCUMENTS = 4
"""Examples in a sequence; half of each is its prompt."""


class LocalSession:
    """One worker without Ray, which keeps no checkpoints."""

    def __init__(self, device: str) -> None:
        self.rank, self.world_size, self.device = 0, 1, torch.device(device)
        self.losses: list[float] = []

    def checkpoint(self) -> Path | None:
        """None."""

    def stop_requested(self) -> bool:
        """Never."""
        return False

    def leaving(self) -> bool:
        """Never."""
        return False

    def resumed(self, step: int) -> None:
        """Never."""

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Keep the loss."""
        self.losses.append(metrics["train/loss"])

    def report(self, metrics: Mapping[str, float], save: Any | None) -> None:
        """Nobody is told."""


def prepare(shape: str, steps: int, root: Path) -> WorkerSpec:
    """Write model, tokenizer and instructions of random tokens; return the spec that trains `steps` steps."""
    width, ffn, layers, vocab, length, batch = SHAPES[shape]
    settings = {"hidden_size": width, "intermediate_size": ffn, "num_hidden_layers": layers}
    heads = {"num_attention_heads": width // 16 if shape == "tiny" else width // 64}
    torch.manual_seed(0)
    LlamaForCausalLM(LlamaConfig(**settings, **heads, vocab_size=vocab)).save_pretrained(root / "dense")
    tokenizer = Tokenizer(models.BPE({"<s>": 0, "</s>": 1, "a": 2}, []))
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>")
    fast.save_pretrained(root / "dense")
    _instructions(steps * batch * DOCUMENTS, length // DOCUMENTS, vocab).save(root / "data" / "train")
    _instructions(DOCUMENTS, length // DOCUMENTS, vocab).save(root / "data" / "validation")
    run = Run(
        model=Model(name=str(root / "dense")),
        data=Data(max_length=length),
        method=Dense(),
        optimization=Optimization(batch_size=batch, schedule="constant", warmup_fraction=0),
        evaluation=Evaluation(milestones=(1.0,)),
    )
    execution = Execution(micro_batch=batch, zero_stage=0)
    return WorkerSpec(run, execution, root / "dense", None, root / "data", root / "out")


def _instructions(count: int, length: int, vocab: int) -> Encoded:
    tokens = np.random.default_rng(0).integers(0, vocab, count * length, dtype=np.int32)
    offsets = np.arange(count + 1, dtype=np.int64) * length
    labels = ("",) * count
    return Encoded(tokens, offsets, np.full(count, length // 2, np.int32), labels, labels, labels)


class BareLoop:
    """The same steps in plain PyTorch."""

    def __init__(self, spec: WorkerSpec, batches: Iterator[Batch], device: str) -> None:
        o = spec.run.optimization
        self.model = CausalLoss(starting_model(spec)).to(device).train()
        self.batches, self.clip = batches, o.max_grad_norm
        self.optimizer = torch.optim.AdamW(
            self.model.parameters(),
            lr=o.learning_rate,
            betas=(o.beta1, o.beta2),
            eps=o.epsilon,
            weight_decay=o.weight_decay,
            fused=True,
        )
        self.losses: list[float] = []

    def step(self) -> None:
        """Take one optimizer step."""
        loss = self.model(next(self.batches))[0].mean()
        loss.backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), self.clip)
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.losses.append(float(loss.detach()))


def alone() -> None:
    """Set up the process group of a single worker, as Ray Train would."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    place = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1"}
    os.environ.update(place, MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))


def main() -> None:
    o = parser(__doc__, rounds=15).parse_args()
    alone()
    with tempfile.TemporaryDirectory() as folder:
        spec = prepare("tiny" if o.size == "tiny" else o.device, o.rounds + 1, Path(folder))
        session = LocalSession(o.device)
        trainer = Trainer(spec, session)
        sequences = [trainer.order.sequences(step) for step in range(o.rounds + 1)]
        length = spec.run.data.max_length
        batches = [collate(trainer.encoded, some, length).to(o.device) for some in sequences]
        bare = BareLoop(spec, iter(batches), o.device)
        work: dict[str, Callable[[], object]] = {"raymoe": trainer.step, "bare": bare.step}
        rounds = interleaved(work, o.rounds)
    apart = max(abs(a - b) for a, b in zip(session.losses, bare.losses, strict=True))
    print(f"{o.rounds} steps of {len(sequences[0]) * length} tokens: losses differ by at most {apart:.1e}")
    print("ms: " + ", ".join(f"{name} {1000 * rounds.median(name):.1f}" for name in work))
    ratio = rounds.ratio("raymoe", "bare")
    figure("step_overhead_vs_bare_loop", "bare PyTorch loop", ratio, 1.03, ratio, o.device)


if __name__ == "__main__":
    main()
