"""Packed attention: an attention implementation for transformers models, over packed documents.

    model = AutoModelForCausalLM.from_pretrained(folder, attn_implementation=PACKED_ATTENTION)
    model(input_ids=..., position_ids=..., documents=((0, 17), (17, 40)))

Every document (packed example) attends to itself alone, causally, so it gets the same result packed as alone.
No mask is built: transformers makes none for a name that its mask interface doesn't know, and the documents'
bounds reach every layer as Python integers. A padding mask is therefore ignored: generate from padded prompts
with another implementation (`model.set_attn_implementation("sdpa")`).

Shapes: W packed sequences, T tokens of a sequence, H heads, K key-value heads, E head width, C completion tokens.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import lru_cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import AttentionInterface, PreTrainedModel

from raymoe.data.packing import Batch, Documents
from raymoe.models.families import logits_divisor

PACKED_ATTENTION = "raymoe_packed"

LOGITS_PER_CHUNK = 2**26
"""LM head logits that exist at a time: 256 MiB in float32."""


def packed_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None = None,
    dropout: float = 0.0,
    scaling: float | None = None,
    sliding_window: int | None = None,
    documents: Documents | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Attend causally within each document; transformers calls this in every layer.

    Args:
        module: the calling attention layer; its `sliding_window`, if any, applies when none is passed:
            transformers' Qwen2-MoE leaves the window to the mask.
        query: [W, H, T, E].
        key: [W, K, T, E]; longer than the query only with a cache and without documents.
        value: like `key`.
        attention_mask: unused, always None (see the module's docstring).
        dropout: probability, 0 outside training.
        scaling: factor on the scores, by default 1 / sqrt(E).
        sliding_window: number of keys that a token sees, itself included; None: all.
        documents: (start, end) of each document in the flattened [W * T] tokens, ascending, not overlapping;
            tokens outside documents are padding and get zeros. None: each sequence is one document.
        kwargs: whatever else transformers passes.

    Returns:
        [W, T, H, E], and None for the attention weights.
    """
    # a layer without a window has none of its own either: no attribute, None or 0
    window: int | None = sliding_window or getattr(module, "sliding_window", None) or None
    attend: Attend = lambda q, k, v: _causal(q, k, v, dropout, scaling, window)  # noqa: E731
    if documents is None:
        return attend(query, key, value).transpose(1, 2).contiguous(), None
    q, k, v = (_flatten_sequences(x) for x in (query, key, value))
    if _varlen_serves(q) and not dropout:
        output = _varlen(q, k, v, documents, scaling, window)
    else:
        output = _per_document(q, k, v, documents, attend)
    return output.view(query.shape[0], query.shape[2], *output.shape[1:]), None


AttentionInterface.register(PACKED_ATTENTION, packed_attention)

Attend = Callable[[Tensor, Tensor, Tensor], Tensor]


def _flatten_sequences(x: Tensor) -> Tensor:
    """Reshape [W, H, T, E] to [1, H, W * T, E]; free for one sequence."""
    return x.transpose(0, 1).reshape(1, x.shape[1], -1, x.shape[3])


def _segments(documents: Documents, total: int) -> list[tuple[int, bool]]:
    """Return (length, is a document) of the documents and of the gaps between them, `total` tokens in all."""
    segments, position = [], 0
    for start, end in documents:
        if start > position:
            segments.append((start - position, False))
        segments.append((end - start, True))
        position = end
    return segments + ([(total - position, False)] if total > position else [])


def _per_document(query: Tensor, key: Tensor, value: Tensor, documents: Documents, attend: Attend) -> Tensor:
    """Attend with one call per document: [1, H, N, E] -> [N, H, E].

    `split` and `cat` rather than slices: their backward is one copy, each slice's is a whole tensor of zeros.
    """
    segments = _segments(documents, query.shape[2])
    lengths = [length for length, _ in segments]
    parts = zip(segments, *(torch.split(x, lengths, dim=2) for x in (query, key, value)), strict=True)
    outputs = [attend(q, k, v) if real else torch.zeros_like(q) for (_, real), q, k, v in parts]
    return torch.cat([x.transpose(1, 2) for x in outputs], dim=1)[0]


def _causal(
    query: Tensor, key: Tensor, value: Tensor, dropout: float, scaling: float | None, window: int | None
) -> Tensor:
    """Attend causally from [B, H, n, E] to [B, K, m, E]; the last query sees the last key."""
    n, m = query.shape[2], key.shape[2]
    windowed = window is not None and m > window
    mask = _band(n, m, window if windowed else None, query.device) if windowed or 1 < n != m else None
    gqa = key.shape[1] != query.shape[1]
    return F.scaled_dot_product_attention(
        query, key, value, mask, dropout, is_causal=mask is None and n > 1, scale=scaling, enable_gqa=gqa
    )


