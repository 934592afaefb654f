"""What the trainer lends to sources of parameters: reading checkpoints, and training the runs that others start from."""

import hashlib
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import numpy as np

from moejax.core.errors import ConfigError
from moejax.pretrained import convert as pretrained
from moejax.surgery.base import Checkpoint
from moejax.surgery.sources.base import Reader, network_of
from moejax.tasks.base import Task
from moejax.train.checkpoints import load, load_meta
from moejax.train.identity import essence
from moejax.train.results import ProgressCallback
from moejax.train.same_run import contents, files
from moejax.train.settings import plain

# Gives the folder of the finished run of a config, `(config, seed, label)`, and trains it first unless it has been.
Resolve = Callable[[Mapping[str, Any], int, str], Path]
# The same, told whom to report to: `(config, seed, progress, label)`.
ResolveRun = Callable[[Mapping[str, Any], int, ProgressCallback, str], Path]


def make_reader(place: str, seed: int, fresh: Callable[[], Checkpoint], resolve: Resolve, label: str = "") -> Reader:
    """A reader for the source that is written at `place`; `label` names the run that asks, in progress reports."""

    def train(config: Mapping[str, Any], seed: int) -> Checkpoint:
        return on_host(load(resolve(config, seed, f"{place} of {label}" if label else place)))

    return Reader(place, seed, fresh, _load(place), _config_of(place), train, _published, _published_config)


def train_below(
    folder: Path, fit: Callable[..., Any], config: Mapping[str, Any], model: nn.Module | None, **given: Any
) -> ResolveRun:
    """Trains what runs start from below `folder`, in a folder for each config and seed that all of them share.

    Args:
      folder: where to.
      fit: `moejax.train.fit`.
      config: plain config of the run that starts from them.
      model: what takes the place of its model and adapters; also of theirs, where those are equal.
      **given: further arguments of `fit`.
    """

    def resolve(start: Mapping[str, Any], seed: int, progress: ProgressCallback, label: str) -> Path:
        start = plain(start)
        text = json.dumps({"config": essence(start), "files": files(start), "seed": seed}, sort_keys=True)
        workdir = folder / hashlib.sha256(text.encode()).hexdigest()[:12]
        same = model if network_of(start) == network_of(config) else None
        fit(start, seed, workdir, progress, label, model=same, resolve=resolve, **given)
        return workdir

    return resolve


def frozen_specs(task: Task) -> dict[str, Any]:
    """What each frozen model of a task is made of (`network_of`), by name; trains nothing."""

    def refuse(*_: Any) -> Any:
        raise AssertionError("a source that says what its model is must not ask for more")

    return {name: source.network(make_reader(f"task.{name}", 0, refuse, refuse)) for name, source in task.frozen().items()}


def on_host(checkpoint: Checkpoint) -> Checkpoint:
    """With NumPy arrays: several models at a time would not fit on the device that trains one."""
    return checkpoint._replace(variables=jax.tree.map(np.asarray, dict(checkpoint.variables)))


def _load(place: str) -> Callable[[str, int | None], Checkpoint]:
    def read(path: str, step: int | None) -> Checkpoint:
        found = _found(place, load, path, step)
        return on_host(found._replace(meta={**found.meta, "contents": contents(path, step)}))

    return read


def _config_of(place: str) -> Callable[[str, int | None], Mapping[str, Any]]:
    return lambda path, step: _found(place, load_meta, path, step)["config"]


def _published(name: str) -> Checkpoint:
    found = pretrained.load(name)
    return Checkpoint({"model": found.model}, found.variables, {"contents": pretrained.contents(name)})


def _published_config(name: str) -> Mapping[str, Any]:
    return {"model": pretrained.config_of(name)}


def _found(place: str, read: Callable[[str, int | None], Any], path: str, step: int | None) -> Any:
    try:
        return read(path, step)
    except (FileNotFoundError, ValueError) as error:
        raise ConfigError(f"{place}.path='{path}': {error}") from None
