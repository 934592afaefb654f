"""The GPU kernels of the grouped GLU: what is theirs alone. `test_grouped_glu` runs them through the common contract."""

import re
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from kernels.gpu import KINDS, lower_for, triton_kernels

from pallas_kernels import grouped_glu
from pallas_kernels.grouped_glu import gpu
from pallas_kernels.grouped_glu.gpu import OPERANDS, TILES
from pallas_kernels.grouped_matmul.gpu import SHARED, Tiles, shared_bytes

M, D, F, E = 8192, 2048, 1408, 64


def shapes(dtype: jnp.dtype, m: int = M, d: int = D, f: int = F, e: int = E, held: int = E) -> tuple[jax.ShapeDtypeStruct, ...]:
    shape = jax.ShapeDtypeStruct
    return shape((m, d), dtype), shape((held, d, f), dtype), shape((held, d, f), dtype), shape((e,), jnp.int32)


def vjp(x: jax.Array, w_gate: jax.Array, w_up: jax.Array, sizes: jax.Array, offset: jax.Array | None = None) -> tuple:
    h, pull = jax.vjp(lambda x, a, b: grouped_glu(x, a, b, sizes, group_offset=offset), x, w_gate, w_up)
    return h, *pull(h)


def test_forward_reads_x_once_and_writes_the_hidden_units_only() -> None:
    lowered = lower_for("h100", grouped_glu, *shapes(jnp.bfloat16, f=1024))
    [kernel] = triton_kernels(lowered)
    assert kernel.name == "grouped_glu"
    # Per step one tile of x and one of each matrix (stores, which Pallas lowers with a load that is not used, come after).
    loop = kernel.text[kernel.text.index("scf.for") : kernel.text.index("scf.yield")]
    assert re.findall(r"tt\.load .* : tensor<(\d+x\d+)x!", loop) == ["128x64", "64x128", "64x128"]
    assert loop.count("tt.dot ") == 2
    [store] = re.findall(r"tt\.store (.*) :", kernel.text)
    assert store.count(",") == 2  # masked: rows past the group's end belong to other programs
    assert "stablehlo.dot_general" not in lowered.as_text()


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16, jnp.float32])
def test_forward_and_backward_lower(dtype: jnp.dtype) -> None:
    lowered = lower_for("h100", vjp, *shapes(dtype))
    found = triton_kernels(lowered)
    assert {k.name for k in found} == {"grouped_glu_saving", "grouped_glu_dx", "grouped_matmul_weights"}
    name = {jnp.bfloat16: "bf16", jnp.float16: "f16", jnp.float32: "f32"}[dtype]
    for kernel in found:
        assert kernel.dots == {(name, name, "f32")}
        assert kernel.widenings == set()
        assert kernel.precisions == ({"ieee"} if dtype == jnp.float32 else set())
    dx = next(k for k in found if k.name == "grouped_glu_dx")
    assert dx.text.count("tt.dot ") == 2
    assert dx.text.count("tt.store ") == 1
    assert "stablehlo.dot_general" not in lowered.as_text()
    arrays = [set(s.split("x")) for s in re.findall(r"tensor<((?:\d+x)+)\w+>", lowered.as_text())]
    assert not [s for s in arrays if {str(M), str(E)} <= s]


@pytest.mark.parametrize("kind", KINDS)
def test_odd_sizes_and_a_slice_of_the_groups_lower_for_every_chip(kind: str) -> None:
    args = *shapes(jnp.bfloat16, m=1001, d=257, f=131, e=7, held=3), jax.ShapeDtypeStruct((), jnp.int32)
    found = triton_kernels(lower_for(kind, vjp, *args))
    assert {k.name for k in found} == {"grouped_glu_saving", "grouped_glu_dx", "grouped_matmul_weights"}
    for kernel in found:
        loads = re.findall(r"tt\.load (.*) : tensor<\d+x\d+x!tt\.ptr<bf16>>", kernel.text)
        assert loads
        assert all("," in load for load in loads)
        assert all(store.count(",") == 2 for store in re.findall(r"tt\.store (.*) : tensor<\d+x\d+x", kernel.text))


@pytest.mark.parametrize("activation", [jax.nn.gelu, jax.nn.relu, jax.nn.tanh, jax.nn.mish])
def test_activations_lower(activation: object) -> None:
    args = shapes(jnp.bfloat16, m=256, d=64, f=64, e=4, held=4)
    [kernel] = triton_kernels(lower_for("a100", lambda *a: grouped_glu(*a, activation, "gpu"), *args))
    assert kernel.name == "grouped_glu"


