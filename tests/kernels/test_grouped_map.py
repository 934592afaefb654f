"""The CPU's way of running a bank: whole experts, tile by tile, against a loop over rows in NumPy and against its own parts."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moejax.train.flops import matmul_flops
from pallas_kernels.grouped_map import grouped_map, schedule, tile_sizes

D, F = 5, 4


def expert(params: dict, rows: jax.Array) -> jax.Array:
    """One expert on rows: bias and non-linearity, so that wrong rows and wrong experts both show."""
    return jnp.tanh(rows @ params["w"][0] + params["b"][0]) @ params["v"][0]


def parameters(rng: np.random.Generator, e: int) -> dict[str, np.ndarray]:
    shapes = {"w": (e, D, F), "b": (e, F), "v": (e, F, D)}
    return {name: jnp.asarray(rng.normal(size=shape), jnp.float32) for name, shape in shapes.items()}


def numpy_map(params: dict, x: np.ndarray, sizes: np.ndarray) -> np.ndarray:
    y, row = np.zeros((x.shape[0], D)), 0
    for i, size in enumerate(sizes):
        for _ in range(size):
            h = np.tanh(x[row] @ params["w"][i] + params["b"][i])
            y[row] = h @ params["v"][i]
            row += 1
    return y


def masked(params: dict, x: jax.Array, sizes: jax.Array) -> jax.Array:
    """Every expert on every row, then a mask: what JAX differentiates by itself."""
    group = (jnp.arange(len(x))[:, None] >= jnp.cumsum(sizes)).sum(1)
    each = [expert(jax.tree.map(lambda p, i=i: p[i : i + 1], params), x) for i in range(len(sizes))]
    return sum(jnp.where((group == i)[:, None], y, 0) for i, y in enumerate(each))


@pytest.mark.parametrize("m", [45, 30], ids=["one by one", "together"])
def test_values_and_gradients_for_every_pattern_of_empty_groups(m: int, rng: np.random.Generator) -> None:
    params, x = parameters(rng, 4), jnp.asarray(rng.normal(size=(m, D)), jnp.float32)
    c = rng.normal(size=(m, D)).astype(np.float32)
    ours = jax.jit(jax.grad(lambda p, x, s: (grouped_map(expert, p, x, s) * c).sum(), argnums=(0, 1)))
    forward = jax.jit(lambda p, x, s: grouped_map(expert, p, x, s))
    plain = jax.jit(jax.grad(lambda p, x, s: (masked(p, x, s) * c).sum(), argnums=(0, 1)))
    for pattern in itertools.product([0, 1], repeat=4):
        sizes = jnp.array(pattern, jnp.int32) * jnp.array([17, 1, m - 30, 8], jnp.int32)
        by_hand = numpy_map(jax.tree.map(np.asarray, params), np.asarray(x), np.asarray(sizes))
        np.testing.assert_allclose(forward(params, x, sizes), by_hand, rtol=1e-5, atol=1e-5)
        actual, expected = (gradients(params, x, sizes) for gradients in (ours, plain))
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4), actual, expected)


def test_rows_past_the_last_group_reach_no_gradient(rng: np.random.Generator) -> None:
    """Not even as infinities: the last tile reaches into them."""
    params, x = parameters(rng, 2), rng.normal(size=(12, D)).astype(np.float32)
    sizes = jnp.array([4, 3], jnp.int32)
    spoiled = jnp.asarray(x).at[7:].set(jnp.inf)

    def loss(p: dict, x: jax.Array) -> jax.Array:
        return jnp.square(grouped_map(expert, p, x, sizes)[:7]).sum()

    gradient = jax.jit(jax.grad(loss))
    clean, dirty = (gradient(params, a) for a in (jnp.asarray(x), spoiled))
    jax.tree.map(np.testing.assert_array_equal, clean, dirty)


def test_tiles_cover_every_group_once_and_waste_less_than_the_group() -> None:
    sizes = jnp.arange(0, 700, dtype=jnp.int32)
    for tiles in ((256, 128, 64, 32), (8, 4, 2, 1), (1,)):
        rows = (np.asarray(schedule(sizes, tiles)) * np.array(tiles)[:, None]).sum(0)
        assert (rows >= np.asarray(sizes)).all()
        assert (rows - np.asarray(sizes) < np.maximum(np.asarray(sizes), tiles[-1])).all()


def test_a_balanced_group_is_one_tile() -> None:
    for m, e in ((8192, 32), (8192, 512), (1024, 8)):
        sizes = np.random.default_rng(0).multinomial(m, np.ones(e) / e)
        assert (sizes <= tile_sizes(m, e)[0]).mean() > 0.9
    assert tile_sizes(1, 4) == (1,)


def test_the_derivative_keeps_products_and_nothing_else_of_the_forward_pass() -> None:
    """No product is computed twice, and of all that lies between two products (tanh, bias) nothing is kept; nor is the bank copied."""
    m, e, d, f = 2048, 16, 8, 256
    params = {"w": jnp.ones((e, d, f)), "b": jnp.ones((e, f)), "v": jnp.ones((e, f, d))}

    def loss(p: dict, x: jax.Array) -> jax.Array:
        return jnp.square(grouped_map(expert, p, x, jnp.full(e, m // e, jnp.int32))).sum()

    traced = jax.jit(jax.grad(loss, argnums=(0, 1))).trace(params, jnp.ones((m, d)))
    assert matmul_flops(traced.jaxpr) == 3 * 2 * m * 2 * d * f
    memory = traced.lower().compile().memory_analysis()
    hidden, tile = m * f * 4, tile_sizes(m, e)[0] * f * 4
    assert hidden < memory.temp_size_in_bytes < hidden + 5 * tile


def test_products_of_parameters_alone(rng: np.random.Generator) -> None:
    """They are no rows to be kept: their gradient is right all the same."""

    def merged(p: dict, rows: jax.Array) -> jax.Array:
        return jnp.tanh(rows @ (p["w"][0] @ p["v"][0]))

    params, x = parameters(rng, 2), jnp.asarray(rng.normal(size=(9, D)), jnp.float32)
    sizes = jnp.array([4, 5], jnp.int32)
    ours = jax.jit(jax.grad(lambda p: jnp.square(grouped_map(merged, p, x, sizes)).sum()))(params)

    def apart(p: dict) -> jax.Array:
        return sum(
            jnp.square(merged(jax.tree.map(lambda a, i=i: a[i : i + 1], p), x[rows])).sum()
            for i, rows in enumerate((slice(0, 4), slice(4, 9)))
        )

    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), ours, jax.jit(jax.grad(apart))(params))
