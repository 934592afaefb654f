"""Rank-one experts: every implementation against loops over picks in NumPy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from kernels.gpu import lower_for, triton_kernels

from pallas_kernels.rank_one import AUTO, IMPLEMENTATIONS, rank_one_experts, tpu
from pallas_kernels.rank_one.xla import CHUNK

RUNNABLE = [name for name in IMPLEMENTATIONS if name not in ("tpu", "gpu")]


def activation(a: jax.Array) -> jax.Array:
    """Smooth, not odd, and zero nowhere near zero, so that fill-ups would show."""
    return a * a + jnp.tanh(a) + 1


def numpy_activation(a: np.ndarray) -> np.ndarray:
    return a * a + np.tanh(a) + 1


def numpy_slope(a: np.ndarray) -> np.ndarray:
    return 2 * a + 1 - np.tanh(a) ** 2


def by_loops(x, index, weight, u, v, dy) -> tuple[np.ndarray, ...]:
    """y, dx, dweight, du, dv, pick by pick in float64."""
    x, weight, u, v, dy = (np.asarray(a, np.float64) for a in (x, weight, u, v, dy))
    y, dx, dweight, du, dv = (np.zeros(a.shape) for a in (x, x, weight, u, v))
    for (t, j), i in np.ndenumerate(index):
        pre = x[t] @ u[i]
        y[t] += weight[t, j] * numpy_activation(pre) * v[i]
        dweight[t, j] = numpy_activation(pre) * (dy[t] @ v[i])
        dpre = weight[t, j] * numpy_slope(pre) * (dy[t] @ v[i])
        dx[t] += dpre * u[i]
        du[i] += dpre * x[t]
        dv[i] += weight[t, j] * numpy_activation(pre) * dy[t]
    return y, dx, dweight, du, dv


def inputs(n: int, p: int, d: int, e: int, rng: np.random.Generator, dtype: jnp.dtype = jnp.float32) -> tuple:
    """x, index, weight, u, v, dy; picks repeat within and across tokens, and experts e // 2 .. e - 1 are never picked."""
    x, dy, u, v = (jnp.asarray(rng.normal(size=s) / d**0.25, dtype) for s in ((n, d), (n, d), (e, d), (e, d)))
    index = jnp.asarray(rng.integers(0, e // 2, (n, p)), jnp.int32).at[0, :2].set(1)
    return x, index, jnp.asarray(rng.normal(size=(n, p)), jnp.float32), u, v, dy


@pytest.mark.parametrize("implementation", RUNNABLE)
class TestRankOneExperts:
    @pytest.mark.parametrize(
        ("shape", "dtype"),
        [((19, 3, 10, 14), jnp.float32), ((CHUNK + 1, 2, 130, 60), jnp.float32), ((5, 4, 6, 8), jnp.bfloat16)],
    )
    def test_values_and_gradients(
        self, implementation: str, shape: tuple[int, ...], dtype: jnp.dtype, rng: np.random.Generator
    ) -> None:
        if implementation == "interpret_tpu" and dtype == jnp.bfloat16:
            x, index, weight, u, v, _ = inputs(*shape, rng, dtype)
            with pytest.raises(ValueError, match="rows narrower than 32 bits"):
                rank_one_experts(x, index, weight, u, v, activation, implementation)
            return
        x, index, weight, u, v, dy = inputs(*shape, rng, dtype)

        @jax.jit
        def run(x: jax.Array, weight: jax.Array, u: jax.Array, v: jax.Array) -> tuple:
            y, vjp = jax.vjp(
                lambda x, w, u, v: rank_one_experts(x, index, w, u, v, activation, implementation), x, weight, u, v
            )
            return y, *vjp(dy)

        results = run(x, weight, u, v)
        if implementation == "interpret_tpu":
            from jax._src.pallas.mosaic.interpret import interpret_pallas_call

            assert not interpret_pallas_call.races.races_found
        loose = dict(rtol=2e-2, atol=2e-2) if dtype == jnp.bfloat16 else dict(rtol=1e-4, atol=1e-4)  # 8 bits of mantissa
        for name, actual, expected in zip(
            ("y", "x", "weight", "u", "v"), results, by_loops(x, index, weight, u, v, dy), strict=True
        ):
            assert actual.dtype == (jnp.float32 if name == "weight" else dtype)
            np.testing.assert_allclose(np.asarray(actual, np.float64), expected, **loose, err_msg=name)
        for gradient in results[3:]:
            assert not np.asarray(gradient[shape[3] // 2 :]).any()

    def test_rows_nobody_picked_are_never_read(self, implementation: str, rng: np.random.Generator) -> None:
        """NaN in all other rows changes nothing, whatever fills up tiles and chunks."""
        x, index, weight, u, v, dy = inputs(5, 3, 8, 12, rng)
        index = jnp.maximum(index, 1)
        others = jnp.zeros((12, 1), bool).at[index.reshape(-1)].set(True)
        loss = jax.jit(lambda x, u, v: (rank_one_experts(x, index, weight, u, v, activation, implementation) * dy).sum())
        assert jnp.isfinite(loss(x, jnp.where(others, u, jnp.nan), jnp.where(others, v, jnp.nan)))


def test_memory_is_that_of_a_chunk() -> None:
    """Temporaries at 1,024 tokens with 16 of 65,536 experts of width 256, in MiB; XLA's are 16 per bank of gathered rows."""
    n, p, d, e = 1024, 16, 256, 65536
    shape = jax.ShapeDtypeStruct
    x, index, weight, bank = (
        shape((n, d), jnp.float32),
        shape((n, p), jnp.int32),
        shape((n, p), jnp.float32),
        shape((e, d), jnp.float32),
    )

    def temporaries(function, *args) -> float:
        return jax.jit(function).lower(*args).compile().memory_analysis().temp_size_in_bytes / 2**20

    def loss(name: str):
        return lambda x, index, weight, u, v: rank_one_experts(x, index, weight, u, v, jax.nn.gelu, name).sum()

    assert (
        temporaries(loss("xla"), x, index, weight, bank, bank)
        < 5
        < 25
        < temporaries(loss("reference"), x, index, weight, bank, bank)
    )
    assert temporaries(jax.grad(loss("xla"), (0, 3, 4)), x, index, weight, bank, bank) < 15


def test_calls_are_split_where_indices_would_not_fit(monkeypatch: pytest.MonkeyPatch, rng: np.random.Generator) -> None:
    monkeypatch.setattr(tpu, "MAX_PICKS_PER_CALL", 40)
    x, index, weight, u, v, dy = inputs(21, 3, 10, 14, rng)
    y = jax.jit(lambda x: tpu.experts(x, index, weight, u, v, activation, interpret=True))(x)
    np.testing.assert_allclose(y, by_loops(x, index, weight, u, v, dy)[0], rtol=1e-4, atol=1e-4)


def test_lowers_to_triton_forward_and_backward(rng: np.random.Generator) -> None:
    x, index, weight, u, v, _ = inputs(9, 5, 100, 30, rng, jnp.bfloat16)

    def loss(x: jax.Array, u: jax.Array, v: jax.Array) -> jax.Array:
        return rank_one_experts(x, index, weight, u, v, jax.nn.gelu, "gpu").sum()

    for function in (loss, jax.value_and_grad(loss, (0, 1, 2))):
        [kernel] = triton_kernels(lower_for("h100", function, x, u, v))
        assert kernel.name == "rank_one_experts"
        assert kernel.grid == (9, 1, 1)


def test_errors_and_auto(rng: np.random.Generator) -> None:
    x, index, weight, u, v, _ = inputs(2, 2, 4, 4, rng)
    with pytest.raises(ValueError, match="implementation='cuda' of rank_one_experts is unknown"):
        rank_one_experts(x, index, weight, u, v, activation, "cuda")
    assert AUTO["cpu"] == ("xla",)
