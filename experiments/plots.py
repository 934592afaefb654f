"""The pictures of a study: how its arms learnt, how they rank, and how evenly their experts were used."""

import math
import re
from collections.abc import Sequence
from pathlib import Path

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import TwoSlopeNorm
from matplotlib.figure import Figure

from experiments.cache import Run
from experiments.record import Outcome

# Okabe and Ito's palette without its yellow, which is too pale for a line; told apart by colour-blind readers.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#000000")
# Past the last colour they begin again, with another stroke that also stands before the name.
STROKES = (("-", ""), ("--", "╌ "), (":", "┈ "))
SOFT = "#666666"  # of what is no arm
STYLE = {
    "font.size": 11,
    "axes.titlesize": 12,
    "axes.titlelocation": "left",
    "axes.titleweight": "bold",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": "#888888",
    "xtick.color": "#444444",
    "ytick.color": "#444444",
    "axes.labelcolor": "#444444",
    "axes.grid": True,
    "axes.grid.axis": "y",
    "grid.color": "#e6e6e6",
    "axes.axisbelow": True,
}
LOADS = ("eval/stats/*/load", "stats/*/load")
FEW_POINTS = 10  # points of a curve that are all shown
MIN_RANKED = 6  # arms; fewer are read from the table at a glance
MAX_LAYERS = 12  # rows of a heat map; a deeper model shows layers spread over its depth


def curves(outcome: Outcome, path: Path) -> Path | None:
    """Training loss and the headline's metric over steps: a line per arm (mean over seeds), a band from least to most.

    Baselines are dotted lines, where the curves come near them.

    Returns:
      `path`, or None if nothing was logged often enough to draw a line.
    """
    wanted = ("train/loss", outcome.study.headline.metric, "eval/bits_per_byte", "eval/accuracy")
    metrics = [m for m in dict.fromkeys(wanted) if any(len(run.curve(m)[0]) > 1 for run in _runs(outcome))][:2]
    if not metrics:
        return None
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(6.4 * len(metrics), 4.4), layout="constrained")
        for axes, metric in zip(figure.subplots(1, len(metrics), squeeze=False)[0], metrics, strict=True):
            _curve_panel(axes, outcome, metric)
        return save(figure, path)


def ranking(outcome: Outcome, path: Path) -> Path | None:
    """Arms from best to worst by the headline's metric: a dot per seed, a line at their mean.

    Runs of one seed share their data, and so part of their spread: beside the values stand their distances from what all arms reach
    on average with that seed. Seeds that some arm has not run with stand on the left only.

    Returns:
      `path`, or None for fewer arms than are worth ranking.
    """
    claim = outcome.study.headline
    found = {arm: {seed: run.value(claim.metric) for seed, run in seeds.items()} for arm, seeds in outcome.runs.items()}
    found = {arm: values for arm, values in found.items() if np.isfinite(list(values.values())).all()}
    if len(found) < MIN_RANKED:
        return None
    shared = sorted(set.intersection(*map(set, found.values())))
    order = sorted(found, key=lambda arm: np.mean([found[arm][seed] for seed in shared]), reverse=math.isinf(claim.high))
    panels = [(f"{claim.metric}: a dot per seed, a line at their mean", [list(found[arm].values()) for arm in order])]
    if len(shared) > 1:
        table = np.array([[found[arm][seed] for seed in shared] for arm in order])
        panels.append(("less the mean of all arms of that seed", list(table - table.mean(0))))
    with matplotlib.rc_context({**STYLE, "axes.grid.axis": "both"}):
        figure = Figure(figsize=(1.5 + 5.5 * len(panels), 0.33 * len(order) + 1.1), layout="constrained")
        for axes, (title, rows) in zip(figure.subplots(1, len(panels), sharey=True, squeeze=False)[0], panels, strict=True):
            for place, dots in enumerate(rows):
                mean = np.mean(dots)
                axes.plot(dots, [place] * len(dots), "o", color=COLOURS[0], alpha=0.55, markersize=6, markeredgewidth=0)
                axes.plot([mean, mean], [place - 0.32, place + 0.32], color=COLOURS[1], linewidth=2)
            axes.set_title(title)
        axes.set_yticks(range(len(order)), order)
        axes.invert_yaxis()
        return save(figure, path)


def loads(outcome: Outcome, path: Path) -> Path | None:
    """A heat map per arm with experts: rows are its MoE layers, columns its experts from most to least used.

    Experts have no order between seeds, so each layer is sorted before the mean over seeds is taken. 1 is an even share.

    Returns:
      `path`, or None if no arm reports load.
    """
    maps = {arm: found for arm, seeds in outcome.runs.items() if (found := load_map(list(seeds.values())))}
    if not maps:
        return None
    with matplotlib.rc_context({**STYLE, "axes.grid": False}):
        heights = [0.34 * len(rows) + 0.75 for rows in maps.values()]
        figure = Figure(figsize=(9.5, sum(heights) + 0.5), layout="constrained")
        panels = figure.subplots(len(maps), 1, squeeze=False, gridspec_kw={"height_ratios": heights})[:, 0]
        for axes, (arm, rows) in zip(panels, maps.items(), strict=True):
            image = _load_panel(axes, arm, rows)
        panels[-1].set_xlabel("experts of a layer, most used first")
        bar = figure.colorbar(image, ax=list(panels), shrink=min(1.0, 2.5 / sum(heights)), aspect=14, pad=0.02)
        bar.set_label("load / even share")
        bar.set_ticks([0, 0.5, 1, 2, 3], labels=["0", "½", "1", "2", "3+"])
        bar.outline.set_visible(False)
        return save(figure, path)


