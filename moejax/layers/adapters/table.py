"""What was adapted: a table to look at before training."""

import dataclasses
from collections.abc import Iterable, Mapping
from typing import Any

import flax.linen as nn

from moejax.layers.adapters.base import count
from moejax.layers.adapters.places import Named, Place, record_adapted
from moejax.layers.adapters.trees import shapes_of

COLUMNS = ("adapter", "kind", "layer", "kind of layer", "shape", "added")


@dataclasses.dataclass(frozen=True)
class AdaptedLayer:
    """One adapter around one layer, or around all layers of a scan.

    Attributes:
      adapter, kind: its name, and its class.
      path, layer: the path of what it changes, and the kind of layer that this is.
      shape: of what it changes, as it is stored; () where that is no matrix.
      added: parameters that the adapter adds.
    """

    adapter: str
    kind: str
    path: str
    layer: str
    shape: tuple[int, ...]
    added: int


def adapted_layers(model: nn.Module, *args: Any, **kwargs: Any) -> tuple[AdaptedLayer, ...]:
    """What the adapters of a model sit around, found by tracing `model.init(key, *args, **kwargs)` without computing it."""
    with record_adapted() as found:
        shapes = shapes_of(model, *args, **kwargs)
    return layers_of(found, shapes)


def layers_of(found: Iterable[tuple[Named, Place]], params: Mapping[str, Any]) -> tuple[AdaptedLayer, ...]:
    """The rows for what `record_adapted` found, with the parameters of the adapted model or their shapes."""
    rows = []
    for named, place in found:
        shape = () if place.param is None else _at(params, (*place.module, place.param)).shape
        added = count(_at(params, place.scope(named)))
        rows.append(AdaptedLayer(named.name, type(named.adapter).__name__, place.path, place.kind, tuple(shape), added))
    return tuple(rows)


def cells(layers: Iterable[AdaptedLayer]) -> tuple[tuple[str, ...], ...]:
    """Rows of text for `COLUMNS`, and one with the sum."""
    layers = tuple(layers)
    rows = ((a.adapter, a.kind, a.path, a.layer, " x ".join(map(str, a.shape)), f"{a.added:,}") for a in layers)
    return *rows, ("", "", "all", "", "", f"{sum(a.added for a in layers):,}")


def adapted_table(layers: Iterable[AdaptedLayer]) -> str:
    """What was adapted, as aligned text."""
    lines = [COLUMNS, *cells(layers)]
    widths = [max(len(line[i]) for line in lines) for i in range(len(COLUMNS))]
    aligns = [str.ljust] * (len(COLUMNS) - 1) + [str.rjust]
    return "\n".join("  ".join(f(cell, w) for f, cell, w in zip(aligns, line, widths, strict=True)).rstrip() for line in lines)


def _at(tree: Mapping[str, Any], path: tuple[str, ...]) -> Any:
    for name in path:
        tree = tree.get(name, {})
    return tree