def _band(n: int, m: int, window: int | None, device: torch.device) -> Tensor:
    """Return the mask [n, m], true where query i (at position i + m - n) sees key j: j <= i and i - j < window."""
    distance = torch.arange(m - n, m, device=device)[:, None] - torch.arange(m, device=device)
    return (distance >= 0) & (distance < (window or m))


# torch's flash attention over documents of varying length: CUDA, half precision.


def _varlen_function() -> Callable[..., Tensor] | None:
    try:
        from torch.nn.attention.varlen import varlen_attn
    except ImportError:
        return None
    known = inspect.signature(varlen_attn).parameters
    return varlen_attn if {"scale", "window_size", "enable_gqa"} <= known.keys() else None  # type: ignore[return-value]


_VARLEN = _varlen_function()


def _varlen_serves(query: Tensor) -> bool:
    half = query.dtype in (torch.bfloat16, torch.float16)
    width = query.shape[-1]
    return _VARLEN is not None and query.is_cuda and half and width % 8 == 0 and width <= 256


def _varlen(
    query: Tensor, key: Tensor, value: Tensor, documents: Documents, scaling: float | None, window: int | None
) -> Tensor:
    """Attend in one kernel for all documents: [1, H, N, E] -> [N, H, E]. Gaps see themselves and are zeroed."""
    assert _VARLEN is not None
    bounds, real, longest = _varlen_bounds(documents, query.shape[2], query.device)
    q, k, v = (x[0].transpose(0, 1) for x in (query, key, value))
    left = window - 1 if window is not None and longest > window else -1
    gqa = key.shape[1] != query.shape[1]
    output = _VARLEN(
        q, k, v, bounds, bounds, longest, longest, scale=scaling, window_size=(left, 0), enable_gqa=gqa
    )
    return output if real is None else output.masked_fill(~real[:, None, None], 0)


@lru_cache(maxsize=4)
def _varlen_bounds(
    documents: Documents, total: int, device: torch.device
) -> tuple[Tensor, Tensor | None, int]:
    """Return the bounds of all segments [S + 1], which tokens are real [total] (None: all), the longest segment.

    Cached, so that they are copied to the device once per batch, not once per layer.
    """
    segments = _segments(documents, total)
    lengths = torch.tensor([0, *(length for length, _ in segments)])
    bounds = lengths.cumsum(0).to(torch.int32).pin_memory().to(device, non_blocking=True)
    longest = int(lengths.max())
    if all(real for _, real in segments):
        return bounds, None, longest
    real = torch.tensor([r for _, r in segments]).repeat_interleave(lengths[1:])
    return bounds, real.pin_memory().to(device, non_blocking=True), longest


# The loss over a packed batch.


def completion_losses(model: PreTrainedModel, batch: Batch) -> Tensor:
    """Return the negative log-likelihood of every completion token of a packed batch, in order: float32 [C].

    Only positions that predict a completion token reach the LM head, and only one chunk of their logits exists at
    a time, in the backward pass too (it recomputes chunks). The number of chunks depends on the batch's shape
    alone, as under ZeRO-3 all workers must use the head equally often.
    """
    hidden = model.base_model(
        input_ids=batch.input_ids,
        position_ids=batch.position_ids,
        attention_mask=None,
        use_cache=False,
        documents=batch.documents,
    ).last_hidden_state
    hidden = hidden.flatten(0, 1).index_select(0, batch.targets)
    labels = batch.labels.flatten().index_select(0, batch.targets)
    chunks = -(-batch.input_ids.numel() * model.config.vocab_size // LOGITS_PER_CHUNK)
    return token_losses(model.get_output_embeddings(), hidden, labels, chunks, logits_divisor(model.config))


def token_losses(
    head: nn.Module, hidden: Tensor, labels: Tensor, chunks: int = 1, divisor: float = 1.0
) -> Tensor:
    """Return the cross-entropy [C] (float32) of `head` on `hidden` [C, D] and `labels` [C], in `chunks` parts.

    The head's output is divided by `divisor`.
    """
    if chunks == 1:
        return _chunk_losses(head, hidden, labels, divisor)
    parts = zip(hidden.tensor_split(chunks), labels.tensor_split(chunks), strict=True)
    if torch.is_grad_enabled():
        return torch.cat(
            [checkpoint(_chunk_losses, head, h, y, divisor, use_reentrant=False) for h, y in parts]
        )
    return torch.cat([_chunk_losses(head, h, y, divisor) for h, y in parts])


def _chunk_losses(head: nn.Module, hidden: Tensor, labels: Tensor, divisor: float) -> Tensor:
    logits = head(hidden)
    if divisor != 1:  # in the model's dtype, as transformers does
        logits = logits / divisor
    return F.cross_entropy(logits.float(), labels, reduction="none")
