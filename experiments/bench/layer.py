"""One size of a routed layer: its parameters, its tokens, and the ways of computing it that are timed against each other."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array

from experiments.bench.table import Bar
from moejax.dispatch import dispatch
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
