"""K-means of every layer's token representations, all layers that fit in memory together.

    found = kmeans(x_LND, k=8, starts=4, spherical=True, seed=0)

One batched GEMM assigns the tokens of every layer and of every k-means++ start at once.

Shape letters: L layers, N tokens, D width, K clusters (experts), R starts, S subsample, C candidates.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

SUBSAMPLES = (128, 1024)
"""Tokens per cluster for the first Lloyd steps of all k-means++ starts, and for the race of the best."""

TRIES = 8
"""k-means++ starts tried per requested start: they are cheap, and single starts end up to 10% apart."""

STEPS = (5, 10, 300)
"""Lloyd steps at most: of all starts tried, of the best `starts`, of the best one on all tokens."""

TOLERANCE = 1e-2
"""Lloyd's iteration ends when the squared movement of all centroids, summed over them and D, is below this
fraction of the variance of one coordinate. On FFN inputs (D 256) the inertia is then within 0.01% of its limit."""


@dataclass(frozen=True)
class Centroids:
    """The result of `kmeans`: centroids [L, K, D], assignment [L, N], inertia [L] (float64), sizes [L, K]."""

    centroids: Tensor
    assignment: Tensor
    inertia: Tensor
    sizes: Tensor


def kmeans(x_LND: Tensor, k: int, *, starts: int, spherical: bool, seed: int) -> Centroids:
    """Run K-means on every layer's tokens, each layer by itself.

    TRIES * `starts` k-means++ starts race on a subsample, the best `starts` of them on a larger one; each layer's
    best then runs on all tokens to convergence. All layers use the same random numbers, so which layers are
    clustered together changes only rounding.

    Args:
        x_LND: vectors [L, N, D], float32, on any device.
        k: number of clusters, at most N.
        starts: k-means++ starts, at least 1.
        spherical: cluster by direction: vectors and centroids have unit length, the assignment is argmax c.x.
        seed: equal seeds give equal results.
    """
    points_LND, origin_LD = _points(x_LND, spherical)
    generator = torch.Generator().manual_seed(seed)
    small, large = (_subsample(points_LND, tokens * max(8, k), generator) for tokens in SUBSAMPLES)
    tried_LRKD = _plus_plus(small, k, TRIES * starts, generator)
    tried_LRKD = _lloyd(small, tried_LRKD, spherical, iterations=STEPS[0])
    tried_LRKD = _lloyd(large, _best(large, tried_LRKD, starts), spherical, iterations=STEPS[1])
    c_LKD = _lloyd(points_LND, _best(large, tried_LRKD, 1), spherical, iterations=STEPS[2]).squeeze(1)
    return _result(points_LND, c_LKD, origin_LD)


def _points(x_LND: Tensor, spherical: bool) -> tuple[Tensor, Tensor]:
    """Return what to cluster and its origin [L, D]: unit vectors, or offsets from the mean (to keep digits)."""
    if spherical:
        return F.normalize(x_LND, dim=-1), x_LND.new_zeros(len(x_LND), x_LND.shape[-1])
    origin_LD = x_LND.mean(1)
    return x_LND - origin_LD.unsqueeze(1), origin_LD


def _subsample(x_LND: Tensor, size: int, generator: torch.Generator) -> Tensor:
    if x_LND.shape[1] <= size:
        return x_LND
    return x_LND[:, torch.randperm(x_LND.shape[1], generator=generator)[:size].to(x_LND.device)]


def _best(x_LSD: Tensor, c_LRKD: Tensor, count: int) -> Tensor:
    """Return each layer's `count` starts with the smallest inertia: [L, count, K, D]."""
    best = _distances(x_LSD, c_LRKD).sum(-1).topk(count, largest=False).indices
    return c_LRKD[torch.arange(len(c_LRKD), device=best.device).unsqueeze(1), best]


