"""Which method is best, beyond the noise of the seed?

python sweeps/methods.py [config.yaml] [--model.name ID --data.train FILE ...] [--dry-run]
"""

from raymoe import Point, Run, Sweep, main, replace
from raymoe.methods import METHODS

SEEDS = (0, 1, 2)


def run(base: Run, point: Point) -> Run:
    """Return `base` with the point's method, the point's seed added to its own."""
    return replace(base, {"method.name": point["method"], "seed": base.seed + int(point["seed"])})


SWEEP = Sweep(
    name="methods",
    question="which method has the lowest held-out loss at equal tokens, on average over seeds?",
    points=[{"method": method, "seed": seed} for method in METHODS for seed in SEEDS],
    run=run,
    average_over="seed",
)

if __name__ == "__main__":
    main(SWEEP)
