"""What a bench reports: rows of ratios with their rooflines, printed, saved as JSON and drawn."""

import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path

from experiments.bench.timing import Timing

FORWARD, BACKWARD = "forward", "forward+backward"


@dataclass(frozen=True)
class Bar:
    """A ratio that a contestant should not exceed, in one pass of one case."""

    pass_name: str
    contestant: str
    at_most: float


@dataclass(frozen=True)
class Outcome:
    """One case: the same work done by several contestants.

    Attributes:
      name, title: of the case.
      limit: the contestant that ratios are relative to.
      timings: pass -> contestant -> timing.
      auto: the contestant that 'auto' takes, marked in the table; None where there is no choice.
      choices: the contestants that 'auto' can take here: those that compute the same function.
      bars: what should hold.
      notes: lines to print below.
    """

    name: str
    title: str
    limit: str
    timings: dict[str, dict[str, Timing]]
    auto: str | None = None
    choices: tuple[str, ...] = ()
    bars: tuple[Bar, ...] = ()
    notes: tuple[str, ...] = field(default=())

    def ratio(self, pass_name: str, contestant: str) -> float:
        rows = self.timings[pass_name]
        return rows[contestant].median / rows[self.limit].median

    def winner(self) -> str | None:
        """The fastest of what 'auto' can choose from, added up over the passes; None where there is no choice."""
        if not self.choices:
            return None
        return min(self.choices, key=lambda c: sum(rows[c].median for rows in self.timings.values()))

    def judged(self) -> list[tuple[Bar, float, bool]]:
        """Each bar with what was measured and whether it is met."""
        ratios = [(bar, self.ratio(bar.pass_name, bar.contestant)) for bar in self.bars]
        return [(bar, ratio, ratio <= bar.at_most) for bar, ratio in ratios]


def show(outcome: Outcome) -> None:
    """Prints one case."""
    print(f"\n{outcome.name}: {outcome.title}")
    print(f"{'contestant':<24}{'pass':<18}{'ratio':>7}{'quartiles':>14}{'GFLOP':>9}{'MB':>9}{'temp MB':>9}{'compile s':>11}")
    for pass_name, rows in outcome.timings.items():
        unit = rows[outcome.limit].median
        for name, t in rows.items():
            spread = f"{t.low / unit:.2f}-{t.high / unit:.2f}"
            print(
                f"{name + ' *' if name == outcome.auto else name:<24}{pass_name:<18}{t.median / unit:>7.2f}{spread:>14}"
                f"{t.flops / 1e9:>9.2f}{t.bytes / 1e6:>9.1f}{t.temp_bytes / 1e6:>9.1f}{t.compile_seconds:>11.1f}"
            )
    for bar, ratio, met in outcome.judged():
        print(f"bar: {bar.contestant} {bar.pass_name} at most {bar.at_most:.2f}: {ratio:.2f}, {'met' if met else 'NOT met'}")
    if winner := outcome.winner():
        print(f"auto takes {outcome.auto}; the fastest of {', '.join(outcome.choices)} is {winner}")
    for note in outcome.notes:
        print(note)


LEGEND = (
    "ratio: time over that of the first row of its pass, in the same run; * is what 'auto' takes. GFLOP: matrix products of the program; "
    "MB: arguments and results, each moved once; temp MB: what it needs besides."
)


def save(bench: str, machine: str, outcomes: Iterable[Outcome], out: Path) -> tuple[Path, Path]:
    """Writes `<bench>.json` and `<bench>.png` into `out`, and gives their paths."""
    out.mkdir(parents=True, exist_ok=True)
    outcomes = list(outcomes)
    cases = [asdict(o) | {"ratios": {p: {c: o.ratio(p, c) for c in rows} for p, rows in o.timings.items()}} for o in outcomes]
    path = out / f"{bench}.json"
    path.write_text(json.dumps({"bench": bench, "machine": machine, "cases": cases}, indent=1) + "\n")
    plot(bench, outcomes, out / f"{bench}.png")
    return path, out / f"{bench}.png"


def plot(bench: str, outcomes: list[Outcome], path: Path) -> None:
    """Bars of ratios, one panel per pass; the line is the limit, the chosen contestant is coloured."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    passes = list(dict.fromkeys(p for o in outcomes for p in o.timings))
    height = 0.8 + 0.22 * sum(max(len(rows) for rows in o.timings.values()) + 1 for o in outcomes)
    figure, axes = plt.subplots(1, len(passes), figsize=(5.5 * len(passes), height), squeeze=False)
    for axis, pass_name in zip(axes[0], passes, strict=True):
        ticks, labels, y = [], [], 0.0
        for outcome in outcomes:
            rows = [c for c in outcome.timings.get(pass_name, ()) if c != outcome.limit]
            start = y
            for contestant in rows:
                ratio = outcome.ratio(pass_name, contestant)
                axis.barh(y, ratio, color="C0" if contestant == outcome.auto else "0.75", height=0.8)
                axis.text(ratio, y, f" {contestant} {ratio:.2f}", va="center", fontsize=7)
                y += 1
            if rows:
                ticks.append((start + y - 1) / 2)
                labels.append(outcome.name)
            y += 0.7
        axis.axvline(1, color="k", lw=0.8)
        axis.set(title=f"{pass_name}: time / limit", yticks=ticks, yticklabels=labels, xscale="log")
        axis.invert_yaxis()
        axis.spines[["top", "right"]].set_visible(False)
    figure.suptitle(f"bench {bench}", fontsize=9)
    figure.tight_layout()
    figure.savefig(path, dpi=130)
    plt.close(figure)
