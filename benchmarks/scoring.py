"""Perplexity scoring against a padded loop, and against the bare forward pass.

    python benchmarks/scoring.py [--device cuda] [--rounds 7]

One round scores the same examples with raymoe (packed, head on the completions only), with the loop that
everyone writes (batches of 8 in the data's order, right-padded, transformers' own logits) and with the packed
model alone; rounds are interleaved and medians compared. Ratios are tokens per second over the peer's.
"""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from harness import figure, interleaved, parser
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

from raymoe.data.instructions import Encoded
from raymoe.data.packing import Batch, collate
from raymoe.models.packed_attention import PACKED_ATTENTION
from raymoe.routers.actors import consecutive_packs
from raymoe.routers.perplexity import score

TOKENS_PER_BATCH = 2048
NAIVE_BATCH = 8
SHAPES = {  # hidden, intermediate, layers, heads, key-value heads, vocabulary, examples
    "cpu": (512, 1408, 4, 8, 4, 8192, 32),
    "cuda": (2048, 5632, 16, 32, 8, 32000, 2048),
    "tiny": (32, 48, 2, 4, 2, 64, 8),
}


def dense_models(shape: str, device: str) -> tuple[PreTrainedModel, PreTrainedModel]:
    """The same random model twice: with packed attention and with transformers' sdpa."""
    hidden, intermediate, layers, heads, kv_heads, vocab, _ = SHAPES[shape]
    config = LlamaConfig(
        hidden_size=hidden,
        intermediate_size=intermediate,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        vocab_size=vocab,
    )
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    torch.manual_seed(0)
    stock = LlamaForCausalLM._from_config(config, attn_implementation="sdpa").to(device, dtype).eval()
    packed = (
        LlamaForCausalLM._from_config(config, attn_implementation=PACKED_ATTENTION).to(device, dtype).eval()
    )
    packed.load_state_dict(stock.state_dict())
    return packed, stock


def instances(shape: str) -> Encoded:
    """Make examples of random tokens with realistic lengths: median 180, a long tail, two thirds prompt."""
    *_, vocab, count = SHAPES[shape]
    generator = np.random.default_rng(0)
    lengths = np.clip(generator.lognormal(np.log(180), 0.6, count).astype(np.int64), 16, 1024)
    offsets = np.concatenate([[0], np.cumsum(lengths)])
    tokens = generator.integers(0, vocab, offsets[-1], dtype=np.int32)
    labels = ("",) * count
    return Encoded(tokens, offsets, (lengths * 2 // 3).astype(np.int32), labels, labels, labels)


def packed_batches(encoded: Encoded) -> list[Batch]:
    packs = consecutive_packs(encoded.lengths, TOKENS_PER_BATCH)
    return [collate(encoded, [np.arange(a, b)], int(encoded.lengths[a:b].sum())) for a, b in packs]


@torch.inference_mode()
def score_packed(model: PreTrainedModel, encoded: Encoded) -> np.ndarray:
    return np.concatenate([score(model, batch.to(model.device))[0] for batch in packed_batches(encoded)])


@torch.inference_mode()
def score_naively(model: PreTrainedModel, encoded: Encoded) -> np.ndarray:
    sums = []
    for start in range(0, len(encoded), NAIVE_BATCH):
        records = range(start, min(start + NAIVE_BATCH, len(encoded)))
        rows = [torch.from_numpy(encoded.example(r).astype(np.int64)) for r in records]
        ids = nn.utils.rnn.pad_sequence(rows, batch_first=True).to(model.device)
        lengths = torch.tensor([len(row) for row in rows], device=model.device)
        prompts = torch.tensor(encoded.prompt_lengths[list(records)], device=model.device)
        position = torch.arange(ids.shape[1], device=model.device)
        logits = model(ids, attention_mask=(position < lengths[:, None]).long(), use_cache=False).logits
        nll = F.cross_entropy(logits[:, :-1].float().flatten(0, 1), ids[:, 1:].flatten(), reduction="none")
        learnt = (position[1:] >= prompts[:, None]) & (position[1:] < lengths[:, None])
        sums.append((nll.view(learnt.shape) * learnt).sum(-1).cpu().numpy())
    return np.concatenate(sums)


@torch.inference_mode()
def forward_only(model: PreTrainedModel, batches: list[Batch]) -> None:
    """Run the layers on packed tokens and the head on completions, without data handling or loss."""
    for batch in batches:
        hidden = model.base_model(
            input_ids=batch.input_ids,
            position_ids=batch.position_ids,
            documents=batch.documents,
            use_cache=False,
        ).last_hidden_state
        model.lm_head(hidden.flatten(0, 1)[batch.targets])


@torch.inference_mode()
def matmuls_only(model: PreTrainedModel, batches: list[Batch]) -> None:
    """Run the floor: every linear layer's GEMM, nothing in between."""
    dtype = model.lm_head.weight.dtype
    for batch in batches:
        inputs: dict[tuple[int, int], torch.Tensor] = {}
        for name, module in model.named_modules():
            if isinstance(module, nn.Linear):
                rows = len(batch.targets) if name == "lm_head" else batch.num_tokens
                shape = (rows, module.in_features)
                x = inputs.setdefault(shape, torch.ones(shape, dtype=dtype, device=model.device))
                module(x)


def main() -> None:
    o = parser(__doc__, rounds=7).parse_args()
    shape = "tiny" if o.size == "tiny" else o.device
    packed, stock = dense_models(shape, o.device)
    encoded = instances(shape)
    batches = [batch.to(o.device) for batch in packed_batches(encoded)]
    difference = np.abs(score_packed(packed, encoded) - score_naively(stock, encoded)).max()
    tokens = int(encoded.offsets[-1])
    print(f"{len(encoded)} examples, {tokens} tokens; scores differ by at most {difference:.1e} nats")
    rounds = interleaved(
        {
            "raymoe": lambda: score_packed(packed, encoded),
            "naive": lambda: score_naively(stock, encoded),
            "forward": lambda: forward_only(packed, batches),
            "matmuls": lambda: matmuls_only(packed, batches),
        },
        o.rounds,
    )
    print("tokens/s: " + ", ".join(f"{name} {tokens / rounds.median(name):.0f}" for name in rounds.seconds))
    floor = rounds.ratio("matmuls", "raymoe")
    for name, peer, described, goal in (
        ("scoring_vs_naive", "naive", f"padded loop, batches of {NAIVE_BATCH}", 3.0),
        ("scoring_vs_forward", "forward", "packed forward pass alone", 0.9),
    ):
        figure(name, described, rounds.ratio(peer, "raymoe"), goal, floor, o.device, more_is_better=True)


if __name__ == "__main__":
    main()
