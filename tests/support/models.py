"""Tiny dense models on disk, so that the real save and load paths run on a CPU."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerFast

from raymoe.models import families
from raymoe.models.families import Layout

SPECIAL = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>"}
SHAPE: dict[str, Any] = {
    "vocab_size": 264,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "bos_token_id": 256,
    "eos_token_id": 257,
    "pad_token_id": 258,
}
# What distinguishes the families, so that nothing of it can be forgotten unseen: one entry per record of
# raymoe.models.families (tests/models/test_families.py).
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {},
    "mistral": {"sliding_window": 8, "head_dim": 8},
    "qwen2": {},
    "qwen3": {"head_dim": 16, "tie_word_embeddings": True},
    "olmo2": {},
    "granite": {
        "embedding_multiplier": 3.0,
        "attention_multiplier": 0.2,
        "residual_multiplier": 0.6,
        "logits_scaling": 1.7,
        "tie_word_embeddings": True,
    },
    "ernie4_5": {"head_dim": 16},
}
GATINGS = ("straight_through", "renormalized", "softmax")
SPARSE = [(f, g) for f in FAMILIES for g in GATINGS if isinstance(families.FAMILIES[f].sparse[g], Layout)]
"""(family, gating) that a stock sparse class computes."""
IMPOSSIBLE = [(f, g) for f in FAMILIES for g in GATINGS if (f, g) not in SPARSE]


def byte_tokenizer(add_bos: bool) -> PreTrainedTokenizerFast:
    """One token per byte; the beginning of a text is marked if `add_bos`."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: i for i, token in enumerate([*alphabet, *SPECIAL.values()])}
    tokenizer = Tokenizer(models.BPE(vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    if add_bos:
        tokenizer.post_processor = processors.TemplateProcessing(
            single="<s> $A", pair="<s> $A $B", special_tokens=[("<s>", vocabulary["<s>"])]
        )
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **SPECIAL)


def pico_model(family: str, **settings: Any) -> PreTrainedModel:
    """A 2-layer, 32-wide model whose every parameter, norms and biases too, is random and seeded."""
    model = AutoModelForCausalLM.from_config(
        AutoConfig.for_model(family, **{**SHAPE, **FAMILIES[family], **settings})
    )
    generator = torch.Generator().manual_seed(0)
    for name, parameter in model.named_parameters():
        offset = 1.0 if "norm" in name else 0.0
        parameter.data.normal_(offset, 0.2, generator=generator)
    return model.eval()


def write_pico(folder: Path, family: str, **settings: Any) -> Path:
    """Save a pico model and its tokenizer in `folder`."""
    shards = settings.pop("max_shard_size", "5GB")
    pico_model(family, **settings).save_pretrained(folder, max_shard_size=shards)
    byte_tokenizer(add_bos=family in ("llama", "mistral")).save_pretrained(folder)
    return folder
