"""The sections of a run's config."""

import dataclasses
import json
from collections.abc import Mapping
from typing import Any, TypeVar

from ml_collections import ConfigDict

from moejax.core.errors import ConfigError, nearest

REQUIRED = ("model", "data", "task", "optimizer", "train")
OPTIONAL = ("adapters", "init", "trainable", "eval", "checkpoint", "mesh", "exchange")
# Where a run computes; a run that another one starts from computes in the same place.
PLACE = ("mesh", "exchange")
# `init` of a run that begins untrained: no section at all says the same.
UNTRAINED = {"source": {"kind": "fresh"}}

Section = TypeVar("Section")


@dataclasses.dataclass(frozen=True)
class TrainSettings:
    """`config.train`.

    Attributes:
      steps: optimizer updates in all. A run that starts from a trained model may have 0: it is evaluated as it is.
      accumulation: microbatches a batch is split into; must divide the batch size.
      log_every: steps between two lines of metrics. A step that is not logged never waits for the device.
    """

    steps: int
    accumulation: int = 1
    log_every: int = 20

    def __post_init__(self):
        _at_least(self, "train", steps=0, accumulation=1, log_every=1)


@dataclasses.dataclass(frozen=True)
class EvalSettings:
    """`config.eval`.

    Attributes:
      every: steps between two evaluations; 0 evaluates at the end only. The end is always evaluated.
      batches: batches of one evaluation; 0 means the whole split.
      split: name of the data's split.
    """

    every: int = 0
    batches: int = 0
    split: str = "validation"

    def __post_init__(self):
        _at_least(self, "eval", every=0, batches=0)


@dataclasses.dataclass(frozen=True)
class CheckpointSettings:
    """`config.checkpoint`.

    Attributes:
      every: steps between two checkpoints; 0 saves at the end (and on a signal) only.
      keep: newest checkpoints that stay. With 1, a damaged one has no elder to fall back to.
      asynchronous: training goes on while a checkpoint is written.
    """

    every: int = 0
    keep: int = 2
    asynchronous: bool = True

    def __post_init__(self):
        _at_least(self, "checkpoint", every=0, keep=1)


def normalized(config: Mapping[str, Any] | ConfigDict) -> ConfigDict:
    """The config as a `ConfigDict`, with its sections checked and without those that say what is so anyway.

    Raises:
      ConfigError: a section is missing or unknown, or nothing would be trained.
    """
    config = config if isinstance(config, ConfigDict) else ConfigDict(dict(config))
    config = ConfigDict(without_defaults(config.to_dict()))
    for name in config:
        if name not in REQUIRED + OPTIONAL:
            raise ConfigError(f"unknown section '{name}' in the config{nearest(name, REQUIRED + OPTIONAL)}")
    for name in REQUIRED:
        if name not in config:
            raise ConfigError(f"the config has no section '{name}'; a run needs {', '.join(REQUIRED)}")
    if "init" not in config and config.train.get("steps") == 0:
        raise ConfigError(
            "train.steps=0 must be a whole number of at least 1 unless the run starts from a trained model (init)"
        )
    return config


def without_defaults(config: Mapping[str, Any]) -> dict[str, Any]:
    """A plain config whose `init`, `adapters` and `trainable` are as short as they can be, and left out where they say nothing."""
    found = dict(config)
    init = _named(found.pop("init", None), "init")
    init |= {k: _named(init[k], f"init.{k}") for k in ("others", "surgeries") if k in init}
    init = {k: v for k, v in init.items() if v or k == "source"}
    others = {name: _named(found.pop(name, None), name) for name in ("adapters", "trainable")}
    if init and init != UNTRAINED:
        found["init"] = {**UNTRAINED, **init}
    return found | {name: value for name, value in others.items() if value}


def section(cls: type[Section], config: ConfigDict, name: str) -> Section:
    """Section `name` of the config as an object of settings; what it leaves out keeps its default.

    Raises:
      ConfigError: an unknown key, a missing one, or a value out of range.
    """
    given = dict(config.get(name) or {})
    fields = {field.name: field for field in dataclasses.fields(cls)}
    for key in given:
        if key not in fields:
            raise ConfigError(f"unknown key '{key}' in {name}{nearest(key, fields)}")
    for key, field in fields.items():
        if field.default is dataclasses.MISSING and key not in given:
            raise ConfigError(f"{name} needs '{key}'")
    return cls(**given)


def plain(config: Mapping[str, Any] | ConfigDict) -> dict[str, Any]:
    """The config as nested dicts and lists, exactly as it reads back from JSON.

    Raises:
      ConfigError: it holds something that JSON has no word for.
    """
    tree = config.to_dict() if isinstance(config, ConfigDict) else dict(config)
    try:
        return json.loads(json.dumps(tree, sort_keys=True))
    except TypeError as error:
        raise ConfigError(f"the config must be made of mappings, lists, strings and numbers: {error}") from None


def _named(entries: Mapping[str, Any] | None, where: str) -> dict[str, Any]:
    """The entries of a mapping by name, without those that None leaves out."""
    if not isinstance(entries or {}, Mapping):
        raise ConfigError(f"{where}={entries!r} must be a mapping of names to what is said of them")
    return {name: entry for name, entry in (entries or {}).items() if entry is not None}


def _at_least(settings: Any, name: str, **lowest: int) -> None:
    for key, low in lowest.items():
        value = getattr(settings, key)
        if not isinstance(value, int) or isinstance(value, bool) or value < low:
            raise ConfigError(f"{name}.{key}={value!r} must be a whole number of at least {low}")
