"""K-means against scikit-learn, router rows against their formulas, shards in any split."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from sklearn.cluster import KMeans
from torch import Tensor

from raymoe.methods import ContextRepresentations, TaskRepresentations
from raymoe.routers.kmeans import Clusters, cluster, kmeans, router_rows
from raymoe.schema import InputError

LAYERS, TOKENS, WIDTH = 2, 2500, 24


def blobs(clusters: int, spread: float) -> Tensor:
    g = torch.Generator().manual_seed(1)
    centres = spread * torch.randn(LAYERS, clusters, WIDTH, generator=g)
    member = torch.randint(clusters, (TOKENS,), generator=g)
    return centres[:, member] + torch.randn(LAYERS, TOKENS, WIDTH, generator=g)


def heavy_tailed() -> Tensor:
    """Anisotropic, Student t, far from the origin: what token representations look like."""
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


DATA = {
    "blobs": lambda: blobs(8, 1.0),
    "far_blobs": lambda: blobs(8, 100.0),
    "more_blobs_than_clusters": lambda: blobs(16, 2.0),
    "heavy_tailed": heavy_tailed,
    "language_like": language_like,
}


def spherical_inertia(unit: np.ndarray, labels: np.ndarray) -> float:
    """Sum of |x - c|^2 where c is the direction of its cluster's sum."""
    total = 0.0
    for label in np.unique(labels):
        members = unit[labels == label].astype(np.float64)
        centre = members.sum(0) / np.linalg.norm(members.sum(0))
        total += float(((members - centre) ** 2).sum())
    return total


def unit_vectors(x: Tensor) -> np.ndarray:
    return (x / x.norm(dim=-1, keepdim=True)).numpy()


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


def test_result_is_a_fixed_point_of_lloyds_iteration() -> None:
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


def test_spherical_centroids_are_unit_and_their_argmax_is_the_assignment() -> None:
    x = heavy_tailed()
    found = kmeans(x, 8, starts=2, spherical=True, seed=0)
    assert torch.allclose(found.centroids.norm(dim=-1), torch.ones(LAYERS, 8), atol=1e-5)
    cosines = np.einsum("lnd,lkd->lnk", unit_vectors(x).astype(np.float64), found.centroids.double().numpy())
    assert (cosines.argmax(-1) == found.assignment.numpy()).mean() > 0.9999  # but for float32 ties


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


def mean_top_probability(x: Tensor, router: Tensor) -> np.ndarray:
    logits = np.einsum("lnd,lkd->lnk", x.double().numpy(), router.double().numpy())
    p = np.exp(logits - logits.max(-1, keepdims=True))
    return (p.max(-1) / p.sum(-1)).mean(-1)


@pytest.mark.parametrize("spherical", [True, False])
@pytest.mark.parametrize("confidence", [0.2, 0.6, 0.95])
def test_scaled_rows_have_the_asked_for_confidence(spherical: bool, confidence: float) -> None:
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


