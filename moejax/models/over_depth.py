"""Fields that differ from layer to layer: a schedule over depth in the place of a value, anywhere in a block's spec.

    select = {"kind": "top_k", "k": {"over_depth": (4, 2, 2, 1)}}                            # one value for each layer of the network
    num_experts = {"over_depth": "linear", "first": 8, "last": 32}                           # rounded where both ends are whole
    scale = {"over_depth": "power", "first": 1.0, "exponent": -0.5}                          # first * (layer + 1) ** exponent

Such a block is built once for each layer, so anything may differ: k, the number of experts, a rank, a kind. Layers are then no longer
alike and cannot be scanned: the stack runs them one after another, and compile time grows with depth. What a rule only reads, such
as a k below a common maximum, can look at `ctx.layer` instead and stays scanned.
"""

from collections.abc import Mapping
from typing import Any

from moejax.core.errors import ConfigError, nearest

KEY = "over_depth"


def varies(spec: Any) -> bool:
    """Whether a spec holds a schedule anywhere."""
    if isinstance(spec, Mapping) or hasattr(spec, "items"):
        return KEY in spec or any(varies(value) for _, value in spec.items())
    return isinstance(spec, tuple | list) and any(map(varies, spec))


def at_layer(spec: Any, layer: int, num_layers: int, where: str) -> Any:
    """The spec with each schedule's value at `layer` (from 0).

    Raises:
      ConfigError: an unknown schedule, a key that it lacks or does not know, or not one value for each layer.
    """
    if isinstance(spec, tuple | list):
        return type(spec)(at_layer(value, layer, num_layers, f"{where}[{i}]") for i, value in enumerate(spec))
    if not (isinstance(spec, Mapping) or hasattr(spec, "items")):
        return spec
    if KEY not in spec:
        return {key: at_layer(value, layer, num_layers, f"{where}.{key}") for key, value in spec.items()}
    return _value(dict(spec.items()), layer, num_layers, where)


def _value(schedule: dict[str, Any], layer: int, num_layers: int, where: str) -> Any:
    kind = schedule.pop(KEY)
    if isinstance(kind, tuple | list):
        if len(kind) != num_layers:
            raise ConfigError(
                f"{where}.{KEY} has {len(kind)} values, and the network num_layers={num_layers}; give one for each layer"
            )
        return at_layer(kind[layer], layer, num_layers, where)
    if kind not in _SCHEDULES:
        raise ConfigError(
            f"unknown schedule '{kind}' in {where}.{KEY}{nearest(str(kind), _SCHEDULES)}; or give one value for each layer"
        )
    function, keys = _SCHEDULES[kind]
    if set(schedule) != keys:
        raise ConfigError(
            f"{where} ('{kind}' over depth) needs {', '.join(sorted(keys))}, not {', '.join(sorted(schedule)) or 'nothing'}"
        )
    return function(layer, num_layers, **schedule)


def _linear(layer: int, num_layers: int, first: float | int, last: float | int) -> float | int:
    value = first + (last - first) * layer / max(num_layers - 1, 1)
    return round(value) if isinstance(first, int) and isinstance(last, int) else value


def _power(layer: int, num_layers: int, first: float | int, exponent: float | int) -> float:
    return first * (layer + 1) ** exponent


_SCHEDULES = {"linear": (_linear, {"first", "last"}), "power": (_power, {"first", "exponent"})}
