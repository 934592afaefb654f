"""Dotted overrides of a config: applied from studies, parsed from the command line, and refused with the nearest name.

A key must exist in the config, so that a typing error cannot start a training. There are three exceptions. What data may be told
(`data.data_dir`) need not be said in a config. The fields of a model's
blocks are optional (`model.blocks.moe.ffn.router.jitter`): there the last part of a key may be new, and building the model checks
it against the fields of the class. What a run starts from, its adapters and what learns are named freely
(`init.source.path`, `adapters.main.rank`, `trainable.norms.rate`): there every part but the section may be new, and is checked when the sections are read.
"""

import ast
import contextlib
from collections.abc import Mapping
from dataclasses import fields
from typing import Any

from ml_collections import ConfigDict

from moejax.core.errors import ConfigError, nearest
from moejax.train.identity import is_config

FREE = ("model", "blocks")
OPEN = ("init", "adapters", "trainable")
# What a run starts from, its adapters and what learns: every config has these. From nothing, none, and everything.
BEGIN = {"init": {"source": {"kind": "fresh"}, "others": {}, "surgeries": {}, "order": ()}, "adapters": {}, "trainable": {}}
# Where a run computes: every config has these, named or not, and they do not change what it is. No mesh is one device.
PLACE = {"mesh": "", "exchange": {"kind": "auto", "chunks": 1, "bound": None, "hosts": None}}


def apply(config: ConfigDict, overrides: Mapping[str, Any], where: str) -> None:
    """Sets each dotted key of `overrides` in `config`, in order; a mapping as value replaces the whole sub-dict.

    Args:
      where: who asks, for errors (`arm 'switch'`).

    Raises:
      ConfigError: a key that the config lacks, or a value of another type than the config's.
    """
    for key, value in overrides.items():
        parent, name = _locate(config, key, where)
        path, is_open = tuple(key.split(".")), _is_open(config, key)
        adds_block = path[:-1] == FREE and name not in parent
        if adds_block and not isinstance(value, Mapping | ConfigDict):
            raise ConfigError(
                f"{key}={value!r} in {where} adds a block, which must be a mapping such as {{'kind': 'transformer'}}"
            )
        if isinstance(value, Mapping):
            value = ConfigDict(dict(value))
        try:
            with config.unlocked(), config.ignore_type() if is_open else contextlib.nullcontext():
                parent[name] = value
        except (TypeError, ValueError):
            old = parent[name]
            raise ConfigError(
                f"{key}={value!r} in {where} is {_a(type(value))}, but the config holds {_a(type(old))}: {_short(old)}"
            ) from None


