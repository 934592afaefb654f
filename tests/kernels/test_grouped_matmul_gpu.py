"""The GPU kernels of grouped matmul: what is theirs alone. `test_grouped_matmul` runs them through the common contract."""

import re
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from kernels.gpu import KINDS, TritonKernel, lower_for, triton_kernels

from pallas_kernels import grouped_matmul
from pallas_kernels.grouped_matmul import gpu
from pallas_kernels.grouped_matmul.gpu import SHARED, TILES, Tiles, program_order, shared_bytes, tiles_for, visits_table
from pallas_kernels.implementations import target

M, D, F, E = 8192, 2048, 1408, 64


def shapes(dtype: jnp.dtype, m: int = M, d: int = D, f: int = F, e: int = E, held: int = E) -> tuple[jax.ShapeDtypeStruct, ...]:
    shape = jax.ShapeDtypeStruct
    return shape((m, d), dtype), shape((held, d, f), dtype), shape((e,), jnp.int32)


def vjp(x: jax.Array, w: jax.Array, sizes: jax.Array, offset: jax.Array | None = None, implementation: str = "auto") -> tuple:
    y, pull = jax.vjp(lambda x, w: grouped_matmul(x, w, sizes, implementation, offset), x, w)
    return y, *pull(y)


def kernels(function: object, *args: jax.ShapeDtypeStruct, kind: str = "h100") -> dict[str, TritonKernel]:
    found = triton_kernels(lower_for(kind, function, *args))
    assert len({k.name for k in found}) == len(found)
    return {k.name: k for k in found}


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16, jnp.float32])
def test_forward_and_backward_lower_to_three_kernels(dtype: jnp.dtype) -> None:
    lowered = lower_for("h100", vjp, *shapes(dtype))
    found = {k.name: k for k in triton_kernels(lowered)}
    assert sorted(found) == ["grouped_matmul", "grouped_matmul_transposed", "grouped_matmul_weights"]
    name = {jnp.bfloat16: "bf16", jnp.float16: "f16", jnp.float32: "f32"}[dtype]
    for kernel in found.values():
        # Operands reach the tensor cores in their own type, and the sum is float32.
        assert kernel.dots == {(name, name, "f32")}
        assert kernel.widenings == set()
        assert kernel.precisions == ({"ieee"} if dtype == jnp.float32 else set())
    # No array pairs rows with groups: nothing is expanded, and nothing is computed that is not there.
    found = [set(s.split("x")) for s in re.findall(r"tensor<((?:\d+x)+)\w+>", lowered.as_text())]
    assert {str(M), str(D), ""} in found
    assert not [s for s in found if {str(M), str(E)} <= s]
    assert "stablehlo.dot_general" not in lowered.as_text()


