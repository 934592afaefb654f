"""Timing of compiled functions against each other."""

import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import jax


@dataclass(frozen=True)
class Timing:
    """Seconds of one contestant.

    Attributes:
      median: of the repeats.
      low, high: quartiles.
      compile_seconds: tracing and compiling, once.
      temp_bytes: temporary memory of the compiled program.
    """

    median: float
    low: float
    high: float
    compile_seconds: float
    temp_bytes: int


def race(contestants: Mapping[str, tuple[Callable[..., Any], tuple[Any, ...]]], repeats: int = 9) -> dict[str, Timing]:
    """Times `name -> (function, arguments)`: every repeat runs each contestant once, so that all meet the same machine."""
    compiled, compile_seconds = {}, {}
    for name, (function, args) in contestants.items():
        start = time.perf_counter()
        compiled[name] = jax.jit(function).lower(*args).compile()
        compile_seconds[name] = time.perf_counter() - start
        for _ in range(2):
            jax.block_until_ready(compiled[name](*args))
    seconds: dict[str, list[float]] = {name: [] for name in contestants}
    for _ in range(repeats):
        for name, (_, args) in contestants.items():
            start = time.perf_counter()
            jax.block_until_ready(compiled[name](*args))
            seconds[name].append(time.perf_counter() - start)
    timings = {}
    for name, values in seconds.items():
        low, median, high = statistics.quantiles(values, n=4)
        memory = compiled[name].memory_analysis()
        timings[name] = Timing(median, low, high, compile_seconds[name], int(getattr(memory, "temp_size_in_bytes", 0)))
    return timings
