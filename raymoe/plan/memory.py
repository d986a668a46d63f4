"""Bytes on one GPU while training: weights, gradients, optimizer, activations, buffers.

`Activations` and `Setting` say what the estimate is made of; benchmarks/plan_memory.py compares it with what training
allocates.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from itertools import product
from typing import Any

from transformers import PreTrainedModel

from raymoe.analysis.size import WEIGHT_BYTES, Counts, training_state
from raymoe.config import RunFile
from raymoe.methods import MethodConfig
from raymoe.models.families import family_of
from raymoe.models.gates import gate_layout
from raymoe.models.packed_attention import LOGITS_PER_CHUNK

USABLE = 0.9
"""Share of a GPU's memory that a plan fills; the rest is left to CUDA's context, NCCL and fragmentation."""
BUCKET = 500_000_000
"""DeepSpeed's default `reduce_bucket_size`, in elements: the buffer of gradients in flight, allocated whole for any
model."""
LIVE = 1_000_000_000
"""DeepSpeed's defaults under ZeRO-3, in elements: weights gathered at a time (`stage3_max_live_parameters`) and
updated at a time (`sub_group_size`)."""
TOKENS_PER_DOCUMENT = 256
"""Assumed to count SIMoE's coefficients, one row per document."""


@dataclass(frozen=True)
class Activations:
    """Bytes of activations of one micro batch, per token as below (D = hidden size, F = FFN width, A = heads x head
    width, K likewise of key-value heads, N = experts, k = top_k, G = gates, V = vocabulary, b = bytes of the
    precision); all tokens count as completion.

    kept, for the backward pass, of every layer; with checkpointing only its input, b D:
        norm: 4 D (its input in fp32) + b D (normalised; 4 D where the family scales in fp32) + b D (what the linears
            behind it read: it, scaled; before a norm that comes after them, the residual). Two in a layer; in
            some families also of query and key, which then are what attention keeps.
        attention: b (3 A + 2 K): query, key, value, output, output in the order of tokens; no score matrices.
        FFN: 4 b F: gate, its activation, up, their product. Experts: k times that, 2 k b D for what is dispatched and
            what comes back, 12 N for the router. SIMoE's linears keep what dense ones do; its coefficients take
            8 G per document, gradients included.
    passing, the larger of what exists beside it
        at the loss: the last norm and its share that the head sees, and 12 V (fp32 log-probabilities, their gradient
            and the logits'), of LOGITS_PER_CHUNK logits at most;
        in the first layer of the backward pass: b (2 F + D), the gradients inside its FFN, and that of its
            largest weight; with checkpointing also the layer, computed again.
    """

    kept: int
    passing: int

    @property
    def total(self) -> int:
        """Bytes at the peak."""
        return self.kept + self.passing


@dataclass(frozen=True)
class Setting:
    """One way to train, and the bytes it takes on one GPU.

    The peak is either in the backward pass (buffers and activations) or in the update.
    """

    zero_stage: int
    offload: str
    activation_checkpointing: bool
    micro_batch: int
    state: int
    """Weights, gradients and optimizer state."""
    buffers: int
    """DeepSpeed's bucket of gradients; under ZeRO-3 also weights gathered from other GPUs."""
    activations: int
    update: int
    """Copies that the optimizer's step makes of its gradients."""

    @property
    def total(self) -> int:
        """Bytes on one GPU at the peak."""
        return self.state + max(self.buffers + self.activations, self.update)

    def as_json(self) -> dict[str, Any]:
        """Return it as plain values."""
        return {**asdict(self), "total": self.total}


