"""How strongly should routers be pushed towards balance?

python sweeps/load_balance_alpha.py [config.yaml] [--method trsu ...] [--dry-run]
"""

from raymoe import Point, Run, Sweep, main, replace

ALPHAS = (0.0, 0.001, 0.01, 0.1)


def run(base: Run, point: Point) -> Run:
    """Return `base` with the point's weight of the load-balance loss."""
    return replace(base, {"method.load_balance_alpha": point["load_balance_alpha"]})


SWEEP = Sweep(
    name="load_balance_alpha",
    question="which weight of the load-balance loss has the lowest held-out loss?",
    points=[{"load_balance_alpha": alpha} for alpha in ALPHAS],
    run=run,
)

if __name__ == "__main__":
    main(SWEEP)
