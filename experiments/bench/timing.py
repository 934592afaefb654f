"""Timing of compiled functions against each other."""

import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import jax

from moejax.train.flops import matmul_flops

Contestants: TypeAlias = Mapping[str, tuple[Callable[..., Any], tuple[Any, ...]]]


@dataclass(frozen=True)
class Timing:
    """Seconds of one contestant.

    Attributes:
      median: of the repeats.
      low, high: quartiles.
      compile_seconds: tracing and compiling, once.
      temp_bytes: temporary memory of the compiled program.
      flops: of the program's matrix products; 0 for a peer that is not a JAX program.
      bytes: of arguments and results.
    """

    median: float
    low: float
    high: float
    compile_seconds: float
    temp_bytes: int
    flops: float = 0.0
    bytes: int = 0


@dataclass(frozen=True)
class Foreign:
    """A contestant that is called as it is, such as a torch module or a program that is compiled already.

    `facts`: what is known of it, fields of `Timing`.
    """

    call: Callable[[], Any]
    facts: Mapping[str, Any] = field(default_factory=dict)


def race(
    contestants: Mapping[str, tuple[Callable[..., Any], tuple[Any, ...]] | Foreign], repeats: int = 9
) -> dict[str, Timing]:
    """Times `name -> (function, arguments)`: every repeat runs each contestant once, so that all meet the same machine."""
    calls, facts = {}, {}
    for name, contestant in contestants.items():
        if isinstance(contestant, Foreign):
            calls[name], facts[name] = contestant.call, {"compile_seconds": 0.0, "temp_bytes": 0, **contestant.facts}
        else:
            calls[name], facts[name] = _compile(*contestant)
        for _ in range(2):
            calls[name]()
    seconds: dict[str, list[float]] = {name: [] for name in contestants}
    for _ in range(repeats):
        for name, call in calls.items():
            start = time.perf_counter()
            call()
            seconds[name].append(time.perf_counter() - start)
    timings = {}
    for name, values in seconds.items():
        low, median, high = statistics.quantiles(values, n=4)
        timings[name] = Timing(median, low, high, **facts[name])
    return timings


def backward(contestants: Contestants, argnums: tuple[int, ...] = (0, 1)) -> Contestants:
    """Each contestant's gradient of the sum of its squared outputs."""

    def gradient(function: Callable[..., Any]) -> Callable[..., Any]:
        def loss(*args: Any) -> jax.Array:
            return sum(jax.numpy.square(y).sum() for y in jax.tree.leaves(function(*args)))

        return jax.grad(loss, argnums=argnums)

    return {name: (gradient(function), args) for name, (function, args) in contestants.items()}


def _compile(function: Callable[..., Any], args: tuple[Any, ...]) -> tuple[Callable[[], Any], dict[str, Any]]:
    start = time.perf_counter()
    traced = jax.jit(function).trace(*args)
    compiled = traced.lower().compile()
    seconds = time.perf_counter() - start
    memory = compiled.memory_analysis()
    facts = {
        "compile_seconds": seconds,
        "temp_bytes": int(getattr(memory, "temp_size_in_bytes", 0)),
        "flops": matmul_flops(traced.jaxpr),
        "bytes": int(getattr(memory, "argument_size_in_bytes", 0) + getattr(memory, "output_size_in_bytes", 0)),
    }
    return lambda: jax.block_until_ready(compiled(*args)), facts
