"""A causal LM for the training loop: takes a packed batch, returns losses and routing statistics."""

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
"""Name of the load-balance penalty: 1 when balanced, for any number of experts; not multiplied by alpha."""


class Routed(NamedTuple):
    """Routing of a batch in all sparse layers: W packed sequences of T tokens, L layers, N experts, K choices."""

    logits_LWTN: Tensor
    """Router logits, with their graph."""
    expert_ids_LWTK: Tensor
    """Chosen experts, most probable first."""


class LossOutput(NamedTuple):
    """Result of one forward pass."""

    nll: Tensor
    """Negative log-likelihood of each completion token [C], in the batch's order."""
    penalties: dict[str, Tensor]
    """Further losses: scalars, averaged over the batch's tokens, unweighted."""
    statistics: dict[str, Tensor]
    """Measurements without a graph: `load` [L, N], tokens per expert; `entropy` [L], of the router in nats. Empty for
    dense models."""


Penalties = Callable[[Batch, Routed | None], dict[str, Tensor]]
"""Maps a batch and its routing (None: no sparse layer) to the penalties of a forward pass."""


def load_balance(batch: Batch, routed: Routed | None) -> dict[str, Tensor]:
    """Return the load-balance loss of the RSU paper (eq. 3 and 4, without alpha); nothing for a dense model."""
    if routed is None:
        return {}
    top_k = routed.expert_ids_LWTK.shape[-1]
    return {LOAD_BALANCE: load_balancing_loss(routed.logits_LWTN, batch.mask, top_k)}


class CausalLoss(nn.Module):
    """Wraps `model` so that head and losses are computed within one forward pass, as ZeRO-3's hooks require."""

    def __init__(self, model: PreTrainedModel, penalties: Penalties = load_balance) -> None:
        super().__init__()
        self.model = model
        self.penalties = penalties

    def forward(self, batch: Batch) -> LossOutput:
        """Compute losses and statistics of one packed batch."""
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
