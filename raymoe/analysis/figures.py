"""Figures of one SIMoE trial, as PNG files, and of a sweep's nodes and trials over time.

    draw(description, rows, sizes, folder)      # masks.json, rows of metrics.jsonl, parameter counts
    timeline(rows).savefig(file)                # of a sweep: rows of timeline.jsonl

overlap.png, where.png and activation.png show the masks, constraint.png the training, size.png the model beside
others. Matplotlib's own objects are used, never pyplot, whose state is global: workers draw while others train.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import cycle
from pathlib import Path
from typing import Any, Literal

import numpy as np
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.collections import LineCollection
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.ticker import MaxNLocator, MultipleLocator
from numpy.typing import NDArray
from scipy.cluster.hierarchy import dendrogram

from raymoe.analysis.masks import clustered

Description = Mapping[str, Any]
Row = Mapping[str, Any]
Sizes = Mapping[str, Mapping[str, int]]
Floats = NDArray[np.float64]
Curve = tuple[list[int], list[float]]
"""Steps and values of a metric."""

DPI = 130
BLUE, ORANGE, GREEN, GREY = "#0072B2", "#E69F00", "#009E73", "#666666"
COLOURS = (BLUE, ORANGE, GREEN, "#D55E00", "#CC79A7", "#56B4E9", "black", "#B8A800")
"""Okabe and Ito's colour-blind safe palette, its yellow darkened for a white background."""
LINES = ("-", "--", ":", "-.")
HEAT = "cividis"
MOST_TASKS = 100
"""Tasks that activation.png has room for; those with the most prompts are shown."""
MOST_VALUES = 16
"""Most experts for which the cells of a heat map show their value."""
LONGEST = 44
"""Characters shown of a task's name."""
LABELS = {"simoe": "SIMoE", "upcycled": "sparse upcycling\n(4 experts, top-2)", "dense": "dense"}


def draw(description: Description, rows: Iterable[Row], sizes: Sizes | None, out_folder: Path) -> list[Path]:
    """Write every figure that has something to show; returns the files.

    Args:
        description: result of `raymoe.analysis.masks.describe`.
        rows: the metric log, each row with `step` and `metrics`.
        sizes: by model label, parameters `total` and `active`, and `training_bytes`.
        out_folder: created if missing.
    """
    drawn = {
        "overlap": overlap(description),
        "where": where(description),
        "activation": activation(description),
        "constraint": constraint(rows),
        "size": size(sizes or {}),
    }
    out_folder.mkdir(parents=True, exist_ok=True)
    files = {out_folder / f"{name}.png": figure for name, figure in drawn.items() if figure is not None}
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing")  # in task names: drawn as boxes
        for file, figure in files.items():
            figure.savefig(file, dpi=DPI)
    return list(files)


def overlap(description: Description) -> Figure:
    """Draw the overlap of each pair of experts [M, M]; the diagonal, 1 by definition, stays blank."""
    ratios_MM = np.array(description["overlap"]["ratios"])
    experts = len(ratios_MM)
    pairs_MM = np.where(np.eye(experts, dtype=bool), np.nan, ratios_MM)
    side = 3.2 + 0.42 * min(experts, 24)
    figure = _figure(side + 0.6, side)
    axes = figure.add_subplot()
    image = _heat(axes, pairs_MM, aspect="equal")
    if experts > 1:
        figure.colorbar(image, ax=axes, shrink=0.8, label="overlap (cosine of the gates)")
    _expert_axis(axes.xaxis, experts)
    _expert_axis(axes.yaxis, experts)
    mean = f"mean of pairs {description['overlap']['mean']:.3f}" if experts > 1 else "one expert, no pairs"
    axes.set_title(f"Overlap of experts' masks\n{mean}")
    return figure


