"""TRSU and CRSU (RSU paper): routers start from clusters of the dense model's representations.

The clusters stage makes the rows, for TRSU per task, for CRSU over all tokens; here they are loaded.
"""

from __future__ import annotations

from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from raymoe.methods import Representations
from raymoe.schema import InputError


def router(
    method: Representations, *, num_layers: int, width: int, clusters: Path | None, seed: int
) -> Tensor:
    """Load the tensor `router` of `<clusters>/router.safetensors`: fp32 [num_layers, num_experts, width].

    Raises:
        InputError: no clusters, an unreadable file, or rows of another shape.
    """
    if clusters is None:
        raise InputError(f"method {getattr(method, 'name', '')}: needs the clusters of the dense model")
    file = clusters / "router.safetensors"
    try:
        rows_LND: Tensor = load_file(file)["router"].float()
    except (OSError, KeyError, SafetensorError) as error:
        raise InputError(f"{file}: no router rows: {error}") from None
    expected = (num_layers, method.num_experts, width)
    if tuple(rows_LND.shape) != expected:
        raise InputError(f"{file}: rows of shape {tuple(rows_LND.shape)}, expected {expected}")
    return rows_LND
