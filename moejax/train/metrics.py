"""Names for what models sow, and the files that metrics are written to."""

import base64
import contextlib
import json
import os
import warnings
import zlib
from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from moejax.core.files import Damaged, parse_lines, read_lines, set_aside, write_atomically
from moejax.train.events import Events

Line = dict[str, Any]
LOGS = ("metrics.jsonl", "timings.jsonl")


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

    metrics.jsonl holds nothing that differs between two runs of one config and seed; wall-clock values go to timings.jsonl. A
    checkpoint keeps a copy of both (`copies`), so that a run which goes on from it goes on from the lines that led to it.
    """

    def __init__(self, workdir: Path, step: int, copies: Mapping[str, str] | None = None):
        """Opens the folder to go on after `step`, with the lines in `copies`: what was written past it will be written again.

        Without copies, of a checkpoint that has none, the lines up to `step` that can be read stay.
        """
        files = (workdir / name for name in LOGS)
        self._lines, self._timings = (
            _Growing(file, _upto(file, step) if copies is None else _same(file, unpacked(copies[file.name]), step))
            for file in files
        )
        self._events = Events(workdir, step)

    def write(self, step: int, line: Mapping[str, Any]) -> None:
        """One line, with its step first."""
        self._lines.write({"step": step, **line})
        self._events.write(step, line)

    def write_timing(self, step: int, line: Mapping[str, Any]) -> None:
        self._timings.write({"step": step, **line})

    def sync(self) -> None:
        """Returns once the lines are on the disk: a checkpoint must not outlive the lines that lead to it."""
        for file in (self._lines, self._timings):
            file.sync()

    def copies(self) -> dict[str, str]:
        """Both files, packed as JSON can hold them, by name."""
        return {file.path.name: file.packed() for file in (self._lines, self._timings)}

    def history(self) -> list[Line]:
        """All lines, those of earlier processes included."""
        return parse_lines(unpacked(self._lines.packed()), str(self._lines.path))

    def close(self) -> None:
        for stream in (self._lines, self._timings, self._events):
            stream.close()


class SilentLog(MetricLog):
    """What the other processes of a run have: it writes nothing, and reads what the first one wrote in the shared folder."""

    def __init__(self, workdir: Path, step: int, copies: Mapping[str, str] | None = None):
        self.path = workdir / LOGS[0]

    def write(self, step: int, line: Mapping[str, Any]) -> None:
        pass

    def write_timing(self, step: int, line: Mapping[str, Any]) -> None:
        pass

    def sync(self) -> None:
        pass

    def copies(self) -> dict[str, str]:
        return {}

    def history(self) -> list[Line]:
        return read_lines(self.path)

    def close(self) -> None:
        pass


def unpacked(copy: str) -> str:
    """The text of one of `MetricLog.copies`."""
    return zlib.decompress(base64.b64decode(copy)).decode()


class _Growing:
    """A file of JSON lines that only grows, with a packed copy of it in memory: the disk is not asked what was written to it."""

    def __init__(self, path: Path, text: str):
        self.path = path
        self._packer, self._packed = zlib.compressobj(), []
        self._open(text)
        self._keep(text)

    def write(self, line: Line) -> None:
        text = json.dumps(line) + "\n"
        self._keep(text)
        self._stream.write(text)
        self._stream.flush()

    def sync(self) -> None:
        os.fsync(self._stream.fileno())
        try:
            there = os.path.samestat(os.stat(self.path), os.fstat(self._stream.fileno()))
        except FileNotFoundError:
            there = False
        if not there:
            warnings.warn(f"{self.path} was removed while the run wrote it; it is written anew", Damaged, stacklevel=2)
            self.close()
            self._open(unpacked(self.packed()))

    def packed(self) -> str:
        return base64.b64encode(b"".join(self._packed) + self._packer.copy().flush()).decode()

    def close(self) -> None:
        # What a full disk refused is in the packed copy, and is tried again by nobody.
        with contextlib.suppress(OSError):
            self._stream.close()

    def _open(self, text: str) -> None:
        write_atomically(self.path, text)
        self._stream = self.path.open("a")

    def _keep(self, text: str) -> None:
        self._packed.append(self._packer.compress(text.encode()))


def _same(file: Path, text: str, step: int) -> str:
    """`text`; with a word about the file if it does not begin with it."""
    there = file.read_bytes() if file.exists() else b""
    if not there.startswith(text.encode()):
        if file.exists():
            set_aside(file, "log", f"it is not what was written up to step {step}", "made again from the checkpoint")
        else:
            warnings.warn(f"log {file} is gone, made again from the checkpoint of step {step}", Damaged, stacklevel=3)
    return text


def _upto(file: Path, step: int) -> str:
    """The lines of a file, up to `step`, that can be read."""
    if not step or not file.exists():
        return ""
    return "".join(json.dumps(line) + "\n" for line in read_lines(file) if line.get("step", step + 1) <= step)