def test_grid_covers_all_visits_and_columns() -> None:
    found = kernels(partial(vjp, implementation="gpu"), *shapes(jnp.bfloat16))
    forward = tiles_for_h100("gmm")
    visits = (M + (E + 2) * (forward.rows - 1)) // forward.rows
    assert found["grouped_matmul"].grid == (visits * -(-F // forward.columns), 1, 1)
    assert found["grouped_matmul_transposed"].grid == (visits * -(-D // forward.columns), 1, 1)
    weights = tiles_for_h100("tgmm")
    assert found["grouped_matmul_weights"].grid == (E * -(-D // weights.rows) * -(-F // weights.columns), 1, 1)
    assert found["grouped_matmul"].num_warps == forward.warps
    assert found["grouped_matmul"].num_stages == forward.stages


def tiles_for_h100(operation: str) -> Tiles:
    with target("h100"):
        return tiles_for(operation, jnp.bfloat16, M, E)


@pytest.mark.parametrize("kind", KINDS)
def test_odd_sizes_and_a_slice_of_the_groups_lower_for_every_chip(kind: str) -> None:
    args = shapes(jnp.bfloat16, m=1001, d=257, f=131, e=7, held=3)
    found = kernels(vjp, *args, jax.ShapeDtypeStruct((), jnp.int32), kind=kind)
    assert len(found) == 3
    # Every load of an operand is masked, and every store: nothing divides anything here.
    for kernel in found.values():
        loads = re.findall(r"tt\.load (.*) : tensor<\d+x\d+x!tt\.ptr<bf16>>", kernel.text)
        assert len(loads) >= 2
        assert all("," in load for load in loads)
        assert all(store.count(",") == 2 for store in re.findall(r"tt\.store (.*) : tensor<\d+x\d+x", kernel.text))


def test_masks_are_left_out_where_tiles_divide_the_sizes_but_never_of_rows() -> None:
    """Rows past a group's end belong to another program, which may write them first: the interpreter, which runs programs in order,
    would not tell."""
    found = kernels(vjp, *shapes(jnp.bfloat16, d=2048, f=1024))
    for name, matrix, rows in (("grouped_matmul", "64x256", "128x64"), ("grouped_matmul_transposed", "256x64", "128x64")):
        loads = re.findall(r"tt\.load (.*) : tensor<(\d+x\d+)x!tt\.ptr<bf16>>", found[name].text)
        assert (rows, True) in {(tile, "," in load) for load, tile in loads}
        assert (matrix, False) in {(tile, "," in load) for load, tile in loads}
        [store] = re.findall(r"tt\.store (.*) : tensor<\d+x\d+x", found[name].text)
        assert store.count(",") == 2
    # The weights' gradients: both operands are rows, and the result has none.
    text = found["grouped_matmul_weights"].text
    loads = re.findall(r"tt\.load (.*) : tensor<64x(?:128|256)x!tt\.ptr<bf16>>", text)
    assert len(loads) == 2
    assert all("," in load for load in loads)
    [store] = re.findall(r"tt\.store (.*) : tensor<\d+x\d+x", text)
    assert store.count(",") == 1


def test_masks_keep_their_structure() -> None:
    """A reshape of a mask hides from Triton that neighbours share it, and turns 16-byte copies into loads of single elements."""
    for kernel in kernels(vjp, *shapes(jnp.bfloat16, d=2000, f=1408)).values():
        assert "tt.reshape" not in kernel.text


def test_precision_of_float32_products_is_asked_for() -> None:
    args = shapes(jnp.float32, m=256, d=64, f=64, e=4, held=4)
    with jax.default_matmul_precision("tensorfloat32"):
        assert {p for k in kernels(vjp, *args).values() for p in k.precisions} == {"tf32"}
    with jax.default_matmul_precision("highest"):
        assert {p for k in kernels(vjp, *args).values() for p in k.precisions} == {"ieee"}


def test_offsets_have_64_bits_where_32_are_too_few() -> None:
    def offsets(held: int) -> set[str]:
        text = kernels(grouped_matmul, *shapes(jnp.bfloat16, m=256, d=4096, f=4096, e=held, held=held))["grouped_matmul"].text
        return set(re.findall(r"tt\.addptr .*tensor<64x128x!tt\.ptr<bf16>>, tensor<64x128x(\w+)>", text))

    assert offsets(64) == {"i32"}
    assert offsets(160) == {"i64"}  # 160 * 4096 * 4096 elements are more than 2**31


def test_auto_takes_the_kernels_on_gpus_and_says_why_a_named_one_cannot() -> None:
    x, w, sizes = shapes(jnp.bfloat16, m=64, d=32, f=32, e=2, held=2)
    mixed = jax.ShapeDtypeStruct(w.shape, jnp.float32)
    assert kernels(grouped_matmul, x, w, sizes)
    with pytest.raises(ValueError, match="implementation='gpu' of grouped_matmul cannot run: it takes float32, bfloat16 or"):
        lower_for("h100", lambda *a: grouped_matmul(*a, "gpu"), x, mixed, sizes)


@pytest.mark.parametrize(
    ("tiles", "dtype"),
    [(Tiles(16, 32, 64, 1, 1, band=3), jnp.bfloat16), (Tiles(32, 16, 16, 1, 1, band=1), jnp.float32)],
)
def test_values_with_tiles_of_unequal_sides(tiles: Tiles, dtype: jnp.dtype, rng: np.random.Generator) -> None:
    m, d, f, held = 83, 70, 37, 3
    x, dy = (jnp.asarray(rng.normal(size=s), dtype) for s in ((m, d), (m, f)))
    w = jnp.asarray(rng.normal(size=(held, d, f)), dtype)
    exact_x, exact_w, exact_dy = (np.asarray(a, np.float64) for a in (x, w, dy))

    @jax.jit
    def run(sizes: jax.Array, offset: jax.Array) -> tuple[jax.Array, ...]:
        options = {"tiles": tiles, "interpret": True}
        return (
            gpu.gmm(x, w, sizes, offset, False, **options),
            gpu.gmm(dy, w, sizes, offset, True, **options),
            gpu.tgmm(x, dy, sizes, offset, held, **options),
        )

    tolerance = {"rtol": 1e-2, "atol": 0.05} if dtype == jnp.bfloat16 else {"rtol": 1e-5, "atol": 1e-4}
    for sizes, offset in (([40, 0, 17, 1, 20], 1), ([0, 0, 83, 0, 0], 2), ([16, 16, 16, 16, 19], 0)):
        ends = np.cumsum(sizes)[offset : offset + held]
        y, dx, dw = np.zeros((m, f)), np.zeros((m, d)), np.zeros((held, d, f))
        for i, (end, size) in enumerate(zip(ends, sizes[offset : offset + held], strict=True)):
            rows = slice(end - size, end)
            y[rows], dx[rows] = exact_x[rows] @ exact_w[i], exact_dy[rows] @ exact_w[i].T
            dw[i] = exact_x[rows].T @ exact_dy[rows]
        got = [np.asarray(a, np.float64) for a in run(jnp.array(sizes, jnp.int32), jnp.int32(offset))]
        np.testing.assert_allclose(got[0], y, **tolerance)
        np.testing.assert_allclose(got[1], dx, **tolerance)
        np.testing.assert_allclose(got[2], dw, rtol=1e-5, atol=1e-4)  # float32 sums of exact products


def test_pairs_of_operands_add_up_in_one_kernel(rng: np.random.Generator) -> None:
    m, d, f, e = 21, 18, 20, 2
    xs = [jnp.asarray(rng.normal(size=(m, d)), jnp.float32) for _ in range(2)]
    ws = [jnp.asarray(rng.normal(size=(e, d, f)), jnp.float32) for _ in range(2)]
    sizes = jnp.array([9, 10], jnp.int32)
    y = gpu.gmm_sum(xs, ws, sizes, jnp.int32(0), False, **gpu.INTERPRET)
    expected = np.zeros((m, f))
    for x, w in zip(xs, ws, strict=True):
        expected[:9] += np.asarray(x)[:9] @ np.asarray(w)[0]
        expected[9:19] += np.asarray(x)[9:19] @ np.asarray(w)[1]
    np.testing.assert_allclose(y, expected, rtol=1e-5, atol=1e-5)


def test_visits_cover_every_row_once(rng: np.random.Generator) -> None:
    m, e, held, rows = 61, 6, 4, 8
    table = jax.jit(partial(visits_table, num_groups=held, m=m, rows=rows))
    tried = [rng.multinomial(rng.integers(m + 1), rng.dirichlet(np.full(e, 0.4))) for _ in range(60)]
    tried += [np.zeros(e, int), np.full(e, 10), np.array([1] * 5 + [56]), np.array([61, 0, 0, 0, 0, 0]), np.full(e, 9)]
    for n, sizes in enumerate(tried):
        offset = n % 3
        group, start, stop = np.asarray(table(jnp.asarray(sizes, jnp.int32), jnp.int32(offset)))
        owner = np.full(m, -2)
        for g, a, b in zip(group, start, stop, strict=True):
            assert b - a <= rows
            assert (owner[a:b] == -2).all()
            owner[a:b] = g
        of_row = np.concatenate([np.repeat(np.arange(e), sizes), np.full(m - sizes.sum(), e)]) - offset
        np.testing.assert_array_equal(owner, np.where((of_row >= 0) & (of_row < held), of_row, -1))


def test_the_longest_table_is_needed() -> None:
    """The bound on the number of visits is not only safe: these sizes use every line."""
    m, e, rows = 26, 2, 8
    _, start, stop = np.asarray(visits_table(jnp.array([9, 9], jnp.int32), jnp.int32(0), e, m, rows))
    assert (start < stop).sum() == len(start) - 1
    _, start, stop = np.asarray(visits_table(jnp.array([1, 9], jnp.int32), jnp.int32(1), 1, m - 1, rows))
    assert (start < stop).all()


@pytest.mark.parametrize(("rows", "columns", "band"), [(7, 3, 2), (8, 5, 8), (3, 4, 8), (9, 1, 4)])
def test_program_order_visits_every_tile_once_in_bands(rows: int, columns: int, band: int) -> None:
    row, column = jax.vmap(lambda p: program_order(p, rows, columns, band))(jnp.arange(rows * columns))
    assert sorted(zip(row.tolist(), column.tolist(), strict=True)) == [(r, c) for r in range(rows) for c in range(columns)]
    assert (np.diff(np.asarray(row) // band) >= 0).all()
    first = min(band, rows)
    assert row[:first].tolist() == list(range(first))
    assert not column[:first].any()


def test_tiles_fit_every_chip() -> None:
    for chip in TILES:
        for (_, size, _), tiles in (TILES["default"] | TILES[chip]).items():
            assert shared_bytes(tiles, size) <= SHARED[chip], (chip, tiles)
            assert all(side >= 16 and side & (side - 1) == 0 for side in (tiles.rows, tiles.columns, tiles.depth))
            assert tiles.rows * tiles.columns <= 128 * 32 * tiles.warps  # float32 sums, at most half of the registers


def test_tiles_follow_the_chip_and_the_size_of_groups() -> None:
    with target("h100"):
        assert tiles_for("gmm", jnp.bfloat16, 64, 64).rows == 16
        assert tiles_for("gmm", jnp.bfloat16, 64 * 64, 64).rows == 64
        large = tiles_for("gmm", jnp.bfloat16, M, E)
    with target("a100"):
        assert tiles_for("gmm", jnp.bfloat16, M, E) != large
    assert tiles_for("gmm", jnp.bfloat16, M, E) == TILES["default"]["gmm", 2, float("inf")]  # no GPU: the default


def test_tiles_are_no_larger_than_narrow_matrices_need() -> None:
    """As those of LoRA experts: rank 8, of which the tensor cores take 16 columns."""
    found = kernels(vjp, *shapes(jnp.bfloat16, f=8))
    assert "tensor<64x16xbf16> -> tensor<128x16xf32>" in found["grouped_matmul"].text
    assert "tensor<16x256xbf16> -> tensor<128x256xf32>" in found["grouped_matmul_transposed"].text
    assert "tensor<64x16xbf16> -> tensor<128x16xf32>" in found["grouped_matmul_weights"].text
