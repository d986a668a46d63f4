"""Upcycling: makes router rows and experts as the method's row in `raymoe.methods.SEAMS` says; the recipe.

A recipe is the dense model by reference, the method, its seed and the router rows: a few kilobytes that
`expand` turns into the sparse model when a trial loads, instead of N FFNs per layer and trial on disk.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedModel

from raymoe.config import validate
from raymoe.methods import METHODS, Experts, resolve, seam
from raymoe.models.moe import FFN, ExpertStart, upcycle_model
from raymoe.schema import InputError


@dataclass(frozen=True)
class Recipe:
    """Recipe of a sparse model, without its router rows."""

    dense: str
    """The dense model: a folder or a reference that the caller resolves to one."""
    method: Experts
    seed: int = 0
    """Seed of the experts, for methods whose experts are not plain copies."""


def router(method: Experts, *, num_layers: int, width: int, clusters: Path | None, seed: int) -> Tensor:
    """Make the router rows that `method` starts from: fp32 [num_layers, num_experts, width], on the CPU.

    `clusters`: output folder of the clusters stage, for methods that start from representations.

    Raises:
        InputError: the clusters are missing or do not fit.
    """
    make = resolve(str(seam(method).router))
    rows: Tensor = make(method, num_layers=num_layers, width=width, clusters=clusters, seed=seed)
    return rows


def expert_start(method: Experts, seed: int) -> ExpertStart | None:
    """Return the function that makes the experts of `method`; None: they are copies of the dense FFN.

    Every expert has its own random generator, so the result does not depend on who makes it or in what order.
    """
    reference = seam(method).expert
    if reference is None:
        return None
    make: Callable[[Any, FFN, torch.Generator], FFN] = resolve(reference)

    def start(ffn: FFN, layer: int, expert: int) -> FFN:
        numbers = np.random.default_rng([seed, layer, expert]).integers(2**63)
        return make(method, ffn, torch.Generator().manual_seed(int(numbers)))

    return start


def write_recipe(folder: Path, dense: str | Path, method: Experts, router: Tensor, seed: int = 0) -> None:
    """Write `recipe.json` and `router.safetensors` into `folder`, which is created if missing."""
    folder.mkdir(parents=True, exist_ok=True)
    save_file({"router": router.detach().cpu().contiguous()}, folder / "router.safetensors")
    recipe = {"dense": str(dense), "method": method.model_dump(mode="json"), "seed": seed}
    (folder / "recipe.json").write_text(json.dumps(recipe, indent=1))


def load_recipe(folder: Path) -> tuple[Recipe, Tensor]:
    """Load the recipe in `folder` and its router rows [L, N, D].

    Raises:
        InputError: not a recipe folder, or one of another version of raymoe.
    """
    try:
        values = json.loads((folder / "recipe.json").read_text())
        rows = load_file(folder / "router.safetensors")["router"]
        return Recipe(values["dense"], _method(values["method"]), values.get("seed", 0)), rows
    except (OSError, ValueError, KeyError, SafetensorError) as error:
        raise InputError(f"{folder}: not a recipe: {error}") from None


def _method(values: dict[str, Any]) -> Experts:
    method = validate(METHODS[values["name"]], values)
    if not isinstance(method, Experts):
        raise ValueError(f"{values['name']} has no experts")
    return method


def expand(
    dense: Path,
    router: Tensor,
    method: Experts,
    dtype: torch.dtype,
    experts_implementation: str = "grouped_mm",
    on_layer: Callable[[nn.Module], None] | None = None,
    seed: int = 0,
    **from_pretrained: Any,
) -> PreTrainedModel:
    """Return the sparse model: the dense folder, loaded in `dtype` and upcycled layer by layer.

    `seed`: the recipe's. Further keywords go to transformers' `from_pretrained` (such as `attn_implementation`).
    """
    model = AutoModelForCausalLM.from_pretrained(dense, dtype=dtype, local_files_only=True, **from_pretrained)
    return upcycle_model(model, router, method, experts_implementation, on_layer, expert_start(method, seed))
