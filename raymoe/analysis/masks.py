"""Describe SIMoE's masks: how sparse they are, how much they overlap, where they open and for which tasks.

    description = describe(gates_MG, layout, weights_SM, tasks, domains)    # plain values: masks.json
    headline(description)                                                   # the few that are logged as metrics

Shapes: M experts, G gates, L gate spans, S held-out prompts, T tasks.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.cluster.hierarchy import linkage
from torch import Tensor

from raymoe.models import gates
from raymoe.models.gates import KINDS, GateLayout

Floats = NDArray[np.float64]

KIND_ORDER = ("norm", *KINDS.values())
SCOPES = ("union", "mean", "per_expert")
ORDERED = 200
"""Most tasks that are ordered optimally: it takes 1 s for 750 tasks, and 15 s for twice as many."""


def describe(
    gates_MG: Tensor,
    layout: GateLayout,
    weights_SM: Tensor,
    tasks: Sequence[str],
    domains: Sequence[str],
    scope: str = "union",
) -> dict[str, Any]:
    """Describe the masks of a trained model, as plain JSON values.

    Args:
        gates_MG: the gates in evaluation.
        layout: what each gate controls.
        weights_SM: the router's output for each held-out prompt.
        tasks: each prompt's task [S].
        domains: each prompt's domain [S].
        scope: the `sparsity_scope` that the model was trained with, which `masks/sparsity` measures.

    Returns:
        The result of `describe_gates`, `tasks` and `domains` (number of `prompts` and mean expert `weights` [M]),
        and `linkage` (`clustered` of the tasks, in their order; empty for a single task).
    """
    activation = _activation(weights_SM.detach().double().cpu().numpy(), tasks, domains)
    return describe_gates(gates_MG, layout, scope) | activation


def describe_gates(gates_MG: Tensor, layout: GateLayout, scope: str = "union") -> dict[str, Any]:
    """Describe the gates in evaluation, without any prompts, as plain JSON values.

    Returns:
        `experts`, `gates`, `parameters` (of theta_delta), `live_gates`, `live_parameters` (in any expert),
        `sparsity` by scope, `overlap` (`ratios` [M, M] and their `mean`), `kinds` and `layers` (`parameters`
        and non-zero fractions `union` and `mean`).
    """
    gates_MG = gates_MG.detach().double().cpu()
    owned_G = layout.owned().double()
    open_G = (gates_MG != 0).any(0)
    return {
        "experts": len(gates_MG),
        "gates": layout.size,
        "parameters": layout.num_parameters,
        "live_gates": int(open_G.sum()),
        "live_parameters": int(owned_G[open_G].sum()),
        "scope": scope,
        "sparsity": {s: gates.sparsity(gates_MG, owned_G, s).tolist() for s in SCOPES},
        "overlap": {
            "ratios": gates.overlap(gates_MG).tolist(),
            "mean": float(gates.mean_overlap(gates_MG)),
        },
        **_where(gates_MG, layout),
    }


def headline(description: Mapping[str, Any]) -> dict[str, float]:
    """Return a description's metrics: `masks/sparsity` in the scope trained with, and others to compare trials."""
    sparsity: Mapping[str, Sequence[float]] = description["sparsity"]
    return {
        "masks/sparsity": float(np.mean(sparsity[description["scope"]])),
        "masks/sparsity_union": sparsity["union"][0],
        "masks/sparsity_mean": sparsity["mean"][0],
        "masks/overlap": description["overlap"]["mean"],
        "masks/live_parameters": float(description["live_parameters"]),
        **{f"masks/nonzero/{row['kind']}": row["union"] for row in description["kinds"]},
    }


def _where(gates_MG: Tensor, layout: GateLayout) -> dict[str, list[dict[str, Any]]]:
    """Return non-zero fractions by kind of parameter and by depth; the final norm is in no layer."""
    spans = layout.spans
    open_MG = (gates_MG != 0).numpy()
    columns_KG = np.vstack([open_MG.any(0, keepdims=True), open_MG]).astype(np.int64)
    owned_L = np.array([span.owned for span in spans], dtype=np.int64)
    counts_KL = np.add.reduceat(columns_KG, [span.start for span in spans], axis=1) * owned_L
    sizes_L = owned_L * np.array(layout.widths)

    def shares(labels: Sequence[Any], label: Any) -> dict[str, Any]:
        chosen = np.array([each == label for each in labels])
        size = int(sizes_L[chosen].sum())
        union, *experts = (counts_KL[:, chosen].sum(1) / size).tolist()
        return {"parameters": size, "union": union, "mean": float(np.mean(experts))}

    kinds, layers = [span.kind for span in spans], [span.layer for span in spans]
    depth = sorted({layer for layer in layers if layer is not None})
    return {
        "kinds": [{"kind": kind, **shares(kinds, kind)} for kind in KIND_ORDER if kind in kinds],
        "layers": [{"layer": layer, **shares(layers, layer)} for layer in depth],
    }


def _activation(weights_SM: Floats, tasks: Sequence[str], domains: Sequence[str]) -> dict[str, list[Any]]:
    """Return mean expert weights by task and by domain, in the order of their names."""
    by_task = mean_weights(weights_SM, list(zip(domains, tasks, strict=True)))
    by_domain = mean_weights(weights_SM, domains)
    weights_TM = np.array([means["weights"] for means in by_task.values()])
    return {
        "tasks": [{"task": task, "domain": domain, **v} for (domain, task), v in by_task.items()],
        "domains": [{"domain": domain, **v} for domain, v in by_domain.items()],
        "linkage": clustered(weights_TM).tolist() if len(weights_TM) > 1 else [],
    }


def mean_weights(weights_SM: Floats, labels: Sequence[Any]) -> dict[Any, dict[str, Any]]:
    """Return the number of `prompts` and the mean expert `weights` [M] of every label."""
    rows: dict[Any, list[int]] = {}
    for i, label in enumerate(labels):
        rows.setdefault(label, []).append(i)
    return {
        label: {"prompts": len(rows[label]), "weights": weights_SM[rows[label]].mean(0).tolist()}
        for label in sorted(rows)
    }


def clustered(weights_TM: Floats) -> Floats:
    """Cluster tasks hierarchically by their mean expert weights; returns scipy's linkage matrix [T - 1, 4].

    Average linkage of Euclidean distances. Up to ORDERED tasks, leaves are ordered so that neighbours are similar,
    which changes no cluster. Needs at least two tasks.
    """
    ordered = len(weights_TM) <= ORDERED
    return np.asarray(linkage(weights_TM, "average", optimal_ordering=ordered), dtype=np.float64)
