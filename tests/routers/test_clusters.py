"""Clusters from shards: any split of them, measurements recomputed, TRSU against scikit-learn."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from sklearn.cluster import KMeans
from support.token_vectors import LAYERS, TOKENS, WIDTH, blobs, heavy_tailed, language_like, unit_vectors
from torch import Tensor

from raymoe.methods import ContextRepresentations, TaskRepresentations
from raymoe.routers.clusters import Clusters, cluster
from raymoe.schema import InputError


def write_shards(folder: Path, x: Tensor, group: Tensor, splits: list[list[int]], **points: Tensor) -> Path:
    """Write shards holding the tokens of `splits`, three tokens an example."""
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


def test_trsu_with_one_expert_per_task_uses_the_tasks_means(tmp_path: Path) -> None:
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
