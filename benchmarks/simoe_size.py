"""How large is SIMoE, and how much memory does its training take, against sparse upcycling with 4 experts, top-2?

    python benchmarks/simoe_size.py [--dtypes float32 bfloat16] [--rounds 1]

First by arithmetic, for Llama-3.2-3B and Llama-3-8B with M = 8 and sparsity 0.75, next to the figures of SIMoE's
page (size 42.7% and 29.3% below the upcycled model's active parameters, peak memory 27.8% and 31.8% lower). Then
measured: peak memory of training steps of a Llama of 45 million parameters on this machine's CPU, each model
in its own process, minus the level before the model is built. A step is forward, backward, clipping
and AdamW; in bfloat16 with weights and moments in float32 beside the bfloat16 weights, as in the training engine.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import statistics
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import step
import torch
from harness import figure, parser
from simoe_step import Documents, Interpolating
from step import Contestant
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from raymoe.analysis.size import sizes
from raymoe.methods import SparseInterpolation, SparseUpcycling
from raymoe.models.causal_loss import LOAD_BALANCE, CausalLoss
from raymoe.models.gates import gate_layout
from raymoe.models.moe import upcycle_model

METHOD = SparseInterpolation(num_experts=8, sparsity_target=0.75)
UPCYCLED = {"num_experts": 4, "top_k": 2}
SHAPES: dict[str, dict[str, Any]] = {
    "Llama-3.2-3B": {
        "hidden_size": 3072,
        "intermediate_size": 8192,
        "num_hidden_layers": 28,
        "num_attention_heads": 24,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "vocab_size": 128_256,
        "tie_word_embeddings": True,
    },
    "Llama-3-8B": {
        "hidden_size": 4096,
        "intermediate_size": 14_336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "vocab_size": 128_256,
        "tie_word_embeddings": False,
    },
}
PAGE_SIZE = {"Llama-3.2-3B": 0.427, "Llama-3-8B": 0.293}
"""SIMoE's size, as a fraction below the upcycled model's active parameters."""
PAGE_MEMORY = {"Llama-3.2-3B": 0.278, "Llama-3-8B": 0.318}
"""Its peak memory in training, as a fraction below the upcycled model's."""
SIZE_GOAL, MEMORY_GOAL = 0.71, 0.73
MEASURED = (768, 2048, 6, 4096, 512, 128, 64)
"""Shape of the trained model, as in `step.SHAPES`."""
STEPS = 3


def arithmetic(name: str) -> None:
    """Print size and training state of one of `SHAPES`."""
    config, device = LlamaConfig(**SHAPES[name]), "arithmetic"
    found = sizes(config, METHOD, precision="bfloat16", **UPCYCLED)
    simoe, upcycled = found["simoe"], found["upcycled"]
    print(f"{name}, billions of parameters (active) and gigabytes of training state in bfloat16:")
    for label, each in found.items():
        print(
            f"  {label:9}{each['total'] / 1e9:7.2f} ({each['active'] / 1e9:.2f}){each['training_bytes'] / 1e9:7.1f}"
        )
    print(f"  {reproduced(name, found)}")
    figure(
        "simoe_size_vs_upcycled_active",
        "active parameters of the upcycled model",
        simoe["total"] / upcycled["active"],
        SIZE_GOAL,
        None,
        device,
        model=name,
        page=round(1 - PAGE_SIZE[name], 3),
        total=simoe["total"],
        upcycled_active=upcycled["active"],
        vs_upcycled_total=round(simoe["total"] / upcycled["total"], 4),
    )
    figure(
        "simoe_state_vs_upcycled",
        "training state of the upcycled model",
        simoe["training_bytes"] / upcycled["training_bytes"],
        MEMORY_GOAL,
        None,
        device,
        model=name,
        page=round(1 - PAGE_MEMORY[name], 3),
        vs_dense=round(simoe["training_bytes"] / found["dense"]["training_bytes"], 4),
        bytes=simoe["training_bytes"],
    )


def delta_size(name: str) -> int:
    """Return the number of parameters of theta_delta."""
    with torch.device("meta"):
        return gate_layout(LlamaForCausalLM(LlamaConfig(**SHAPES[name]))).num_parameters


def reproduced(name: str, found: dict[str, dict[str, int]]) -> str:
    """Say which sparsity would give the page's figure."""
    dense, simoe, delta = found["dense"]["total"], found["simoe"]["total"], delta_size(name)
    live = round((1 - METHOD.sparsity_target) * delta)
    asked = (1 - PAGE_SIZE[name]) * found["upcycled"]["active"]
    words = f"the page's {PAGE_SIZE[name]:.1%} below is {asked / 1e9:.2f}"
    if asked < dense:
        return f"{words}, fewer than the dense model's: no sparsity gives it"
    return f"{words}: sparsity {1 - (asked - simoe + live) / delta:.3f} gives it"


# ---- measured, in processes of their own


