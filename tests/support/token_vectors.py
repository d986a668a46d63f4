"""Token vectors for the tests of K-means and routers: easy, hard, and like a language model's."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

LAYERS, TOKENS, WIDTH = 2, 2500, 24


def blobs(clusters: int, spread: float) -> Tensor:
    g = torch.Generator().manual_seed(1)
    centres = spread * torch.randn(LAYERS, clusters, WIDTH, generator=g)
    member = torch.randint(clusters, (TOKENS,), generator=g)
    return centres[:, member] + torch.randn(LAYERS, TOKENS, WIDTH, generator=g)


def heavy_tailed() -> Tensor:
    """Anisotropic, Student t, far from the origin: like token representations."""
    rng = np.random.default_rng(2)
    scale = np.logspace(1, -2, WIDTH)
    x = rng.standard_t(4, size=(LAYERS, TOKENS, WIDTH)) * scale + 5 * scale
    return torch.from_numpy(x.astype(np.float32))


def language_like() -> Tensor:
    """Zipfian tokens embedded, mixed with their context and RMS-normalised, width 128: no clear clusters."""
    rng = np.random.default_rng(3)
    tokens = np.minimum(rng.zipf(1.3, size=(LAYERS, TOKENS)), 500) - 1
    x = rng.normal(size=(500, 128))[tokens]
    x = x + sum(np.roll(x, step, axis=1) / (1 + step) for step in (1, 2, 3)) + rng.normal(size=128)
    return torch.from_numpy((x / np.sqrt((x**2).mean(-1, keepdims=True))).astype(np.float32))


def unit_vectors(x: Tensor) -> np.ndarray:
    unit: np.ndarray = (x / x.norm(dim=-1, keepdim=True)).numpy()
    return unit