def shortened(config: ConfigDict, overrides: Mapping[str, Any]) -> Mapping[str, Any]:
    """The command line's overrides; where they leave fewer steps than the warm-up has, with a warm-up that is as much shorter."""
    steps, before = overrides.get("train.steps"), config.train.steps
    warmup = config.get("optimizer", {}).get("warmup_steps", 0)
    if not isinstance(steps, int) or "optimizer.warmup_steps" in overrides or not 0 < steps < min(before, warmup):
        return overrides
    return {**overrides, "optimizer.warmup_steps": warmup * steps // before}


def parse(config: ConfigDict, key: str, text: str, where: str) -> Any:
    """The value that `text` gives to dotted `key`, in the type that the config holds there.

    Numbers, `true`/`false`, strings; `None` unsets what is no string; tuples as `a,b` or `('a', 'b')`; a sub-dict as a Python literal. In `OPEN` sections a single
    value may have another type than before (a seed is a number or 'own').

    Raises:
      ConfigError: the key is unknown or the text is not of its type.
    """
    parent, name = _locate(config, key, where, make=False)
    old = parent.get(name)
    if _is_open(config, key) and not isinstance(old, ConfigDict | tuple | list | float):
        old = None
    try:
        return _convert(text, old)
    except (ValueError, SyntaxError):
        raise ConfigError(f"{key}='{text}' in {where} is not {_a(type(old))}; the config holds {_short(old)}") from None


def copy(config: ConfigDict) -> ConfigDict:
    """The config with every sub-dict its own (one that stands in two places would change in both), and with `BEGIN` and `PLACE`."""

    def plain(node: Mapping[str, Any] | ConfigDict) -> dict[str, Any]:
        return {name: plain(value) if isinstance(value, Mapping | ConfigDict) else value for name, value in node.items()}

    made = plain({**BEGIN, **PLACE, **config})
    for name, default in (("init", BEGIN["init"]), ("exchange", PLACE["exchange"])):
        made[name] = {**plain(default), **(made[name] or {})}
    return ConfigDict(made)


def flatten(config: ConfigDict | Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Dotted key -> value of every leaf; the config of a run that this one starts from is one leaf, in words."""
    flat: dict[str, Any] = {}
    for name, value in config.items():
        if is_config(value):
            flat[f"{prefix}{name}"] = f"a run of {value['train']['steps']} steps"
        elif isinstance(value, ConfigDict | Mapping) and len(value):
            flat |= flatten(value, f"{prefix}{name}.")
        else:
            flat[f"{prefix}{name}"] = {} if isinstance(value, ConfigDict) else value
    return flat


def _is_open(config: ConfigDict, key: str) -> bool:
    """Whether the key lies in a section whose names are free."""
    section, *rest = key.split(".")
    return section in OPEN and section in config and bool(rest)


def _locate(config: ConfigDict, key: str, where: str, make: bool = True) -> tuple[ConfigDict, str]:
    """The sub-dict that holds dotted `key`, and the key's last part. What an open section lacks on the way is made."""
    *path, name = key.split(".")
    node, seen, is_open = config, [], _is_open(config, key)
    for part in [*path, None]:
        if not isinstance(node, ConfigDict):
            raise ConfigError(f"'{key}' in {where} goes below '{'.'.join(seen)}', which is {_short(node)} and has no keys")
        if part is None:
            break
        if is_open and node.get(part) is None:
            missing = ConfigDict()
            if make:
                with node.unlocked(), node.ignore_type():
                    node[part] = missing
            node = missing if not make else node[part]
            seen.append(part)
            continue
        if part not in node:
            raise ConfigError(f"unknown key '{part}' in {_place(seen)} ('{key}' in {where}){nearest(part, node.keys())}")
        node = node[part]
        seen.append(part)
    known = {*node.keys(), *(_data_keys() if path == ["data"] else ())}
    if name not in known and tuple(path[: len(FREE)]) != FREE and not is_open:
        raise ConfigError(f"unknown key '{name}' in {_place(seen)} ('{key}' in {where}){nearest(name, known)}")
    return node, name


def _data_keys() -> set[str]:
    """What `config.data` may say, of any kind of data; a key that is not for these is refused when the section is read."""
    from moejax.data.config import ImageConfig, TextConfig  # only who overrides something waits for it

    return {field.name for cls in (TextConfig, ImageConfig) for field in fields(cls)}


def _convert(text: str, old: Any) -> Any:
    if text == "None" and not isinstance(old, str):
        return None
    match old:
        case bool():
            return _bool(text)
        case int():
            return int(text)
        case float():
            return float(text)
        case str():
            return text
        case tuple() | list():
            return _sequence(text, old)
        case ConfigDict():
            value = ast.literal_eval(text)
            if not isinstance(value, dict):
                raise ValueError(text)
            return value
    try:
        return _bool(text)
    except ValueError:
        pass
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return None if text.lower() == "none" else text


def _bool(text: str) -> bool:
    words = {"true": True, "false": False}
    if text.lower() not in words:
        raise ValueError(text)
    return words[text.lower()]


def _sequence(text: str, old: tuple[Any, ...] | list[Any]) -> tuple[Any, ...] | list[Any]:
    """`(1, 2)` or `1,2`; the items take the type of the first item there was."""
    if text.strip()[:1] in ("(", "["):
        items = list(ast.literal_eval(text))
    else:
        items = [_convert(item.strip(), old[0] if len(old) else None) for item in text.split(",") if item.strip()]
    if len(old) and not all(isinstance(item, type(old[0])) for item in items):
        raise ValueError(text)
    return type(old)(items)


def _place(parts: list[str]) -> str:
    return ".".join(["config", *parts])


def _a(kind: type) -> str:
    names = {ConfigDict: "a mapping", type(None): "None", int: "an int", bool: "true or false"}
    return names.get(kind, f"a {kind.__name__}")


def _short(value: Any) -> str:
    text = repr(dict(value)) if isinstance(value, ConfigDict) else repr(value)
    return " ".join(text.split()) if len(text) <= 60 else " ".join(text[:57].split()) + "..."
