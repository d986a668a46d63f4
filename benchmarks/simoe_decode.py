"""How much does decoding with SIMoE cost, with its experts merged for the prompt and without merging?

    python benchmarks/simoe_decode.py [--device cuda] [--dtype bfloat16] [--batches 1 8 32]

Greedy decoding with a cache, the same number of tokens for all. Taking turns:

- merged: one prompt, its weights merged once beforehand; against the dense model, with the same weights. The time of
  the merge itself is given in decoding steps of the dense model;
- factored: a batch of different prompts together, every linear y = x W^T + (c * x) W_delta; against merging and
  decoding one prompt at a time;
- floor: the GEMMs of all linear layers of the steps, of both products where it is factored.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any

import torch
from harness import Rounds, figure, interleaved, parser
from step import SHAPES, fast_float32
from torch import Tensor
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM

from raymoe.models.simoe import Interpolated, interpolate

PROMPT, NEW = 64, 32
"""Tokens of a prompt, and tokens decoded after it."""
LIVE = 0.25
"""Fraction of the delta that is not zero."""


class Contest:
    """A dense Llama, a SIMoE of it, and prompts of one batch with their coefficients."""

    def __init__(self, o: argparse.Namespace) -> None:
        self.o = o
        shape = SHAPES["tiny" if o.size == "tiny" else o.device]
        self.width, self.ffn, self.layers, self.vocab, _, _, self.head = shape
        self.layers, self.new = o.layers or self.layers, 4 if o.size == "tiny" else NEW
        self.dense = self.model()
        self.simoe: Interpolated = interpolate(self.model())
        self._random_delta()
        ids = torch.randint(
            0, self.vocab, (max(o.batches), PROMPT), generator=torch.Generator().manual_seed(1)
        )
        self.prompts = ids.to(o.device)
        gates = torch.rand(len(ids), self.simoe.layout.size, generator=torch.Generator().manual_seed(2))
        self.coefficients_SG = gates.to(o.device)

    def model(self) -> LlamaForCausalLM:
        """Return a model with the same random weights at every call."""
        torch.manual_seed(0)
        config = LlamaConfig(
            hidden_size=self.width,
            intermediate_size=self.ffn,
            num_hidden_layers=self.layers,
            num_attention_heads=self.width // self.head,
            num_key_value_heads=self.width // self.head // 2,
            vocab_size=self.vocab,
            dtype=self.o.dtype,
        )
        return LlamaForCausalLM._from_config(config, attn_implementation="sdpa").to(self.o.device).eval()

    def _random_delta(self) -> None:
        generator = torch.Generator().manual_seed(3)
        for layer in self.simoe.layers:
            some = torch.rand(len(layer.delta), generator=generator) < LIVE
            values = 0.02 * torch.randn(layer.delta.shape, generator=generator)
            values[~some] = 0
            layer.delta.data.copy_(values)

    def merged(self, batch: int = 1) -> list[Tensor]:
        """Decode one prompt at a time, its experts merged beforehand."""
        texts = []
        for prompt, c_G in zip(self.prompts[:batch], self.coefficients_SG, strict=False):
            with self.simoe.merged(c_G):
                texts.append(decode(self.simoe.model, prompt[None], self.new))
        return texts

    def only_merge(self) -> None:
        """Merge, as `merged` does before decoding."""
        with self.simoe.merged(self.coefficients_SG[0]):
            pass

    def factored(self, batch: int) -> Tensor:
        """Decode all prompts together."""
        with self.simoe.applied(self.coefficients_SG[:batch], form="factored"):
            return decode(self.simoe.model, self.prompts[:batch], self.new)

    def floor(self, batch: int, products: int) -> Callable[[], None]:
        """Run the GEMMs of all linears, `products` times each: for the prompts, then for every new token."""
        d, f, options = self.width, self.ffn, {"dtype": self.o.dtype, "device": self.o.device}
        shapes = [(d, d), (d // 2, d), (d // 2, d), (d, d), (f, d), (f, d), (d, f)] * self.layers * products
        weights = [torch.ones(shape, **options) for shape in shapes]
        head = torch.ones(self.vocab, d, **options)
        rows = {n: {i: torch.ones(n, i, **options) for i in (d, f)} for n in (batch * PROMPT, batch)}

        def run() -> None:
            for step in range(self.new):
                x = rows[batch if step else batch * PROMPT]
                for w in weights:
                    torch.mm(x[w.shape[1]], w.T)
                torch.mm(rows[batch][d], head.T)

        return run


@torch.inference_mode()
def decode(model: Any, ids: Tensor, new: int) -> Tensor:
    """Decode `new` tokens greedily after every row of `ids`."""
    cache, found = DynamicCache(config=model.config), []
    for _ in range(new):
        ids = model(ids, past_key_values=cache, use_cache=True, logits_to_keep=1).logits.argmax(-1)
        found.append(ids)
    return torch.cat(found, dim=1)


def compare_merged(contest: Contest) -> None:
    """Time one prompt: dense, merged, and the merge alone."""
    o = contest.o

    def merged() -> None:
        decode(contest.simoe.model, contest.prompts[:1], contest.new)

    with contest.simoe.merged(contest.coefficients_SG[0]):
        rounds = interleaved(
            {
                "dense": lambda: decode(contest.dense, contest.prompts[:1], contest.new),
                "merged": merged,
                "floor": contest.floor(1, 1),
            },
            o.rounds,
        )
    merging = interleaved({"merge": contest.only_merge}, o.rounds).median("merge")
    show("1 prompt", rounds)
    figure(
        "simoe_decode_vs_dense",
        "the dense model's decoding",
        rounds.ratio("merged", "dense"),
        1.02,
        rounds.ratio("merged", "floor"),
        o.device,
        dtype=str(o.dtype).removeprefix("torch."),
        merge_in_dense_steps=round(merging / rounds.median("dense") * contest.new, 2),
        merge_ms=round(1000 * merging, 2),
        tokens=contest.new,
    )


def compare_factored(contest: Contest, batch: int) -> None:
    """Time a batch of different prompts: together, or one at a time."""
    o = contest.o
    rounds = interleaved(
        {
            "factored": lambda: contest.factored(batch),
            "merged one by one": lambda: contest.merged(batch),
            "dense": lambda: decode(contest.dense, contest.prompts[:batch], contest.new),
            "floor": contest.floor(batch, 2),
        },
        o.rounds,
    )
    show(f"{batch} prompts", rounds)
    figure(
        "simoe_factored_decode_vs_merging",
        "merging for one prompt after the other",
        rounds.ratio("factored", "merged one by one"),
        1.0,
        rounds.ratio("factored", "floor"),
        o.device,
        dtype=str(o.dtype).removeprefix("torch."),
        batch=batch,
        vs_dense_batch=round(rounds.ratio("factored", "dense"), 4),
        tokens=contest.new,
    )


def show(what: str, rounds: Rounds) -> None:
    print(f"{what}; ms: " + ", ".join(f"{name} {1000 * rounds.median(name):.1f}" for name in rounds.seconds))


def main() -> None:
    options = parser(__doc__, rounds=9)
    options.add_argument("--dtype", choices=("float32", "bfloat16"), help="by default bfloat16 on a GPU")
    options.add_argument("--batches", type=int, nargs="+", default=[1, 8, 32])
    options.add_argument("--layers", type=int)
    o = options.parse_args()
    o.dtype = getattr(torch, o.dtype or ("bfloat16" if o.device == "cuda" else "float32"))
    precision = fast_float32() if o.device == "cpu" else torch.get_float32_matmul_precision()
    contest = Contest(o)
    print(
        f"{contest.layers} layers of {contest.width} x {contest.ffn}, {contest.new} tokens after a prompt of "
        f"{PROMPT}, {o.dtype}, float32 matmul precision {precision}: median of {o.rounds}"
    )
    compare_merged(contest)
    for batch in o.batches:
        compare_factored(contest, batch)


if __name__ == "__main__":
    main()
