"""Whether a folder holds the run that is asked for: by its config, by what its files hold, and by what `fit` was given by hand."""

import contextlib
import dataclasses
import functools
import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from moejax import data
from moejax.core.errors import ConfigError
from moejax.core.files import digest
from moejax.data.catalog import is_own
from moejax.optim.base import optimizers
from moejax.pretrained.convert import contents as pretrained_contents
from moejax.pretrained.names import tokenizer_file
from moejax.surgery.sources.checkpoint import CheckpointSource
from moejax.train.checkpoints import MANIFEST, find_checkpoint
from moejax.train.identity import check_equal, essence
from moejax.train.trainable import spans


def check_same_run(saved: Mapping[str, Any], config: Mapping[str, Any], place: str, done: int = 0) -> None:
    """Refuses the checkpoint of a run that was defined otherwise.

    A run may be made longer as long as its first `done` updates are those of the longer one too; of its logs, those of its
    earlier end stay.

    Args:
      saved: plain config in the checkpoint.
      config: plain config of this run.
      place: the work folder, for the error.
      done: updates that the checkpoint has behind it.

    Raises:
      ConfigError: naming the first setting that differs.
    """
    check_equal(_of_any_length(saved), _of_any_length(config), place)
    before, now = saved["train"]["steps"], config["train"]["steps"]
    if before == now:
        return
    if done > now:
        raise ConfigError(
            f"train.steps={now} is less than the {done} steps of the run in {place}; raise it, or take another workdir"
        )
    rates = [_rates(config["optimizer"], steps, done) for steps in (before, now)]
    if not np.array_equal(*rates):
        raise ConfigError(
            f"{place} holds {done} steps of a run of train.steps={before}, in which their learning rates were not those of "
            f"{now} steps; take another workdir, or from the start a schedule that knows no end (optimizer.schedule='constant')"
        )
    phases = [
        {name: (min(span.since, done), min(span.end, done)) for name, span in spans(config.get("trainable"), steps).items()}
        for steps in (before, now)
    ]
    check_equal({"steps of trainable": phases[0]}, {"steps of trainable": phases[1]}, place)


def files(config: Any, place: str = "") -> dict[str, str]:
    """What is in the files that a config names: dotted place -> a hash of the contents. Those that are not there are left out."""
    if not isinstance(config, Mapping | ConfigDict):
        return {}
    found: dict[str, str] = {}
    inside = f"{place}." if place else ""
    if config.get("kind") == "checkpoint" and "path" in config:
        source = CheckpointSource(config["path"], config.get("step"))
        with contextlib.suppress(FileNotFoundError):
            found[place] = contents(*source.place)
    if config.get("kind") == "pretrained" and "path" in config:
        with contextlib.suppress(ConfigError):
            found[place] = pretrained_contents(config["path"])
    if config.get("tokenizer", "bytes") != "bytes":
        with contextlib.suppress(ConfigError, FileNotFoundError):
            named = str(config["tokenizer"])
            file = Path(named) if named.endswith(".json") else tokenizer_file(named)
            found[f"{inside}tokenizer"] = digest(file)[:20]
    if config.get("path") is not None and is_own(config.get("name")):
        with contextlib.suppress(ConfigError, FileNotFoundError):
            found[f"{inside}path"] = data.contents(data.parse(config))
    for name, value in config.items():
        found |= files(value, f"{inside}{name}")
    return found


def contents(path: str | Path, step: int | None = None) -> str:
    """Names what is in a checkpoint: a hash of the checksums of its files."""
    return digest(find_checkpoint(path, step) / MANIFEST)[:20]


def described(value: Any) -> Any:
    """What a value given by hand is made of, as plain data that are the same in every process.

    Dataclasses, Flax modules among them, by class and fields; functions by name, and by what they close over; arrays by contents.
    Of two classes with one name and equal fields nobody can tell.
    """
    match value:
        case None | bool() | int() | float() | str():
            return value
        case Mapping() | ConfigDict():
            return {str(key): described(item) for key, item in value.items()}
        case list() | tuple():
            return [described(item) for item in value]
        case set() | frozenset():
            return sorted(str(described(item)) for item in value)
        case functools.partial():
            return {"": "partial", "function": described(value.func), "args": described([value.args, value.keywords])}
        case np.ndarray() | jax.Array() if not jax.dtypes.issubdtype(value.dtype, jax.dtypes.prng_key):
            array = np.asarray(value)
            return f"{array.dtype}{array.shape} {hashlib.sha256(array.tobytes()).hexdigest()[:20]}"
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        names = [field.name for field in dataclasses.fields(value) if field.name != "parent"]
        return {"": _name(type(value)), **{name: described(getattr(value, name, None)) for name in names}}
    if not hasattr(value, "__qualname__"):
        return _name(type(value)) + (f" {value}" if isinstance(value, np.dtype) else "")
    cells = [cell.cell_contents for cell in getattr(value, "__closure__", None) or ()]
    if "<lambda>" in value.__qualname__:
        cells = [hashlib.sha256(value.__code__.co_code).hexdigest()[:20], str(value.__code__.co_consts), *cells]
    return {"": _name(value), "closure": described(cells)} if cells else _name(value)


def batch_contents(batch: Mapping[str, Any]) -> str:
    """Names a batch by its contents."""
    found = hashlib.sha256()
    for name, value in sorted(batch.items()):
        array = np.ascontiguousarray(value)
        found.update(f"{name} {array.dtype} {array.shape}".encode() + array.tobytes())
    return found.hexdigest()[:20]


def _of_any_length(config: Mapping[str, Any]) -> dict[str, Any]:
    found = essence(config)
    return {**found, "train": {**found["train"], "steps": None}}


def _rates(spec: Mapping[str, Any], steps: int, done: int) -> np.ndarray:
    """Learning rates of the first `done` updates of a run of so many steps."""
    return np.asarray(jax.vmap(optimizers.build(spec, "optimizer", steps=steps).rate)(jnp.arange(done)))


def _name(thing: Any) -> str:
    return f"{getattr(thing, '__module__', '')}.{thing.__qualname__}"
