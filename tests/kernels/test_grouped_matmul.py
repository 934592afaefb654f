"""Grouped matmul: one body that every implementation inherits, with every pattern of empty groups."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import grouped_matmul, permute, unpermute
from pallas_kernels.grouped_map import tile_sizes
from pallas_kernels.grouped_matmul import AUTO, IMPLEMENTATIONS

# Kernels run here in their interpreters; `test_grouped_matmul_gpu` and its like lower and compile them.
RUNNABLE = [name for name in IMPLEMENTATIONS if name not in ("tpu", "gpu")]


def numpy_grouped(x: np.ndarray, w: np.ndarray, sizes: np.ndarray) -> np.ndarray:
    y, start = np.zeros((x.shape[0], w.shape[2])), 0
    for i, size in enumerate(sizes):
        y[start : start + size] = x[start : start + size] @ w[i]
        start += size
    return y


@pytest.mark.parametrize("implementation", RUNNABLE)
class TestGroupedMatmul:
    def test_every_pattern_of_empty_groups(self, implementation: str, rng: np.random.Generator) -> None:
        e, d, f, m = 4, 5, 3, 29
        x, w = rng.normal(size=(m, d)).astype(np.float32), rng.normal(size=(e, d, f)).astype(np.float32)
        run = jax.jit(
            jax.value_and_grad(lambda x, w, s, c: (grouped_matmul(x, w, s, implementation) * c).sum(), argnums=(0, 1)),
        )
        forward = jax.jit(lambda x, w, s: grouped_matmul(x, w, s, implementation))
        c = rng.normal(size=(m, f)).astype(np.float32)
        for pattern in itertools.product([0, 1], repeat=e):
            sizes = np.array(pattern) * np.array([7, 1, 12, 3])
            y = forward(x, w, jnp.asarray(sizes, jnp.int32))
            np.testing.assert_allclose(y, numpy_grouped(x, w, sizes), rtol=1e-5, atol=1e-5)
            _, (dx, dw) = run(x, w, jnp.asarray(sizes, jnp.int32), c)
            np.testing.assert_allclose(dx, numpy_grouped(c, w.swapaxes(1, 2), sizes), rtol=1e-5, atol=1e-5)
            ends = np.cumsum(sizes)
            expected = [x[b - s : b].T @ c[b - s : b] for b, s in zip(ends, sizes, strict=True)]
            np.testing.assert_allclose(dw, expected, rtol=1e-4, atol=1e-5)
            assert not np.any(np.asarray(dw)[sizes == 0])
            assert not np.any(np.asarray(y)[sizes.sum() :])

    def test_groups_longer_than_a_tile(self, implementation: str, rng: np.random.Generator) -> None:
        m, e, d, f = 300, 2, 3, 2
        assert m > 2 * tile_sizes(m, e)[-1]
        x, w = jnp.asarray(rng.normal(size=(m, d)), jnp.float32), jnp.asarray(rng.normal(size=(e, d, f)), jnp.float32)
        for sizes in ([300, 0], [1, 299], [131, 150]):
            y = grouped_matmul(x, w, jnp.array(sizes, jnp.int32), implementation)
            np.testing.assert_allclose(y, numpy_grouped(x, w, np.array(sizes)), rtol=1e-5, atol=1e-5)

    def test_tail_rows_do_not_leak_into_results(self, implementation: str) -> None:
        """Whatever lies past the last group, even infinities, changes neither outputs nor gradients of the groups."""
        x = jnp.ones((10, 2)).at[6:].set(1e30)
        w = jnp.ones((2, 2, 2))
        sizes = jnp.array([2, 4], jnp.int32)
        y, dw = jax.jit(jax.value_and_grad(lambda w: grouped_matmul(x, w, sizes, implementation)[:6].sum()))(w)
        assert float(y) == 24
        np.testing.assert_array_equal(dw[0], 2 * np.ones((2, 2)))
        np.testing.assert_array_equal(dw[1], 4 * np.ones((2, 2)))


def test_unknown_implementation_raises_and_auto_is_named() -> None:
    with pytest.raises(ValueError, match="implementation='triton' of grouped_matmul is unknown"):
        grouped_matmul(jnp.ones((2, 2)), jnp.ones((1, 2, 2)), jnp.array([2], jnp.int32), "triton")
    assert AUTO["cpu"][0] == "xla"


def test_auto_on_cpu_runs_the_loop() -> None:
    """The compiled program says which implementation ran: a while loop, not a dense product over all groups."""
    args = jnp.ones((64, 4)), jnp.ones((8, 4, 4)), jnp.full((8,), 8, jnp.int32)
    auto = jax.jit(grouped_matmul).lower(*args).compile().as_text()
    assert "while" in auto
    dense = jax.jit(lambda *a: grouped_matmul(*a, "ragged_dot")).lower(*args).compile().as_text()
    assert "while" not in dense


def test_permute_and_unpermute_match_indexing_in_value_and_gradient(rng: np.random.Generator) -> None:
    n, k, d = 7, 3, 4
    x = jnp.asarray(rng.normal(size=(n, d)), jnp.float32)
    weight = jnp.asarray(rng.normal(size=(n, k)), jnp.float32)
    order = jnp.asarray(rng.permutation(n * k))
    inverse = jnp.argsort(order)
    c = rng.normal(size=(n, d)).astype(np.float32)

    def ours(x: jax.Array, weight: jax.Array) -> jax.Array:
        return (unpermute(jnp.tanh(permute(x, order, inverse, k)), weight, order, inverse) * c).sum()

    def plain(x: jax.Array, weight: jax.Array) -> jax.Array:
        rows = jnp.tanh(jnp.repeat(x, k, axis=0)).reshape(n, k, d)
        return ((weight[..., None] * rows).sum(1) * c).sum()

    actual, expected = (jax.jit(jax.value_and_grad(f, argnums=(0, 1)))(x, weight) for f in (ours, plain))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5), actual, expected)


@pytest.mark.parametrize("implementation", [n for n in RUNNABLE if n != "ragged_dot"])
def test_a_slice_of_the_groups_gives_its_rows_and_zeros_elsewhere(implementation: str, rng: np.random.Generator) -> None:
    m, e, d, f, held = 23, 6, 4, 3, 2
    x, w = rng.normal(size=(m, d)).astype(np.float32), rng.normal(size=(e, d, f)).astype(np.float32)
    sizes = np.array([3, 0, 5, 4, 0, 7])
    whole = numpy_grouped(x, w, sizes)
    ends = np.cumsum(sizes)
    run = jax.jit(lambda x, w, s, o: jax.vjp(lambda x, w: grouped_matmul(x, w, s, implementation, o), x, w))
    for offset in (0, 2, 4):
        y, vjp = run(x, w[offset : offset + held], jnp.asarray(sizes, jnp.int32), jnp.int32(offset))
        rows = np.zeros(m, bool)
        rows[ends[offset] - sizes[offset] : ends[offset + held - 1]] = True
        np.testing.assert_allclose(y, np.where(rows[:, None], whole, 0), rtol=1e-5, atol=1e-5)
        dx, dw = vjp(jnp.ones_like(y))
        np.testing.assert_array_equal(np.asarray(dx).any(1), rows)
        expected = [np.repeat(x[ends[i] - sizes[i] : ends[i]].sum(0)[:, None], f, 1) for i in (offset, offset + 1)]
        np.testing.assert_allclose(dw, expected, rtol=1e-4, atol=1e-5)


def test_a_slice_without_its_offset_raises() -> None:
    with pytest.raises(ValueError, match="w holds 1 matrices for 2 groups"):
        grouped_matmul(jnp.ones((2, 2)), jnp.ones((1, 2, 2)), jnp.array([1, 1], jnp.int32))
