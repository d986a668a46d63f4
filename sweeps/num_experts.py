"""How many experts, and which way of making them?

python sweeps/num_experts.py [config.yaml] [--model.name ID --data.train FILE ...] [--dry-run]
"""

from raymoe import Point, Run, Sweep, main, replace

METHODS = ("su", "trsu", "crsu", "simoe")
GRID: list[Point] = [{"method": method, "num_experts": n} for method in METHODS for n in (2, 4)]


def run(base: Run, point: Point) -> Run:
    """Return `base` with the point's method, keeping other settings that both methods have."""
    if point["method"] == "dense":
        return replace(base, {"method.name": "dense"})
    return replace(base, {"method.name": point["method"], "method.num_experts": point["num_experts"]})


SWEEP = Sweep(
    name="num_experts",
    question="which way of upcycling, with how many experts, has the lowest held-out loss at equal tokens?",
    points=[{"method": "dense", "num_experts": 1}, *GRID],
    run=run,
)

if __name__ == "__main__":
    main(SWEEP)
