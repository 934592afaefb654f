"""Low-rank grouped matmul: one body that every implementation inherits, in values and gradients, with every pattern of empty groups."""

import itertools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax._src.pallas.mosaic.interpret import interpret_pallas_call

from pallas_kernels.low_rank import IMPLEMENTATIONS, low_rank_grouped_matmul, tpu

# On a CPU `grouped_matmul` is `xla`.
RUNNABLE = [name for name in IMPLEMENTATIONS if name not in ("tpu", "gpu", "grouped_matmul")]
# Both round z, dz and the results to bfloat16, the products' sums are float32.
TOLERANCE = {jnp.float32: dict(rtol=1e-4, atol=1e-4), jnp.bfloat16: dict(rtol=4e-2, atol=8e-2)}


def no_races() -> bool:
    found = interpret_pallas_call.races
    return found is None or not found.races_found


def numpy_low_rank(
    x: jax.Array, a: jax.Array, b: jax.Array, sizes: np.ndarray, dy: jax.Array, scale: float, first: int = 0
) -> tuple[np.ndarray, ...]:
    """Value and gradients, group after group; a and b hold the groups from `first` on."""
    x, a, b, dy = (np.asarray(v, np.float64) for v in (x, a, b, dy))
    y, dx, da, db = np.zeros((x.shape[0], b.shape[2])), np.zeros(x.shape), np.zeros(a.shape), np.zeros(b.shape)
    ends = np.cumsum(sizes)
    for i in range(a.shape[0]):
        rows = slice(ends[first + i] - sizes[first + i], ends[first + i])
        y[rows] = scale * x[rows] @ a[i] @ b[i]
        dx[rows] = scale * dy[rows] @ b[i].T @ a[i].T
        da[i] = scale * x[rows].T @ (dy[rows] @ b[i].T)
        db[i] = scale * (x[rows] @ a[i]).T @ dy[rows]
    return y, dx, da, db


def arrays(rng: np.random.Generator, m: int, d: int, r: int, f: int, e: int, dtype: jnp.dtype) -> tuple[jax.Array, ...]:
    shapes = (m, d), (e, d, r), (e, r, f), (m, f)
    return tuple(jnp.asarray(rng.normal(size=shape) * (0.5 if len(shape) == 3 else 1), dtype) for shape in shapes)


def run(implementation: str, scale: float) -> Callable[..., tuple[jax.Array, ...]]:
    def values_and_gradients(
        x: jax.Array, a: jax.Array, b: jax.Array, sizes: jax.Array, dy: jax.Array, offset: jax.Array | None = None
    ) -> tuple[jax.Array, ...]:
        y, back = jax.vjp(lambda *v: low_rank_grouped_matmul(*v, sizes, scale, implementation, offset), x, a, b)
        return y, *back(dy)

    return jax.jit(values_and_gradients)


def check(actual: tuple, expected: tuple, dtype: jnp.dtype) -> None:
    for result, correct in zip(actual, expected, strict=True):
        assert result.dtype == dtype
        np.testing.assert_allclose(np.asarray(result, np.float64), correct, **TOLERANCE[dtype])
    assert no_races()


