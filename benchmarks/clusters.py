"""How fast, and how good, is the K-means of all layers, against scikit-learn's one layer after another?

    python benchmarks/clusters.py [--rounds 5] [--layers 8] [--tokens 20000] [--width 256] [--clusters 8]

Vectors are made like a language model's: Zipfian tokens, mixed with their context, RMS-normalised. Taking
turns: raymoe (4 starts), scikit-learn's KMeans with 4 starts and with one, MiniBatchKMeans with 4, and the
floor: the GEMMs of one start alone, for as many iterations as scikit-learn's best start took on average.
`--device cuda` runs raymoe and the floor on a GPU; scikit-learn stays on the CPU.
"""

from __future__ import annotations

import argparse
import statistics
from functools import partial

import torch
from harness import Rounds, device_name, figure, interleaved, parser
from sklearn.cluster import KMeans, MiniBatchKMeans
from torch import Tensor
from torch.nn import functional as F

from raymoe.routers.kmeans import kmeans

STARTS = 4
SHAPE = {"layers": 8, "tokens": 20_000, "width": 256, "clusters": 8}
TINY = {"layers": 2, "tokens": 500, "width": 16, "clusters": 4}


def vectors(layers: int, tokens: int, width: int) -> Tensor:
    """Return token embeddings with a Zipfian vocabulary, mixed with their context: float32 [L, N, D]."""
    g = torch.Generator().manual_seed(0)
    vocabulary = torch.arange(1, 5001, dtype=torch.float64) ** -1.0
    token = vocabulary.multinomial(tokens, replacement=True, generator=g)
    x = torch.randn(layers, len(vocabulary), width, generator=g)[:, token]
    context = sum(x.roll(step, 1) / (1 + step) for step in (1, 2, 3))
    return F.rms_norm(x + context + 0.5 * torch.randn(layers, 1, width, generator=g), (width,))


class Contest:
    """The contestants, on the same vectors; each returns every layer's inertia."""

    def __init__(self, x: Tensor, clusters: int) -> None:
        self.x, self.k = x, clusters
        self.layers = [layer.cpu().numpy() for layer in x]
        self.iterations = 1

    def raymoe(self) -> list[float]:
        """Run raymoe on all layers together."""
        return kmeans(self.x, self.k, starts=STARTS, spherical=False, seed=0).inertia.tolist()

    def sklearn(self) -> list[float]:
        """Return scikit-learn's best of 4 starts; sets the floor's iterations."""
        found = [KMeans(self.k, n_init=STARTS, random_state=0).fit(layer) for layer in self.layers]
        self.iterations = round(statistics.mean(one.n_iter_ for one in found))
        return [one.inertia_ for one in found]

    def sklearn_one_start(self) -> list[float]:
        """Return scikit-learn's result from one start."""
        return [KMeans(self.k, n_init=1, random_state=0).fit(layer).inertia_ for layer in self.layers]

    def minibatch(self) -> list[float]:
        """Return MiniBatchKMeans' best of 4 starts."""
        found = [MiniBatchKMeans(self.k, n_init=STARTS, random_state=0).fit(layer) for layer in self.layers]
        return [-float(one.score(layer)) for one, layer in zip(found, self.layers, strict=True)]

    def floor(self) -> list[float]:
        """Compute every iteration's scores and sums, and nothing else."""
        c, x = self.x[:, : self.k].contiguous(), self.x
        for _ in range(self.iterations):
            for part in torch.split(x, 1024, 1):
                scores = torch.bmm(part, c.transpose(1, 2))
                torch.bmm(scores.transpose(1, 2), part)
        return []


def main() -> None:
    options = parser(__doc__)
    for name, default in SHAPE.items():
        options.add_argument(f"--{name}", type=int, default=default)
    options.set_defaults(**(TINY if options.parse_known_args()[0].size == "tiny" else {}))
    o = options.parse_args()
    contest = Contest(vectors(o.layers, o.tokens, o.width).to(o.device), o.clusters)
    work = {
        "sklearn": contest.sklearn,  # first: it sets the floor's iterations
        "raymoe": contest.raymoe,
        "one": contest.sklearn_one_start,
        "minibatch": contest.minibatch,
        "floor": contest.floor,
    }
    inertia: dict[str, list[float]] = {}

    def run(name: str) -> None:
        inertia[name] = work[name]()

    rounds = interleaved({name: partial(run, name) for name in work}, o.rounds)
    report(rounds, inertia, o)


def report(rounds: Rounds, inertia: dict[str, list[float]], o: argparse.Namespace) -> None:
    excess = {
        name: max(mine / best for mine, best in zip(inertia[name], inertia["sklearn"], strict=True))
        for name in ("raymoe", "one", "minibatch")
    }
    size = f"{o.layers} layers x {o.tokens} tokens x {o.width}, {o.clusters} clusters"
    print(f"{size}, {device_name(o.device)}: median of {o.rounds} rounds")
    print("seconds: " + ", ".join(f"{name} {rounds.median(name):.2f}" for name in rounds.seconds))
    worst = ", ".join(f"{name} {share:.4f}" for name, share in excess.items())
    print(f"inertia of the worst layer over scikit-learn's best of 4: {worst}")
    best, floor = "scikit-learn KMeans, best of 4", rounds.ratio("raymoe", "floor")
    peers = {
        "clusters_vs_sklearn": (best, "sklearn", 0.5),
        "clusters_vs_sklearn_one_start": ("scikit-learn KMeans, 1 start", "one", 1.0),
        "clusters_vs_minibatch": ("MiniBatchKMeans, best of 4", "minibatch", 1.0),
    }
    for name, (described, peer, goal) in peers.items():
        figure(name, described, rounds.ratio("raymoe", peer), goal, floor, o.device)
    figure("clusters_inertia", best, excess["raymoe"], 1.005, None, o.device)


if __name__ == "__main__":
    main()
