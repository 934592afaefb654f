"""Permute and unpermute: one body that every implementation inherits, in values and gradients."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax._src.pallas.mosaic.interpret import interpret_pallas_call

from pallas_kernels import permute, unpermute
from pallas_kernels.implementations import target
from pallas_kernels.permute import AUTO, IMPLEMENTATIONS, NARROW, tpu

RUNNABLE = [name for name in IMPLEMENTATIONS if name not in ("tpu", "gpu")]
TOLERANCE = {jnp.float32: 1e-5, jnp.bfloat16: 2e-2}  # a bfloat16 result is rounded once, and so is what it is compared with


def no_races() -> bool:
    found = interpret_pallas_call.races
    return found is None or not found.races_found


def sorted_list(rng: np.random.Generator, n: int, k: int) -> tuple[jax.Array, jax.Array]:
    order = jnp.asarray(rng.permutation(n * k), jnp.int32)
    return order, jnp.argsort(order)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("implementation", RUNNABLE)
class TestPermute:
    @pytest.mark.parametrize(("n", "k", "d"), [(38, 2, 130), (6, 3, 4), (20, 1, 520)])
    def test_values_and_gradients(
        self, implementation: str, dtype: jnp.dtype, n: int, k: int, d: int, rng: np.random.Generator
    ) -> None:
        """Sizes that are no multiple of a tile, of a register, or of the width worked on at once."""
        order, inverse = sorted_list(rng, n, k)
        x, rows = (jnp.asarray(rng.normal(size=(s, d)), dtype) for s in (n, n * k))
        weight = jnp.asarray(rng.normal(size=(n, k)), jnp.float32)
        dy, drows = jnp.asarray(rng.normal(size=(n, d)), dtype), jnp.asarray(rng.normal(size=(n * k, d)), dtype)

        @jax.jit
        def run() -> tuple:
            moved, back = jax.vjp(lambda x: permute(x, order, inverse, k, implementation), x)
            y, back_y = jax.vjp(lambda r, w: unpermute(r, w, order, inverse, implementation), rows, weight)
            return moved, back(drows)[0], y, *back_y(dy)

        moved, dx, y, drow, dweight = run()
        x, rows, w, dy, drows = (np.asarray(a, np.float64) for a in (x, rows, weight, dy, drows))
        expected_dx, expected_y, expected_drow, expected_dweight = (np.zeros(s) for s in ((n, d), (n, d), rows.shape, (n, k)))
        for r, choice in enumerate(np.asarray(order)):
            t, j = divmod(choice, k)
            np.testing.assert_array_equal(moved[r], x[t])
            expected_dx[t] += drows[r]
            expected_y[t] += w[t, j] * rows[r]
            expected_drow[r] = w[t, j] * dy[t]
            expected_dweight[t, j] = dy[t] @ rows[r]
        assert [a.dtype for a in (moved, dx, y, drow)] == [dtype] * 4
        assert dweight.dtype == jnp.float32
        for actual, expected in ((dx, expected_dx), (y, expected_y), (drow, expected_drow)):
            np.testing.assert_allclose(np.asarray(actual, np.float64), expected, rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype])
        np.testing.assert_allclose(dweight, expected_dweight, rtol=1e-4, atol=1e-4)
        assert no_races()

    def test_unused_entries_may_hold_anything(self, implementation: str, dtype: jnp.dtype, rng: np.random.Generator) -> None:
        n, k, d = 10, 2, 12
        order, inverse = sorted_list(rng, n, k)
        used = rng.random((n, k)) < 0.5
        rows = np.where(used.reshape(-1)[np.asarray(order)][:, None], rng.normal(size=(n * k, d)), np.inf)
        rows[inverse[np.flatnonzero(~used)[0]]] = np.nan
        weight = rng.normal(size=(n, k)).astype(np.float32)

        @jax.jit
        def run(w: jax.Array) -> tuple:
            return jax.vjp(
                lambda w: unpermute(jnp.asarray(rows, dtype), jnp.where(used, w, 0), order, inverse, implementation), w
            )

        y, back = run(weight)
        clean = np.where(np.isfinite(rows), rows, 0)[np.asarray(inverse)].reshape(n, k, d)
        np.testing.assert_allclose(
            np.asarray(y, np.float64), ((weight * used)[..., None] * clean).sum(1), rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype]
        )
        dweight = back(jnp.ones_like(y))[0]
        np.testing.assert_allclose(dweight, clean.sum(-1), rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype])


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16], ids=["float32", "bfloat16"])
def test_tpu_kernels_over_several_tiles(dtype: jnp.dtype, rng: np.random.Generator) -> None:
    """Rows of the next tile arrive while this one is summed; the last tile is ragged."""
    n, k, d, s = 39, 2, 20, 18
    source, rows = (jnp.asarray(rng.normal(size=(a, d)), dtype) for a in (s, n))
    index = jnp.asarray(rng.integers(0, s, size=(n, k)), jnp.int32)
    weight = jnp.asarray(rng.normal(size=(n, k)), jnp.float32)
    with target("v5p"):  # two cores share the tiles, of which there is an odd number
        y = tpu.gather_sum(source, index, weight, tile=16, interpret=True)
    assert no_races()
    scaled, dots = tpu.gather_scale_dot(source, index[:, 0], rows, weight[:, 0], tile=16, interpret=True)
    assert no_races()
    gathered, w = np.asarray(source, np.float64)[np.asarray(index)], np.asarray(weight)
    for actual, expected in (
        (y, (w[..., None] * gathered).sum(1)),
        (scaled, w[:, :1] * gathered[:, 0]),
        (dots, (np.asarray(rows, np.float64) * gathered[:, 0]).sum(1)),
    ):
        np.testing.assert_allclose(np.asarray(actual, np.float64), expected, rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype])


def test_auto_by_chip_and_width() -> None:
    """XLA for moving rows out, for narrow rows and off TPU; the kernel for sums of wide rows."""

    def kernels(d: int) -> list[str]:
        order = jax.ShapeDtypeStruct((16,), jnp.int32)
        rows, weight = jax.ShapeDtypeStruct((16, d), jnp.float32), jax.ShapeDtypeStruct((8, 2), jnp.float32)
        out = jax.make_jaxpr(lambda x, o: permute(x, o, o, 2))(jax.ShapeDtypeStruct((8, d), jnp.float32), order)
        back = jax.make_jaxpr(lambda r, w, o: unpermute(r, w, o, o))(rows, weight, order)
        return ["pallas_call" in str(jaxpr) for jaxpr in (out, back)]

    for chip, d, expected in (("v5e", NARROW // 4, [False, True]), ("v5e", NARROW // 4 - 1, [False, False])):
        with target(chip):
            assert kernels(d) == expected
    assert kernels(NARROW) == [False, False]
    assert AUTO["cpu"] == ("xla",)


def test_what_cannot_run_raises() -> None:
    order = jnp.arange(6, dtype=jnp.int32)
    with pytest.raises(
        ValueError, match="implementation='tpu' of permute cannot run: it reads bfloat16 rows in pairs, and there are 3"
    ):
        permute(jnp.ones((3, 4), jnp.bfloat16), order, order, 2, "tpu")
    with pytest.raises(ValueError, match="implementation='triton' of unpermute is unknown"):
        unpermute(jnp.ones((6, 4)), jnp.ones((3, 2)), order, order, "triton")
    with pytest.raises(ValueError, match="too many for VMEM"):
        unpermute(jnp.ones((512, 65536)), jnp.ones((8, 64)), jnp.arange(512), jnp.arange(512), "tpu")
