"""Product-key top-k: every implementation against brute force over all s * s keys in NumPy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from kernels.gpu import lower_for, triton_kernels

from pallas_kernels.implementations import target
from pallas_kernels.product_keys import AUTO, IMPLEMENTATIONS, gpu, product_key_top_k, tpu
from pallas_kernels.product_keys.xla import CHUNK, staircase

RUNNABLE = [name for name in IMPLEMENTATIONS if name not in ("tpu", "gpu")]
compiled_top_k = jax.jit(product_key_top_k, static_argnames=("k", "implementation"))
# n, h, s, dk, k: tokens that do not fill a tile, k beyond s, a power of two nowhere.
SHAPES = {"odd": (21, 2, 9, 5, 4), "more_picks_than_half_keys": (3, 1, 3, 16, 5), "many": (CHUNK + 3, 2, 20, 8, 16)}


def brute_force(query: np.ndarray, keys: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
    halves = np.einsum("nhwd,hwsd->nhws", query.astype(np.float64), keys.astype(np.float64))
    sums = (halves[:, :, 0, :, None] + halves[:, :, 1, None, :]).reshape(*query.shape[:2], -1)
    index = np.argsort(-sums, axis=-1, kind="stable")[..., :k]
    return np.take_along_axis(sums, index, -1), index


def inputs(shape: tuple[int, ...], rng: np.random.Generator, whole: bool = False) -> tuple[np.ndarray, np.ndarray]:
    """Query and keys; small whole numbers, whose sums are exact and often equal, or normal ones."""
    n, h, s, dk, _ = shape
    draw = (lambda size: rng.integers(-2, 3, size)) if whole else (lambda size: rng.normal(size=size))
    return draw((n, h, 2, dk)).astype(np.float32), draw((h, 2, s, dk)).astype(np.float32)


def assert_no_race() -> None:
    from jax._src.pallas.mosaic.interpret import interpret_pallas_call

    assert not interpret_pallas_call.races.races_found


@pytest.mark.parametrize("implementation", RUNNABLE)
class TestProductKeyTopK:
    @pytest.mark.parametrize("shape", SHAPES)
    def test_ties_go_to_the_lowest_index(self, implementation: str, shape: str, rng: np.random.Generator) -> None:
        k = SHAPES[shape][-1]
        query, keys = inputs(SHAPES[shape], rng, whole=True)
        score, index = compiled_top_k(query, keys, k=k, implementation=implementation)
        if implementation == "interpret_tpu":
            assert_no_race()
        expected_score, expected_index = brute_force(query, keys, k)
        assert np.any(np.diff(expected_score) == 0)
        np.testing.assert_array_equal(score, expected_score)
        np.testing.assert_array_equal(index, expected_index)

    @pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
    def test_values_and_gradients(self, implementation: str, dtype: jnp.dtype, rng: np.random.Generator) -> None:
        n, h, s, _, k = shape = SHAPES["odd"]
        query, keys = (np.asarray(a.astype(dtype)) for a in inputs(shape, rng))
        cotangent = rng.normal(size=(n, h, k)).astype(np.float32)

        @jax.jit
        def run(query: jax.Array, keys: jax.Array) -> tuple:
            (score, index), vjp = jax.vjp(lambda q, ks: product_key_top_k(q, ks, k, implementation), query, keys)
            return score, index, vjp((jnp.asarray(cotangent), np.zeros(index.shape, jax.dtypes.float0)))

        score, index, (dquery, dkeys) = run(query, keys)
        assert score.dtype == jnp.float32
        expected_score, expected_index = brute_force(query, keys, k)
        np.testing.assert_allclose(score, expected_score, rtol=1e-5, atol=1e-5)
        np.testing.assert_array_equal(index, expected_index)
        wide_query, wide_keys = query.astype(np.float64), keys.astype(np.float64)
        expected_dquery, expected_dkeys = np.zeros(query.shape), np.zeros(keys.shape)
        for (t, head, r), g in np.ndenumerate(cotangent):
            for w, row in enumerate(divmod(expected_index[t, head, r], s)):
                expected_dquery[t, head, w] += g * wide_keys[head, w, row]
                expected_dkeys[head, w, row] += g * wide_query[t, head, w]
        assert dquery.dtype == dkeys.dtype == dtype
        loose = dict(rtol=1e-2, atol=1e-2) if dtype == jnp.bfloat16 else dict(rtol=1e-4, atol=1e-5)  # 8 bits of mantissa
        np.testing.assert_allclose(np.asarray(dquery, np.float64), expected_dquery, **loose)
        np.testing.assert_allclose(np.asarray(dkeys, np.float64), expected_dkeys, **loose)


def test_staircase_holds_every_pair_that_can_win_and_few_others() -> None:
    """Pairs outside are beaten by k others whatever the scores; each pair inside wins for some."""
    assert len(staircase(16, 100)) == 50
    for a, b in staircase(5, 4):
        first, second = np.full(4, -100.0), np.full(4, -100.0)
        first[: a + 1], second[: b + 1] = 0, 0
        assert np.sum(np.add.outer(first, second) >= first[a] + second[b]) <= 5
    outside = {(a, b) for a in range(4) for b in range(4)} - set(staircase(5, 4))
    assert all((a + 1) * (b + 1) > 5 for a, b in outside)


def test_tiles_smaller_than_the_operands(rng: np.random.Generator) -> None:
    query, keys = inputs((150, 2, 9, 5, 3), rng, whole=True)
    expected = brute_force(query, keys, 3)
    for run in (
        lambda q, ks: tpu.top_k(q, ks, 3, interpret=True, rows=128),
        lambda q, ks: gpu.top_k(q, ks, 3, interpret=True, rows=32),
    ):
        for actual, value in zip(jax.jit(run)(query, keys), expected, strict=True):
            np.testing.assert_array_equal(actual, value)
    with target("v5e"):
        assert tpu.choose_rows(4096, 256, 128, 16) == 512
        assert tpu.choose_rows(4096, 4096, 128, 16) == 256
        assert tpu.choose_rows(7, 256, 128, 16) == 7


def test_memory_does_not_grow_with_the_number_of_keys() -> None:
    """Temporaries of forward and backward at 65,536 keys: a fraction of the scores of all half keys, let alone of all keys."""
    n, h, s, dk, k = 1024, 4, 256, 16, 8
    shapes = jax.ShapeDtypeStruct((n, h, 2, dk), jnp.float32), jax.ShapeDtypeStruct((h, 2, s, dk), jnp.float32)
    gradient = jax.jit(jax.grad(lambda q, ks: product_key_top_k(q, ks, k)[0].sum(), (0, 1)))
    half_scores = n * h * 2 * s * 4
    assert gradient.lower(*shapes).compile().memory_analysis().temp_size_in_bytes < 0.5 * half_scores


def test_errors_name_value_and_bounds() -> None:
    query, keys = jnp.ones((2, 1, 2, 4)), jnp.ones((1, 2, 3, 4))
    with pytest.raises(ValueError, match=r"k=10 of product_key_top_k must be between 1 and the number of keys, 3\*3"):
        product_key_top_k(query, keys, 10)
    with pytest.raises(ValueError, match="s=50000 half keys"):
        jax.eval_shape(lambda ks: product_key_top_k(query, ks, 1), jax.ShapeDtypeStruct((1, 2, 50000, 4), jnp.float32))
    with pytest.raises(ValueError, match="implementation='interpret_gpu' of product_key_top_k cannot run: 2000 half keys"):
        product_key_top_k(query, jnp.ones((1, 2, 2000, 4)), 1, "interpret_gpu")
    assert AUTO["cpu"] == ("xla",)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_lowers_to_triton_forward_and_backward(dtype: jnp.dtype) -> None:
    query, keys = jax.ShapeDtypeStruct((1000, 2, 2, 60), dtype), jax.ShapeDtypeStruct((2, 2, 200, 60), dtype)

    def loss(query: jax.Array, keys: jax.Array) -> jax.Array:
        return product_key_top_k(query, keys, 4, "gpu")[0].sum()

    name = "f32" if dtype == jnp.float32 else "bf16"
    for function in (loss, jax.grad(loss, (0, 1))):
        [kernel] = triton_kernels(lower_for("h100", function, query, keys))
        assert kernel.name == "product_key_top_k"
        assert kernel.dots == {(name, name, "f32")}
        assert "tf32" not in kernel.precisions
