"""What of a config makes two runs the same run: everything that their numbers depend on, and nothing else.

What numbers do not depend on may change from call to call: how often a run saves and logs, on which devices and by which kernels
it computes, how batches are fetched.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

from ml_collections import ConfigDict

from moejax.core.errors import ConfigError
from moejax.train.settings import PLACE, REQUIRED, EvalSettings, TrainSettings, without_defaults

# What cannot change a number of a finished run, by section. What lies at `data.path` counts by its contents, see `same_run.files`.
COSMETIC = ("checkpoint", "train.log_every", *PLACE, "data.data_dir", "data.path", "data.prefetch", "data.workers")
# The same of any part of a model or an adapter.
HOW = ("backend", "implementation", "remat")
_NOTHING = object()


def essence(config: Mapping[str, Any]) -> dict[str, Any]:
    """A plain config without what its numbers do not depend on; likewise every config inside it (of the runs that it starts from).

    Where `exchange.bound` lets devices refuse rows, mesh and exchange are part of it: who is refused depends on them.
    """
    found = _stripped(config)
    if (config.get("exchange") or {}).get("bound") is not None:
        found |= {name: config[name] for name in PLACE if name in config}
    return found


def is_config(value: Any) -> bool:
    """Whether a value inside a config is the whole config of another run."""
    return isinstance(value, Mapping | ConfigDict) and all(name in value for name in REQUIRED)


def check_equal(before: Mapping[str, Any], now: Mapping[str, Any], place: str, fix: str = "") -> None:
    """Refuses what differs from what a run was begun with.

    Raises:
      ConfigError: naming the first entry that differs.
    """
    saved, given = _flat(before, ""), _flat(now, "")
    for key in sorted(saved.keys() | given.keys()):
        if saved.get(key) != given.get(key):
            raise ConfigError(
                f"{place} holds a run with {key}={saved.get(key)!r}, not {given.get(key)!r}{fix}; "
                "take another workdir, or remove this one to start anew"
            )


def _stripped(value: Any) -> Any:
    if not isinstance(value, Mapping):
        return [_stripped(item) for item in value] if isinstance(value, list | tuple) else value
    if not is_config(value):
        return {name: _stripped(item) for name, item in value.items()}
    found = without_defaults(value)
    for name, settings in (("train", TrainSettings), ("eval", EvalSettings)):
        usual = {field.name: field.default for field in dataclasses.fields(settings)}
        found[name] = {key: item for key, item in (found.get(name) or {}).items() if item != usual.get(key, _NOTHING)}
    for dotted in COSMETIC:
        name, _, key = dotted.partition(".")
        section = found.pop(name, None)
        if key and section is not None:
            found[name] = {k: item for k, item in section.items() if k != key}
    for name in ("model", "adapters"):
        if name in found:
            found[name] = _without(found[name], HOW)
    return {name: _stripped(item) for name, item in found.items() if item or name in REQUIRED}


def _without(tree: Any, names: tuple[str, ...]) -> Any:
    if isinstance(tree, Mapping):
        return {name: _without(item, names) for name, item in tree.items() if name not in names}
    return [_without(item, names) for item in tree] if isinstance(tree, list | tuple) else tree


def _flat(tree: Any, prefix: str) -> dict[str, Any]:
    if not isinstance(tree, Mapping) or not tree:
        return {prefix: tree} if prefix else {}
    return {k: v for key, value in tree.items() for k, v in _flat(value, f"{prefix}.{key}".strip(".")).items()}
