"""SU, sparse upcycling (Komatsuzaki et al., arXiv 2212.05055): experts are copies, routers are random."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from raymoe.methods import SparseUpcycling


def router(
    method: SparseUpcycling, *, num_layers: int, width: int, clusters: Path | None, seed: int
) -> Tensor:
    """Draw rows from N(0, router_std^2): fp32 [num_layers, num_experts, width], determined by `seed` alone."""
    generator = torch.Generator().manual_seed(seed)  # on the CPU, as GPUs draw other numbers
    rows_LND = torch.randn(num_layers, method.num_experts, width, generator=generator)
    return rows_LND * method.router_std