class MasterAdamW:
    """AdamW on float32 copies of half-precision `parameters`, whose gradients are released one by one."""

    def __init__(self, parameters: Iterable[nn.Parameter]) -> None:
        self.parameters = list(parameters)
        self.masters = [p.detach().float().requires_grad_() for p in self.parameters]
        self.optimizer = torch.optim.AdamW(self.masters, lr=1e-7, fused=True)

    def zero_grad(self) -> None:
        """Release all gradients."""
        for p in (*self.parameters, *self.masters):
            p.grad = None

    @torch.no_grad()
    def step(self) -> None:
        """Update the copies and round them."""
        for p, master in zip(self.parameters, self.masters, strict=True):
            master.grad, p.grad = None if p.grad is None else p.grad.float(), None
        self.optimizer.step()
        for p, master in zip(self.parameters, self.masters, strict=True):
            p.copy_(master)
        self.zero_grad()


def contestant(contest: Documents, name: str) -> Contestant:
    """Build `dense`, `upcycled`, or `simoe` in one of its forms."""
    if name == "dense":
        made = contest.dense()
    elif name == "upcycled":
        made = upcycled(contest)
    else:
        made = Interpolating(contest, "merged" if name == "simoe merged" else "factored", 1.0)
    if contest.o.dtype == torch.bfloat16:
        trained = [p for p in made.model.parameters() if p.requires_grad]
        made.optimizer = MasterAdamW(trained)  # type: ignore[assignment]
    return made


def upcycled(contest: Documents) -> Contestant:
    """Return the loss, formed as in `raymoe.train.worker`."""
    rows = torch.randn(contest.layers, UPCYCLED["num_experts"], contest.width) * 0.02
    causal = CausalLoss(upcycle_model(contest.dense_model(), rows, SparseUpcycling(**UPCYCLED))).train()

    def loss() -> Tensor:
        nll, penalties, _ = causal(contest.batch)
        total: Tensor = nll.mean() + step.ALPHA * penalties[LOAD_BALANCE]
        return total

    return Contestant(causal, loss)


def measure(o: argparse.Namespace) -> None:
    """Print, in the child process, the peak of training steps above the level before, and the trained parameters."""
    if o.size != "tiny":
        step.SHAPES["cpu"] = MEASURED
    o.dtype, o.experts, o.tokens, o.layers = getattr(torch, o.dtypes[0]), [4], None, None
    o.num_experts, o.log_alpha = METHOD.num_experts, 40.0
    contest = Documents(o, 128)
    before = memory("VmRSS")
    made = contestant(contest, o.contestant)
    Path("/proc/self/clear_refs").write_text("5")
    for _ in range(STEPS):
        made.step()
    trained = sum(p.numel() for p in made.model.parameters() if p.requires_grad)
    print(json.dumps({"bytes": memory("VmHWM") - before, "trained": trained}))


def memory(key: str) -> int:
    """Return this process's memory in bytes: `VmRSS` now, `VmHWM` the peak since it was reset."""
    found = re.search(rf"^{key}:\s+(\d+) kB$", Path("/proc/self/status").read_text(), re.MULTILINE)
    assert found is not None
    return 1024 * int(found[1])


def peak(o: argparse.Namespace, name: str, dtype: str) -> int:
    """Return the median over rounds of a contestant's peak, in bytes."""
    command = [sys.executable, __file__, "--contestant", name, "--dtypes", dtype, "--size", o.size]
    environment = os.environ | {"MALLOC_TRIM_THRESHOLD_": "0", "MALLOC_MMAP_THRESHOLD_": "65536"}
    peaks: list[int] = []
    for _ in range(o.rounds):
        done = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
        peaks.append(json.loads(done.stdout.splitlines()[-1])["bytes"])
    return int(statistics.median_low(peaks))


def compare(o: argparse.Namespace, dtype: str) -> None:
    """Measure the peak memory of all contestants in one dtype."""
    names = ("dense", "upcycled", "simoe", "simoe merged")
    peaks = {name: peak(o, name, dtype) for name in names}
    print(f"{dtype}, MB at the peak: " + ", ".join(f"{name} {p / 1e6:.0f}" for name, p in peaks.items()))
    for name in names[2:]:
        figure(
            "simoe_peak_memory_vs_upcycled",
            "peak memory of training the upcycled model",
            peaks[name] / peaks["upcycled"],
            MEMORY_GOAL,
            None,
            "cpu",
            form=name.partition(" ")[2] or "factored",
            dtype=dtype,
            vs_dense=round(peaks[name] / peaks["dense"], 4),
            bytes=peaks[name],
        )


def main() -> None:
    options = parser(__doc__, rounds=1)
    options.add_argument(
        "--dtypes", nargs="*", default=["float32", "bfloat16"], help="to measure in; none: arithmetic alone"
    )
    options.add_argument("--contestant", help=argparse.SUPPRESS)
    o = options.parse_args()
    if o.contestant:
        measure(o)
        return
    for name in SHAPES:
        arithmetic(name)
    for dtype in o.dtypes:
        compare(o, dtype)


if __name__ == "__main__":
    main()
