"""How much does a training step of the sparse model cost, against the dense one, Mixtral, and its GEMMs alone?

    python benchmarks/step.py [--device cuda] [--dtype bfloat16] [--tokens 256] [--experts 4 8] [--rounds 5]

A step is forward, backward, clipping and torch's fused AdamW on one batch of equally long documents without
padding, in which every token has a loss: the same work for all. Taking turns:

- raymoe: `upcycle_model` on a Llama, top-1, packed attention, completion and load-balance losses;
- dense: the same code with the Llama;
- Mixtral: the same weights in transformers' class, `output_router_logits`, sdpa attention, in a bare loop; with
  `eager` experts and with `grouped_mm`, its fastest that needs no compiler. `batched_mm` copies an expert's
  weights for every token (65 times slower): left out;
- floor: the GEMMs of all linear layers, forward and twice backward, tokens spread evenly over the experts.

AdamW passes over N times the FFN's parameters, whatever the tokens: `ratio_before_update` is without it and the
clipping. In bfloat16 parameters and optimizer state are both bfloat16, for all. A GPU's default depth is
divided by the experts, so that the three sparse models fit into its memory together.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from harness import Rounds, figure, interleaved, parser
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM, MixtralConfig, MixtralForCausalLM

from raymoe.data.instructions import Encoded
from raymoe.data.packing import Batch, collate
from raymoe.methods import SparseUpcycling
from raymoe.models.causal_loss import LOAD_BALANCE, CausalLoss
from raymoe.models.moe import upcycle_model
from raymoe.models.packed_attention import PACKED_ATTENTION

SHAPES = {  # width, FFN width, layers, vocabulary, tokens, tokens of a document, width of a head
    "cpu": (512, 1408, 4, 2048, 2048, 128, 64),
    "cuda": (2048, 5632, 16, 32000, 8192, 512, 64),
    "tiny": (32, 48, 2, 64, 64, 16, 8),
}
ALPHA = 0.01
GOALS = {"float32": 1.08, "bfloat16": 1.10}


class Contestant:
    """A model with its optimizer; `loss` returns a scalar for the contest's batch."""

    def __init__(self, model: nn.Module, loss: Callable[[], Tensor]) -> None:
        self.model, self.loss = model, loss
        self.optimizer = torch.optim.AdamW(model.parameters(), lr=1e-7, fused=True)

    def step(self) -> None:
        """Run forward and backward; gradients stay, so that `update` alone can be timed too."""
        self.optimizer.zero_grad()
        torch.autograd.backward(self.loss())
        self.update()

    def update(self) -> None:
        """Clip the gradients and take the optimizer's step."""
        nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()


