"""Greedy generation in batches, for evaluation."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from transformers import GenerationConfig, PreTrainedTokenizerBase

from raymoe.models.packed_attention import PACKED_ATTENTION


def generate(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[np.ndarray],
    max_new_tokens: int,
    synced: bool = False,
    stop: Collection[int] = (),
) -> list[str]:
    """Complete tokenised prompts greedily; returns text without special tokens.

    A completion ends before the tokenizer's end of sequence, any of the model's own, or a token in `stop` (such as
    a chat's end of turn). The model's other generation settings are ignored.
    """
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    width = max(len(p) for p in prompts)
    ids = torch.full((len(prompts), width), pad, dtype=torch.long)
    mask = torch.zeros_like(ids)
    for row, prompt in enumerate(prompts):
        ids[row, width - len(prompt) :] = torch.from_numpy(np.asarray(prompt, dtype=np.int64))
        mask[row, width - len(prompt) :] = 1
    ends = _end_tokens(model, tokenizer, stop)
    greedy = GenerationConfig(
        max_new_tokens=max_new_tokens,
        do_sample=False,
        num_beams=1,
        use_cache=True,
        eos_token_id=ends or None,
        pad_token_id=pad,
    )
    with _generating(model, greedy):
        out = model.generate(
            ids.to(model.device),
            attention_mask=mask.to(model.device),
            generation_config=greedy,
            synced_gpus=synced,
        )
    rows = [_before(row, ends) for row in out[:, width:].tolist()]
    return [str(tokenizer.decode(row, skip_special_tokens=True)) for row in rows]


@contextmanager
def _generating(model: Any, settings: GenerationConfig) -> Iterator[None]:
    """Give `model` padded attention and only `settings`: `generate` would fill gaps from the model's own."""
    own, packed = model.generation_config, model.config._attn_implementation == PACKED_ATTENTION
    if packed:
        model.set_attn_implementation("sdpa")
    model.generation_config = settings
    try:
        yield
    finally:
        model.generation_config = own
        if packed:
            model.set_attn_implementation(PACKED_ATTENTION)


def _end_tokens(model: Any, tokenizer: PreTrainedTokenizerBase, stop: Collection[int]) -> list[int]:
    own = model.generation_config.eos_token_id
    own = own if isinstance(own, list) else [own]
    return sorted({t for t in (tokenizer.eos_token_id, *own, *stop) if t is not None})


def _before(tokens: list[int], ends: Collection[int]) -> list[int]:
    return tokens[: next((i for i, token in enumerate(tokens) if token in ends), len(tokens))]
