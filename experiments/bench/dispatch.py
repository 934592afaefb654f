"""What a routed layer costs, backend by backend, against the dense layer of equal active FLOPs; `decode` and `scaling` are its
shapes for few tokens and for many experts.

Routing is included: the contestants go from tokens to outputs through a linear router and a top-k rule.
"""

import dataclasses
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array

from experiments.bench import peers
from experiments.bench.table import BACKWARD, FORWARD, Bar, Outcome
from experiments.bench.timing import Foreign, backward, race
from moejax.dispatch import choose, dispatch
from moejax.dispatch.layout import Batched
from moejax.experts import FFN, GLU
from moejax.routing import TopK


@dataclass(frozen=True)
class Shape:
    """One size of a layer: n tokens of width d, e experts of hidden width f, k per token.

    Attributes:
      skewed: one expert gets half of the rows, most of the others none.
      capacity_factor: of the plan that all of `backends` execute; None for a dropless one.
      backends: the contestants among which 'auto' chooses.
      capped: backends that are timed besides on a plan of capacity factor 1.25, which drops tokens: what a user could do instead.
      bars: what should hold.
      read: measure against reading the touched experts' weights once, rather than against the dense layer.
    """

    name: str
    n: int = 4096
    d: int = 256
    f: int = 1024
    e: int = 32
    k: int = 2
    glu: bool = False
    skewed: bool = False
    capacity_factor: float | None = None
    backends: tuple[str, ...] = ("grouped",)
    capped: tuple[str, ...] = ()
    bars: tuple[Bar, ...] = ()
    read: bool = False

    @property
    def flops(self) -> int:
        """Active FLOPs of one forward pass, two a multiply-add; the router's left out."""
        return 2 * self.n * self.k * self.d * self.f * (3 if self.glu else 2)

    @property
    def title(self) -> str:
        return f"n={self.n} d={self.d} f={self.f} e={self.e} k={self.k}, {self.flops / 1e9:.2f} active GFLOP forward"


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


class Layer:
    """Parameters, tokens and contestants of one shape."""

    def __init__(self, shape: Shape) -> None:
        self.shape = shape
        key = jax.random.split(jax.random.key(0), 4)
        self.bank = (GLU if shape.glu else FFN)(hidden=shape.f, num_experts=shape.e)
        self.single = self.bank.clone(num_experts=1)
        self.x = jax.random.normal(key[0], (1, shape.n, shape.d))
        self.rows = jax.random.normal(key[1], (1, shape.n * shape.k, shape.d))
        self.params = jax.jit(lambda k: self.bank.init(k, shape.d))(key[2])
        self.dense_params = jax.jit(lambda k: self.single.init(k, shape.d))(key[2])
        self.w = jax.random.normal(key[3], (shape.d, shape.e)) / shape.d**0.5
        # Skewed: the first choice of nearly every token is expert 0, the second one of a few others.
        crowd = jnp.full(shape.e, -20.0).at[:4].set(0.0).at[0].set(20.0)
        self.bias = crowd if shape.skewed else jnp.zeros(shape.e)

    def dense(self) -> tuple[Callable[..., Array], tuple[Any, ...]]:
        """The layer of equal active FLOPs: one expert on as many rows."""
        return lambda params, x: self.single.apply(params, self.shape.d).run(x, Batched()), (self.dense_params, self.rows)

    def routed(self, backend: str, capacity_factor: float | None = None) -> tuple[Callable[..., Array], tuple[Any, ...]]:
        select = TopK(k=self.shape.k, capacity_factor=capacity_factor)

        def layer(params: Any, x: Array) -> Array:
            plan = select(x @ self.w + self.bias)
            return dispatch(plan, self.bank.apply(params, self.shape.d), x, backend)

        return layer, (self.params, self.x)

    def read(self) -> tuple[Callable[..., Array], tuple[Any, ...]]:
        """Summing the weights of the experts that the tokens touch: they come from memory once, and nothing else happens."""
        expert = TopK(k=self.shape.k)(self.x @ self.w + self.bias).expert
        touched = jnp.unique(expert)

        def read(params: Any, touched: Array) -> list[Array]:
            leaves = jax.tree.leaves(params)

            def step(i: Array, totals: list[Array]) -> list[Array]:
                mine = (jax.lax.dynamic_index_in_dim(w, touched[i], keepdims=False) for w in leaves)
                return [total + w.sum(0) for total, w in zip(totals, mine, strict=True)]

            return jax.lax.fori_loop(0, touched.shape[0], step, [jnp.zeros(w.shape[-1]) for w in leaves])

        return read, (self.params, touched)


__all__ = ["DECODE", "DISPATCH", "SCALING", "Layer", "Shape", "chosen", "run", "shapes"]