class Contest:
    """The contestants of one shape; no two share a tensor."""

    def __init__(self, o: argparse.Namespace) -> None:
        self.o = o
        shape = SHAPES["tiny" if o.size == "tiny" else o.device]
        self.width, self.ffn, layers, self.vocab, tokens, self.document, self.head = shape
        self.tokens = o.tokens or tokens
        self.layers = o.layers or (max(1, 4 * layers // max(4, *o.experts)) if o.device == "cuda" else layers)
        self.batch = self._batch().to(o.device)

    def _batch(self) -> Batch:
        """Make one packed sequence of equally long documents, the first token of each being its prompt."""
        count = self.tokens // self.document
        tokens = np.random.default_rng(0).integers(0, self.vocab, count * self.document, dtype=np.int32)
        offsets = np.arange(count + 1, dtype=np.int64) * self.document
        labels = ("",) * count
        encoded = Encoded(tokens, offsets, np.ones(count, np.int32), labels, labels, labels)
        return collate(encoded, [np.arange(count)], count * self.document)

    def _settings(self) -> dict[str, Any]:
        return {
            "hidden_size": self.width,
            "intermediate_size": self.ffn,
            "num_hidden_layers": self.layers,
            "num_attention_heads": self.width // self.head,
            "num_key_value_heads": self.width // self.head // 2,
            "vocab_size": self.vocab,
            "rms_norm_eps": 1e-6,
            "rope_parameters": {"rope_type": "default", "rope_theta": 10_000.0},
            "use_cache": False,
        }

    def _ready(self, model: nn.Module) -> nn.Module:
        return model.to(self.o.device).train()

    def dense_model(self) -> LlamaForCausalLM:
        """Return a model with the same random weights at every call."""
        torch.manual_seed(0)
        config = LlamaConfig(**self._settings(), dtype=self.o.dtype)
        return LlamaForCausalLM._from_config(config, attn_implementation=PACKED_ATTENTION)

    def dense(self) -> Contestant:
        """Build the contestant on the same code path without experts."""
        causal = self._ready(CausalLoss(self.dense_model()))
        return Contestant(causal, lambda: causal(self.batch)[0].mean())

    def raymoe(self, num_experts: int) -> Contestant:
        """Build raymoe's contestant, its loss formed as in `raymoe.train.worker`."""
        rows = torch.randn(self.layers, num_experts, self.width) * 0.02
        model = upcycle_model(self.dense_model(), rows, SparseUpcycling(num_experts=num_experts, top_k=1))
        causal = self._ready(CausalLoss(model))

        def loss() -> Tensor:
            nll, penalties, _ = causal(self.batch)
            total: Tensor = nll.sum() / len(nll) + ALPHA * penalties[LOAD_BALANCE]
            return total

        return Contestant(causal, loss)

    def mixtral(self, num_experts: int, experts_implementation: str, weights: nn.Module) -> Contestant:
        """Build stock Mixtral with a copy of raymoe's weights, so that both route alike."""
        config = MixtralConfig(
            **self._settings(),
            head_dim=self.head,
            num_local_experts=num_experts,
            num_experts_per_tok=1,
            output_router_logits=True,
            router_aux_loss_coef=ALPHA,
            dtype=self.o.dtype,
        )
        model = MixtralForCausalLM._from_config(
            config, attn_implementation="sdpa", experts_implementation=experts_implementation
        )
        model.load_state_dict(weights.state_dict())
        self._ready(model)
        ids = self.batch.input_ids.view(-1, self.document)
        return Contestant(model, lambda: model(input_ids=ids, labels=ids).loss)

    def floor(self, num_experts: int) -> Callable[[], None]:
        """Build the floor, with one layer's operands for all layers: only the GEMMs are timed."""
        options: Any = {"dtype": self.o.dtype, "device": self.o.device}
        shapes = list(self._products(num_experts))
        operands = [
            (times, torch.ones(s, n, **options), torch.ones(m, n, **options), torch.ones(s, m, **options))
            for times, s, n, m in shapes
        ]

        def run() -> None:
            for times, x, w, dy in operands:
                for _ in range(times):
                    torch.mm(x, w.T)
                    torch.mm(dy, w)
                    torch.mm(dy.T, x)

        return run

    def _products(self, num_experts: int) -> Iterator[tuple[int, int, int, int]]:
        """Return (times, rows, inputs, outputs) of every linear layer."""
        d, f, s = self.width, self.ffn, self.batch.num_tokens
        for outputs in (d, d // 2, d // 2, d):  # q, k, v, o
            yield self.layers, s, d, outputs
        yield self.layers * num_experts, s // num_experts, d, 2 * f
        yield self.layers * num_experts, s // num_experts, f, d
        yield 1, len(self.batch.targets), d, self.vocab


def fast_float32() -> str:
    """Set matmul precision to `medium` where that is as exact as float32; returns the precision set."""
    generator = torch.Generator().manual_seed(0)
    x, w, dy = (torch.randn(512, 512, generator=generator) for _ in range(3))
    torch.set_float32_matmul_precision("medium")
    pairs = ((x, w.T), (dy, w), (dy.T, x))
    if any(_error(a, b) > 1e-6 for a, b in pairs):
        torch.set_float32_matmul_precision("highest")
    return torch.get_float32_matmul_precision()


def _error(a: Tensor, b: Tensor) -> float:
    exact = a.double() @ b.double()
    return float(((a @ b).double() - exact).norm() / exact.norm())


def contestants(contest: Contest, num_experts: int) -> dict[str, Contestant]:
    raymoe = contest.raymoe(num_experts)
    weights = raymoe.model.model
    assert isinstance(weights, nn.Module)
    return {
        "raymoe": raymoe,
        "dense": contest.dense(),
        **{name: contest.mixtral(num_experts, name, weights) for name in ("eager", "grouped_mm")},
    }


def compare(contest: Contest, num_experts: int) -> None:
    """Time all contestants and print their figures."""
    field = contestants(contest, num_experts)
    losses = {name: float(c.loss().detach()) for name, c in field.items()}
    work: dict[str, Callable[[], object]] = {"floor": contest.floor(num_experts)}
    for name, contestant in field.items():
        work |= {name: contestant.step, f"{name} update": contestant.update}
    rounds = interleaved(work, contest.o.rounds)
    print(f"{num_experts} experts; loss: " + ", ".join(f"{name} {loss:.5f}" for name, loss in losses.items()))
    print("  ms: " + ", ".join(f"{name} {1000 * rounds.median(name):.1f}" for name in work))
    report(contest, num_experts, rounds)


def report(contest: Contest, num_experts: int, rounds: Rounds) -> None:
    o = contest.o
    dtype = str(o.dtype).removeprefix("torch.")
    before = Rounds(
        {name: _before_update(rounds, name) for name in ("raymoe", "dense", "eager", "grouped_mm")}
    )
    peers = {
        "moe_step_vs_dense": ("dense", "the dense step", GOALS[dtype]),
        "moe_step_vs_mixtral_eager": ("eager", "transformers Mixtral, eager", 1.0),
        "moe_step_vs_mixtral_grouped_mm": ("grouped_mm", "transformers Mixtral, grouped_mm", 1.0),
    }
    for name, (peer, described, goal) in peers.items():
        figure(
            name,
            described,
            rounds.ratio("raymoe", peer),
            goal,
            rounds.ratio("raymoe", "floor"),
            o.device,
            ratio_before_update=round(before.ratio("raymoe", peer), 4),
            dtype=dtype,
            experts=num_experts,
            tokens=contest.batch.num_tokens,
        )


def _before_update(rounds: Rounds, name: str) -> list[float]:
    updates = rounds.seconds[f"{name} update"]
    return [step - update for step, update in zip(rounds.seconds[name], updates, strict=True)]


def main() -> None:
    options = parser(__doc__)
    options.add_argument("--dtype", choices=tuple(GOALS), help="by default bfloat16 on a GPU, else float32")
    options.add_argument("--tokens", type=int, help="tokens of a step")
    options.add_argument("--experts", type=int, nargs="+", default=[4, 8])
    options.add_argument("--layers", type=int)
    o = options.parse_args()
    o.dtype = getattr(torch, o.dtype or ("bfloat16" if o.device == "cuda" else "float32"))
    contest = Contest(o)
    precision = fast_float32() if o.device == "cpu" else torch.get_float32_matmul_precision()
    print(
        f"{contest.layers} layers of {contest.width} x {contest.ffn}, {contest.batch.num_tokens} tokens in "
        f"documents of {contest.document}, {o.dtype}, float32 matmul precision {precision}: median of {o.rounds}"
    )
    for num_experts in o.experts:
        compare(contest, num_experts)


if __name__ == "__main__":
    main()
