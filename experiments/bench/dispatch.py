"""What a routed layer costs, backend by backend, against the dense layer of equal active FLOPs; `decode` and `scaling` are its
shapes for few tokens and for many experts.

Routing is included: the contestants go from tokens to outputs through a linear router and a top-k rule.
"""

import dataclasses
from collections.abc import Iterator
from typing import Any

import jax.numpy as jnp

from experiments.bench import peers
from experiments.bench.layer import Layer, Shape
from experiments.bench.table import BACKWARD, FORWARD, Bar, Outcome
from experiments.bench.timing import Foreign, backward, race
from moejax.dispatch import choose
from moejax.routing import TopK

LAYER = (Bar(FORWARD, "grouped", 1.10), Bar(BACKWARD, "grouped", 1.45))
SKEW = (Bar(FORWARD, "grouped", 1.15), Bar(BACKWARD, "grouped", 1.15))
READ = (Bar(FORWARD, "grouped", 1.30),)
SLOTS = ("grouped", "capacity", "einsum")
DEMO = dict(n=2048, d=64, f=128, e=8, k=1, glu=True)
DISPATCH = (
    Shape("reference", capped=("capacity", "einsum"), bars=LAYER),
    Shape("glu", glu=True, capped=("capacity",), bars=LAYER),
    Shape("skewed", skewed=True, bars=SKEW),
    Shape("wide", n=512, d=512, f=2048, e=8, capped=("capacity",)),
    Shape("demo", **DEMO, capped=("capacity", "einsum")),
    Shape("reference capped", capacity_factor=1.25, backends=SLOTS),
    Shape("demo capped", capacity_factor=1.25, backends=SLOTS, **DEMO),
    Shape("few capped", n=64, capacity_factor=1.25, backends=SLOTS),
)
DECODE = tuple(
    Shape(f"n{n}", n=n, backends=("grouped", "gather") if n <= 8 else ("grouped",), bars=READ, read=True) for n in (1, 8, 64)
) + tuple(Shape(f"fine n{n}", n=n, d=64, f=32, e=256, k=4, backends=("grouped", "gather"), read=True) for n in (1, 8, 64))
SCALING = tuple(Shape(f"e{e}", e=e) for e in (8, 32, 128, 512))


def shapes(bench: str) -> dict[str, Shape]:
    return {s.name: s for s in {"dispatch": DISPATCH, "decode": DECODE, "scaling": SCALING}[bench]}


def run(bench: str, names: list[str], repeats: int, against: tuple[str, ...] = ()) -> Iterator[Outcome]:
    """The outcome of each named shape, one after the other."""
    for name in names:
        yield _run(shapes(bench)[name], repeats, against)


def _run(shape: Shape, repeats: int, against: tuple[str, ...]) -> Outcome:
    layer = Layer(shape)
    contestants: dict[str, Any] = {"dense": layer.dense()}
    if shape.read:
        contestants = {"read once": layer.read(), **contestants}
    if shape.skewed:
        contestants = {"balanced": Layer(dataclasses.replace(shape, skewed=False)).routed("grouped"), **contestants}
    limit = next(iter(contestants))
    contestants |= {name: layer.routed(name, shape.capacity_factor) for name in shape.backends}
    contestants |= {f"{name} at 1.25": layer.routed(name, 1.25) for name in shape.capped}
    contestants |= {name: getattr(peers, name)(layer) for name in against}
    timings = {FORWARD: race(contestants, repeats)}
    if not shape.read:
        jax_programs = {name: c for name, c in contestants.items() if not isinstance(c, Foreign)}
        timings[BACKWARD] = race(backward(jax_programs), repeats)
    choices = shape.backends if len(shape.backends) > 1 else ()
    return Outcome(shape.name, shape.title, limit, timings, chosen(shape), choices, shape.bars, notes(shape))


def chosen(shape: Shape) -> str:
    """The backend that `auto` takes for this shape."""
    return choose(TopK(k=shape.k, capacity_factor=shape.capacity_factor)(jnp.zeros((1, shape.n, shape.e))), shape.d)


def notes(shape: Shape) -> tuple[str, ...]:
    """What no layout of the work avoids: weights are read once in each direction, and their gradients written."""
    weights = shape.e * shape.d * shape.f * (3 if shape.glu else 2) * 4
    return (
        f"unavoidable: {weights / 1e6:.0f} MB of experts to read forward; backward, as much again to read and as much of gradients to write",
    )