def where(description: Description) -> Figure:
    """Draw the fraction of non-zero parameters by kind of parameter and by depth."""
    kinds, layers = description["kinds"], description["layers"]
    figure = _figure(10.5, 4.6)
    left, right = figure.subplots(1, 2, sharey=True)
    places = np.arange(len(kinds))
    left.bar(places - 0.2, [row["union"] for row in kinds], 0.4, color=BLUE, label="in any expert")
    left.bar(places + 0.2, [row["mean"] for row in kinds], 0.4, color=ORANGE, label="mean over experts")
    left.set_xticks(places, [row["kind"] for row in kinds])
    left.set(xlabel="kind of parameter", ylabel="non-zero parameters (%)", title="By kind of parameter")
    depth = [row["layer"] for row in layers]
    right.plot(depth, [row["union"] for row in layers], "o-", color=BLUE, ms=4)
    right.plot(depth, [row["mean"] for row in layers], "s--", color=ORANGE, ms=4)
    right.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    right.set(xlabel="layer (0: next to the embeddings)", title="By depth")
    right.set_xlim(depth[0] - 0.5, depth[-1] + 0.5)
    whole = 1 - description["sparsity"]["union"][0]
    for axes in (left, right):
        line = axes.axhline(whole, color=GREY, lw=1, ls=":")
        axes.yaxis.set_major_formatter(_percent)
        _open(axes)
    line.set_label(f"whole model, in any expert: {whole:.1%}")
    left.set_ylim(0, None)
    left.tick_params(labelsize=9)
    figure.legend(loc="outside lower center", ncols=3, frameon=False)
    figure.suptitle("Where the model is upcycled: non-zero parameters of the delta")
    return figure


def activation(description: Description) -> Figure:
    """Draw every task's mean expert weights, ordered by a dendrogram so that similar tasks are neighbours."""
    every = description["tasks"]
    tasks = sorted(every, key=lambda task: -task["prompts"])[:MOST_TASKS]
    weights_TM = np.array([task["weights"] for task in tasks])
    figure = _figure(6.4 + 0.42 * min(weights_TM.shape[1], 24), 2.6 + 0.22 * len(tasks))
    *trees, heat = (
        figure.subplots(1, 2, width_ratios=[1, 2.5]) if _differ(weights_TM) else [figure.subplots()]
    )
    order = _dendrogram(trees[0], weights_TM) if trees else list(range(len(tasks)))
    image = _heat(heat, weights_TM[order], aspect="auto")
    pad = 0.2 / figure.get_figheight()  # as a fraction of the height
    figure.colorbar(
        image, ax=heat, location="bottom", label="mean expert weight", aspect=30, shrink=0.6, pad=pad
    )
    heat.yaxis.tick_right()
    names = [_task_name(tasks[i]) for i in order]
    heat.set_yticks(range(len(names)), names, fontsize=8.5, parse_math=False)
    _expert_axis(heat.xaxis, weights_TM.shape[1])
    for tree in trees:
        tree.set_ylim(heat.get_ylim())
    count = f"{len(tasks)} tasks" if len(tasks) == len(every) else f"{len(tasks)} of {len(every)} tasks"
    figure.suptitle(f"Expert weights on held-out prompts, {'1 task' if len(every) == 1 else count}")
    return figure


def constraint(rows: Iterable[Row]) -> Figure | None:
    """Draw loss, sparsity with its target, and multipliers over training; None if no sparsity was logged."""
    curves = _curves(rows)
    multipliers = {name: curve for name, curve in curves.items() if name.startswith("masks/multiplier")}
    if "masks/sparsity" not in curves:
        return None
    figure = _figure(8.5, 7.5)
    loss, sparsity, multiplier = figure.subplots(3, 1, sharex=True)
    if "train/loss" in curves:
        loss.plot(*curves["train/loss"], color=BLUE, lw=1)
    sparsity.plot(*curves["masks/sparsity"], color=BLUE, lw=1.5, label="measured")
    if "masks/target" in curves:
        sparsity.plot(*curves["masks/target"], color=GREY, lw=1.2, ls="--", label="target")
    sparsity.set_ylim(-0.03, 1.03)
    sparsity.yaxis.set_major_formatter(_percent)
    _plot_by_expert(multiplier, multipliers)
    for axes in (sparsity, multiplier)[: 2 if len(multipliers) > 1 else 1]:
        columns = -(-len(axes.lines) // 12)
        axes.legend(loc="center left", bbox_to_anchor=(1, 0.5), frameon=False, fontsize=8, ncols=columns)
    labels = ("loss (nats / token)", "sparsity (%)", "multiplier")
    for axes, label in zip((loss, sparsity, multiplier), labels, strict=True):
        axes.set_ylabel(label)
        _open(axes)
    multiplier.set_xlabel("optimizer step")
    multiplier.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1, steps=[1, 2, 5, 10]))
    figure.align_ylabels()
    figure.suptitle("Training loss and the sparsity constraint")
    return figure


