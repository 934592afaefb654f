"""Compiling configs for pods: what `--compile_for` shows and writes, and the record that the README quotes.

python -m experiments.run --config=configs/pods/mixtral_8x7b.py --compile_for=v5e:16x16
python -m experiments.pods                                # all of configs/pods for both slices, into the ledger and the README
python -m experiments.pods mixtral_8x7b --for=v5e:16x16   # some of it
"""

import contextlib
import json
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console

from experiments.environment import REPOSITORY, describe
from experiments.tables import Table, duration, percent, quantity
from experiments.terminal import make_console, say, short, show, told
from moejax.core.errors import ConfigError, nearest
from moejax.core.text import tell

if TYPE_CHECKING:
    from moejax.aot.report import Report

CONFIGS = REPOSITORY / "configs" / "pods"
RECORD = REPOSITORY / "experiments" / "ledger" / "pods"
SLICES = ("v5e:16x16", "v5p:4x4x8")  # of the record: 256 and 128 chips

PLAIN_EVERY = 20.0  # seconds between two lines where there is no terminal to animate
PARTS = ("parameters", "frozen", "optimizer", "inputs", "temporaries", "results", "code")
GB = 1e9
SEEN = 0.05  # share of the limit below which a bar beside it is no picture


def compile_configs(configs: Mapping[str, Any], topology: str, folder: Path, console: Console) -> None:
    """Compiles the train step of each config, shows what it needs, and writes `<name>.<topology>.json` with a picture beside it.

    Args:
      configs: name -> config.
      topology: 'v5e:16x16', or 'cpu:8' for simulated devices.
      folder: where to.

    Raises:
      ConfigError: a config is wrong; one that does not fit raises `DoesNotFit` after those before it have been written.
    """
    for name, config in configs.items():
        file = write(compile_one(name, config, topology, console), folder)
        shown = picture([read_report(file)], file.with_suffix(".png"))
        say(console, f"wrote {short(file)} and {short(shown)}\n")


def compile_one(name: str, config: Any, topology: str, console: Console) -> "Report":
    """Compiles one config and shows what it needs."""
    from moejax.aot import ahead, report

    where = ahead.topology(topology)
    with _phases(console, f"{name} for {topology}") as phase:
        made = report.make_report(name, config, where, phase)
    say(console, f"\n{made.name} on {made.topology}: {made.devices} devices, mesh {made.mesh}\n")
    for table in tables(made):
        show(console, table)
    return made


def tables(report: "Report") -> tuple[Table, Table, Table]:
    """Memory, work and exchanges of one report."""
    memory, costs = report.memory, report.costs
    limit = memory.limit or memory.total
    rows = [(part, _size(getattr(memory, part)), percent(getattr(memory, part) / limit)) for part in PARTS]
    rows.append(("in all", _size(memory.total), percent(memory.total / limit)))
    if memory.limit:
        rows.append(("limit", _size(memory.limit), ""))
    of = "of the limit" if memory.limit else "of all"
    work = [
        ("parameters, active", f"{quantity(report.params)}, {quantity(report.active_params)}"),
        ("parameters that learn", quantity(report.trainable_params)),
        ("tokens or images a step", f"{quantity(report.tokens)}, {quantity(report.tokens / report.devices)} a device"),
        ("FLOPs of a device", f"{costs.flops:.3g}"),
        ("bytes of memory traffic", f"{costs.bytes:.3g}"),
    ]
    if costs.seconds is not None:
        work += [
            ("computing, at peak rates", _ms(costs.compute_seconds)),
            (
                "exchanging, at peak rates",
                f"{_ms(costs.exchange_seconds)}, of which not overlapped {_ms(costs.exposed_seconds)}",
            ),
            ("step, an estimate and no measurement", _ms(costs.seconds)),
        ]
    work.append(("tracing, compiling", f"{duration(report.trace_seconds)}, {duration(report.compile_seconds)}"))
    exchanges = [
        (
            e.kind,
            " x ".join(e.axes) or "-",
            f"{e.group}",
            f"{e.count}" + ("" if e.known else "+"),
            _size(e.bytes),
            percent(e.overlapped),
        )
        for e in report.exchanges
    ]
    return (
        Table("memory of a device", ("", "", of), tuple(rows)),
        Table("one step", ("", ""), tuple(work)),
        Table(
            "exchanges of a device in one step",
            ("kind", "along", "devices", "times", "sent", "overlapped"),
            tuple(exchanges) or (("none", "", "", "", "", ""),),
        ),
    )


def write(report: "Report", folder: Path) -> Path:
    """A report as JSON; returns the file."""
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / f"{report.name}.{report.topology.replace(':', '-')}.json"
    file.write_text(json.dumps({**report.to_json(), "made": describe()}, indent=1) + "\n")
    return file


