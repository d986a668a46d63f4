"""A causal LM as the training loop sees it: packed batch in, losses and routing out."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from raymoe.data.packing import Batch
from raymoe.models.moe import load_balancing_loss, routing_entropy, sparse_layers, tokens_per_expert
from raymoe.models.packed_attention import completion_losses

LOAD_BALANCE = "load_balance_loss"
"""Name of the MoE's own penalty: 1 when balanced, whatever the number of experts; alpha is not in it."""


class Routed(NamedTuple):
    """Where the sparse layers sent the tokens of a batch: W packed sequences of T tokens, L layers, N experts."""

    logits_LWTN: Tensor
    """Router logits, with their graph."""
    expert_ids_LWTK: Tensor
    """Chosen experts, the most probable first."""


class LossOutput(NamedTuple):
    """What one forward pass returns."""

    nll: Tensor
    """Negative log-likelihood of each completion token [C], in the batch's order."""
    penalties: dict[str, Tensor]
    """Further losses (scalars), means over the batch's tokens and without their weights."""
    statistics: dict[str, Tensor]
    """Measurements without a graph: `load` [L, N] tokens per expert, `entropy` [L] of the router in nats; of a
    dense model none."""


Penalties = Callable[[Batch, Routed | None], dict[str, Tensor]]
"""From a batch and where its tokens went (None: no sparse layer) to the penalties of a forward pass."""


def load_balance(batch: Batch, routed: Routed | None) -> dict[str, Tensor]:
    """The load-balance loss of the RSU paper (eq. 3 and 4, without alpha) as the penalty of a sparse model."""
    if routed is None:
        return {}
    top_k = routed.expert_ids_LWTK.shape[-1]
    return {LOAD_BALANCE: load_balancing_loss(routed.logits_LWTN, batch.mask, top_k)}


class CausalLoss(nn.Module):
    """Wraps `model` so that losses and head are computed inside one forward (what ZeRO-3's hooks need)."""

    def __init__(self, model: PreTrainedModel, penalties: Penalties = load_balance) -> None:
        super().__init__()
        self.model = model
        self.penalties = penalties

    def forward(self, batch: Batch) -> LossOutput:
        """Run one packed batch."""
        nll = completion_losses(self.model, batch)
        routed = self._routed(batch)
        statistics = {} if routed is None else _statistics(batch, routed)
        return LossOutput(nll, self.penalties(batch, routed), statistics)

    def _routed(self, batch: Batch) -> Routed | None:
        layers = sparse_layers(self.model)
        if not layers:
            return None
        routing = [layer.take_routing() for layer in layers]
        shape = (len(layers), *batch.mask.shape, -1)
        logits = torch.stack([r.logits for r in routing]).view(shape)
        ids = torch.stack([r.expert_ids for r in routing]).view(shape)
        return Routed(logits, ids)


def _statistics(batch: Batch, routed: Routed) -> dict[str, Tensor]:
    logits, ids = routed
    return {
        "load": tokens_per_expert(ids, batch.mask, logits.shape[-1]),
        "entropy": routing_entropy(logits, batch.mask),
    }
