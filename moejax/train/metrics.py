"""Names for what models sow, and the files that metrics are written to."""

import json
import os
from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array
from tensorboardX import SummaryWriter

Line = dict[str, Any]


def flatten(collection: Mapping[str, Any], prefix: str, total: bool = False) -> dict[str, Array]:
    """A sown collection as a flat dictionary.

    Each item is named '<prefix>/<module>/<name>', the module's path joined by dots ('stats/stack.repeats.1_moe.ffn/z'). Under a
    scan over layers items keep their leading layers axis; see `expand`. What a module sowed in several calls is stacked.

    Args:
      collection: tree as Flax gives it, with tuples of sown values as leaves.
      prefix: first part of the names.
      total: sum instead, over layers, calls and modules: '<prefix>/<name>' -> scalar.
    """
    out: dict[str, Array] = {}
    for path, calls in jax.tree_util.tree_leaves_with_path(collection, is_leaf=lambda x: isinstance(x, tuple)):
        *module, name = [str(key.key) for key in path]
        values = [jnp.asarray(value) for value in (calls if isinstance(calls, tuple) else (calls,))]
        if total:
            key = f"{prefix}/{name}"
            out[key] = out.get(key, 0.0) + sum(jnp.sum(value) for value in values)
        else:
            out["/".join(filter(None, (prefix, ".".join(module), name)))] = values[0] if len(values) == 1 else jnp.stack(values)
    return out


def expand(metrics: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """Splits leading layers axes: 'stats/repeats.ffn/z' of shape [2] becomes 'stats/repeats.ffn.0/z' and '.1/z'.

    Shape alone cannot tell z of 8 layers from the load of 8 experts, but every layer reports some scalar: whatever axes the
    smallest stat of a module has are the axes that it was scanned over. Adds 'stats/<name>', the mean over all layers, for
    every scalar stat.
    """
    out: dict[str, np.ndarray] = {}
    modules: dict[str, dict[str, np.ndarray]] = defaultdict(dict)
    for key, value in metrics.items():
        kind, _, rest = key.partition("/")
        module, _, name = rest.rpartition("/")
        if kind == "stats":
            modules[module][name] = np.asarray(value)
        else:
            out[key] = np.asarray(value)
    means: dict[str, list[float]] = defaultdict(list)
    for module, stats in modules.items():
        layers = min((stat.shape for stat in stats.values()), key=len)
        for name, stat in stats.items():
            for index in np.ndindex(layers):
                out["/".join(filter(None, ("stats", ".".join((module, *map(str, index))), name)))] = np.asarray(stat[index])
            if stat.shape == layers:
                means[name] += stat.reshape(-1).tolist()
    return out | {f"stats/{name}": np.asarray(np.mean(values)) for name, values in means.items()}


def numbers(metrics: Mapping[str, Any]) -> Line:
    """Metrics as JSON takes them: scalars as numbers, vectors as lists."""
    return {key: np.asarray(value).tolist() for key, value in metrics.items()}


class MetricLog:
    """`metrics.jsonl`, `timings.jsonl` and TensorBoard events in one folder.

    metrics.jsonl holds nothing that differs between two runs of one config and seed; wall-clock values go to timings.jsonl.
    """

    def __init__(self, workdir: Path, step: int):
        """Opens the folder to go on after `step`: what was written past it is dropped, as it will be written again."""
        self.path = workdir / "metrics.jsonl"
        self._truncate(step)
        self._lines = self.path.open("a")
        self._timings = (workdir / "timings.jsonl").open("a")
        self._events = SummaryWriter(str(workdir), purge_step=step + 1 if step else None)

    def write(self, step: int, line: Mapping[str, Any]) -> None:
        """One line, with its step first."""
        self._lines.write(json.dumps({"step": step, **line}) + "\n")
        self._lines.flush()
        for key, value in line.items():
            if isinstance(value, list):
                self._events.add_histogram(key, np.asarray(value), step)
            else:
                self._events.add_scalar(key, value, step)

    def write_timing(self, step: int, line: Mapping[str, Any]) -> None:
        self._timings.write(json.dumps({"step": step, **line}) + "\n")
        self._timings.flush()

    def sync(self) -> None:
        """Returns once the lines are on the disk: a checkpoint must not outlive the lines that lead to it."""
        os.fsync(self._lines.fileno())

    def history(self) -> list[Line]:
        """All lines, those of earlier processes included."""
        return read_lines(self.path)

    def close(self) -> None:
        for stream in (self._lines, self._timings, self._events):
            stream.close()

    def _truncate(self, step: int) -> None:
        if self.path.exists():
            kept = [line for line in read_lines(self.path) if line["step"] <= step]
            write_atomically(self.path, "".join(json.dumps(line) + "\n" for line in kept))


class SilentLog(MetricLog):
    """What the other processes of a run have: it writes nothing, and reads what the first one wrote in the shared folder."""

    def __init__(self, workdir: Path, step: int):
        self.path = workdir / "metrics.jsonl"

    def write(self, step: int, line: Mapping[str, Any]) -> None:
        pass

    def write_timing(self, step: int, line: Mapping[str, Any]) -> None:
        pass

    def sync(self) -> None:
        pass

    def close(self) -> None:
        pass


def read_lines(path: Path) -> list[Line]:
    """The whole lines of a JSON-lines file; a last line that was cut off is left out."""
    return [json.loads(line) for line in path.read_text().splitlines(keepends=True) if line.endswith("\n")]


def write_atomically(path: Path, text: str) -> None:
    """Writes a file that is either the old one or the new one, never half."""
    part = path.with_name(path.name + ".part")
    with part.open("w") as stream:
        stream.write(text)
        stream.flush()
        os.fsync(stream.fileno())
    os.replace(part, path)
