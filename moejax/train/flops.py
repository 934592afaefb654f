"""Arithmetic of a program, counted from its jaxpr.

XLA's own cost analysis counts the body of a loop once, so a model that scans over its layers would look cheaper than the same
model unrolled. Here a scan counts as often as it runs.
"""

import math
from collections.abc import Callable, Iterator
from typing import Any

from jax.extend.core import ClosedJaxpr, Jaxpr


def matmul_flops(jaxpr: Jaxpr | ClosedJaxpr) -> float:
    """Floating point operations (2 per multiply-add) of all matrix products and convolutions of a program.

    A `cond` counts as its most expensive branch, a loop whose length depends on data as one turn, and a program under
    `shard_map` as often as there are devices. Elementwise work is left out: it is a few per cent of a network, and its count
    says nothing about time.
    """
    jaxpr = jaxpr.jaxpr if isinstance(jaxpr, ClosedJaxpr) else jaxpr
    return float(sum(_COUNTS.get(eqn.primitive.name, _nested)(eqn) for eqn in jaxpr.eqns))


def _dot(eqn: Any) -> float:
    (contracted, _), _ = eqn.params["dimension_numbers"]
    lhs = eqn.invars[0].aval.shape
    return 2.0 * math.prod(eqn.outvars[0].aval.shape) * math.prod(lhs[i] for i in contracted)


def _ragged_dot(eqn: Any) -> float:
    """Rows times one expert's matrix, whichever expert: groups cost nothing extra."""
    numbers = eqn.params["ragged_dot_dimension_numbers"]
    (contracted, _), _ = numbers.dot_dimension_numbers
    lhs, out = eqn.invars[0].aval.shape, eqn.outvars[0].aval.shape
    # Gradient of the weights: rows are contracted group by group, and the output's leading group axis is no extra work.
    groups = 1 if numbers.rhs_group_dimensions else out[0]
    return 2.0 * math.prod(out) / groups * math.prod(lhs[i] for i in contracted)


def _convolution(eqn: Any) -> float:
    spec = eqn.params["dimension_numbers"].rhs_spec
    kernel = eqn.invars[1].aval.shape
    per_output = math.prod(kernel) / kernel[spec[0]]
    return 2.0 * math.prod(eqn.outvars[0].aval.shape) * per_output


def _scan(eqn: Any) -> float:
    return eqn.params["length"] * matmul_flops(eqn.params["jaxpr"])


def _cond(eqn: Any) -> float:
    return max(matmul_flops(branch) for branch in eqn.params["branches"])


def _shard_map(eqn: Any) -> float:
    return eqn.params["mesh"].size * matmul_flops(eqn.params["jaxpr"])


def _call(eqn: Any) -> float:
    """A jitted call; the loops of `pallas_kernels.grouped_map` turn as often as there are rows, and their name says how many."""
    name = eqn.params.get("name", "")
    if not name.startswith("grouped_rows_"):
        return _nested(eqn)
    rows, tile = (int(number) for number in name.split("_")[2:])
    body = next(_innermost_loops(eqn.params["jaxpr"]), None)
    return 0.0 if body is None else matmul_flops(body) * rows / tile


def _innermost_loops(jaxpr: Jaxpr | ClosedJaxpr) -> Iterator[Jaxpr | ClosedJaxpr]:
    """Bodies of the loops without a loop inside, in program order; the first of a grouped map's takes its largest tile."""
    jaxpr = jaxpr.jaxpr if isinstance(jaxpr, ClosedJaxpr) else jaxpr
    for eqn in jaxpr.eqns:
        if eqn.primitive.name == "while":
            body = eqn.params["body_jaxpr"]
            inner = list(_innermost_loops(body))
            yield from inner or [body]
        else:
            for value in eqn.params.values():
                for nested in _jaxprs(value):
                    yield from _innermost_loops(nested)


def _kernel(eqn: Any) -> float:
    if estimate := eqn.params.get("cost_estimate"):
        return float(estimate.flops)
    grid = eqn.params["grid_mapping"].grid
    return math.prod(grid) * matmul_flops(eqn.params["jaxpr"])


def _nested(eqn: Any) -> float:
    return float(sum(matmul_flops(jaxpr) for value in eqn.params.values() for jaxpr in _jaxprs(value)))


def _jaxprs(value: Any) -> Iterator[Jaxpr | ClosedJaxpr]:
    if isinstance(value, (Jaxpr, ClosedJaxpr)):
        yield value
    elif isinstance(value, (tuple, list)):
        for item in value:
            yield from _jaxprs(item)


_COUNTS: dict[str, Callable[[Any], float]] = {
    "dot_general": _dot,
    "ragged_dot_general": _ragged_dot,
    "conv_general_dilated": _convolution,
    "scan": _scan,
    "cond": _cond,
    "shard_map": _shard_map,
    "pallas_call": _kernel,
    "jit": _call,
    "pjit": _call,
}
