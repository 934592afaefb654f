"""Every registered kind of the library, and which of them a model is made of."""

import dataclasses
import functools
import importlib
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import flax.linen as nn

import moejax
from moejax.core.registry import Registry
from moejax.models.parts import NamedBlock
from moejax.models.stack import pattern_blocks

_REGISTRY = re.compile(r"^([a-z]\w*)(?:: Registry)? = Registry\(", re.MULTILINE)


class Kind(NamedTuple):
    """A registered class: its registry's slot ('router'), its name there ('linear'), itself."""

    slot: str
    name: str
    cls: type

    def __str__(self) -> str:
        return f"{self.slot}.{self.name}"


@functools.cache
def registries() -> dict[str, Registry]:
    """Slot -> registry, for every registry of the library: found by reading its files."""
    root = Path(moejax.__file__).parent
    found = {}
    for file in sorted(root.rglob("*.py")):
        module = ".".join((moejax.__name__, *file.relative_to(root).with_suffix("").parts)).removesuffix(".__init__")
        for name in _REGISTRY.findall(file.read_text(encoding="utf-8")):
            registry = getattr(importlib.import_module(module), name)
            found[registry.slot] = registry
    return found


def kinds() -> list[Kind]:
    """Every kind that is registered by the library itself; a user's, or a test's, is none of its business."""
    every = (Kind(slot, name, cls) for slot, registry in registries().items() for name, cls in registry.items())
    return [kind for kind in every if kind.cls.__module__.split(".")[0] == moejax.__name__]


def made_of(thing: Any) -> frozenset[type]:
    """The classes of an object and of everything that its fields hold; of a model, of the blocks that its pattern names."""
    return frozenset(type(part) for part in inside(thing))


def inside(thing: Any) -> Iterator[Any]:
    """The object and everything that its fields hold, outermost first."""
    if isinstance(thing, Mapping):
        thing = tuple(thing.values())
    if isinstance(thing, tuple | list):
        for part in thing:
            yield from inside(part)
    elif dataclasses.is_dataclass(thing) and not isinstance(thing, type):
        yield thing
        for field in dataclasses.fields(thing):
            # Flax's own fields; `parent` would lead back up.
            if not field.init or (isinstance(thing, nn.Module) and field.name in ("parent", "name")):
                continue
            is_table = field.name == "blocks" and hasattr(thing, "pattern") and not isinstance(thing, NamedBlock)
            yield from inside(pattern_blocks(thing) if is_table else getattr(thing, field.name))
