"""Routers, experts, gating and the load-balance loss: the sparse layer that replaces a dense model's FFN.

`upcycle_model` turns a Hugging Face dense model into a Mixture-of-Experts without touching its modelling
code: every decoder layer's `mlp` becomes a `SparseMoE`; attention, norms and embeddings stay as they are.
The experts are computed by transformers' kernels (`grouped_mm`, `eager`, ...).

Shapes: W sequences, T tokens of a sequence, S = W * T tokens, D width, F FFN width, N experts, K = top_k,
L layers. A name's suffix is its shape.
"""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.models.mixtral.modeling_mixtral import MixtralExperts

from raymoe.methods import Experts
from raymoe.models.families import layout_of, sparse_config
from raymoe.schema import InputError


def _softmax(p_SK: Tensor) -> Tensor:
    """g_i = p_i (RSU paper, eq. 2)."""
    return p_SK


def _renormalized(p_SK: Tensor) -> Tensor:
    """g_i = p_i / sum_j p_j over the chosen experts: 1, without a gradient, for top-1."""
    return p_SK / p_SK.sum(-1, keepdim=True)


def _straight_through(p_SK: Tensor) -> Tensor:
    """Return the value of `_renormalized` with the gradient of p_i / constant: the LM loss trains the router."""
    return p_SK / p_SK.sum(-1, keepdim=True).detach()


GATINGS: dict[str, Callable[[Tensor], Tensor]] = {
    "softmax": _softmax,
    "renormalized": _renormalized,
    "straight_through": _straight_through,
}


class FFN(NamedTuple):
    """Weights of a dense FFN or of one expert, by their names in a dense model."""

    gate_proj: Tensor
    """[F, D]"""
    up_proj: Tensor
    """[F, D]"""
    down_proj: Tensor
    """[D, F]"""


ExpertStart = Callable[[FFN, int, int], FFN]
"""Maps the dense FFN, its layer's index and the expert's index to the weights that the expert starts from."""


class Routing(NamedTuple):
    """Router logits and chosen experts of one forward pass."""

    logits: Tensor
    """[S, N], with their graph."""
    expert_ids: Tensor
    """[S, K], most probable first."""


