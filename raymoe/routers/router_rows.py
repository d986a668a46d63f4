"""Router rows from centroids: a scale per layer gives the router a chosen confidence.

Shape letters: L layers, N tokens, D width, K clusters (experts).
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from raymoe.schema import InputError


def router_rows(
    centroids_LKD: Tensor,
    inputs_LND: Tensor,
    *,
    rows: Literal["scaled", "raw"],
    confidence: float,
    spherical: bool = True,
) -> Tensor:
    """Return the router rows [L, K, D] made from centroids.

    `raw`: the centroids themselves. `scaled`: `_directions`, times one scalar per layer that makes the mean
    top-1 probability on `inputs_LND` (what the router sees) equal to `confidence`.

    Raises:
        InputError: `confidence` is not above 1 / K, or out of reach because the inputs are too similar.
    """
    if rows == "raw":
        return centroids_LKD
    k = centroids_LKD.shape[1]
    if confidence * k <= 1:
        raise InputError(
            f"method.router_confidence: {confidence} must be above 1/{k}, chance among {k} experts"
        )
    directions_LKD = _directions(centroids_LKD, inputs_LND, spherical)
    return directions_LKD * _scale(router_logits(inputs_LND, directions_LKD), confidence).view(-1, 1, 1)


def _directions(centroids_LKD: Tensor, inputs_LND: Tensor, spherical: bool) -> Tensor:
    """Return rows [L, K, D] whose argmax is the cluster, as nearly as a router without a bias can have it.

    The argmax of spherical centroids is the assignment, also after subtracting their mean. Plain centroids need
    |c|^2 as a bias; they miss it least with the inputs' mean direction projected out and at unit length. Agreement
    with the clusters, measured on a small LM's FFN inputs (D 256, K 8):

        |           | centred | unit length | mean projected out | both |
        | spherical | 1.000   | .988        | .970               | .977 |
        | plain     | .850    | .903        | .888               | .941 |
    """
    centred_LKD = centroids_LKD - centroids_LKD.mean(1, keepdim=True)
    if spherical:
        return centred_LKD
    mean_L1D = F.normalize(inputs_LND.mean(1, keepdim=True), dim=-1)
    along_LK1 = (centred_LKD * mean_L1D).sum(-1, keepdim=True)
    return F.normalize(centred_LKD - along_LK1 * mean_L1D, dim=-1)


def router_logits(x_LND: Tensor, router_LKD: Tensor) -> Tensor:
    """Return the router's logits [L, N, K]."""
    return torch.bmm(x_LND, router_LKD.transpose(1, 2))


def _scale(logits_LNK: Tensor, confidence: float) -> Tensor:
    """Find, per layer, the factor that makes the logits' mean top-1 probability `confidence`, by bisection."""
    gaps_LNK = logits_LNK - logits_LNK.amax(-1, keepdim=True)
    unit_L = -gaps_LNK.mean((1, 2))
    low_L, high_L = (torch.full_like(unit_L, log2) for log2 in (-20.0, 20.0))  # in mean gaps
    for _ in range(36):
        middle_L = (low_L + high_L) / 2
        below_L = _top_probability(gaps_LNK * (middle_L.exp2() / unit_L).view(-1, 1, 1)) < confidence
        low_L, high_L = torch.where(below_L, middle_L, low_L), torch.where(below_L, high_L, middle_L)
    if unreachable := ((unit_L == 0) | (high_L == 20)).nonzero().flatten().tolist():
        raise InputError(
            f"method.router_confidence: {confidence} can't be reached in layers {unreachable}: "
            "their tokens are too similar, or the clusters coincide"
        )
    return high_L.exp2() / unit_L


def _top_probability(gaps_LNK: Tensor) -> Tensor:
    """Return the mean top-1 softmax probability of logits whose largest is 0: [L]."""
    return gaps_LNK.exp().sum(-1).reciprocal().mean(-1)
