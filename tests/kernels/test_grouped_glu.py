"""Fused GLU of grouped rows: one body that every implementation inherits, and the real TPU compiler."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from kernels.tpu import KINDS, compile_for, custom_calls, no_races

from pallas_kernels import grouped_glu
from pallas_kernels.grouped_glu import AUTO, IMPLEMENTATIONS
from pallas_kernels.implementations import target

# Kernels run here in their interpreters.
RUNNABLE = [name for name in IMPLEMENTATIONS if name not in ("tpu", "gpu")]


def sigmoid(x: np.ndarray) -> np.ndarray:
    return 1 / (1 + np.exp(-x))


def numpy_glu(x: np.ndarray, w_gate: np.ndarray, w_up: np.ndarray, sizes: np.ndarray, offset: int, dh: np.ndarray) -> tuple:
    """`silu(x W_gate) * (x W_up)` group by group, with the gradients written out."""
    h, dx = np.zeros((x.shape[0], w_up.shape[2])), np.zeros(x.shape)
    dw_gate, dw_up = np.zeros(w_gate.shape), np.zeros(w_up.shape)
    ends = np.cumsum(sizes)
    for i in range(w_gate.shape[0]):
        rows = slice(ends[offset + i] - sizes[offset + i], ends[offset + i])
        gate, up, s = x[rows] @ w_gate[i], x[rows] @ w_up[i], sigmoid(x[rows] @ w_gate[i])
        h[rows] = gate * s * up
        dgate, dup = dh[rows] * up * s * (1 + gate * (1 - s)), dh[rows] * gate * s
        dx[rows] = dgate @ w_gate[i].T + dup @ w_up[i].T
        dw_gate[i], dw_up[i] = x[rows].T @ dgate, x[rows].T @ dup
    return h, dx, dw_gate, dw_up


@pytest.mark.parametrize("implementation", RUNNABLE)
class TestGroupedGLU:
    @pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
    def test_value_and_gradients(self, implementation: str, dtype: jnp.dtype, rng: np.random.Generator) -> None:
        """Groups straddle tiles, some are empty, the last rows belong to none; at most a slice of the groups is held."""
        m, d, f, e = 43, 20, 140, 5
        x, dh = (rng.normal(size=(m, n)).astype(dtype) for n in (d, f))
        w_gate, w_up = ((rng.normal(size=(e, d, f)) / 4).astype(dtype) for _ in range(2))

        @jax.jit
        def run(x: jax.Array, w_gate: jax.Array, w_up: jax.Array, sizes: jax.Array, offset: jax.Array) -> tuple:
            def glu(*arrays: jax.Array) -> jax.Array:
                return grouped_glu(*arrays, sizes, implementation=implementation, group_offset=offset)

            h, pull = jax.vjp(glu, x, w_gate, w_up)
            return h, *pull(jnp.asarray(dh))

        scale = 2e-2 if dtype == jnp.bfloat16 else 1e-5
        for sizes, offset in [((9, 0, 19, 1, 8), 1), ((0, 0, 0, 0, 0), 0), ((0, 43, 0, 0, 0), 0)]:
            held = slice(offset, offset + 3)
            actual = run(x, w_gate[held], w_up[held], jnp.array(sizes, jnp.int32), jnp.int32(offset))
            exact = (np.asarray(a, np.float64) for a in (x, w_gate[held], w_up[held]))
            expected = numpy_glu(*exact, np.array(sizes), offset, np.asarray(dh, np.float64))
            for a, b in zip(actual, expected, strict=True):
                assert a.dtype == dtype
                a = np.asarray(a, np.float64)
                np.testing.assert_allclose(a, b, rtol=scale, atol=scale * np.abs(b).max())
                assert not np.any(a[~b.reshape(b.shape[0], -1).any(1)])  # other rows and empty groups: exactly zero
        if implementation == "interpret_tpu":
            assert no_races()

    def test_any_activation_with_a_derivative(self, implementation: str, rng: np.random.Generator) -> None:
        x, w_gate, w_up = (jnp.asarray(rng.normal(size=s), jnp.float32) for s in ((6, 4), (1, 4, 5), (1, 4, 5)))
        sizes = jnp.array([6], jnp.int32)

        def grouped(x: jax.Array) -> jax.Array:
            return (grouped_glu(x, w_gate, w_up, sizes, jnp.tanh, implementation) ** 2).sum()

        def dense(x: jax.Array) -> jax.Array:
            return ((jnp.tanh(x @ w_gate[0]) * (x @ w_up[0])) ** 2).sum()

        actual, expected = (jax.jit(jax.value_and_grad(function))(x) for function in (grouped, dense))
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4), actual, expected)


def test_wrong_calls_raise() -> None:
    x, w, sizes = jnp.ones((2, 2)), jnp.ones((1, 2, 2)), jnp.array([1, 1], jnp.int32)
    with pytest.raises(ValueError, match="w_gate holds 1 matrices for 2 groups"):
        grouped_glu(x, w, w, sizes)
    with pytest.raises(ValueError, match="implementation='triton' of grouped_glu is unknown"):
        grouped_glu(x, w, w, sizes, implementation="triton", group_offset=0)
    assert AUTO["cpu"][0] == "xla"


@pytest.mark.slow
@pytest.mark.tpu_aot
class TestCompiled:
    @pytest.mark.parametrize("kind", KINDS)
    @pytest.mark.parametrize(
        ("m", "d", "f", "e", "dtype"), [(8192, 1024, 4096, 32, jnp.bfloat16), (700, 200, 330, 5, jnp.float32)]
    )
    def test_one_kernel_forward_and_two_backward(self, kind: str, m: int, d: int, f: int, e: int, dtype: jnp.dtype) -> None:
        x, w, dh = (jax.ShapeDtypeStruct(s, dtype) for s in ((m, d), (e, d, f), (m, f)))
        sizes = jax.ShapeDtypeStruct((e,), jnp.int32)
        forward = compile_for(kind, grouped_glu, x, w, w, sizes)
        assert custom_calls(forward) == ["grouped_glu"]
        assert forward.memory_analysis().temp_size_in_bytes < 2**21

        def step(x: jax.Array, w_gate: jax.Array, w_up: jax.Array, sizes: jax.Array, dh: jax.Array) -> tuple:
            h, pull = jax.vjp(lambda *arrays: grouped_glu(*arrays, sizes), x, w_gate, w_up)
            return h, pull(dh)

        compiled = compile_for(kind, step, x, w, w, sizes, dh)
        assert sorted(custom_calls(compiled)) == ["grouped_glu_dw", "grouped_glu_dx", "grouped_glu_saving"]
        # What stays between forward and backward: gate and up.
        assert compiled.memory_analysis().temp_size_in_bytes < 2.1 * m * f * dtype.dtype.itemsize + 2**22

    def test_auto_on_tpu_takes_what_the_kernel_refuses_elsewhere(self) -> None:
        x, w, sizes = jnp.ones((4, 2), jnp.float16), jnp.ones((1, 2, 2), jnp.float16), jnp.array([4], jnp.int32)
        with target("v5e"):
            assert float(grouped_glu(x, w, w, sizes, lambda a: a)[0, 0]) == 4
