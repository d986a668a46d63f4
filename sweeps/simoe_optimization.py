"""What holds SIMoE back: its optimisation, or the parameters it may train?

python sweeps/simoe_optimization.py [config.yaml] [--model.name ID --data.train FILE ...] [--dry-run]
"""

from raymoe import Point, Run, Sweep, main, replace
from raymoe.methods import SparseInterpolation

DEFAULT = SparseInterpolation()
VARIATIONS: dict[str, list[float]] = {
    "mask_learning_rate": [0.1, 1.0],  # by default 22 / steps
    "log_alpha_mean": [2.0, 4.0],
    "log_alpha_std": [0.1],
    "sparsity_warmup": [0.1, 0.9],
    "delta_learning_rate": [1e-3, 8e-3],
    "orthogonality": [0.0, 0.1],
    "num_experts": [1],
    "sparsity_target": [0.0],
}
VARIED: list[Point] = [{"setting": name, "value": v} for name, values in VARIATIONS.items() for v in values]


def run(base: Run, point: Point) -> Run:
    """Return SIMoE with one setting changed; `everything_open` fine-tunes all but embeddings and LM head.

    It has one expert; some 5% of its gates are sampled below 1 in a step.
    """
    settings = {"method.name": "simoe", f"method.{point['setting']}": point["value"]}
    if point["setting"] == "everything_open":
        rate = {
            "method.delta_learning_rate": base.optimization.learning_rate,
            "method.mask_learning_rate": 1e-9,
        }
        gates = {"method.log_alpha_mean": 4.6, "method.log_alpha_std": 0.0, "method.sparsity_target": 0.0}
        settings = {"method.name": "simoe", "method.num_experts": 1, **rate, **gates}
    return replace(base, settings)


SWEEP = Sweep(
    name="simoe_optimization",
    question="which of SIMoE's settings changes its held-out loss most, and what is out of their reach?",
    points=[
        {"setting": "sparsity_target", "value": DEFAULT.sparsity_target},
        {"setting": "everything_open", "value": 1},
        *VARIED,
    ],
    run=run,
)

if __name__ == "__main__":
    main(SWEEP)