def test_activations_that_triton_does_not_know_are_left_to_xla(rng: np.random.Generator) -> None:
    gelu = partial(jax.nn.gelu, approximate=False)
    args = shapes(jnp.bfloat16, m=256, d=64, f=64, e=4, held=4)
    [kernel] = triton_kernels(lower_for("a100", lambda *a: grouped_glu(*a, gelu, "gpu"), *args))
    assert kernel.name == "grouped_glu_products"
    x, w_gate, w_up = (jnp.asarray(rng.normal(size=s), jnp.float32) for s in ((9, 4), (2, 4, 3), (2, 4, 3)))
    sizes = jnp.array([4, 3], jnp.int32)
    got, expected = (
        jax.jit(jax.value_and_grad(lambda *a, n=n: jnp.sin(grouped_glu(*a, sizes, gelu, n)).sum(), (0, 1, 2)))(x, w_gate, w_up)
        for n in ("interpret_gpu", "reference")
    )
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5), got, expected)


@pytest.mark.parametrize(
    ("tiles", "dtype"),
    [(Tiles(16, 32, 64, 1, 1, band=3), jnp.bfloat16), (Tiles(32, 16, 16, 1, 1, band=1), jnp.float32)],
)
def test_values_and_gradients_of_a_slice_of_the_groups(tiles: Tiles, dtype: jnp.dtype, rng: np.random.Generator) -> None:
    m, d, f, held, offset, sizes = 83, 70, 37, 3, 1, [40, 0, 17, 1, 20]
    x, w_gate, w_up, dh = (jnp.asarray(rng.normal(size=s) / 3, dtype) for s in ((m, d), (held, d, f), (held, d, f), (m, f)))

    @jax.jit
    def run(x: jax.Array, w_gate: jax.Array, w_up: jax.Array) -> tuple[jax.Array, ...]:
        args = jnp.array(sizes, jnp.int32), jnp.int32(offset), jax.nn.silu, tiles, True
        h, pull = jax.vjp(lambda *a: gpu.glu(*a, *args), x, w_gate, w_up)
        return gpu.glu(x, w_gate, w_up, *args), h, *pull(dh)

    alone, *got = (np.asarray(a, np.float64) for a in run(x, w_gate, w_up))
    exact = [np.asarray(a, np.float64) for a in (x, w_gate, w_up, dh)]
    expected = [np.zeros(a.shape) for a in (dh, x, w_gate, w_up)]
    ends = np.cumsum(sizes)
    for i in range(held):
        rows = slice(ends[offset + i] - sizes[offset + i], ends[offset + i])
        inputs, grads = exact[0][rows], exact[3][rows]
        gate, up = inputs @ exact[1][i], inputs @ exact[2][i]
        sigmoid = 1 / (1 + np.exp(-gate))
        expected[0][rows] = gate * sigmoid * up
        dgate, dup = grads * up * sigmoid * (1 + gate * (1 - sigmoid)), grads * gate * sigmoid
        expected[1][rows] = dgate @ exact[1][i].T + dup @ exact[2][i].T
        expected[2][i], expected[3][i] = inputs.T @ dgate, inputs.T @ dup
    assert alone.any()
    np.testing.assert_array_equal(alone, got[0])
    for actual, value in zip(got, expected, strict=True):
        # bfloat16 rounds gate, up and their gradients on the way to memory.
        limit = 0.02 if dtype == jnp.bfloat16 else 1e-5
        np.testing.assert_allclose(actual, value, rtol=limit, atol=limit * np.abs(value).max())
        np.testing.assert_array_equal(actual[value == 0], 0)


def test_tiles_fit_every_chip() -> None:
    for chip in TILES:
        for (operation, size, _), tiles in (TILES["default"] | TILES[chip]).items():
            assert shared_bytes(tiles, size, *OPERANDS[operation]) <= SHARED[chip], (chip, tiles)
            assert all(side >= 16 and side & (side - 1) == 0 for side in (tiles.rows, tiles.columns, tiles.depth))
            sums = {"glu": 2, "glu_dx": 1}[operation]
            assert sums * tiles.rows * tiles.columns <= 128 * 32 * tiles.warps  # at most half of the registers
