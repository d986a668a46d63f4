"""K-means against scikit-learn."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from sklearn.cluster import KMeans
from support.token_vectors import LAYERS, blobs, heavy_tailed, language_like, unit_vectors

from raymoe.routers.kmeans import kmeans

DATA = {
    "blobs": lambda: blobs(8, 1.0),
    "far_blobs": lambda: blobs(8, 100.0),
    "more_blobs_than_clusters": lambda: blobs(16, 2.0),
    "heavy_tailed": heavy_tailed,
    "language_like": language_like,
}


def spherical_inertia(unit: np.ndarray, labels: np.ndarray) -> float:
    """Return the sum of |x - c|^2, with c the direction of its cluster's sum."""
    total = 0.0
    for label in np.unique(labels):
        members = unit[labels == label].astype(np.float64)
        centre = members.sum(0) / np.linalg.norm(members.sum(0))
        total += float(((members - centre) ** 2).sum())
    return total


@pytest.mark.parametrize("name", DATA)
@pytest.mark.parametrize("k", [2, 8])
def test_inertia_is_within_half_a_percent_of_the_best_of_four_sklearn_starts(name: str, k: int) -> None:
    x = DATA[name]()
    found = kmeans(x, k, starts=4, spherical=False, seed=0)
    for layer in range(LAYERS):
        peers = [KMeans(k, n_init=1, random_state=s).fit(x[layer].numpy()).inertia_ for s in range(4)]
        assert found.inertia[layer] <= 1.005 * min(peers)


@pytest.mark.parametrize("name", ["blobs", "heavy_tailed", "language_like"])
def test_spherical_inertia_is_within_half_a_percent_of_sklearn_on_unit_vectors(name: str) -> None:
    x = DATA[name]()
    found = kmeans(x, 8, starts=4, spherical=True, seed=0)
    for layer, unit in enumerate(unit_vectors(x)):
        peers = [KMeans(8, n_init=1, random_state=s).fit_predict(unit) for s in range(4)]
        assert found.inertia[layer] <= 1.005 * min(spherical_inertia(unit, labels) for labels in peers)


def test_the_result_is_a_fixed_point_of_lloyds_iteration() -> None:
    x = blobs(6, 3.0)
    found = kmeans(x, 6, starts=4, spherical=False, seed=0)
    for layer in range(LAYERS):
        vectors, centres = x[layer].double().numpy(), found.centroids[layer].double().numpy()
        distances = ((vectors[:, None] - centres[None]) ** 2).sum(-1)
        assert np.array_equal(found.assignment[layer].numpy(), distances.argmin(1))
        assert found.inertia[layer].item() == pytest.approx(distances.min(1).sum(), rel=1e-5)
        assert found.sizes[layer].tolist() == np.bincount(distances.argmin(1), minlength=6).tolist()
        means = np.stack([vectors[distances.argmin(1) == c].mean(0) for c in range(6)])
        assert np.abs(means - centres).max() < 0.02


def test_spherical_centroids_have_unit_length_and_their_argmax_is_the_assignment() -> None:
    x = heavy_tailed()
    found = kmeans(x, 8, starts=2, spherical=True, seed=0)
    assert torch.allclose(found.centroids.norm(dim=-1), torch.ones(LAYERS, 8), atol=1e-5)
    cosines = np.einsum("lnd,lkd->lnk", unit_vectors(x).astype(np.float64), found.centroids.double().numpy())
    assert (cosines.argmax(-1) == found.assignment.numpy()).mean() > 0.9999  # except for float32 ties


def test_equal_seeds_give_equal_results_and_a_layer_does_not_depend_on_the_others() -> None:
    x = language_like()
    both, again = (kmeans(x, 8, starts=2, spherical=True, seed=5) for _ in range(2))
    assert torch.equal(both.centroids, again.centroids)
    alone = kmeans(x[1:], 8, starts=2, spherical=True, seed=5)
    assert torch.allclose(both.centroids[1:], alone.centroids, atol=1e-4)


def test_no_cluster_stays_empty_and_duplicates_do_no_harm() -> None:
    rng = torch.Generator().manual_seed(0)
    outliers = torch.randn(1, 5, 4, generator=rng) * 1000
    x = torch.cat([torch.zeros(1, 3000, 4), outliers], 1)  # k-means++ on a subsample can't see all of these
    assert kmeans(x, 6, starts=1, spherical=False, seed=0).sizes.min() > 0
    same = kmeans(torch.ones(2, 50, 4), 3, starts=2, spherical=False, seed=0)
    assert same.inertia.tolist() == [0, 0] and torch.equal(same.centroids, torch.ones(2, 3, 4))