def write_shards(folder: Path, x: Tensor, group: Tensor, splits: list[list[int]], **points: Tensor) -> Path:
    """Shards holding the tokens of `splits`; three tokens a record."""
    folder.mkdir()
    for number, tokens in enumerate(splits):
        index = torch.tensor(tokens)
        vectors = {name: v[:, index].contiguous() for name, v in {"ffn_input": x, **points}.items()}
        place = {"record": index // 3, "position": (index % 3).int(), "group": group[index].int()}
        save_file({**vectors, **place}, folder / f"shard-{number:05d}.safetensors")
    return folder


def shards(folder: Path, x: Tensor, group: Tensor | None = None, **points: Tensor) -> Path:
    everything = list(range(x.shape[1]))
    return write_shards(
        folder, x, torch.zeros(len(everything)) if group is None else group, [everything], **points
    )


def test_clusters_do_not_depend_on_how_tokens_are_split_over_shards(tmp_path: Path) -> None:
    x = language_like()[:, :1500]
    order = np.random.default_rng(0).permutation(1500).tolist()
    other = write_shards(tmp_path / "b", x, torch.zeros(1500), [order[:100], order[100:900], order[900:]])
    method = ContextRepresentations(num_experts=4)
    one = cluster(shards(tmp_path / "a", x), method, seed=1)
    two = cluster(other, method, seed=1)
    assert torch.equal(one.router, two.router) and one == replace(
        two, router=one.router, centroids=one.centroids
    )


def test_layers_at_once_changes_only_rounding(tmp_path: Path) -> None:
    folder = shards(tmp_path / "a", language_like()[:, :1500])
    method = ContextRepresentations(num_experts=4)
    together, apart = (cluster(folder, method, seed=1, layers_at_once=n) for n in (2, 1))
    assert torch.allclose(together.router, apart.router, rtol=1e-3, atol=1e-4)


def test_measurements_follow_from_the_router_and_the_tokens(tmp_path: Path) -> None:
    x, attention = language_like(), language_like().flip(1)
    method = ContextRepresentations(num_experts=4, representation="attention_output", spherical=False)
    found = cluster(shards(tmp_path / "a", x, attention_output=attention), method, seed=0)
    logits = np.einsum("lnd,lkd->lnk", x.numpy(), found.router.numpy())
    distances = ((attention.numpy()[:, :, None] - found.centroids.numpy()[:, None]) ** 2).sum(-1)
    for layer, measured in enumerate(found.layers):
        chosen, assigned = logits[layer].argmax(-1), distances[layer].argmin(-1)
        assert measured.agreement == pytest.approx((chosen == assigned).mean(), abs=2 / TOKENS)
        assert measured.load == pytest.approx(np.bincount(chosen, minlength=4) / TOKENS, abs=2 / TOKENS)
        assert measured.mean_top_probability == pytest.approx(0.6, abs=1e-4)
        assert measured.inertia == pytest.approx(distances[layer].min(-1).sum(), rel=1e-4)
    assert found.load_per_task["all"] == pytest.approx(np.mean([m.load for m in found.layers], 0))


def test_spherical_clusters_of_the_ffn_input_are_the_routers_argmax(tmp_path: Path) -> None:
    found = cluster(shards(tmp_path / "a", language_like()), ContextRepresentations(num_experts=8), seed=0)
    assert all(layer.agreement > 0.999 for layer in found.layers)


def test_trsu_gives_every_task_its_own_experts_in_order(tmp_path: Path) -> None:
    x = blobs(4, 4.0)
    member = torch.from_numpy(KMeans(4, n_init=4, random_state=0).fit_predict(x[0].numpy()))
    group = (member >= 2).int()  # two blobs are task code, two math
    method = TaskRepresentations(num_experts=4, tasks=("code", "math"))
    found = cluster(shards(tmp_path / "a", x, group), method, seed=0)
    assert found.tokens == {"code": int((group == 0).sum()), "math": int((group == 1).sum())}
    for task, experts in ((0, slice(0, 2)), (1, slice(2, 4))):
        unit = unit_vectors(x[1][group == task])
        labels = KMeans(2, n_init=4, random_state=0).fit_predict(unit)
        means = np.stack([unit[labels == label].mean(0) for label in (0, 1)])
        means /= np.linalg.norm(means, axis=1, keepdims=True)
        cosines = found.centroids[1, experts].numpy() @ means.T
        assert cosines.max(1) == pytest.approx(1, abs=1e-4) and sorted(cosines.argmax(1)) == [0, 1]
    assert sum(found.load_per_task["code"][:2]) > 0.99 and sum(found.load_per_task["math"][2:]) > 0.99


def test_trsu_with_one_expert_per_task_takes_the_tasks_means(tmp_path: Path) -> None:
    x = heavy_tailed()
    group = (torch.arange(TOKENS) % 2).int()
    method = TaskRepresentations(num_experts=2, spherical=False, router_rows="raw")
    found = cluster(shards(tmp_path / "a", x, group), method, seed=0)
    means = torch.stack([x[:, 0::2].mean(1), x[:, 1::2].mean(1)], 1)
    assert torch.allclose(found.router, means, rtol=1e-4, atol=1e-4)


def test_save_and_load_keep_everything(tmp_path: Path) -> None:
    found = cluster(shards(tmp_path / "a", blobs(4, 1.0)), ContextRepresentations(num_experts=4), seed=0)
    found.save(tmp_path / "out")
    loaded = Clusters.load(tmp_path / "out")
    assert torch.equal(loaded.router, found.router) and torch.equal(loaded.centroids, found.centroids)
    assert loaded == replace(found, router=loaded.router, centroids=loaded.centroids)
    assert loaded.router.shape == (LAYERS, 4, WIDTH) and loaded.router.dtype == torch.float32


def test_errors_say_what_is_wrong(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match="no representations"):
        cluster(tmp_path / "empty", ContextRepresentations(), seed=0)
    few = shards(tmp_path / "few", blobs(2, 1.0)[:, :5], torch.tensor([0, 0, 0, 0, 1]))
    with pytest.raises(InputError, match="method.num_experts: 2 clusters need .* task math has 1"):
        cluster(few, TaskRepresentations(num_experts=4), seed=0)
    with pytest.raises(InputError, match="method.num_experts: 8 clusters need .* there are 5"):
        cluster(few, ContextRepresentations(num_experts=8), seed=0)
    with pytest.raises(InputError, match="method.representation: .* holds no attention_output"):
        cluster(few, ContextRepresentations(representation="attention_output"), seed=0)
