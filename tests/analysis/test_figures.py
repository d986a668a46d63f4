"""Figures: what they show, read back from what is drawn; no text overlaps another or is cut off."""

from __future__ import annotations

import itertools
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from matplotlib.backends.backend_agg import RendererAgg
from matplotlib.figure import Figure
from matplotlib.image import imread
from scipy.cluster.hierarchy import linkage
from transformers import LlamaConfig, LlamaForCausalLM

from raymoe.analysis.figures import activation, constraint, draw, overlap, size, where
from raymoe.analysis.masks import describe
from raymoe.models.gates import gate_layout

SIZES = {
    "simoe": {"total": 9_600_000_000, "active": 9_600_000_000, "training_bytes": 120 * 2**30},
    "upcycled": {"total": 24_800_000_000, "active": 13_600_000_000, "training_bytes": 176 * 2**30},
    "dense": {"total": 8_030_000_000, "active": 8_030_000_000, "training_bytes": 110 * 2**30},
}
NAMES = ("sum_of_digits", "a $tricky name", "question answering about long passages of text", "c++")


def description(experts: int = 8, tasks: int = 28, layers: int = 4) -> dict[str, Any]:
    with torch.device("meta"):
        config = LlamaConfig(
            vocab_size=64,
            hidden_size=16,
            intermediate_size=40,
            num_hidden_layers=layers,
            num_attention_heads=2,
        )
        layout = gate_layout(LlamaForCausalLM(config))
    g = torch.Generator().manual_seed(experts)
    gates = torch.rand(experts, layout.size, generator=g)
    gates = gates * (torch.rand(experts, layout.size, generator=g) > 0.9)
    prompts = [i % tasks for i in range(3 * tasks + tasks // 2)]
    weights = (2 * torch.randn(len(prompts), experts, generator=g)).softmax(-1)
    names = [f"{NAMES[i % 4]} {i}" for i in prompts]
    return describe(gates, layout, weights, names, [NAMES[0] if i % 5 else names[i] for i in prompts])


def rows(experts: int = 1, steps: int = 30) -> list[dict[str, Any]]:
    names = [f"masks/multiplier/{m}" for m in range(experts)] if experts > 1 else ["masks/multiplier"]
    return [
        {
            "step": step,
            "time": 0,
            "metrics": {
                "train/loss": 5 / (step + 1),
                "masks/sparsity": 0.7 * step / steps,
                "masks/target": min(0.75, step / steps),
                **{name: step % (m + 3) / 10 for m, name in enumerate(names)},
            },
        }
        for step in range(steps)
    ]


class Recorder(RendererAgg):
    """Agg, recording the box (left, top, right, bottom) of every text drawn."""

    def __init__(self, figure: Figure) -> None:
        self.extent = (figure.bbox.width, figure.bbox.height)
        self.texts: dict[tuple[float, float, float, float], str] = {}
        super().__init__(*self.extent, figure.dpi)

    def draw_text(
        self, gc: Any, x: Any, y: Any, s: Any, prop: Any, angle: Any, *more: Any, **named: Any
    ) -> None:
        w, h, d = self.get_text_width_height_descent(s, prop, False)
        upright = (x, y - h + d, x + w, y + d)
        self.texts[upright if angle == 0 else (x - h + d, y - w, x + d, y)] = s
        super().draw_text(gc, x, y, s, prop, angle, *more, **named)


def drawn_texts(figure: Figure) -> Recorder:
    figure.draw_without_rendering()  # lays it out
    recorder = Recorder(figure)
    figure.draw(recorder)
    return recorder


def check_texts(figure: Figure) -> None:
    found = drawn_texts(figure)
    width, height = found.extent
    assert len(found.texts) > 3
    for (left, top, right, bottom), text in found.texts.items():
        assert left >= 0 and top >= 0 and right <= width and bottom <= height, f"{text} is cut"
    for (a, one), (b, other) in itertools.combinations(found.texts.items(), 2):
        apart = a[2] <= b[0] + 1 or b[2] <= a[0] + 1 or a[3] <= b[1] + 1 or b[3] <= a[1] + 1
        assert apart, f"{one} lies on {other}"


# ---- as pictures


@pytest.mark.parametrize(
    ("experts", "tasks", "layers"), [(8, 28, 4), (1, 1, 1), (1, 3, 2), (2, 2, 2), (16, 20, 48), (40, 130, 3)]
)
def test_no_text_overlaps_another(experts: int, tasks: int, layers: int) -> None:
    given = description(experts, tasks, layers)
    for figure in (overlap(given), where(given), activation(given), constraint(rows(min(experts, 32)))):
        assert figure is not None
        check_texts(figure)


@pytest.mark.parametrize("scale", [1, 1e-3, 1e-6, 3e-9])
def test_sizes_of_any_magnitude_are_readable(scale: float) -> None:
    small = {name: {k: max(1, int(v * scale)) for k, v in part.items()} for name, part in SIZES.items()}
    figure = size(small)
    assert figure is not None
    check_texts(figure)


def test_every_figure_is_a_png_in_the_folder(tmp_path: Path) -> None:
    files = draw(description(), rows(), SIZES, tmp_path / "figures")
    assert [f.name for f in files] == [
        "overlap.png", "where.png", "activation.png", "constraint.png", "size.png",
    ]  # fmt: skip
    assert sorted(files) == sorted((tmp_path / "figures").iterdir())
    for file in files:
        picture = imread(file)
        assert min(picture.shape[:2]) > 300
        assert (picture[..., :3].min(-1) < 0.9).mean() > 0.01  # of its points have ink


def test_what_was_not_measured_is_not_drawn(tmp_path: Path) -> None:
    evaluations = [{"step": 0, "time": 0, "metrics": {"eval/loss": 3.0}}]
    assert [f.stem for f in draw(description(2, 2), evaluations, None, tmp_path)] == [
        "overlap", "where", "activation",
    ]  # fmt: skip


def test_task_names_without_glyphs_in_the_font(tmp_path: Path) -> None:
    given = description(2, 2)
    given["tasks"][0]["task"] = "数学"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert draw(given, [], {}, tmp_path)


# ---- what they show


def test_the_heat_map_of_overlaps() -> None:
    given = description()
    figure = overlap(given)
    shown = np.ma.filled(figure.axes[0].images[0].get_array(), np.nan)
    expected = np.array(given["overlap"]["ratios"])
    np.fill_diagonal(expected, np.nan)
    np.testing.assert_array_equal(shown, expected)
    texts = [text.get_text() for text in figure.axes[0].texts]
    assert texts == [f"{value:.2f}" for value in expected.flat if np.isfinite(value)]
    assert f"{np.nanmean(expected):.3f}" in figure.axes[0].get_title()


def test_shares_by_kind_and_by_depth() -> None:
    given = description()
    left, right = where(given).axes
    heights = [bar.get_height() for bar in left.patches]
    assert heights == [row[part] for part in ("union", "mean") for row in given["kinds"]]
    assert [t.get_text() for t in left.get_xticklabels()] == [row["kind"] for row in given["kinds"]]
    for line, part in zip(right.lines[:2], ("union", "mean"), strict=True):
        assert list(line.get_ydata()) == [row[part] for row in given["layers"]]
    assert list(right.lines[2].get_ydata()) == pytest.approx([1 - given["sparsity"]["union"][0]] * 2)


def test_tasks_are_in_the_order_of_scipys_tree() -> None:
    given = description()
    tree, heat, _ = activation(given).axes
    rows = [list(row) for row in heat.images[0].get_array()]
    shown = [next(i for i, task in enumerate(given["tasks"]) if task["weights"] == row) for row in rows]
    for text, i in zip(heat.get_yticklabels(), shown, strict=True):
        name, domain = given["tasks"][i]["task"], given["tasks"][i]["domain"]
        full = name if name == domain else f"{name} ({domain})"
        start, _, end = text.get_text().partition("…")
        assert full.startswith(start) and full.endswith(end) and len(text.get_text()) <= 45
    distances = linkage([task["weights"] for task in given["tasks"]], "average")
    assert clusters_together(shown, distances)
    joints = sorted(float(segment[1, 0]) for segment in tree.collections[0].get_segments())
    assert joints == pytest.approx(sorted(distances[:, 2]))


def clusters_together(shown: Sequence[int], distances: np.ndarray[Any, Any]) -> bool:
    """True if the leaves of every cluster of scipy's tree are side by side."""
    members = {i: {i} for i in range(len(shown))}
    place = {leaf: i for i, leaf in enumerate(shown)}
    for i, (a, b, *_) in enumerate(distances):
        members[len(shown) + i] = members[int(a)] | members[int(b)]
    places = [[place[leaf] for leaf in cluster] for cluster in members.values()]
    return all(max(each) - min(each) == len(each) - 1 for each in places)


def test_the_tasks_with_the_most_prompts_are_shown() -> None:
    given = description(tasks=130)
    figure = activation(given)
    assert "100 of 130 tasks" in figure.get_suptitle()
    shown = {tuple(row) for row in figure.axes[1].images[0].get_array()}
    most = {tuple(task["weights"]) for task in given["tasks"] if task["prompts"] == 4}
    assert len(shown) == 100
    assert most < shown


def test_a_single_task_or_equal_ones_have_no_tree() -> None:
    assert len(activation(description(tasks=1)).axes) == len(activation(description(experts=1)).axes) == 2
    assert len(activation(description(tasks=2)).axes) == 3


def test_curves_over_training() -> None:
    given = rows(experts=10)
    evaluation = {"step": 15, "time": 0, "metrics": {"eval/loss": 2.0}}
    figure = constraint([*given[:15], evaluation, *given[15:]])
    assert figure is not None
    loss, sparsity, multiplier = figure.axes
    names = ["train/loss", "masks/sparsity", "masks/target", *(f"masks/multiplier/{m}" for m in range(10))]
    lines = [*loss.lines, *sparsity.lines, *multiplier.lines]
    assert len(lines) == len(names)
    for line, name in zip(lines, names, strict=True):
        assert list(line.get_xdata()) == list(range(30))
        assert list(line.get_ydata()) == [row["metrics"][name] for row in given]
    looks = {(line.get_color(), line.get_linestyle()) for line in multiplier.lines}
    assert len(looks) == 10


def test_sizes_and_how_they_compare() -> None:
    figure = size(SIZES)
    assert figure is not None
    left, right = figure.axes
    assert [bar.get_height() for bar in left.patches] == [
        part[which] for which in ("total", "active") for part in SIZES.values()
    ]
    # 9.6 / 13.6 = 0.706, 24.8 / 13.6 = 1.824, 8.03 / 13.6 = 0.590; 120 / 176 = 0.682, 110 / 176 = 0.625
    assert [text.get_text() for text in left.texts] == [
        "9.6B\n−29%", "24.8B\n+82%", "8.03B\n−41%", "9.6B\n−29%", "13.6B", "8.03B\n−41%",
    ]  # fmt: skip
    assert [text.get_text() for text in right.texts] == ["120 GiB\n−32%", "176 GiB", "110 GiB\n−38%"]
    alone = size({"dense": SIZES["dense"]})
    assert alone is not None
    assert [text.get_text() for text in alone.axes[1].texts] == ["110 GiB"]
