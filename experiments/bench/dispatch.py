"""What a routed layer costs, backend by backend, against the dense layer of equal active FLOPs.

Routing is included: the contestants go from tokens to outputs through a linear router and a top-k rule.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array

from experiments.bench.timing import Timing, race
from moejax.dispatch import choose, dispatch
from moejax.dispatch.layout import Batched
from moejax.experts import FFN, GLU
from moejax.routing import TopK

BACKENDS = ("grouped", "capacity", "einsum")


@dataclass(frozen=True)
class Shape:
    """One size of a layer: n tokens of width d, e experts of hidden width f, k per token."""

    name: str
    n: int = 4096
    d: int = 256
    f: int = 1024
    e: int = 32
    k: int = 2
    glu: bool = False
    skewed: bool = False

    @property
    def flops(self) -> int:
        """Active FLOPs of one forward pass, two a multiply-add; the router's left out."""
        return 2 * self.n * self.k * self.d * self.f * (3 if self.glu else 2)


SHAPES = {
    s.name: s
    for s in (
        Shape("reference"),
        Shape("glu", glu=True),
        Shape("skewed", skewed=True),
        Shape("e8", e=8),
        Shape("e128", e=128),
        Shape("decode8", n=8),
        Shape("demo", n=2048, d=64, f=128, e=8, k=1, glu=True),
    )
}


def run(shape: Shape, repeats: int, against: tuple[str, ...] = ()) -> dict[str, dict[str, Timing]]:
    """Timings of forward and of forward plus backward: pass -> contestant -> timing."""
    key = jax.random.split(jax.random.key(0), 4)
    bank = (GLU if shape.glu else FFN)(hidden=shape.f, num_experts=shape.e)
    single = bank.clone(num_experts=1)
    x = jax.random.normal(key[0], (1, shape.n, shape.d))
    rows = jax.random.normal(key[1], (1, shape.n * shape.k, shape.d))
    params = jax.jit(lambda k: bank.init(k, jnp.zeros((shape.e, 1, shape.d)), Batched()))(key[2])
    dense_params = jax.jit(lambda k: single.init(k, rows[:, :1], Batched()))(key[2])
    w = jax.random.normal(key[3], (shape.d, shape.e)) / shape.d**0.5
    bias = jnp.zeros(shape.e).at[0].set(6.0 if shape.skewed else 0.0)

    def dense(params: Any, x: Array) -> Array:
        return single.apply(params, x, Batched())

    def routed(backend: str) -> Callable[[Any, Array], Array]:
        select = TopK(k=shape.k, capacity_factor=None if backend in ("grouped", "gather", "ragged_dot") else 1.25)

        def layer(params: Any, x: Array) -> Array:
            plan = select(x @ w + bias)
            return dispatch(plan, lambda r, layout: bank.apply(params, r, layout), x, backend)

        return layer

    names = [b for b in (*BACKENDS, *(("gather",) if shape.n <= 64 else ())) if b != "einsum" or shape.n > 64]
    contestants = {"dense": (dense, (dense_params, rows))}
    contestants |= {name: (routed(name), (params, x)) for name in names}
    if "ragged_dot" in against:
        contestants["ragged_dot"] = (_ragged_dot(shape, w, bias), (params, x))
    backward = {
        name: (jax.grad(lambda p, x, f=function: jnp.square(f(p, x)).sum(), argnums=(0, 1)), args)
        for name, (function, args) in contestants.items()
    }
    return {"forward": race(contestants, repeats), "forward+backward": race(backward, repeats)}


def chosen(shape: Shape) -> str:
    """The backend that `auto` takes for this shape."""
    return choose(TopK(k=shape.k)(jnp.zeros((1, shape.n, shape.e))))


def _ragged_dot(shape: Shape, w: Array, bias: Array) -> Callable[[Any, Array], Array]:
    """The peer: rows sorted by expert and `jax.lax.ragged_dot`."""

    def layer(params: Any, x: Array) -> Array:
        plan, p = TopK(k=shape.k)(x @ w + bias), params["params"]
        order = jnp.argsort(plan.expert.reshape(-1), stable=True)
        sizes = jnp.bincount(plan.expert.reshape(-1), length=shape.e).astype(jnp.int32)
        rows = x[0][order // shape.k]
        if shape.glu:
            gate, up = (jax.lax.ragged_dot(rows, p[name], sizes) for name in ("w_gate", "w_up"))
            hidden = jax.nn.silu(gate) * up
        else:
            hidden = jax.nn.gelu(jax.lax.ragged_dot(rows, p["w_in"], sizes))
        out = jax.lax.ragged_dot(hidden, p["w_out"], sizes) * plan.weight.reshape(-1)[order][:, None]
        return jnp.zeros_like(x[0]).at[order // shape.k].add(out)

    return layer