def _plus_plus(x_LSD: Tensor, k: int, starts: int, generator: torch.Generator) -> Tensor:
    """Choose greedy k-means++ seeds [L, R, K, D]: each is the best of candidates drawn by squared distance."""
    size, candidates = x_LSD.shape[1], 2 + int(math.log(k))  # as many as scikit-learn draws
    first_R = torch.randint(size, (starts,), generator=generator).to(x_LSD.device)
    chosen_LRD = x_LSD[:, first_R]
    seeds = [chosen_LRD]
    near_LRS = _squared_distances(x_LSD, chosen_LRD)
    for _ in range(k - 1):
        draws_RC = torch.rand(starts, candidates, generator=generator, dtype=torch.float64).to(x_LSD.device)
        index_LRC = _draw(near_LRS, draws_RC)
        chosen_LRD, near_LRS = _best_candidate(x_LSD, index_LRC, near_LRS)
        seeds.append(chosen_LRD)
    return torch.stack(seeds, 2)


def _draw(weights_LRS: Tensor, draws_RC: Tensor) -> Tensor:
    """Draw indices [L, R, C] with probability proportional to the weights, from uniform numbers."""
    total_LRS = weights_LRS.double().cumsum(-1)
    index_LRC = torch.searchsorted(total_LRS, draws_RC * total_LRS[..., -1:], right=True)
    return index_LRC.clamp(max=weights_LRS.shape[-1] - 1)


def _best_candidate(x_LSD: Tensor, index_LRC: Tensor, near_LRS: Tensor) -> tuple[Tensor, Tensor]:
    """Return, per start, the candidate with the smallest inertia [L, R, D] and all distances [L, R, S]."""
    layers, starts, candidates = index_LRC.shape
    layer = torch.arange(layers, device=x_LSD.device).view(-1, 1, 1)
    vectors_LRCD = x_LSD[layer, index_LRC]
    d_LRCS = _squared_distances(x_LSD, vectors_LRCD.flatten(1, 2)).view(layers, starts, candidates, -1)
    d_LRCS = torch.minimum(d_LRCS, near_LRS.unsqueeze(2))
    best_LR = d_LRCS.sum(-1).argmin(-1)
    start = torch.arange(starts, device=x_LSD.device)
    return vectors_LRCD[layer[..., 0], start, best_LR], d_LRCS[layer[..., 0], start, best_LR]


def _squared_distances(x_LSD: Tensor, c_LMD: Tensor) -> Tensor:
    """Return |x - c|^2 from every vector to each of M centres: [L, M, S]."""
    norms_L1S = x_LSD.square().sum(-1).unsqueeze(1)
    norms_LM1 = c_LMD.square().sum(-1, keepdim=True)
    return torch.baddbmm(norms_L1S + norms_LM1, c_LMD, x_LSD.transpose(1, 2), alpha=-2).clamp_(min=0)


def _lloyd(x_LND: Tensor, c_LRKD: Tensor, spherical: bool, iterations: int) -> Tensor:
    """Run Lloyd's iteration on all layers and starts until each has converged: centroids [L, R, K, D]."""
    enough_L = TOLERANCE * x_LND.square().mean((1, 2))
    active = torch.arange(len(x_LND), device=x_LND.device)
    for _ in range(iterations):
        moved = _step(x_LND, c_LRKD, active, spherical)
        shift = (moved - c_LRKD[active]).square().sum((2, 3)).amax(1)
        c_LRKD = c_LRKD.index_copy(0, active, moved)
        active = active[shift > enough_L[active]]
        if not len(active):
            break
    return c_LRKD