@pytest.mark.parametrize("implementation", RUNNABLE)
class TestLowRank:
    @pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16], ids=["float32", "bfloat16"])
    def test_every_pattern_of_empty_groups(self, implementation: str, dtype: jnp.dtype, rng: np.random.Generator) -> None:
        x, a, b, dy = arrays(rng, 29, 5, 3, 7, 3, dtype)
        step = run(implementation, 0.5)
        for pattern in itertools.product([0, 1], repeat=3):
            sizes = np.array(pattern) * np.array([7, 1, 12])
            results = step(x, a, b, jnp.asarray(sizes, jnp.int32), dy)
            check(results, numpy_low_rank(x, a, b, sizes, dy, 0.5), dtype)
            y, dx, da, db = (np.asarray(v, np.float32) for v in results)
            assert not y[sizes.sum() :].any()
            assert not dx[sizes.sum() :].any()
            assert not da[sizes == 0].any()
            assert not db[sizes == 0].any()

    def test_groups_over_several_tiles_and_packs(self, implementation: str, rng: np.random.Generator) -> None:
        """Groups straddle row tiles, and a rank of 48 leaves two groups to a pack, of which there are three."""
        m, e = 150, 5
        x, a, b, dy = arrays(rng, m, 20, 48, 33, e, jnp.float32)
        step = run(implementation, 0.1)
        for sizes in ([0, 70, 0, 37, 20], [1, 0, 0, 0, 149]):
            check(step(x, a, b, jnp.asarray(sizes, jnp.int32), dy), numpy_low_rank(x, a, b, sizes, dy, 0.1), jnp.float32)

    def test_a_slice_of_the_groups(self, implementation: str, rng: np.random.Generator) -> None:
        m, e, held = 41, 6, 2
        x, a, b, dy = arrays(rng, m, 6, 2, 5, e, jnp.float32)
        step = run(implementation, 1.0)
        for sizes, offset in (([3, 0, 5, 4, 0, 20], 2), ([3, 20, 5, 4, 0, 7], 4), ([0] * 6, 0)):
            part = slice(offset, offset + held)
            results = step(x, a[part], b[part], jnp.asarray(sizes, jnp.int32), dy, jnp.int32(offset))
            check(results, numpy_low_rank(x, a[part], b[part], sizes, dy, 1.0, offset), jnp.float32)

    def test_tail_rows_do_not_leak(self, implementation: str) -> None:
        """Whatever lies past the last group changes neither outputs nor gradients of the groups."""
        worst = 1e30 if implementation == "reference" else jnp.inf  # its masks are matrices that multiply
        x, dy = (jnp.ones((20, 3)).at[6:].set(worst) for _ in range(2))
        a, b = jnp.ones((2, 3, 2)), jnp.ones((2, 2, 3))
        y, dx, da, db = run(implementation, 1.0)(x, a, b, jnp.array([2, 4], jnp.int32), dy)
        np.testing.assert_array_equal(y, np.where(np.arange(20)[:, None] < 6, 6.0, 0) * np.ones((1, 3)))
        np.testing.assert_array_equal(dx, y)
        np.testing.assert_array_equal(da, np.array([2, 4])[:, None, None] * 3 * np.ones((2, 3, 2)))
        np.testing.assert_array_equal(db, np.array([2, 4])[:, None, None] * 3 * np.ones((2, 2, 3)))


@pytest.mark.slow
def test_tpu_kernels_over_several_row_tiles(rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch) -> None:
    """Small tiles: sums go on from visit to visit and through several chunks of columns; tiles are written once."""
    monkeypatch.setattr(tpu, "_CHUNKS", (128,))
    e, sizes, scale = 5, np.array([9, 0, 30, 17, 20]), 0.3
    x, a, b, dy = arrays(rng, 90, 12, 40, 256, e, jnp.float32)
    group_sizes = jnp.asarray(sizes, jnp.int32)
    y = tpu.forward(x, a, b, group_sizes, jnp.int32(0), scale, rows=16, interpret=True)
    assert no_races()
    gradients = tpu.backward(x, dy, a, b, group_sizes, jnp.int32(0), scale, rows=16, interpret=True)
    check((y, *gradients), numpy_low_rank(x, a, b, sizes, dy, scale), jnp.float32)


@pytest.mark.parametrize(
    ("r", "e", "rank", "groups", "count"),
    [(8, 64, 8, 16, 4), (12, 20, 16, 8, 3), (1, 4, 1, 4, 1), (128, 3, 128, 1, 3), (200, 2, 256, 1, 2)],
)
def test_packs_fill_128_columns(r: int, e: int, rank: int, groups: int, count: int) -> None:
    assert tpu.Packs.of(r, e) == (rank, groups, count)


def test_two_grouped_matmuls_are_the_choice_on_a_cpu(rng: np.random.Generator) -> None:
    x, a, b, _ = arrays(rng, 12, 4, 2, 3, 2, jnp.float32)
    sizes = jnp.array([5, 4], jnp.int32)
    jaxprs = [
        str(jax.make_jaxpr(lambda x, name=name: low_rank_grouped_matmul(x, a, b, sizes, 2.0, name))(x))
        for name in ("auto", "xla", "grouped_matmul")
    ]
    assert jaxprs[0] == jaxprs[1] == jaxprs[2]
    assert "pallas_call" not in jaxprs[0]


def test_what_cannot_run_raises() -> None:
    x, sizes = jnp.ones((4, 3)), jnp.array([2, 2], jnp.int32)
    a, b = jnp.ones((2, 3, 2)), jnp.ones((2, 2, 3))
    with pytest.raises(ValueError, match="implementation='triton' of low_rank_grouped_matmul is unknown"):
        low_rank_grouped_matmul(x, a, b, sizes, 1.0, "triton")
    with pytest.raises(ValueError, match="a holds 1 matrices for 2 groups"):
        low_rank_grouped_matmul(x, a[:1], b[:1], sizes)
    with pytest.raises(ValueError, match="rank 200 of float32 exceeds 64"):
        low_rank_grouped_matmul(x, jnp.ones((2, 3, 200)), jnp.ones((2, 200, 3)), sizes, 1.0, "gpu")
    with pytest.raises(ValueError, match="exceeds VMEM"):
        low_rank_grouped_matmul(jnp.ones((4, 1 << 17)), jnp.ones((2, 1 << 17, 64)), jnp.ones((2, 64, 3)), sizes, 1.0, "tpu")
