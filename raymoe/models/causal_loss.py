"""A causal LM as the training loop sees it: packed batch in, completion losses and routing out."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from raymoe.data.packing import Batch
from raymoe.models.moe import load_balancing_loss, routing_entropy, sparse_layers, tokens_per_expert
from raymoe.models.packed_attention import completion_losses


class CausalLoss(nn.Module):
    """Wraps `model` so that loss and head are computed inside one forward (what ZeRO-3's hooks need)."""

    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__()
        self.model = model

    def forward(self, batch: Batch) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Run one packed batch of W sequences of T tokens.

        Returns:
            Negative log-likelihoods [completion tokens] in the batch's order; load-balance loss (scalar, 1 when
            balanced, eq. 3 and 4 without alpha); tokens per expert [L, N]; router entropy [L]. For a dense
            model the last three are 0 and empty.
        """
        nll = completion_losses(self.model, batch)
        layers = sparse_layers(self.model)
        if not layers:
            empty = nll.new_zeros(0)
            return nll, nll.new_zeros(()), empty, empty
        routing = [layer.take_routing() for layer in layers]
        shape = (len(layers), *batch.mask.shape, -1)
        logits = torch.stack([r.logits for r in routing]).view(shape)
        ids = torch.stack([r.expert_ids for r in routing]).view(shape)
        return (
            nll,
            load_balancing_loss(logits, batch.mask, layers[0].top_k),
            tokens_per_expert(ids, batch.mask, logits.shape[-1]),
            routing_entropy(logits, batch.mask),
        )
