"""What a network is made of: its named blocks, and everything inside them."""

import dataclasses
from collections.abc import Iterator
from typing import Any

import flax.linen as nn


@dataclasses.dataclass(frozen=True)
class NamedBlock:
    """A block of a config: its name, its place, and the module of which every layer makes its own copy.

    Flax does not look into it, so the module gets parameters only through its copies.

    Attributes:
      layers: where the block's fields vary over depth, the module of each layer of the network; empty where all are alike.
    """

    name: str
    where: str
    module: nn.Module
    layers: tuple[nn.Module, ...] = ()

    def at(self, layer: int) -> "NamedBlock":
        """The block as it is in one layer."""
        return NamedBlock(self.name, self.where, self.layers[layer]) if self.layers else self


@dataclasses.dataclass(frozen=True)
class Part:
    """A module or rule inside a block: its place in the config, its path in the block's parameters, and who holds it."""

    where: str
    path: tuple[str, ...]
    value: Any
    owner: Any


def walk(block: NamedBlock) -> Iterator[Part]:
    """The block's module and everything it is made of, outermost first."""
    yield from _walk(Part(block.where, (), block.module, None))


def _walk(part: Part) -> Iterator[Part]:
    yield part
    for field in dataclasses.fields(part.value):
        # Flax's own fields; `parent` would lead back up.
        if field.name in ("parent", "name") or not field.init:
            continue
        value = getattr(part.value, field.name)
        children = value if isinstance(value, tuple) else (value,)
        for i, child in enumerate(children):
            if not dataclasses.is_dataclass(child) or isinstance(child, type):
                continue
            at, key = (f"[{i}]", f"_{i}") if isinstance(value, tuple) else ("", "")
            where, path = f"{part.where}.{field.name}{at}", (*part.path, f"{field.name}{key}")
            yield from _walk(Part(where, path, child, part.value))