def _step(x_LND: Tensor, c_LRKD: Tensor, active: Tensor, spherical: bool) -> Tensor:
    """Return the next centroids of the active layers."""
    c = c_LRKD[active]
    layers, starts, k, width = c.shape
    sums = torch.zeros_like(c).flatten(1, 2)
    counts = c.new_zeros(layers, starts, k)
    for x, _ in _chunks(x_LND, active, starts * k):
        assignment = _scores(x, c).argmax(-1, keepdim=True)
        member = (assignment == torch.arange(k, device=x.device)).to(x.dtype)
        sums = torch.baddbmm(sums, member.flatten(2).transpose(1, 2), x)
        counts = counts + member.sum(1)
    sums = sums.view_as(c)
    moved = F.normalize(sums, dim=-1) if spherical else sums / counts.clamp(min=1).unsqueeze(-1)
    return _reseeded(x_LND, c, moved, counts == 0, active) if (counts == 0).any() else moved


def _scores(x_LND: Tensor, c_LRKD: Tensor) -> Tensor:
    """Return x.c - |c|^2 / 2 [L, N, R, K], which is largest for the nearest centroid."""
    bias_L1M = c_LRKD.square().sum(-1).flatten(1).unsqueeze(1) / -2
    scores = torch.baddbmm(bias_L1M, x_LND, c_LRKD.flatten(1, 2).transpose(1, 2))
    return scores.view(*x_LND.shape[:2], *c_LRKD.shape[1:3])


def _reseeded(x_LND: Tensor, c: Tensor, moved: Tensor, empty_LRK: Tensor, active: Tensor) -> Tensor:
    """Move every empty cluster of `moved` onto one of the tokens farthest from their centroids."""
    far = _distances(x_LND, c, active).topk(min(c.shape[2], x_LND.shape[1]), dim=-1).indices
    rank = (empty_LRK.cumsum(-1) - 1).clamp(min=0, max=far.shape[-1] - 1)
    seeds = x_LND[active.view(-1, 1, 1), far.gather(-1, rank)]
    return torch.where(empty_LRK.unsqueeze(-1), seeds, moved)


def _distances(x_LND: Tensor, c_LRKD: Tensor, active: Tensor | None = None) -> Tensor:
    """Return the squared distance from every token to its nearest centroid: [L, R, N]."""
    active = torch.arange(len(x_LND), device=x_LND.device) if active is None else active
    starts, k = c_LRKD.shape[1:3]
    parts = [
        x.square().sum(-1).unsqueeze(-1) - 2 * _scores(x, c_LRKD).amax(-1)
        for x, _ in _chunks(x_LND, active, starts * k)
    ]
    return torch.cat(parts, 1).transpose(1, 2)


def _chunks(x_LND: Tensor, active: Tensor, centres: int) -> Iterator[tuple[Tensor, slice]]:
    """Yield the active layers' tokens in chunks that fit in a CPU's cache, or keep a GPU busy."""
    layers, tokens, width = x_LND.shape
    elements = 2**20 if x_LND.device.type == "cpu" else 2**26
    size = max(256, elements // (len(active) * max(width, centres)))
    for start in range(0, tokens, size):
        part = slice(start, min(start + size, tokens))
        yield (x_LND[:, part] if len(active) == layers else x_LND[active, part]), part


def _result(points_LND: Tensor, c_LKD: Tensor, origin_LD: Tensor) -> Centroids:
    """Assign tokens to the final centroids; the inertia is from differences, where no digits cancel."""
    layers, k = c_LKD.shape[:2]
    every = torch.arange(layers, device=c_LKD.device)
    assignment_LN = c_LKD.new_empty(points_LND.shape[:2], dtype=torch.int64)
    inertia_L = torch.zeros(layers, dtype=torch.float64, device=c_LKD.device)
    for x, part in _chunks(points_LND, every, k):
        nearest = _scores(x, c_LKD.unsqueeze(1)).squeeze(2).argmax(-1)
        assignment_LN[:, part] = nearest
        inertia_L += (x - c_LKD[every.unsqueeze(1), nearest]).square().sum((1, 2), dtype=torch.float64)
    sizes_LK = F.one_hot(assignment_LN, k).sum(1)
    return Centroids(c_LKD + origin_LD.unsqueeze(1), assignment_LN, inertia_L, sizes_LK)
