"""The sections of a run's config."""

import dataclasses
import json
from collections.abc import Mapping
from typing import Any, TypeVar

from ml_collections import ConfigDict

from moejax.core.errors import ConfigError, nearest
from moejax.core.fields import Count, Whole, check, checked, fits, short

REQUIRED = ("model", "data", "task", "optimizer", "train")
OPTIONAL = ("adapters", "init", "trainable", "eval", "checkpoint", "mesh", "exchange")
# Where a run computes; a run that another one starts from computes in the same place.
PLACE = ("mesh", "exchange")
# `init` of a run that begins untrained: no section at all says the same.
UNTRAINED = {"source": {"kind": "fresh"}}

Section = TypeVar("Section")


@checked
@dataclasses.dataclass(frozen=True)
class TrainSettings:
    """`config.train`.

    Attributes:
      steps: optimizer updates in all. A run that starts from a trained model may have 0: it is evaluated as it is.
      accumulation: microbatches a batch is split into; must divide the batch size.
      log_every: steps between two lines of metrics. A step that is not logged never waits for the device.
    """

    steps: Whole
    accumulation: Count = 1
    log_every: Count = 20


@checked
@dataclasses.dataclass(frozen=True)
class EvalSettings:
    """`config.eval`.

    Attributes:
      every: steps between two evaluations; 0 evaluates at the end only. The end is always evaluated.
      batches: batches of one evaluation; 0 means the whole split.
      split: name of the data's split.
    """

    every: Whole = 0
    batches: Whole = 0
    split: str = "validation"


@checked
@dataclasses.dataclass(frozen=True)
class CheckpointSettings:
    """`config.checkpoint`.

    Attributes:
      every: steps between two checkpoints; 0 saves at the end (and on a signal) only.
      keep: newest checkpoints that stay. With 1, a damaged one has no elder to fall back to.
      asynchronous: training goes on while a checkpoint is written.
    """

    every: Whole = 0
    keep: Count = 2
    asynchronous: bool = True


def normalized(config: Mapping[str, Any] | ConfigDict) -> ConfigDict:
    """The config as a `ConfigDict`, with its sections checked and without those that say what is so anyway.

    Raises:
      ConfigError: a section is missing or unknown, or nothing would be trained.
    """
    config = config if isinstance(config, ConfigDict) else ConfigDict(dict(config))
    config = ConfigDict(without_defaults(_tree(config)))
    for name in config:
        if name not in REQUIRED + OPTIONAL:
            raise ConfigError(f"unknown section '{name}' in the config{nearest(name, REQUIRED + OPTIONAL)}")
    for name in REQUIRED:
        if name not in config:
            raise ConfigError(f"the config has no section '{name}'; a run needs {', '.join(REQUIRED)}")
    for name in config:
        if config[name] is None and name in REQUIRED:
            raise ConfigError(f"{name}=None must be a mapping of names to values")
        if name != "mesh":
            _mapping(config[name], name)
        elif not fits(config.mesh, str | None):
            raise ConfigError(f"mesh={short(config.mesh)} must be a text such as 'data=2,expert=4'")
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
    given = dict(_mapping(config.get(name), name))
    fields = {field.name: field for field in dataclasses.fields(cls)}
    for key in given:
        if key not in fields:
            raise ConfigError(f"unknown key '{key}' in {name}{nearest(key, fields)}")
    for key, field in fields.items():
        if field.default is dataclasses.MISSING and key not in given:
            raise ConfigError(f"{name} needs '{key}'")
    check(cls, given, name)
    return cls(**given)


def plain(config: Mapping[str, Any] | ConfigDict) -> dict[str, Any]:
    """The config as nested dicts and lists, exactly as it reads back from JSON.

    Raises:
      ConfigError: it holds something that JSON has no word for.
    """
    tree = _tree(config)
    try:
        return json.loads(json.dumps(tree, sort_keys=True))
    except TypeError as error:
        raise ConfigError(f"the config must be made of mappings, lists, strings and numbers: {error}") from None


def _tree(config: Mapping[str, Any] | ConfigDict) -> dict[str, Any]:
    """The config as a dict; a ConfigDict is one all the way down."""
    try:
        return config.to_dict() if isinstance(config, ConfigDict) else dict(config)
    except TypeError:  # it sorts its names
        raise ConfigError("every name in a config must be a text; a mapping in this one has another key too") from None


def _named(entries: Any, where: str) -> dict[Any, Any]:
    """The entries of a mapping by name, without those that None leaves out."""
    return {name: entry for name, entry in _mapping(entries, where).items() if entry is not None}


def _mapping(section: Any, where: str) -> Any:
    """A section, or a part of one; an empty one where it is None."""
    if section is None:
        return {}
    if not isinstance(section, Mapping | ConfigDict):
        raise ConfigError(f"{where}={short(section)} must be a mapping of names to values")
    return section