def picture(reports: Sequence[Mapping[str, Any]], path: Path) -> Path:
    """A bar a report, as JSON has them: what a device's memory holds, and its limit unless that would leave the bars too small to see."""
    import matplotlib
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    from experiments.plots import COLOURS, STYLE

    memories = [report["memory"] for report in reports]
    held, limit = (max(memory[name] or 0 for memory in memories) for name in ("total", "limit"))
    is_far = held < SEEN * limit
    scale, unit = _unit(widest := held if is_far else max(held, limit))
    with matplotlib.rc_context({**STYLE, "axes.grid.axis": "x"}):
        figure = Figure(figsize=(8.5, 1.7 + 0.7 * len(reports)), layout="constrained")
        axes = figure.subplots()
        rows, left = range(len(reports)), [0.0] * len(reports)
        for part, colour in zip(PARTS, COLOURS, strict=False):
            # Records of before had no parameters that do not learn.
            sizes = [memory.get(part, 0) / scale for memory in memories]
            axes.barh(rows, sizes, left=left, color=colour, label=part, height=0.55)
            left = [a + b for a, b in zip(left, sizes, strict=True)]
        for row, memory in enumerate(memories):
            if memory["limit"] and not is_far:
                axes.plot([memory["limit"] / scale] * 2, [row - 0.4, row + 0.4], color="black", linewidth=2)
        axes.set_yticks(rows, [f"{r['name']}\n{r['topology']}, {r['mesh']}" for r in reports])
        axes.set_xlim(0, 1.04 * widest / scale)
        note = f" (its limit, {_size(limit)}, is far off)" if is_far else " (black: its limit)" if limit else ""
        axes.set_xlabel(f"{unit} of a device's memory{note}")
        axes.invert_yaxis()
        figure.legend(loc="outside lower center", ncols=len(PARTS), frameon=False, fontsize=9)
        FigureCanvasAgg(figure)
        figure.savefig(path, dpi=150)
    return path


def markdown(record: Path = RECORD) -> str:
    """The table of all recorded reports."""
    lines = [
        "| config | chips | mesh | parameters (active) | memory a chip, GB (of which temporaries) | FLOPs a chip | sent a chip, GB (overlapped) | step, estimated | compiled in |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for r in _recorded(record):
        memory, costs = r["memory"], r["costs"]
        sent = sum(e["bytes"] for e in r["exchanges"])
        hidden = sum(e["bytes"] * e["overlapped"] for e in r["exchanges"])
        lines.append(
            f"| {r['name']} | {r['topology']} ({r['devices']}) | {r['mesh']} | {quantity(r['params'])} ({quantity(r['active_params'])}) "
            f"| {memory['total'] / GB:.2f} of {memory['limit'] / GB:.2f} ({memory['temporaries'] / GB:.2f}) | {costs['flops']:.2g} "
            f"| {sent / GB:.1f} ({percent(hidden / sent if sent else 0)}) | {_ms(costs['estimated_seconds'])} | {duration(r['compile_seconds'])} |"
        )
    return "\n".join(lines)


def main(argv: Sequence[str]) -> int:
    """Compiles configs of `configs/pods` for the slices of the record, and renews the record."""
    os.environ["JAX_PLATFORMS"] = "cpu"  # looking for an accelerator takes a while, and none is needed
    from experiments.flags import load_config

    console = make_console()
    topologies = [a.removeprefix("--for=") for a in argv if a.startswith("--for=")] or SLICES
    files = {f.stem: f for f in sorted(CONFIGS.glob("*.py")) if f.stem != "__init__"}
    try:
        for name in (wanted := [a for a in argv if not a.startswith("--for=")] or list(files)):
            if name not in files:
                raise ConfigError(f"unknown config '{name}' in configs/pods{nearest(name, files)}")
        for topology in topologies:
            for name in wanted:
                write(compile_one(name, load_config(str(files[name]))[1], topology, console), RECORD)
    except ConfigError as error:
        tell(f"error: {told(error)}")
        return 2
    picture(_recorded(RECORD), RECORD / "memory.png")
    say(console, "the pages in docs/ show the record once they are renewed: python -m experiments.docs")
    return 0


def _recorded(record: Path) -> list[dict[str, Any]]:
    """All reports of the record, by chip and then by name."""
    found = [read_report(file) for file in record.glob("*.json")]
    return sorted(found, key=lambda report: (report["topology"], report["name"]))


def read_report(file: Path) -> dict[str, Any]:
    """What was written of one compiled config.

    Raises:
      ConfigError: it cannot be read.
    """
    try:
        found = json.loads(file.read_text())
        return {**found, "topology": found["topology"], "name": found["name"]}
    except (ValueError, TypeError, KeyError) as error:
        raise ConfigError(
            f"{file} is no report of a compiled config ({error}); remove it, or compile the config again"
        ) from None


@contextlib.contextmanager
def _phases(console: Console, what: str) -> Iterator[Callable[[str], None]]:
    """Says which phase a compilation is in and for how long: on one line of a terminal, or now and then in a log."""
    state = {"phase": "", "since": time.monotonic()}
    stop = threading.Event()

    def line() -> str:
        return f"{what}: {state['phase']}, {duration(time.monotonic() - state['since'])}"

    def tick(status: Any) -> None:
        while not stop.wait(1.0 if status else PLAIN_EVERY):
            status.update(line()) if status else say(console, line())

    with contextlib.ExitStack() as stack:
        status = stack.enter_context(console.status(what)) if console.is_terminal else None

        def phase(name: str) -> None:
            state.update(phase=name, since=time.monotonic())
            if status is None:
                say(console, f"{what}: {name}")

        thread = threading.Thread(target=tick, args=(status,), daemon=True)
        thread.start()
        try:
            yield phase
        finally:
            stop.set()
            thread.join()


def _size(count: float) -> str:
    """Bytes as `2.19 GB`, `48.3 MB` or `12 kB`."""
    scale, unit = _unit(count)
    return f"{count / scale:.3g} {unit}" if scale > 1 else f"{count:.0f} B"


def _unit(count: float) -> tuple[float, str]:
    """The unit in which a number of bytes is easy to read: `(1e6, "MB")`."""
    return next(((scale, unit) for scale, unit in ((GB, "GB"), (1e6, "MB"), (1e3, "kB")) if count >= scale), (1.0, "B"))


def _ms(seconds: float) -> str:
    return f"{1e3 * seconds:.0f} ms" if seconds >= 0.01 else f"{1e3 * seconds:.2g} ms"


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
