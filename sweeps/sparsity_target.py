"""What does sparsity cost SIMoE, compared with full fine-tuning and sparse upcycling?

python sweeps/sparsity_target.py [config.yaml] [--model.name ID --data.train FILE ...] [--dry-run]
"""

from raymoe import Point, Run, Sweep, main, replace

SPARSE: list[Point] = [{"method": "simoe", "sparsity_target": share} for share in (0.5, 0.75, 0.9, 0.95)]


def run(base: Run, point: Point) -> Run:
    """Return `base` with the point's method and settings, keeping other settings that both methods have."""
    settings = {f"method.{key}": value for key, value in point.items() if key != "method"}
    return replace(base, {"method.name": point["method"], **settings})


SWEEP = Sweep(
    name="sparsity_target",
    question="how sparse can SIMoE's experts be, and what does it gain on full fine-tuning and sparse upcycling?",
    points=[{"method": "dense"}, {"method": "su", "num_experts": 4, "top_k": 2}, *SPARSE],
    run=run,
)

if __name__ == "__main__":
    main(SWEEP)