class Router(nn.Module):
    """Linear router: `weight` [N, D]; its softmax is computed in fp32, as in transformers.

    `in_fp32`: its logits too, for families whose sparse class computes them so.
    """

    def __init__(self, weight_ND: Tensor, top_k: int, gating: str, in_fp32: bool = False) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight_ND)
        self.top_k = top_k
        self.gating = gating
        self.in_fp32 = in_fp32

    def forward(self, x_SD: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return logits [S, N], gate values [S, K] in fp32 and expert ids [S, K] (eq. 1)."""
        x_SD, weight_ND = (x_SD.float(), self.weight.float()) if self.in_fp32 else (x_SD, self.weight)
        logits_SN = nn.functional.linear(x_SD, weight_ND)
        p_SN = logits_SN.softmax(-1, dtype=torch.float32)
        p_SK, expert_ids_SK = p_SN.topk(self.top_k, dim=-1)
        return logits_SN, GATINGS[self.gating](p_SK), expert_ids_SK

    def extra_repr(self) -> str:
        """Return shape, top_k and gating."""
        return f"{tuple(self.weight.shape)}, top_k={self.top_k}, gating={self.gating}"


class SparseMoE(nn.Module):
    """N experts and the router that chooses K of them per token; a drop-in for a dense decoder layer's `mlp`.

    `gate.weight` [N, D], `experts.gate_up_proj` [N, 2F, D], `experts.down_proj` [N, D, F]: named as in
    transformers' own MoE blocks.
    """

    def __init__(self, gate: Router, experts: nn.Module) -> None:
        super().__init__()
        self.gate = gate
        self.experts = experts
        self.routing: Routing | None = None

    @classmethod
    def from_dense(
        cls,
        mlp: Any,
        router_ND: Tensor,
        method: Experts,
        experts_implementation: str,
        layer: int = 0,
        start: ExpertStart | None = None,
        router_in_fp32: bool = False,
    ) -> SparseMoE:
        """Return the sparse layer whose N experts are copies of the dense FFN `mlp` of `layer`, or made by `start`.

        It has the device and dtype of `mlp`.
        """
        dense = FFN(*(getattr(mlp, name).weight.detach() for name in FFN._fields))
        gate_up_NFD = torch.cat([dense.gate_proj, dense.up_proj]).repeat(method.num_experts, 1, 1)
        down_NDF = dense.down_proj.repeat(method.num_experts, 1, 1)
        if start is not None:
            for expert in range(method.num_experts):
                ffn = start(dense, layer, expert)
                gate_up_NFD[expert] = torch.cat([ffn.gate_proj, ffn.up_proj])
                down_NDF[expert] = ffn.down_proj
        experts = _empty_experts(mlp, method.num_experts, experts_implementation)
        experts.gate_up_proj, experts.down_proj = nn.Parameter(gate_up_NFD), nn.Parameter(down_NDF)
        rows_ND = router_ND.detach().to(dense.down_proj, copy=True)
        gate = Router(rows_ND, method.top_k, method.gating, router_in_fp32)
        return cls(gate, experts).train(mlp.training)

    @property
    def num_experts(self) -> int:
        """N."""
        return len(self.gate.weight)

    @property
    def top_k(self) -> int:
        """K."""
        return self.gate.top_k

    def forward(self, x_WTD: Tensor) -> Tensor:
        """Route, dispatch and compute, combine (eq. 2)."""
        x_SD = x_WTD.flatten(0, -2)
        logits_SN, gates_SK, expert_ids_SK = self.gate(x_SD)
        if not _recomputing():
            self.routing = Routing(logits_SN, expert_ids_SK)
        y_SD: Tensor = self.experts(x_SD, expert_ids_SK, gates_SK)
        return y_SD.view_as(x_WTD)

    def take_routing(self) -> Routing:
        """Return the last forward's routing and drop it here, so that its graph lives as long as the caller's loss.

        Call it before the backward pass. Gradient checkpointing must be of the non-reentrant kind.
        """
        routing, self.routing = self.routing, None
        if routing is None:
            raise RuntimeError("no forward pass since the routing was last taken")
        return routing


def _empty_experts(mlp: Any, num_experts: int, implementation: str) -> nn.Module:
    """Return transformers' stacked experts for an FFN like `mlp`, their parameters not allocated yet."""
    width, ffn_width = mlp.down_proj.weight.shape
    config = SimpleNamespace(
        num_local_experts=num_experts,
        hidden_size=width,
        intermediate_size=ffn_width,
        hidden_act=mlp.config.hidden_act,
        _experts_implementation=implementation,
    )
    with torch.device("meta"):
        experts: nn.Module = MixtralExperts(config)
    return experts


def _recomputing() -> bool:
    """True inside a backward pass, where gradient checkpointing repeats forwards whose routing was taken."""
    return torch._C._current_graph_task_id() != -1


def upcycle_model(
    model: PreTrainedModel,
    router_LND: Tensor,
    method: Experts,
    experts_implementation: str = "grouped_mm",
    on_layer: Callable[[nn.Module], None] | None = None,
    start: ExpertStart | None = None,
) -> PreTrainedModel:
    """Replace every FFN of the dense `model`, in place and layer by layer, with a `SparseMoE`.

    Each dense FFN is freed as its copies are made, so memory peaks at the result plus one layer. `on_layer` is
    called with each new layer before the next one is made (ZeRO-3 partitions it over the workers). Experts are
    copies of the dense FFN unless `start` makes them. The model keeps its dense `config`:
    `raymoe.upcycle.checkpoint` writes the sparse one.

    Raises:
        InputError: no stock sparse class computes what this model and gating would, or router rows of another
            shape.
    """
    in_fp32 = layout_of(model.config, method).router_in_fp32
    sparse_config(model.config, method)  # refuse before training what could not be exported
    _check_shape(model.config, router_LND, method)
    layers = model.get_decoder().layers
    for number, (layer, router_ND) in enumerate(zip(layers, router_LND, strict=True)):
        layer.mlp = SparseMoE.from_dense(
            layer.mlp, router_ND, method, experts_implementation, number, start, in_fp32
        )
        if on_layer is not None:
            on_layer(layer.mlp)
    return model


def _check_shape(config: Any, router_LND: Tensor, method: Experts) -> None:
    expected = (config.num_hidden_layers, method.num_experts, config.hidden_size)
    if tuple(router_LND.shape) != expected:
        raise InputError(
            f"router: rows of shape {tuple(router_LND.shape)} do not fit (layers, experts, width) {expected}"
        )


def sparse_layers(model: nn.Module) -> list[SparseMoE]:
    """Return the sparse layers of `model` in order; empty for a dense model."""
    return [module for module in model.modules() if isinstance(module, SparseMoE)]


def load_balancing_loss(logits_LWTN: Tensor, mask_WT: Tensor, top_k: int) -> Tensor:
    """Return N * sum_i f_i P_i (eq. 3 and 4 without alpha): a scalar, 1 when balanced, N when fully collapsed.

    P_i is the mean probability of expert i; f_i is the share of tokens whose argmax is i. With top_k > 1, f_i
    counts all k choices and is divided by k, so that the f_i add up to 1 and the balanced loss stays 1 (in
    transformers it is top_k).

    f and P are taken per layer and packed sequence: taken over a micro batch, the loss would depend on which
    sequences, and how many, a worker happens to hold. Layers are averaged (pooled, two layers collapsed onto
    different experts would look balanced), sequences weighted by their real tokens.

    Args:
        logits_LWTN: router logits, in any dtype; the softmax is taken in fp32.
        mask_WT: true for tokens, false for padding; a sequence of padding only counts nothing.
        top_k: experts per token.
    """
    p_LWTN = logits_LWTN.softmax(-1, dtype=torch.float32)
    chosen_LWTN = torch.zeros_like(p_LWTN).scatter(-1, p_LWTN.topk(top_k, dim=-1).indices, 1 / top_k)
    mask_WT1 = mask_WT.unsqueeze(-1).to(p_LWTN)
    tokens_W = mask_WT1.sum((1, 2))
    per_token_W1 = 1 / tokens_W.clamp(min=1).unsqueeze(-1)
    f_LWN = (chosen_LWTN * mask_WT1).sum(2) * per_token_W1
    p_LWN = (p_LWTN * mask_WT1).sum(2) * per_token_W1
    loss_LW = logits_LWTN.shape[-1] * (f_LWN * p_LWN).sum(-1)
    return ((loss_LW * tokens_W).sum(1) / tokens_W.sum().clamp(min=1)).mean()


def tokens_per_expert(expert_ids_LWTK: Tensor, mask_WT: Tensor, num_experts: int) -> Tensor:
    """Count the real tokens routed to each expert: integers [L, N], each row adding up to K * tokens."""
    ids_LS = expert_ids_LWTK.flatten(1)
    counted_LS = mask_WT.unsqueeze(-1).expand(expert_ids_LWTK.shape).flatten(1).long()
    return ids_LS.new_zeros(len(ids_LS), num_experts).scatter_add(1, ids_LS, counted_LS)


def routing_entropy(logits_LWTN: Tensor, mask_WT: Tensor) -> Tensor:
    """Return the router's mean entropy over real tokens, in nats, per layer [L]; at most log N."""
    log_p_LWTN = logits_LWTN.detach().log_softmax(-1, dtype=torch.float32)
    entropy_LWT = -(log_p_LWTN.exp() * log_p_LWTN).sum(-1)
    return (entropy_LWT * mask_WT).sum((1, 2)) / mask_WT.sum().clamp(min=1)
