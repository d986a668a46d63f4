"""Clusters: token representations -> K-means centroids per layer -> every layer's router rows.

    clusters = cluster(folder_of_shards, ContextRepresentations(num_experts=8), seed=0)
    clusters.save(folder)           # router.safetensors (router, centroids), clusters.json (measurements)

CRSU clusters all tokens together, TRSU each task's tokens by themselves.

Shape letters: L layers, N tokens, D width, K clusters (experts), T tasks.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn import functional as F

from raymoe.methods import ContextRepresentations, Experts, TaskRepresentations
from raymoe.routers.kmeans import Centroids, kmeans
from raymoe.routers.router_rows import router_logits, router_rows
from raymoe.schema import InputError

MEMORY = 2**30
"""Bytes of token vectors that `cluster` holds at a time by default, working copies included."""


@dataclass(frozen=True)
class LayerMeasurement:
    """One layer's router at step 0, on the FFN inputs of the clustered tokens."""

    agreement: float
    """Fraction of tokens whose argmax expert is their cluster."""
    load: tuple[float, ...]
    """Fraction of tokens per argmax expert."""
    mean_top_probability: float
    inertia: float
    """Sum of squared distances to the centroids (spherical: of unit vectors), over all tasks."""


@dataclass(frozen=True)
class Clusters:
    """Router rows and centroids [L, K, D] (float32, on the CPU; TRSU: task by task), and measurements."""

    router: Tensor
    centroids: Tensor
    method: Mapping[str, Any]
    tokens: Mapping[str, int]
    """Number of clustered tokens per task (CRSU: `all`)."""
    layers: tuple[LayerMeasurement, ...]
    load_per_task: Mapping[str, tuple[float, ...]]
    """Fraction of each task's tokens per argmax expert, averaged over layers (CRSU: of `all`)."""

    def measurements(self) -> dict[str, Any]:
        """Return everything but the tensors, as JSON values."""
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
        """Load what `save` wrote into `folder`."""
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
            representation if it has one, and `group`, `record`, `position` [n], where `record` is an example's
            index. Tokens are clustered in the order of (record, position), however they are split over shards.
        method: number of experts, tasks, representation point, kind of K-means and of rows.
        seed: equal seeds give equal clusters.
        layers_at_once: layers held in memory together, by default as many as fit in 1 GiB; changes only rounding.
        device: where to compute.

    Raises:
        InputError: no shards, a missing tensor, more experts than tokens, or a confidence out of reach.
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
    """The shards of a folder, read as one tensor in the order of (example, position)."""

    shards: tuple[Path, ...]
    places: tuple[Tensor, ...]
    """Per shard, the index of its tokens in that order."""
    group_N: Tensor
    layers: int
    width: int

    @classmethod
    def open(cls, folder: Path) -> _Tokens:
        shards = tuple(sorted(folder.glob("shard-*.safetensors")))
        if not shards:
            raise InputError(f"{folder}: no representations (shard-*.safetensors) in this folder")
        columns = [_columns(shard) for shard in shards]
        group, example, position = (np.concatenate(column) for column in zip(*columns, strict=True))
        order = np.lexsort((position, example))
        place = torch.from_numpy(np.argsort(order))
        layers, _, width = _shape(shards[0], "ffn_input")
        places = torch.split(place, [len(column[0]) for column in columns])
        return cls(shards, places, torch.from_numpy(group[order]), layers, width)

    def read(self, name: str, layers: slice) -> Tensor:
        """Read the tensor `name` of some layers as float32 [L, N, D]."""
        x_LND = torch.empty(layers.stop - layers.start, len(self.group_N), self.width)
        for shard, place in zip(self.shards, self.places, strict=True):
            with safe_open(shard, "pt") as file:
                if name not in file.keys():  # noqa: SIM118 (a safetensors file is no mapping)
                    raise InputError(
                        f"method.representation: {shard} holds no {name}: extract the representations again"
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
    """Tokens that are clustered together, and the number of experts they get."""

    name: str
    index: Tensor
    experts: int


def _groups(group_N: Tensor, method: TaskRepresentations | ContextRepresentations) -> list[_Group]:
    """Return one group per task (TRSU), or all tokens as one (CRSU); raises InputError if one is too small."""
    if tasks := method.domains:
        experts = method.num_experts // len(tasks)
        indices = [(group_N == task).nonzero().flatten() for task in range(len(tasks))]
        groups = [_Group(name, index, experts) for name, index in zip(tasks, indices, strict=True)]
    else:
        groups = [_Group("all", torch.arange(len(group_N)), method.num_experts)]
    for group in groups:
        if len(group.index) < group.experts:
            whose = f"task {group.name} has" if tasks else "there are"
            raise InputError(
                f"method.num_experts: {group.experts} clusters need as many tokens, "
                f"but {whose} {len(group.index)}"
            )
    return groups


def _layers_in_memory(tokens: _Tokens, method: TaskRepresentations | ContextRepresentations) -> int:
    """Return how many layers fit into MEMORY: FFN inputs, representations, one task's part, K-means' copy."""
    copies = 3 if method.representation == "ffn_input" else 4
    return max(1, MEMORY // (copies * len(tokens.group_N) * tokens.width * 4))


@dataclass(frozen=True)
class _Part:
    """The part of `Clusters` that some layers make up."""

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
    logits_LNK = router_logits(inputs_LND, router_LKD)
    measurements = _measure(logits_LNK, assignment_LN, inertia_L)
    load_LTK = torch.stack([_load(_of(logits_LNK, group)) for group in groups], 1)
    return _Part(router_LKD.cpu(), centroids_LKD.cpu(), measurements, load_LTK.cpu())


def _of(x_LND: Tensor, group: _Group) -> Tensor:
    """Select a group's tokens; no copy if that is all of them."""
    return x_LND if len(group.index) == x_LND.shape[1] else x_LND[:, group.index.to(x_LND.device)]


def _joined(found: Sequence[Centroids], groups: Sequence[_Group], group_N: Tensor) -> Tensor:
    """Join the groups' assignments [L, N] as expert indices, the first group's experts first."""
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
    """Return the fraction of tokens per argmax expert: [L, K]."""
    return F.one_hot(logits_LNK.argmax(-1), logits_LNK.shape[-1]).double().mean(1)
