"""`python -m experiments.bench dispatch [--shapes=reference,glu] [--against=ragged_dot] [--repeats=9] [--out=runs/bench]`."""

import argparse
import json
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

from experiments.environment import machine
from moejax.errors import ConfigError, nearest

BENCHES = ("dispatch",)
PEERS = ("ragged_dot",)


def main(argv: list[str] | None = None) -> int:
    """Runs a bench; prints its table, and writes JSON and a plot beside it. Exit status 2 for a wrong name."""
    parser = argparse.ArgumentParser(prog="python -m experiments.bench", description=__doc__)
    parser.add_argument("bench", nargs="?", default="dispatch")
    parser.add_argument("--shapes", default="", help="comma-separated; all of them by default")
    parser.add_argument("--against", default="", help=f"peers to time as well: {', '.join(PEERS)}")
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--out", type=Path, default=Path("runs/bench"))
    options = parser.parse_args(argv)
    try:
        shapes, against = _check(options)
    except ConfigError as error:
        print(error, file=sys.stderr)
        return 2

    from experiments.bench import dispatch

    results: dict[str, Any] = {"machine": machine(), "shapes": {}}
    for name in shapes:
        shape = dispatch.SHAPES[name]
        timings = dispatch.run(shape, options.repeats, against)
        _print(shape, timings, dispatch.chosen(shape))
        results["shapes"][name] = {
            "shape": asdict(shape),
            "flops": shape.flops,
            "auto": dispatch.chosen(shape),
            "timings": {p: {c: asdict(t) for c, t in rows.items()} for p, rows in timings.items()},
        }
    options.out.mkdir(parents=True, exist_ok=True)
    (options.out / f"{options.bench}.json").write_text(json.dumps(results, indent=1) + "\n")
    _plot(results, options.out / f"{options.bench}.png")
    print(f"wrote {options.out / options.bench}.json and .png")
    return 0


def _check(options: argparse.Namespace) -> tuple[list[str], tuple[str, ...]]:
    if options.bench not in BENCHES:
        raise ConfigError(f"unknown bench '{options.bench}'{nearest(options.bench, BENCHES)}")
    from experiments.bench.dispatch import SHAPES

    shapes = [s for s in options.shapes.split(",") if s] or list(SHAPES)
    against = tuple(a for a in options.against.split(",") if a)
    for kind, names, known in (("--shapes", shapes, SHAPES), ("--against", against, PEERS)):
        for name in names:
            if name not in known:
                raise ConfigError(f"unknown name '{name}' in {kind}{nearest(name, known)}")
    if options.repeats < 3:
        raise ConfigError(f"--repeats={options.repeats} is too few for a median and quartiles; take at least 3")
    return shapes, against


def _print(shape: Any, timings: dict[str, Any], auto: str) -> None:
    print(f"\n{shape.name}: n={shape.n} d={shape.d} f={shape.f} e={shape.e} k={shape.k}, {shape.flops / 1e9:.2f} GFLOP forward")
    print(f"{'contestant':<14}{'pass':<18}{'ratio':>7}{'quartiles':>16}{'temp MB':>9}{'compile s':>11}")
    for name_of_pass, rows in timings.items():
        limit = rows["dense"].median
        for name, t in rows.items():
            spread = f"{t.low / limit:.2f}-{t.high / limit:.2f}"
            mark = f"{name} *" if name == auto else name
            print(
                f"{mark:<14}{name_of_pass:<18}{t.median / limit:>7.2f}{spread:>16}{t.temp_bytes / 1e6:>9.1f}{t.compile_seconds:>11.1f}"
            )
    print("ratio: time over that of the dense layer of equal active FLOPs, in the same run; * is what auto takes")


def _plot(results: dict[str, Any], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    shapes = results["shapes"]
    figure, axes = plt.subplots(1, 2, figsize=(11, 0.6 + 0.9 * len(shapes)), sharey=True)
    for axis, pass_name in zip(axes, ("forward", "forward+backward"), strict=True):
        ticks, labels = [], []
        y = 0.0
        for name, entry in shapes.items():
            rows = entry["timings"][pass_name]
            for contestant, timing in rows.items():
                if contestant == "dense":
                    continue
                ratio = timing["median"] / rows["dense"]["median"]
                axis.barh(y, ratio, color="C0" if contestant == entry["auto"] else "0.75", height=0.8)
                axis.text(ratio, y, f" {contestant} {ratio:.2f}", va="center", fontsize=7)
                y += 1
            ticks.append(y - (len(rows) - 1) / 2 - 0.5)
            labels.append(name)
            y += 0.7
        axis.axvline(1, color="k", lw=0.8)
        axis.set(title=f"{pass_name}: time / dense", yticks=ticks, yticklabels=labels)
        axis.invert_yaxis() if axis is axes[0] else None
        axis.spines[["top", "right"]].set_visible(False)
    figure.tight_layout()
    figure.savefig(path, dpi=130)


if __name__ == "__main__":
    sys.exit(main())
