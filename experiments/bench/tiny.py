"""Many tiny experts (PEER): retrieval by product keys and rank-one experts, against the retrieval alone and a plain gather."""

from collections.abc import Iterator
from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jaxtyping import Array

from experiments.bench.table import BACKWARD, FORWARD, Outcome
from experiments.bench.timing import backward, race
from pallas_kernels import product_key_top_k, rank_one_experts


@dataclass(frozen=True)
class Shape:
    """n tokens of width d with p picks of side * side experts."""

    name: str
    n: int = 1024
    d: int = 256
    p: int = 16
    side: int = 256


SHAPES = {s.name: s for s in (Shape("peer65536"), Shape("peer4096", side=64))}


def run(names: list[str], repeats: int) -> Iterator[Outcome]:
    """The outcome of each named shape."""
    for name in names:
        s = SHAPES[name]
        key = jax.random.split(jax.random.key(0), 5)
        e, half = s.side**2, s.d // 2
        x = jax.random.normal(key[0], (s.n, s.d))
        query = jax.random.normal(key[1], (s.n, 1, 2, half))
        keys = jax.random.normal(key[2], (1, 2, s.side, half)) / half**0.5
        u, v = (jax.random.normal(k, (e, s.d)) / s.d**0.5 for k in key[3:])

        def retrieve(query: Array, keys: Array, p: int = s.p) -> tuple[Array, Array]:
            score, index = product_key_top_k(query, keys, p)
            return jax.nn.softmax(score[:, 0]), index[:, 0]

        def ours(bank: tuple[Array, Array], x: Array, query: Array, keys: Array, retrieve=retrieve) -> Array:
            weight, index = retrieve(query, keys)
            return rank_one_experts(x, index, weight, *bank, jax.nn.gelu)

        def plain(bank: tuple[Array, Array], x: Array, query: Array, keys: Array, retrieve=retrieve) -> Array:
            weight, index = retrieve(query, keys)
            hidden = jax.nn.gelu(jnp.einsum("nd,npd->np", x, bank[0][index]))
            return jnp.einsum("np,npd->nd", weight * hidden, bank[1][index])

        args = ((u, v), x, query, keys)
        contestants = {
            "retrieval": (lambda bank, x, query, keys, retrieve=retrieve: retrieve(query, keys)[0] * x[:, :1], args),
            "rank_one": (ours, args),
            "gather": (plain, args),
        }
        timings = {FORWARD: race(contestants, repeats), BACKWARD: race(backward(contestants), repeats)}
        note = f"unavoidable: {2 * s.n * s.p * s.d * 4 / 1e6:.0f} MB of picked vectors forward; backward, {2 * e * s.d * 4 / 1e6:.0f} MB of dense gradient to write"
        yield Outcome(name, f"n={s.n} d={s.d}, {s.p} picks of {e} experts", "retrieval", timings, notes=(note,))
