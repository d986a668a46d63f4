"""Clusters: token representations -> K-means centroids per layer -> the rows of every layer's router.

    clusters = cluster(folder_of_shards, ContextRepresentations(num_experts=8), seed=0)
    clusters.save(folder)           # router.safetensors (router, centroids), clusters.json (measurements)

CRSU clusters all tokens together, TRSU every task's tokens apart. All layers that fit in memory are
clustered together: one batched GEMM assigns the tokens of every layer and of every k-means++ start at once.

Shape letters: L layers, N tokens, D width, K clusters (experts), R starts, S subsample, C candidates,
T tasks.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn import functional as F

from raymoe.methods import ContextRepresentations, Experts, TaskRepresentations
from raymoe.schema import InputError

MEMORY = 2**30
"""Bytes of token vectors that `cluster` holds at a time by default, its working copies included."""

SUBSAMPLES = (128, 1024)
"""Tokens per cluster on which the k-means++ starts begin, and on which the best of them compete."""

TRIES = 8
"""k-means++ starts begun for each one asked for: cheap, and single starts end up to 10% apart."""

STEPS = (5, 10, 300)
"""Lloyd steps at most: of all begun, of the best `starts`, of the best one on all tokens."""

TOLERANCE = 1e-2
"""Lloyd's iteration ends when the centroids' squared movement, summed over them and their D numbers, is below
this share of one number's variance. On FFN inputs (D 256) the inertia is then within 0.01% of its limit."""


@dataclass(frozen=True)
class Centroids:
    """What `kmeans` found: centroids [L, K, D], assignment [L, N], inertia [L] (float64), sizes [L, K]."""

    centroids: Tensor
    assignment: Tensor
    inertia: Tensor
    sizes: Tensor


def kmeans(x_LND: Tensor, k: int, *, starts: int, spherical: bool, seed: int) -> Centroids:
    """K-means of every layer's tokens, each layer by itself.

    TRIES * `starts` k-means++ starts race on a subsample, the best `starts` of them on a larger one, and per
    layer the best goes on over all tokens to convergence. All layers use the same random numbers, so which
    layers are clustered together changes only rounding.

    Args:
        x_LND: vectors [L, N, D], float32, on any device.
        k: number of clusters, at most N.
        starts: k-means++ starts, at least 1.
        spherical: cluster directions: vectors and centroids have unit length, the assignment is argmax c.x.
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
    """What is clustered and its origin [L, D]: unit vectors, or offsets from the mean (to keep digits)."""
    if spherical:
        return F.normalize(x_LND, dim=-1), x_LND.new_zeros(len(x_LND), x_LND.shape[-1])
    origin_LD = x_LND.mean(1)
    return x_LND - origin_LD.unsqueeze(1), origin_LD


def _subsample(x_LND: Tensor, size: int, generator: torch.Generator) -> Tensor:
    if x_LND.shape[1] <= size:
        return x_LND
    return x_LND[:, torch.randperm(x_LND.shape[1], generator=generator)[:size].to(x_LND.device)]


def _best(x_LSD: Tensor, c_LRKD: Tensor, count: int) -> Tensor:
    """The `count` starts of every layer with the smallest inertia: [L, count, K, D]."""
    best = _distances(x_LSD, c_LRKD).sum(-1).topk(count, largest=False).indices
    return c_LRKD[torch.arange(len(c_LRKD), device=best.device).unsqueeze(1), best]


def _plus_plus(x_LSD: Tensor, k: int, starts: int, generator: torch.Generator) -> Tensor:
    """Greedy k-means++ seeds [L, R, K, D]: the next is the best of candidates drawn by squared distance."""
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
    """Indices [L, R, C] drawn with probabilities proportional to the weights, from uniform numbers."""
    total_LRS = weights_LRS.double().cumsum(-1)
    index_LRC = torch.searchsorted(total_LRS, draws_RC * total_LRS[..., -1:], right=True)
    return index_LRC.clamp(max=weights_LRS.shape[-1] - 1)


def _best_candidate(x_LSD: Tensor, index_LRC: Tensor, near_LRS: Tensor) -> tuple[Tensor, Tensor]:
    """Per start the candidate leaving the smallest inertia: its vector [L, R, D], all distances [L, R, S]."""
    layers, starts, candidates = index_LRC.shape
    layer = torch.arange(layers, device=x_LSD.device).view(-1, 1, 1)
    vectors_LRCD = x_LSD[layer, index_LRC]
    d_LRCS = _squared_distances(x_LSD, vectors_LRCD.flatten(1, 2)).view(layers, starts, candidates, -1)
    d_LRCS = torch.minimum(d_LRCS, near_LRS.unsqueeze(2))
    best_LR = d_LRCS.sum(-1).argmin(-1)
    start = torch.arange(starts, device=x_LSD.device)
    return vectors_LRCD[layer[..., 0], start, best_LR], d_LRCS[layer[..., 0], start, best_LR]


def _squared_distances(x_LSD: Tensor, c_LMD: Tensor) -> Tensor:
    """|x - c|^2 of every vector to every one of M centres: [L, M, S]."""
    norms_L1S = x_LSD.square().sum(-1).unsqueeze(1)
    norms_LM1 = c_LMD.square().sum(-1, keepdim=True)
    return torch.baddbmm(norms_L1S + norms_LM1, c_LMD, x_LSD.transpose(1, 2), alpha=-2).clamp_(min=0)


def _lloyd(x_LND: Tensor, c_LRKD: Tensor, spherical: bool, iterations: int) -> Tensor:
    """Lloyd's iteration of all layers and starts until every one has converged: centroids [L, R, K, D]."""
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
    """The next centroids of the active layers."""
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
    """x.c - |c|^2 / 2 [L, N, R, K]: largest for the nearest centroid."""
    bias_L1M = c_LRKD.square().sum(-1).flatten(1).unsqueeze(1) / -2
    scores = torch.baddbmm(bias_L1M, x_LND, c_LRKD.flatten(1, 2).transpose(1, 2))
    return scores.view(*x_LND.shape[:2], *c_LRKD.shape[1:3])


