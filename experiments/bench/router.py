"""What routing costs: logits, choice, plan and sorting, against the router's matrix product alone."""

from collections.abc import Iterator
from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jaxtyping import Array

from experiments.bench.table import FORWARD, Outcome
from experiments.bench.timing import race
from moejax.routing import TopK
from moejax.routing.plan import sort_by_expert


@dataclass(frozen=True)
class Shape:
    """n tokens of width d, e experts, k per token."""

    name: str
    n: int = 4096
    d: int = 256
    e: int = 32
    k: int = 2


SHAPES = {s.name: s for s in (Shape("e8", e=8, k=1), Shape("e32"), Shape("e128", e=128, k=8), Shape("e512", e=512))}


def run(names: list[str], repeats: int) -> Iterator[Outcome]:
    """The outcome of each named shape."""
    for name in names:
        shape = SHAPES[name]
        x = jax.random.normal(jax.random.key(0), (1, shape.n, shape.d))
        w = jax.random.normal(jax.random.key(1), (shape.d, shape.e)) / shape.d**0.5

        def planned(x: Array, w: Array, k: int = shape.k) -> tuple[Array, Array]:
            plan = TopK(k=k)(x @ w)
            return plan.expert, plan.weight

        def sorted_rows(x: Array, w: Array, planned=planned, e: int = shape.e) -> tuple[Array, ...]:
            return sort_by_expert(planned(x, w)[0].reshape(-1), e)

        def argsorted(x: Array, w: Array, planned=planned, e: int = shape.e) -> tuple[Array, ...]:
            expert = planned(x, w)[0].reshape(-1)
            order = jnp.argsort(expert, stable=True)
            return order, jnp.argsort(order), jnp.bincount(expert, length=e)

        contestants = {
            "matmul": (lambda x, w: x @ w, (x, w)),
            "top_k plan": (planned, (x, w)),
            "and sorting": (sorted_rows, (x, w)),
            "and argsorts": (argsorted, (x, w)),
        }
        title = f"n={shape.n} d={shape.d} e={shape.e} k={shape.k}"
        yield Outcome(name, title, "matmul", {FORWARD: race(contestants, repeats)})