def size(sizes: Sizes) -> Figure | None:
    """Draw parameters and training memory beside other models'; None without sizes."""
    if not sizes:
        return None
    figure = _figure(10.5, 4.8)
    left, right = figure.subplots(1, 2)
    other = sizes.get("upcycled", {})
    for shift, part, colour in ((-0.2, "total", BLUE), (0.2, "active", ORANGE)):
        values = [each[part] for each in sizes.values()]
        _bars(left, shift, values, colour, other.get("active"), _count, label=part)
    values = [each["training_bytes"] for each in sizes.values()]
    _bars(right, 0.0, values, GREEN, other.get("training_bytes"), _bytes)
    left.yaxis.set_major_formatter(lambda value, _: _count(value))
    right.yaxis.set_major_locator(MultipleLocator(_byte_step(max(values))))
    right.yaxis.set_major_formatter(lambda value, _: _bytes(value))
    left.set(ylabel="parameters", title=_against("Parameters", other, "the active ones of sparse upcycling"))
    right.set(ylabel="memory", title=_against("Memory in training", other, "sparse upcycling"))
    for axes in (left, right):
        axes.set_xticks(range(len(sizes)), [LABELS.get(name, name) for name in sizes])
        axes.margins(y=0.18)
        _open(axes)
    figure.legend(loc="outside lower center", ncols=2, frameon=False)
    figure.suptitle("Size beside other models")
    return figure


def timeline(rows: Sequence[Row]) -> Figure:
    """Draw a sweep's nodes by type and its waiting, training and ended trials over time (`cluster/watch.py`)."""
    seconds = np.array([row["time"] - rows[0]["time"] for row in rows])
    units = {"seconds": 1, "minutes": 60, "hours": 3600}
    unit = next((name for name, size in units.items() if seconds[-1] < 300 * size), "hours")
    times = seconds / units[unit]
    figure = _figure(8.5, 6.0)
    nodes, trials = figure.subplots(2, 1, sharex=True)
    kinds = sorted({kind for row in rows for kind in row["nodes"]} - {"head"})
    _stack(nodes, times, {kind: [row["nodes"].get(kind, 0) for row in rows] for kind in kinds}, COLOURS)
    states = {name: [row[name] for row in rows] for name in ("ended", "training", "waiting")}
    _stack(trials, times, states, (GREEN, BLUE, "#cccccc"))
    nodes.set(ylabel="nodes, without the head", title="Nodes and trials of the sweep")
    trials.set(ylabel="trials", xlabel=f"{unit} since the sweep started")
    for axes in (nodes, trials):
        axes.yaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
        axes.legend(loc="center left", bbox_to_anchor=(1, 0.5), frameon=False, fontsize=9)
        axes.set_xlim(0, max(times[-1], 1e-3))
        axes.set_ylim(0, max(1, axes.get_ylim()[1]))
        _open(axes)
    figure.align_ylabels()
    return figure


# ---- parts


def _stack(axes: Axes, times: Floats, counts: Mapping[str, Sequence[int]], colours: Sequence[str]) -> None:
    """Stack counts on top of each other, each lasting until the next time."""
    below = np.zeros(len(times))
    for (name, values), colour in zip(counts.items(), cycle(colours), strict=False):
        above = below + np.array(values)
        axes.fill_between(times, below, above, step="post", color=colour, lw=0, label=name)
        below = above


def _figure(width: float, height: float) -> Figure:
    """Make an empty figure (sizes in inches) drawn by Agg, which needs no display."""
    figure = Figure(figsize=(width, height), layout=ConstrainedLayoutEngine(w_pad=0.1, h_pad=0.08))
    FigureCanvasAgg(figure)
    return figure


def _open(axes: Axes) -> None:
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="y", lw=0.4, color="#cccccc")
    axes.set_axisbelow(True)


def _heat(axes: Axes, values: Floats, aspect: Literal["auto", "equal"]) -> Any:
    """Draw a heat map starting at 0, with values in the cells where they fit; nan cells are blank."""
    high = max(1e-6, values[np.isfinite(values)].max(initial=0.0))
    image = axes.imshow(values, cmap=HEAT, vmin=0, vmax=high, aspect=aspect, interpolation="nearest")
    axes.set_facecolor("#eeeeee")
    for (i, j), value in np.ndenumerate(values) if values.shape[1] <= MOST_VALUES else ():
        if np.isfinite(value):
            colour = _readable_on(colormaps[HEAT](float(value / high)))
            axes.text(j, i, f"{value:.2f}", ha="center", va="center", fontsize=7.5, color=colour)
    return image


def _readable_on(colour: Sequence[float]) -> str:
    """Return black or white, whichever has more contrast (WCAG 2, by relative luminance)."""
    red, green, blue = (c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in colour[:3])
    return "white" if 0.2126 * red + 0.7152 * green + 0.0722 * blue < 0.179 else "black"


