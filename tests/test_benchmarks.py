"""Every benchmark at its smallest size: its figures are complete, and import no more than they measure."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parent.parent
FIGURES = {
    "clusters": {
        "clusters_vs_sklearn",
        "clusters_vs_sklearn_one_start",
        "clusters_vs_minibatch",
        "clusters_inertia",
    },
    "overhead": {"step_overhead_vs_bare_loop"},
    "plan_memory": {"plan_memory_vs_measured"},
    "scoring": {"scoring_vs_naive", "scoring_vs_forward"},
    "simoe_decode": {"simoe_decode_vs_dense", "simoe_factored_decode_vs_merging"},
    "simoe_size": {
        "simoe_size_vs_upcycled_active",
        "simoe_state_vs_upcycled",
        "simoe_peak_memory_vs_upcycled",
    },
    "simoe_step": {"simoe_step_vs_dense", "simoe_compact_step_vs_dense"},
    "step": {"moe_step_vs_dense", "moe_step_vs_mixtral_eager", "moe_step_vs_mixtral_grouped_mm"},
    "upcycle": {"upcycle_vs_copy"},
}
FORBIDDEN = {
    "clusters": "ray,deepspeed,mlflow",
    "overhead": "ray",  # it measures DeepSpeed, which imports mlflow
    "plan_memory": "ray",
    "scoring": "deepspeed,mlflow",  # its stage drives Ray
    "simoe_decode": "ray,deepspeed,mlflow",
    "simoe_size": "ray,deepspeed,mlflow",
    "simoe_step": "ray,deepspeed,mlflow",
    "step": "ray,deepspeed,mlflow",
    "upcycle": "ray",  # transformers imports DeepSpeed to save a model
}
ON_CLUSTERS = {"live_cluster", "fake_autoscaler", "chaos"}
"""Tested by the tests that use them: test_jobs, test_autoscaling, test_failures."""
NO_FLOOR = {"clusters_inertia", "plan_memory_vs_measured", *FIGURES["simoe_size"]}
# Runs the script, then fails if it brought in a framework that it does not measure.
RUN = """
import runpy, sys
from pathlib import Path
forbidden, script, *sys.argv[1:] = sys.argv[1:]
sys.argv[0] = script
sys.path.insert(0, str(Path(script).parent))
runpy.run_path(script, run_name="__main__")
found = {name for name in forbidden.split(",") if name in sys.modules}
assert not found, found
"""


def run(benchmark: str, *options: str) -> list[dict[str, Any]]:
    """Its JSON lines."""
    script = str(ROOT / "benchmarks" / f"{benchmark}.py")
    without_mergekit = {"RAYMOE_MERGEKIT_PYTHON": ""}  # its imports take 20 s
    done = subprocess.run(
        [
            sys.executable,
            "-c",
            RUN,
            FORBIDDEN[benchmark],
            script,
            "--rounds",
            "1",
            "--size",
            "tiny",
            *options,
        ],
        env={**os.environ, **without_mergekit, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]


def check(figure: dict[str, Any]) -> None:
    assert figure.keys() >= {"name", "peer", "ratio", "goal", "met", "floor_ratio", "device", "commit"}
    assert math.isfinite(figure["ratio"]) and figure["ratio"] > 0
    assert isinstance(figure["met"], bool)
    if figure["name"] in NO_FLOOR:
        assert figure["floor_ratio"] is None
    else:
        assert math.isfinite(figure["floor_ratio"]) and figure["floor_ratio"] > 0


def test_every_benchmark_is_tested() -> None:
    files = {file.stem for file in (ROOT / "benchmarks").glob("*.py")}
    assert files == FIGURES.keys() | {"harness", *ON_CLUSTERS}


@pytest.mark.slow
@pytest.mark.parametrize("benchmark", FIGURES)
def test_figures_are_complete(benchmark: str) -> None:
    fewer = ["--dtypes", "float32"] if benchmark == "simoe_size" else []  # a process for each model and dtype
    figures = run(benchmark, *fewer)
    assert {figure["name"] for figure in figures} >= FIGURES[benchmark]
    for figure in figures:
        check(figure)


@pytest.mark.slow
def test_step_measures_every_number_of_experts_in_the_dtype_asked_for() -> None:
    figures = run("step", "--dtype", "bfloat16", "--experts", "2", "3", "--tokens", "48")
    assert len(figures) == 6
    assert {figure["experts"] for figure in figures} == {2, 3}
    assert {(figure["dtype"], figure["tokens"]) for figure in figures} == {("bfloat16", 48)}


@pytest.mark.slow
def test_simoe_step_measures_both_forms_for_every_length() -> None:
    figures = run("simoe_step", "--dtype", "bfloat16", "--documents", "16", "32")
    for name in FIGURES["simoe_step"]:
        own = [figure for figure in figures if figure["name"] == name]
        assert {(f["form"], f["tokens_per_sample"]) for f in own} == {
            (form, length) for form in ("factored", "merged") for length in (16, 32)
        }
        assert all(f["picked"] == (f["form"] == "factored") for f in own)  # bfloat16: merging loses deltas
    shares = {figure["name"]: figure["live_share"] for figure in figures}
    assert shares["simoe_step_vs_dense"] == 1 and 0.1 < shares["simoe_compact_step_vs_dense"] < 0.4


@pytest.mark.slow
def test_simoe_sizes_are_those_of_the_published_models() -> None:
    sizes = {
        f["model"]: f for f in run("simoe_size", "--dtypes") if f["name"] == "simoe_size_vs_upcycled_active"
    }
    billions = {"Llama-3.2-3B": (3.21, 2.11), "Llama-3-8B": (8.03, 5.64)}  # the model, its FFNs
    assert sizes.keys() == billions.keys()
    for name, (dense, ffn) in billions.items():
        assert sizes[name]["upcycled_active"] / 1e9 == pytest.approx(dense + ffn, abs=0.02)
        assert sizes[name]["total"] / 1e9 < dense + ffn