def load_map(runs: Sequence[Run]) -> dict[str, np.ndarray]:
    """Layer -> load over an even share `[e]`, sorted within each run and averaged over runs."""
    per_layer: dict[str, list[np.ndarray]] = {}
    for run in runs:
        found = next((f for pattern in LOADS if (f := run.last(pattern))), {})
        for name, load in found.items():
            load = np.asarray(load, float)
            if load.ndim == 1 and load.sum() > 0:
                layer = name.removeprefix("eval/").removeprefix("stats/").removesuffix("/load")
                per_layer.setdefault(layer, []).append(np.sort(load / load.mean())[::-1])
    return {layer: np.mean(found, 0) for layer, found in per_layer.items()}


def layer_name(name: str) -> str:
    """What a layer is called in tables and pictures, given its module's path: 'stack.repeats.1_moe.ffn.0' is 'moe ffn 0'."""
    parts = [part for part in name.split(".") if part not in ("stack", "repeats")]
    return " ".join(re.sub(r"^\d+_", "", part) for part in parts)


def _curve_panel(axes: Axes, outcome: Outcome, metric: str) -> None:
    ends, shown = [], []
    for i, (arm, seeds) in enumerate(outcome.runs.items()):
        steps, low, mean, high = _band([run.curve(metric) for run in seeds.values()])
        if not len(steps):
            continue
        colour, (stroke, mark) = COLOURS[i % len(COLOURS)], STROKES[i // len(COLOURS) % len(STROKES)]
        axes.fill_between(steps, low, high, color=colour, alpha=0.18, linewidth=0)
        axes.plot(steps, mean, stroke, color=colour, linewidth=1.8)
        ends.append((float(mean[-1]), mark + arm, colour))
        # The first tenth of a long training falls so steeply that it would flatten the rest; of a short one everything is shown.
        late = steps >= steps[0] + (0.1 if len(steps) > FEW_POINTS else 0) * (steps[-1] - steps[0])
        shown += [np.nanmin(low[late]), np.nanmax(high[late])]
    shown = [v for v in shown if math.isfinite(v)]
    if shown:
        margin = 0.06 * (max(shown) - min(shown)) or 0.1 * abs(shown[0]) or 1.0
        axes.set_ylim(min(shown) - margin, max(shown) + margin)
    bottom, top = axes.get_ylim()
    for name, scores in outcome.baselines.items():
        if bottom < scores.get(metric, math.nan) < top:
            axes.axhline(scores[metric], color=SOFT, linestyle=":", linewidth=1.2)
            ends.append((scores[metric], name, SOFT))
    _label_ends(axes, ends)
    axes.set_title(metric)
    axes.set_xlabel("step")
    axes.margins(x=0.01)


def _label_ends(axes: Axes, ends: list[tuple[float, str, str]]) -> None:
    """Names each line at its right end; labels that would overlap move apart evenly."""
    gap = 0.062
    bottom, top = axes.get_ylim()
    ends = sorted(end for end in ends if math.isfinite(end[0]))
    places = [min(max((value - bottom) / (top - bottom), 0.0), 1.0) for value, _, _ in ends]
    for _ in range(200):
        for i in range(len(places) - 1):
            overlap = gap - (places[i + 1] - places[i])
            if overlap > 0:
                places[i] -= overlap / 2
                places[i + 1] += overlap / 2
    # What was pushed out below comes back in, and lifts what is above it.
    for i in range(len(places)):
        places[i] = max(places[i], places[i - 1] + gap if i else 0.0)
    for (_, arm, colour), place in zip(ends, places, strict=True):
        axes.annotate(
            arm, (1.0, place), xycoords="axes fraction", xytext=(6, 0), textcoords="offset points", va="center", color=colour
        )


def _load_panel(axes: Axes, arm: str, rows: dict[str, np.ndarray]) -> matplotlib.image.AxesImage:
    names = list(rows)
    if len(names) > MAX_LAYERS:
        names = [names[i] for i in np.linspace(0, len(names) - 1, MAX_LAYERS).round().astype(int)]
    width = max(len(rows[name]) for name in names)
    grid = np.full((len(names), width), np.nan)
    for i, name in enumerate(names):
        grid[i, : len(rows[name])] = rows[name]
    image = axes.imshow(grid, aspect="auto", cmap="RdBu_r", norm=TwoSlopeNorm(1.0, 0.0, 3.0), interpolation="nearest")
    if width <= 16:
        for (i, j), value in np.ndenumerate(grid):
            if math.isfinite(value):
                dark = value > 2.2 or value < 0.25
                axes.text(j, i, f"{value:.2f}", ha="center", va="center", fontsize=9, color="white" if dark else "#333333")
    axes.set_title(arm)
    axes.set_yticks(range(len(names)), map(layer_name, names), fontsize=9)
    axes.set_xticks([])
    for spine in axes.spines.values():
        spine.set_visible(False)
    axes.tick_params(length=0)
    return image


def _band(found: list[tuple[list[int], list[float]]]) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Steps that every seed logged, and least, mean and most over the seeds there."""
    tables = [dict(zip(steps, values, strict=True)) for steps, values in found]
    steps = sorted(set.intersection(*(set(t) for t in tables))) if tables else []
    values = np.asarray([[t[s] for s in steps] for t in tables], float).reshape(len(tables), len(steps))
    return np.asarray(steps), values.min(0), values.mean(0), values.max(0)


def _runs(outcome: Outcome) -> list[Run]:
    return [run for seeds in outcome.runs.values() for run in seeds.values()]


def save(figure: Figure, path: Path) -> Path:
    """Writes the figure; returns `path`."""
    path.parent.mkdir(parents=True, exist_ok=True)
    FigureCanvasAgg(figure)
    figure.savefig(path, dpi=150)
    return path