def _bars(
    axes: Axes,
    shift: float,
    values: Sequence[int],
    colour: str,
    other: int | None,
    shown: Callable[[float], str],
    **more: Any,
) -> None:
    """Draw bars side by side, each labelled with its value and its difference from `other` in percent."""
    width = 0.38 if shift else 0.5
    bars = axes.bar(np.arange(len(values)) + shift, values, width, color=colour, **more)
    axes.bar_label(bars, [_beside(value, other, shown) for value in values], padding=2, fontsize=8)


def _plot_by_expert(axes: Axes, curves: Mapping[str, Curve]) -> None:
    """Plot `<metric>/<expert>` curves, told apart by colour and, beyond the palette, by line style."""
    for i, (name, curve) in enumerate(sorted(curves.items(), key=_expert_of)):
        steps, values = curve
        line = LINES[i // len(COLOURS) % len(LINES)]
        label = f"expert {name.rsplit('/', 1)[-1]}"
        axes.plot(steps, values, lw=1, label=label, color=COLOURS[i % len(COLOURS)], ls=line)


def _expert_axis(axis: Any, experts: int) -> None:
    step = -(-experts // 24)
    axis.set_ticks(range(0, experts, step))
    axis.set_label_text("expert")


def _differ(weights_TM: Floats) -> bool:
    """True if the tasks differ: there is nothing to cluster with one task, nor with one expert."""
    return bool((weights_TM != weights_TM[0]).any())


def _dendrogram(axes: Axes, weights_TM: Floats) -> list[int]:
    """Draw the tree of tasks to the left of the heat map; returns the order of its rows."""
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.set_yticks([])
    tree = dendrogram(clustered(weights_TM), no_plot=True)
    # scipy puts leaf i at 5 + 10 i.
    rows, depths = (np.array(tree["icoord"]) - 5) / 10, np.array(tree["dcoord"])
    axes.add_collection(LineCollection(list(np.stack([depths, rows], 2)), colors=GREY, lw=1))
    axes.set_xlim(1.05 * depths.max(), 0)
    axes.xaxis.set_major_locator(MaxNLocator(3))
    axes.set_xlabel("distance")
    return list(tree["leaves"])


def _task_name(task: Mapping[str, Any]) -> str:
    """Return `task (domain)`, its middle cut out if it is long."""
    name, domain = task["task"], task["domain"]
    text = name if name == domain else f"{name} ({domain})"
    half = LONGEST // 2
    return text if len(text) <= LONGEST else f"{text[:half].rstrip()}…{text[-half:].lstrip()}"


def _curves(rows: Iterable[Row]) -> dict[str, Curve]:
    """Collect every metric's steps and values."""
    curves: dict[str, Curve] = {}
    for row in rows:
        for name, value in row["metrics"].items():
            steps, values = curves.setdefault(name, ([], []))
            steps.append(row["step"])
            values.append(value)
    return curves


def _expert_of(item: tuple[str, Any]) -> int:
    last = item[0].rsplit("/", 1)[-1]
    return int(last) if last.isdigit() else -1


def _against(title: str, other: Mapping[str, int], what: str) -> str:
    return f"{title}\n(% against {what})" if other else title


def _beside(value: int, other: int | None, shown: Callable[[float], str]) -> str:
    """Format `9.6B` and, below it, the difference from `other` in percent."""
    if not other or value == other:
        return shown(value)
    return f"{shown(value)}\n{100 * (value / other - 1):+.0f}%".replace("-", "−")


def _count(value: float) -> str:
    return _scaled(value, 1000, ("", "K", "M", "B", "T"), "")


def _percent(value: float, _: int) -> str:
    return f"{100 * value:.3g}"


def _byte_step(most: float) -> float:
    """Return 1, 2 or 5 times a power of ten of the unit: some five ticks on an axis up to `most` bytes."""
    unit = 1024.0 ** max(0, int(np.log(max(1.0, most)) / np.log(1024)))
    rough = max(1e-9, most / unit / 5)
    power = 10.0 ** np.floor(np.log10(rough))
    return float(unit * power * next(n for n in (1, 2, 5, 10) if n * power >= rough))


def _bytes(value: float) -> str:
    return _scaled(value, 1024, ("B", "KiB", "MiB", "GiB", "TiB"), " ")


def _scaled(value: float, base: int, units: Sequence[str], gap: str) -> str:
    """Format three digits and a unit."""
    power = 0
    while abs(value) >= base and power + 1 < len(units):
        value, power = value / base, power + 1
    return f"{value:.3g}{gap}{units[power]}"