def activations(
    model: PreTrainedModel,
    method: MethodConfig,
    precision: str,
    tokens: int,
    checkpointing: bool = False,
) -> Activations:
    """Return those of one micro batch of `tokens` tokens of the dense `model` (on any device) under `method`."""
    c, b = model.config, WEIGHT_BYTES[precision]
    layer = tokens * _layer_bytes(model, method, b)
    kept = c.num_hidden_layers * (tokens * b * c.hidden_size if checkpointing else layer)
    if method.interpolates:
        kept += -(-tokens // TOKENS_PER_DOCUMENT) * gate_layout(model).size * 8
    chunks = -(-tokens * c.vocab_size // LOGITS_PER_CHUNK)
    head = tokens * (4 + 3 * b) * c.hidden_size + 12 * -(-tokens * c.vocab_size // chunks)
    experts, times = method.ffns_per_layer, method.ffns_per_token
    backward = tokens * b * (2 * times * c.intermediate_size + c.hidden_size)
    backward += 2 * experts * c.intermediate_size * c.hidden_size * b // (1 if experts > 1 else 2)
    return Activations(kept, max(head, backward + (layer if checkpointing else 0)))


def _layer_bytes(model: PreTrainedModel, method: MethodConfig, b: int) -> int:
    """Return what one decoder layer keeps of a token."""
    c = model.config
    width, ffn = c.hidden_size, c.intermediate_size
    head_width = getattr(c, "head_dim", None) or width // c.num_attention_heads
    a, k = c.num_attention_heads * head_width, c.num_key_value_heads * head_width
    family = family_of(c)
    norm = 4 + (4 if family.norms_scale_in_fp32 else b)
    norms = 2 * (norm + b) * width + (norm * (a + k) if family.query_key_norms else 0)
    attention = b * (3 * a + 2 * k)
    if method.ffns_per_layer > 1:
        ffn_bytes = method.ffns_per_token * b * (4 * ffn + 2 * width) + 12 * method.ffns_per_layer
    else:
        ffn_bytes = 4 * b * ffn
    return int(norms + attention + ffn_bytes)


def settings(
    model: PreTrainedModel, run_file: RunFile, workers: int, micro_batch: int, counts: Counts
) -> Iterator[Setting]:
    """Yield every ZeRO stage with each offload that it allows, with and without activation checkpointing."""
    precision, tokens = run_file.precision, micro_batch * run_file.data.max_length
    kept = {c: activations(model, run_file.method, precision, tokens, c).total for c in (False, True)}
    for stage, offload in product(range(4), ("none", "optimizer", "parameters")):
        if (offload == "optimizer" and stage == 0) or (offload == "parameters" and stage < 3):
            continue
        # bfloat16 below ZeRO-2 runs as ZeRO-2 (raymoe.train.engine)
        runs_as = max(stage, 2) if precision == "bfloat16" else stage
        state = _state(counts, precision, workers, runs_as, offload)
        buffers = _buffers(counts, precision, workers, runs_as)
        update = _update(counts, precision, workers, runs_as) if offload == "none" else 0
        for on in (False, True):
            yield Setting(stage, offload, on, micro_batch, state, buffers, kept[on], update)


def _state(counts: Counts, precision: str, workers: int, stage: int, offload: str) -> int:
    """Return the bytes of weights, gradients and optimizer state, which under ZeRO copies float32 weights too."""
    state = training_state(counts, precision, workers, stage)
    if stage and precision == "float32":
        state["optimizer"] += -(-counts.trained * WEIGHT_BYTES[precision] // workers)
    away = {"none": (), "optimizer": ("optimizer", "gradients")}.get(
        offload, ("optimizer", "gradients", "weights", "frozen")
    )
    return sum(size for name, size in state.items() if name not in away)


def _buffers(counts: Counts, precision: str, workers: int, stage: int) -> int:
    """Return the bytes of the bucket of gradients and, under ZeRO-3, of its copy and of gathered weights."""
    weight = WEIGHT_BYTES[precision]
    gathered = min(LIVE, counts.trained + counts.frozen) * weight if stage == 3 and workers > 1 else 0
    # reduce_scatter copies a full bucket; one that takes all gradients is flushed when activations are gone
    copied = BUCKET * weight if stage == 3 and counts.trained > BUCKET else 0
    return (BUCKET * weight if stage else 0) + copied + gathered


def _update(counts: Counts, precision: str, workers: int, stage: int) -> int:
    """Return the bytes of gradients' fp32 copies: flattened to be summed (ZeRO-0) or applied, scaled (ZeRO-3)."""
    if stage == 0:
        return min(BUCKET, counts.trained) * 4 if workers > 1 else 0
    own = -(-counts.trained // workers)
    if stage == 3:
        return min(LIVE, own) * 4
    return own * 4 if precision == "float32" else 0


def recommended(
    model: PreTrainedModel, run_file: RunFile, workers: int, memory: float, counts: Counts
) -> Setting | None:
    """Return the fastest setting that fits USABLE of `memory` bytes, with its largest micro batch; None if none does.

    Communication (ZeRO-3) is taken to cost less than recomputing activations, and that less than offloading.
    """
    share = math.ceil(run_file.optimization.batch_size / workers)
    sizes = [n for n in range(share, 0, -1) if share % n == 0]
    first = 2 if run_file.precision == "bfloat16" else (1 if workers > 1 else 0)
    fits = [
        s
        for n in sizes
        for s in settings(model, run_file, workers, n, counts)
        if s.zero_stage >= first and s.total <= USABLE * memory
    ]
    places = ("none", "optimizer", "parameters")
    return min(
        fits,
        key=lambda s: (places.index(s.offload), s.activation_checkpointing, s.zero_stage, -s.micro_batch),
        default=None,
    )
