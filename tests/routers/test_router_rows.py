"""Router rows against their formulas."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from support.token_vectors import LAYERS, WIDTH, heavy_tailed, language_like
from torch import Tensor

from raymoe.routers.kmeans import kmeans
from raymoe.routers.router_rows import router_rows
from raymoe.schema import InputError


def mean_top_probability(x: Tensor, router: Tensor) -> np.ndarray:
    logits = np.einsum("lnd,lkd->lnk", x.double().numpy(), router.double().numpy())
    p = np.exp(logits - logits.max(-1, keepdims=True))
    return (p.max(-1) / p.sum(-1)).mean(-1)


@pytest.mark.parametrize("spherical", [True, False])
@pytest.mark.parametrize("confidence", [0.2, 0.6, 0.95])
def test_scaled_rows_have_the_requested_confidence(spherical: bool, confidence: float) -> None:
    x = heavy_tailed()
    c = kmeans(x, 8, starts=1, spherical=spherical, seed=0).centroids
    rows = router_rows(c, x, rows="scaled", confidence=confidence, spherical=spherical)
    assert mean_top_probability(x, rows) == pytest.approx(np.full(LAYERS, confidence), abs=1e-4)


def test_scaled_spherical_rows_are_centred_and_keep_the_assignment() -> None:
    x = language_like()
    found = kmeans(x, 8, starts=2, spherical=True, seed=0)
    rows = router_rows(found.centroids, x, rows="scaled", confidence=0.6)
    centred = found.centroids - found.centroids.mean(1, keepdim=True)
    factor = rows.norm(dim=(1, 2)) / centred.norm(dim=(1, 2))
    assert torch.allclose(rows, centred * factor.view(-1, 1, 1), rtol=1e-4, atol=1e-5)
    chosen = torch.einsum("lnd,lkd->lnk", x, rows).argmax(-1)
    assert (chosen == found.assignment).double().mean() > 0.999


def test_scaled_plain_rows_have_equal_length_and_ignore_the_inputs_mean() -> None:
    x = heavy_tailed()
    c = kmeans(x, 4, starts=1, spherical=False, seed=0).centroids
    rows = router_rows(c, x, rows="scaled", confidence=0.6, spherical=False)
    lengths = rows.norm(dim=-1)
    assert torch.allclose(lengths, lengths[:, :1].expand(-1, 4), rtol=1e-4)
    along = torch.einsum("lkd,ld->lk", rows, x.mean(1)) / x.mean(1).norm(dim=-1, keepdim=True) / lengths
    assert along.abs().max() < 1e-4


def test_raw_rows_are_the_centroids() -> None:
    c = torch.randn(LAYERS, 4, WIDTH)
    assert torch.equal(router_rows(c, heavy_tailed(), rows="raw", confidence=0.1), c)


def test_confidence_out_of_reach_is_an_error() -> None:
    c = torch.randn(LAYERS, 2, WIDTH)
    with pytest.raises(InputError, match=r"^method\.router_confidence: 0\.5 must be above 1/2"):
        router_rows(c, heavy_tailed(), rows="scaled", confidence=0.5)
    with pytest.raises(
        InputError, match=r"^method\.router_confidence: 0\.6 can't be reached in layers \[0, 1\]"
    ):
        router_rows(torch.ones(LAYERS, 2, WIDTH), heavy_tailed(), rows="scaled", confidence=0.6)
