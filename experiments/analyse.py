"""What routers learnt: `--analyse` looks at the finished runs of a study, in a table, in pictures of its report, and in JSON.

python -m experiments.run --study=switch --analyse
python -m experiments.run --study=switch --analyse --config.checkpoint.every=50 --config.checkpoint.keep=8   # and how routing changes
"""

import itertools
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import TwoSlopeNorm
from matplotlib.figure import Figure
from rich.console import Console

from experiments import plots
from experiments.cache import Run
from experiments.record import Outcome
from experiments.tables import Table, legend, number
from experiments.terminal import say, short, show
from moejax.analysis import ObservedLayer, changed, favourites, observe, preferences, with_noise
from moejax.core.errors import ConfigError
from moejax.core.files import write_json

BATCHES = 16
NOISE = 0.1  # share of tokens replaced, to see whether the others are routed as before
SHOWN_LAYERS = 4
MOST_WORDS = 4096  # token ids that are counted one by one


@dataclass(frozen=True)
class Seen:
    """One run's routing.

    Attributes:
      layers: name -> what was observed at the last checkpoint.
      labels: names of the labels that `layers` counts by: domains or classes.
      noise: share of choices that change when `NOISE` of the other tokens do, by layer.
      changes: (step, share of choices that changed since the checkpoint before), oldest first, by layer; empty without earlier ones.
    """

    layers: dict[str, ObservedLayer]
    labels: tuple[str, ...]
    noise: dict[str, float]
    changes: dict[str, list[tuple[int, float]]] = field(default_factory=dict)


def analyse(outcome: Outcome, runs: Path, console: Console) -> dict[str, Seen]:
    """Looks at the first seed of every arm that routes, prints a table, and leaves pictures where the report finds them."""
    found = {}
    for arm, seeds in outcome.runs.items():
        say(console, f"analysing {arm}")
        try:
            found[arm] = look(next(iter(seeds.values())))
        except ConfigError as refusal:
            say(console, f"  left out: {refusal}")
    if not found:
        raise ConfigError(f"no arm of study '{outcome.study.slug}' routes anything; there is nothing to analyse")
    folder = runs / "reports" / outcome.study.slug / outcome.name
    folder.mkdir(parents=True, exist_ok=True)
    show(console, table(found))
    drawn = (
        experts(found, folder / "experts.png"),
        similarity(found, folder / "similarity.png"),
        changes(found, folder / "changes.png"),
    )
    write_json(folder / "analysis.json", {arm: to_json(seen) for arm, seen in found.items()}, indent=1)
    for path in (*drawn, folder / "analysis.json"):
        if path:
            say(console, f"wrote {short(path)}")
    return found


def look(run: Run, batches: int = BATCHES) -> Seen:
    """Observes a run's checkpoints on its validation data.

    Raises:
      ConfigError: the run has no checkpoint, or routes nothing.
    """
    from moejax import models
    from moejax.data import info, make_iterator
    from moejax.tasks.base import tasks
    from moejax.train import load
    from moejax.train.checkpoints import saved_steps

    steps = saved_steps(run.path)
    if not steps:
        raise ConfigError(f"{short(run.path)} has no checkpoint; train it again with --fresh")
    try:
        config, variables, _ = load(run.path)
    except ValueError as damage:
        raise ConfigError(f"{damage}; train it again with --fresh") from None
    model, task = models.network(config), tasks.build(config["task"], "task")
    known = info(config["data"])
    labels = tuple(known.domains) or tuple(map(str, range(known.num_classes or 1)))
    iterator = make_iterator(config["data"], split=config["eval"].get("split", "validation"), seed=0, num_epochs=1)
    data = list(itertools.islice(iterator, batches))
    vocabulary = config["model"].get("vocab_size", 0)
    layers = observe(model, variables, data, task, len(labels), vocabulary if vocabulary <= MOST_WORDS else 0)
    rng = np.random.default_rng(0)
    noise = changed(model, variables, variables, data[:4], task, lambda batch: with_noise(batch, NOISE, rng))
    moved: dict[str, list[tuple[int, float]]] = {}
    old = None
    for before, after in itertools.pairwise(steps):
        old = load(run.path, before)[1] if old is None else old
        new = load(run.path, after)[1]
        for layer, share in changed(model, old, new, data[:4], task).items():
            moved.setdefault(layer, []).append((after, share))
        old = new
    return Seen(layers, labels, noise, moved)


def table(found: Mapping[str, Seen]) -> Table:
    """One row for each routed layer of each arm."""
    rows = []
    for arm, seen in found.items():
        for name, layer in seen.layers.items():
            last = seen.changes.get(name, [(0, math.nan)])[-1][1]
            per_token = float(layer.counts.sum() / max(layer.tokens.sum(), 1))
            values = (layer.balance, per_token, layer.entropy, layer.specialisation, layer.alikeness, seen.noise[name], last)
            rows.append(
                (arm, plots.layer_name(name), *("-" if math.isnan(v) else number(v) for v in values), layer.backend or "-")
            )
    columns = (
        "arm",
        "layer",
        "balance",
        "experts/token",
        "entropy, bits",
        "specialisation",
        "alike",
        "under noise",
        "changed",
        "backend",
    )
    return Table("What the routers learnt", columns, tuple(rows), notes=legend(columns))