def _reseeded(x_LND: Tensor, c: Tensor, moved: Tensor, empty_LRK: Tensor, active: Tensor) -> Tensor:
    """`moved` with every empty cluster put on one of the tokens that are farthest from their centroids."""
    far = _distances(x_LND, c, active).topk(min(c.shape[2], x_LND.shape[1]), dim=-1).indices
    rank = (empty_LRK.cumsum(-1) - 1).clamp(min=0, max=far.shape[-1] - 1)
    seeds = x_LND[active.view(-1, 1, 1), far.gather(-1, rank)]
    return torch.where(empty_LRK.unsqueeze(-1), seeds, moved)


def _distances(x_LND: Tensor, c_LRKD: Tensor, active: Tensor | None = None) -> Tensor:
    """Squared distance of every token to its nearest centroid: [L, R, N]."""
    active = torch.arange(len(x_LND), device=x_LND.device) if active is None else active
    starts, k = c_LRKD.shape[1:3]
    parts = [
        x.square().sum(-1).unsqueeze(-1) - 2 * _scores(x, c_LRKD).amax(-1)
        for x, _ in _chunks(x_LND, active, starts * k)
    ]
    return torch.cat(parts, 1).transpose(1, 2)


def _chunks(x_LND: Tensor, active: Tensor, centres: int) -> Iterator[tuple[Tensor, slice]]:
    """The active layers' tokens in chunks: what fits in a CPU's cache, or keeps a GPU busy."""
    layers, tokens, width = x_LND.shape
    elements = 2**20 if x_LND.device.type == "cpu" else 2**26
    size = max(256, elements // (len(active) * max(width, centres)))
    for start in range(0, tokens, size):
        part = slice(start, min(start + size, tokens))
        yield (x_LND[:, part] if len(active) == layers else x_LND[active, part]), part


def _result(points_LND: Tensor, c_LKD: Tensor, origin_LD: Tensor) -> Centroids:
    """Assignment to the final centroids; the inertia from differences, where no digits cancel."""
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


def router_rows(
    centroids_LKD: Tensor,
    inputs_LND: Tensor,
    *,
    rows: Literal["scaled", "raw"],
    confidence: float,
    spherical: bool = True,
) -> Tensor:
    """The router's rows [L, K, D] from centroids.

    `raw`: the centroids themselves. `scaled`: `_directions`, every layer's multiplied by the one scalar that
    makes the mean top-1 probability on `inputs_LND` (what the router sees) equal to `confidence`.

    Raises:
        InputError: `confidence` is not above 1 / K, or can't be reached as the inputs are too much alike.
    """
    if rows == "raw":
        return centroids_LKD
    k = centroids_LKD.shape[1]
    if confidence * k <= 1:
        raise InputError(
            f"method.router_confidence: {confidence} must be above 1/{k}, the share of one of {k} experts"
        )
    directions_LKD = _directions(centroids_LKD, inputs_LND, spherical)
    return directions_LKD * _scale(_logits(inputs_LND, directions_LKD), confidence).view(-1, 1, 1)


def _directions(centroids_LKD: Tensor, inputs_LND: Tensor, spherical: bool) -> Tensor:
    """Rows whose argmax is the cluster, as nearly as a router without a bias can: [L, K, D].

    Spherical centroids have the assignment as their argmax, and subtracting their mean keeps it. Plain ones
    need |c|^2 as a bias; without the inputs' mean direction and at unit length they miss it least. Measured
    on a small LM's FFN inputs (D 256, K 8), agreement with the clusters:

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


def _logits(x_LND: Tensor, router_LKD: Tensor) -> Tensor:
    return torch.bmm(x_LND, router_LKD.transpose(1, 2))


def _scale(logits_LNK: Tensor, confidence: float) -> Tensor:
    """Per layer the factor that makes the logits' mean top-1 probability (which rises) `confidence`."""
    gaps_LNK = logits_LNK - logits_LNK.amax(-1, keepdim=True)
    unit_L = -gaps_LNK.mean((1, 2))
    low_L, high_L = (
        torch.full_like(unit_L, -20.0),
        torch.full_like(unit_L, 20.0),
    )  # log2, of mean gaps
    for _ in range(36):
        middle_L = (low_L + high_L) / 2
        below_L = _top_probability(gaps_LNK * (middle_L.exp2() / unit_L).view(-1, 1, 1)) < confidence
        low_L, high_L = torch.where(below_L, middle_L, low_L), torch.where(below_L, high_L, middle_L)
    if unreachable := ((unit_L == 0) | (high_L == 20)).nonzero().flatten().tolist():
        raise InputError(
            f"method.router_confidence: {confidence} can't be reached in layers {unreachable}: "
            "their tokens are too much alike, or the clusters coincide"
        )
    return high_L.exp2() / unit_L


def _top_probability(gaps_LNK: Tensor) -> Tensor:
    """Mean over tokens of the top-1 softmax probability of logits whose largest is 0: [L]."""
    return gaps_LNK.exp().sum(-1).reciprocal().mean(-1)


@dataclass(frozen=True)
class LayerMeasurement:
    """One layer's router at step 0, on the FFN inputs of the clustered tokens."""

    agreement: float
    """Share of tokens whose argmax expert is their cluster."""
    load: tuple[float, ...]
    """Share of tokens per argmax expert."""
    mean_top_probability: float
    inertia: float
    """Sum of squared distances to the centroids (spherical: between unit vectors), over all tasks."""


@dataclass(frozen=True)
class Clusters:
    """Router rows and centroids [L, K, D] float32 on the CPU (TRSU: task by task), and measurements."""

    router: Tensor
    centroids: Tensor
    method: Mapping[str, Any]
    tokens: Mapping[str, int]
    """Clustered tokens per task (CRSU: `all`)."""
    layers: tuple[LayerMeasurement, ...]
    load_per_task: Mapping[str, tuple[float, ...]]
    """Share of each task's tokens per argmax expert, averaged over layers (CRSU: of `all`)."""

    def measurements(self) -> dict[str, Any]:
        """Everything but the tensors, as JSON values."""
        layers = [{**asdict(layer), "load": list(layer.load)} for layer in self.layers]
        load = {task: list(shares) for task, shares in self.load_per_task.items()}
        return {
            "method": dict(self.method),
            "tokens": dict(self.tokens),
            "layers": layers,
            "load_per_task": load,
        }

    def save(self, folder: Path) -> None:
        """Write `router.safetensors` (router, centroids) and `clusters.json` (measurements) into `folder`."""
        folder.mkdir(parents=True, exist_ok=True)
        tensors = {"router": self.router.contiguous(), "centroids": self.centroids.contiguous()}
        save_file(tensors, folder / "router.safetensors")
        (folder / "clusters.json").write_text(json.dumps(self.measurements(), indent=1))

    @classmethod
    def load(cls, folder: Path) -> Clusters:
        """What `save` wrote into `folder`."""
        tensors = load_file(folder / "router.safetensors")
        found = json.loads((folder / "clusters.json").read_text())
        layers = tuple(
            LayerMeasurement(**{**layer, "load": tuple(layer["load"])}) for layer in found["layers"]
        )
        load = {task: tuple(shares) for task, shares in found["load_per_task"].items()}
        return cls(tensors["router"], tensors["centroids"], found["method"], found["tokens"], layers, load)


def cluster(
    representations: Path,
    method: TaskRepresentations | ContextRepresentations,
    *,
    seed: int,
    layers_at_once: int | None = None,
    device: str | torch.device = "cpu",
) -> Clusters:
    """Cluster the token representations in a folder of shards and make every layer's router (TRSU, CRSU).

    Args:
        representations: folder of `shard-*.safetensors` with `ffn_input` [L, n, D], the method's other
            representation if it has one, and `group`, `record`, `position` [n]. How tokens are split over
            shards changes nothing: they are clustered in the order of (record, position).
        method: number of experts, tasks, representation point, kind of K-means and of rows.
        seed: equal seeds give equal clusters.
        layers_at_once: layers held in memory together, by default what 1 GiB holds; changes only rounding.
        device: where to compute.

    Raises:
        InputError: no shards, a missing tensor, more experts than tokens, a confidence out of reach.
    """
    tokens = _Tokens.open(representations)
    groups = _groups(tokens.group_N, method)
    at_once = layers_at_once or _layers_in_memory(tokens, method)
    bounds = [*range(0, tokens.layers, at_once), tokens.layers]
    part_of = partial(_cluster_layers, tokens, method, groups, seed, torch.device(device))
    parts = [part_of(slice(*ends)) for ends in pairwise(bounds)]
    load_TK = torch.cat([part.load_LTK for part in parts]).mean(0)
    return Clusters(
        router=torch.cat([part.router_LKD for part in parts]),
        centroids=torch.cat([part.centroids_LKD for part in parts]),
        method=method.model_dump(mode="json", exclude=set(Experts.model_fields) - {"num_experts"}),
        tokens={group.name: len(group.index) for group in groups},
        layers=tuple(layer for part in parts for layer in part.measurements),
        load_per_task={group.name: tuple(load) for group, load in zip(groups, load_TK.tolist(), strict=True)},
    )


@dataclass(frozen=True)
class _Tokens:
    """The shards of a folder, read as one tensor in the order of (record, position)."""

    shards: tuple[Path, ...]
    places: tuple[Tensor, ...]
    """Of each shard's tokens, their index in that order."""
    group_N: Tensor
    layers: int
    width: int

    @classmethod
    def open(cls, folder: Path) -> _Tokens:
        shards = tuple(sorted(folder.glob("shard-*.safetensors")))
        if not shards:
            raise InputError(f"{folder}: no representations (shard-*.safetensors) in this folder")
        columns = [_columns(shard) for shard in shards]
        group, record, position = (np.concatenate(column) for column in zip(*columns, strict=True))
        order = np.lexsort((position, record))
        place = torch.from_numpy(np.argsort(order))
        layers, _, width = _shape(shards[0], "ffn_input")
        places = torch.split(place, [len(column[0]) for column in columns])
        return cls(shards, places, torch.from_numpy(group[order]), layers, width)

    def read(self, name: str, layers: slice) -> Tensor:
        """The tensor `name` of some layers, float32 [L, N, D]."""
        x_LND = torch.empty(layers.stop - layers.start, len(self.group_N), self.width)
        for shard, place in zip(self.shards, self.places, strict=True):
            with safe_open(shard, "pt") as file:
                if name not in file.keys():  # noqa: SIM118 (a safetensors file is no mapping)
                    raise InputError(
                        f"method.representation: {shard} holds no {name}: extract representations again"
                    )
                x_LND[:, place] = file.get_slice(name)[layers].float()
        return x_LND


def _columns(shard: Path) -> tuple[np.ndarray[Any, Any], ...]:
    with safe_open(shard, "np") as file:
        return tuple(file.get_tensor(name) for name in ("group", "record", "position"))


def _shape(shard: Path, name: str) -> tuple[int, ...]:
    with safe_open(shard, "pt") as file:
        return tuple(file.get_slice(name).get_shape())


@dataclass(frozen=True)
class _Group:
    """Tokens that are clustered together, and into how many experts."""

    name: str
    index: Tensor
    experts: int


def _groups(group_N: Tensor, method: TaskRepresentations | ContextRepresentations) -> list[_Group]:
    """TRSU: one group per task; CRSU: all tokens. Raises InputError where a group has too few."""
    if isinstance(method, TaskRepresentations):
        experts = method.num_experts // len(method.tasks)
        indices = [(group_N == task).nonzero().flatten() for task in range(len(method.tasks))]
        groups = [_Group(name, index, experts) for name, index in zip(method.tasks, indices, strict=True)]
    else:
        groups = [_Group("all", torch.arange(len(group_N)), method.num_experts)]
    for group in groups:
        if len(group.index) < group.experts:
            whose = f"task {group.name} has" if isinstance(method, TaskRepresentations) else "there are"
            raise InputError(
                f"method.num_experts: {group.experts} clusters need as many tokens, "
                f"but {whose} {len(group.index)}"
            )
    return groups


def _layers_in_memory(tokens: _Tokens, method: TaskRepresentations | ContextRepresentations) -> int:
    """Layers whose vectors fit into MEMORY: FFN inputs, representations, a task's share, K-means' copy."""
    copies = 3 if method.representation == "ffn_input" else 4
    return max(1, MEMORY // (copies * len(tokens.group_N) * tokens.width * 4))


@dataclass(frozen=True)
class _Part:
    """Some layers' share of `Clusters`."""

    router_LKD: Tensor
    centroids_LKD: Tensor
    measurements: Sequence[LayerMeasurement]
    load_LTK: Tensor


def _cluster_layers(
    tokens: _Tokens,
    method: TaskRepresentations | ContextRepresentations,
    groups: Sequence[_Group],
    seed: int,
    device: torch.device,
    layers: slice,
) -> _Part:
    inputs_LND = tokens.read("ffn_input", layers).to(device)
    same = method.representation == "ffn_input"
    x_LND = inputs_LND if same else tokens.read(method.representation, layers).to(device)
    found = [
        kmeans(
            _of(x_LND, group),
            group.experts,
            starts=method.kmeans_starts,
            spherical=method.spherical,
            seed=seed,
        )
        for group in groups
    ]
    centroids_LKD = torch.cat([one.centroids for one in found], 1)
    scaled = partial(router_rows, rows=method.router_rows, confidence=method.router_confidence)
    router_LKD = scaled(centroids_LKD, inputs_LND, spherical=method.spherical)
    assignment_LN = _joined(found, groups, tokens.group_N)
    inertia_L = torch.stack([one.inertia for one in found]).sum(0)
    logits_LNK = _logits(inputs_LND, router_LKD)
    measurements = _measure(logits_LNK, assignment_LN, inertia_L)
    load_LTK = torch.stack([_load(_of(logits_LNK, group)) for group in groups], 1)
    return _Part(router_LKD.cpu(), centroids_LKD.cpu(), measurements, load_LTK.cpu())


def _of(x_LND: Tensor, group: _Group) -> Tensor:
    """A group's tokens; no copy where that is all of them."""
    return x_LND if len(group.index) == x_LND.shape[1] else x_LND[:, group.index.to(x_LND.device)]


def _joined(found: Sequence[Centroids], groups: Sequence[_Group], group_N: Tensor) -> Tensor:
    """The groups' assignments [L, N] as indices of experts, the first group's experts first."""
    layers = len(found[0].assignment)
    assignment_LN = found[0].assignment.new_full((layers, len(group_N)), -1)
    first = 0
    for one, group in zip(found, groups, strict=True):
        assignment_LN[:, group.index.to(assignment_LN.device)] = one.assignment + first
        first += group.experts
    return assignment_LN


def _measure(logits_LNK: Tensor, assignment_LN: Tensor, inertia_L: Tensor) -> list[LayerMeasurement]:
    agreement_L = (logits_LNK.argmax(-1) == assignment_LN).double().mean(-1)
    top_L = logits_LNK.softmax(-1).amax(-1).mean(-1)
    columns = (agreement_L, _load(logits_LNK), top_L, inertia_L)
    return [
        LayerMeasurement(agreement, tuple(load), top, inertia)
        for agreement, load, top, inertia in zip(*(column.tolist() for column in columns), strict=True)
    ]


def _load(logits_LNK: Tensor) -> Tensor:
    """Share of tokens per argmax expert: [L, K]."""
    return F.one_hot(logits_LNK.argmax(-1), logits_LNK.shape[-1]).double().mean(1)