def to_json(seen: Seen) -> dict[str, Any]:
    """Everything that was counted, and each expert's favourite bytes or tokens."""

    def layer(each: ObservedLayer) -> dict[str, Any]:
        words = None if each.words is None else [favourites(each.words, i) for i in range(each.words.shape[1])]
        return {
            "counts": each.counts.tolist(),
            "tokens": each.tokens.tolist(),
            "entropy_bits": each.uncertainty.tolist(),
            "balance": each.balance,
            "backend": each.backend,
            "specialisation": None if math.isnan(each.specialisation) else each.specialisation,
            "similarity": None if each.similarity is None else each.similarity.tolist(),
            "favourite_tokens": words,
        }

    return {
        "labels": list(seen.labels),
        "layers": {name: layer(each) for name, each in seen.layers.items()},
        "changed_under_noise": seen.noise,
        "changes": {name: [list(point) for point in points] for name, points in seen.changes.items()},
    }


def experts(found: Mapping[str, Seen], path: Path) -> Path | None:
    """Which labels prefer which experts: a row of panels an arm, a panel a layer; experts sorted by the label that likes them most."""
    shown = {arm: seen for arm, seen in found.items() if len(seen.labels) > 1}
    if not shown:
        return None
    wide = max(len(_some(seen.layers)) for seen in shown.values())
    with matplotlib.rc_context({**plots.STYLE, "axes.grid": False}):
        tall = [0.24 * len(seen.labels) + 0.85 for seen in shown.values()]
        figure = Figure(figsize=(4.2 * wide + 1.5, sum(tall) + 0.6), layout="constrained")
        panels = figure.subplots(len(shown), wide, squeeze=False, gridspec_kw={"height_ratios": tall})
        for row, (arm, seen) in zip(panels, shown.items(), strict=True):
            layers = _some(seen.layers)
            for axes, (name, layer) in zip(row, layers.items(), strict=False):
                likes = preferences(layer.counts)
                order = np.lexsort((-likes.max(0), likes.argmax(0)))
                image = axes.imshow(
                    likes[:, order], aspect="auto", cmap="RdBu_r", norm=TwoSlopeNorm(1, 0, 3), interpolation="nearest"
                )
                _bare(axes, f"{arm}  {plots.layer_name(name)}  ({number(layer.specialisation)})")
                axes.set_yticks(range(len(seen.labels)), seen.labels, fontsize=8)
            for axes in row[len(layers) :]:
                axes.set_axis_off()
        bar = figure.colorbar(image, ax=list(panels.ravel()), shrink=0.6, aspect=16, pad=0.01)
        bar.set_label("relative use")
        return plots.save(figure, path)


def similarity(found: Mapping[str, Seen], path: Path) -> Path | None:
    """How alike the experts of each arm's last layer answer."""
    shown = {
        arm: layers[-1]
        for arm, seen in found.items()
        if (layers := [layer for layer in seen.layers.values() if layer.similarity is not None])
    }
    if not shown:
        return None
    with matplotlib.rc_context({**plots.STYLE, "axes.grid": False}):
        columns = min(4, len(shown))
        rows = -(-len(shown) // columns)
        figure = Figure(figsize=(3.1 * columns + 0.8, 3.0 * rows), layout="constrained")
        panels = figure.subplots(rows, columns, squeeze=False).ravel()
        for axes, (arm, layer) in zip(panels, shown.items(), strict=False):
            image = axes.imshow(layer.similarity, cmap="RdBu_r", vmin=-1, vmax=1, interpolation="nearest")
            _bare(axes, f"{arm}  ({number(layer.alikeness)})")
        for axes in panels[len(shown) :]:
            axes.set_axis_off()
        figure.colorbar(image, ax=list(panels), shrink=0.7, aspect=18).set_label("cosine of two experts' answers")
        return plots.save(figure, path)


def changes(found: Mapping[str, Seen], path: Path) -> Path | None:
    """Share of choices that changed from checkpoint to checkpoint, over steps; None without several checkpoints."""
    shown = {arm: seen for arm, seen in found.items() if seen.changes}
    if not shown:
        return None
    with matplotlib.rc_context(plots.STYLE):
        figure = Figure(figsize=(6.4, 4.0), layout="constrained")
        axes = figure.subplots()
        for i, (arm, seen) in enumerate(shown.items()):
            steps = [step for step, _ in next(iter(seen.changes.values()))]
            mean = np.mean([[share for _, share in points] for points in seen.changes.values()], 0)
            axes.plot(steps, mean, color=plots.COLOURS[i % len(plots.COLOURS)], label=arm, marker="o", markersize=3)
        axes.set_title("choices changed since the checkpoint before")
        axes.set_xlabel("step")
        axes.set_ylim(0)
        axes.legend(frameon=False)
        return plots.save(figure, path)


def _some(layers: dict[str, ObservedLayer]) -> dict[str, ObservedLayer]:
    """At most `SHOWN_LAYERS`, spread over the depth."""
    names = list(layers)
    kept = np.unique(np.linspace(0, len(names) - 1, min(len(names), SHOWN_LAYERS)).round().astype(int))
    return {names[i]: layers[names[i]] for i in kept}


def _bare(axes: Axes, title: str) -> None:
    axes.set_title(title, fontsize=9)
    axes.set_xticks([])
    axes.set_yticks([])
    axes.tick_params(length=0)
    for spine in axes.spines.values():
        spine.set_visible(False)
