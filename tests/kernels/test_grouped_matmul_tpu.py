"""Grouped matmul's TPU kernels: visits, tiles, the interpreter with tiles of all kinds, and the real compiler."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from kernels.tpu import KINDS, compile_for, custom_calls, no_races

from pallas_kernels import grouped_matmul
from pallas_kernels.chips import TPUS
from pallas_kernels.grouped_matmul import tiles as tiles_module
from pallas_kernels.grouped_matmul import tpu
from pallas_kernels.grouped_matmul.tiles import Problem, Tiles, choose, seconds
from pallas_kernels.grouped_matmul.visits import group_visits, row_visits
from pallas_kernels.implementations import target

SHAPES = {"wide": (8192, 1024, 4096, 32), "deepseek": (8192, 2048, 1408, 64)}


def some_sizes(rng: np.random.Generator, e: int, m: int) -> np.ndarray:
    """Sizes that sum to at most m, about half of them zero."""
    sizes = rng.integers(0, 2, e) * rng.integers(1, 15, e)
    while sizes.sum() > m:
        sizes[rng.integers(e)] = 0
    return sizes


class TestVisits:
    """Against a loop over all groups and tiles."""

    @pytest.mark.parametrize("held", [2, 6])
    def test_every_shared_pair_once_and_every_tile_or_group(self, held: int, rng: np.random.Generator) -> None:
        e, tile = 6, 8
        for m in (37, 40):
            by_row = jax.jit(lambda s, o, m=m: row_visits(s, o, held, m, tile))
            by_group = jax.jit(lambda s, o, m=m: group_visits(s, o, held, m, tile))
            tiles = -(-m // tile)
            for i in range(25):
                sizes = some_sizes(rng, e, m) * (i > 0)
                offset = int(rng.integers(0, e - held + 1))
                ends = np.cumsum(sizes)[offset : offset + held]
                starts = ends - sizes[offset : offset + held]
                shared = [
                    (g, t) for g in range(held) for t in range(tiles) if max(starts[g], t * tile) < min(ends[g], (t + 1) * tile)
                ]
                for visits, most in [(by_row(jnp.asarray(sizes), offset), 1), (by_group(jnp.asarray(sizes), offset), -1)]:
                    count = int(visits.count)
                    assert count <= len(visits.group) == tiles + held + most
                    rows = [tuple(int(a[v]) for a in visits[:5]) for v in range(count)]
                    computing = [row for row in rows if row[3] < row[4]]
                    assert [(g, t) for g, t, *_ in computing] == shared
                    assert all((a, b) == (starts[g], ends[g]) and t == source for g, t, source, a, b in computing)
                    assert all(0 <= g < held and 0 <= t < tiles and 0 <= source < tiles for g, t, source, *_ in rows)
                    # Visits that compute nothing cost no matrix and no row tile beside those in use.
                    if shared and most == 1:
                        assert {g for g, *_ in rows} == {g for g, _ in shared}
                        assert {source for _, _, source, *_ in rows} == {t for _, t in shared}
                rows = by_row(jnp.asarray(sizes), offset)
                seen = [int(t) for t in rows.tile[: int(rows.count)]]
                assert seen == sorted(seen)
                assert set(seen) == set(range(tiles))
                groups = by_group(jnp.asarray(sizes), offset)
                seen = [int(g) for g in groups.group[: int(groups.count)]]
                assert seen == sorted(seen)
                assert set(seen) == set(range(held))


class TestInterpreter:
    """Simulated memory that is NaN until written; rows past the last group are infinite."""

    @pytest.mark.parametrize(
        ("tiles", "transpose", "dtype"),
        [
            (Tiles(rows=32, inner=128, columns=128, window=8), False, jnp.float32),  # d and f end inside a tile
            (Tiles(rows=16, inner=128, columns=256, window=16), True, jnp.bfloat16),
            (Tiles(rows=48, inner=200, columns=256, window=16), True, jnp.float32),  # d whole, columns in chunks
        ],
    )
    def test_tiles_of_all_kinds(
        self, tiles: Tiles, transpose: bool, dtype: jnp.dtype, rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(tiles_module, "_UNROLLED", 1)  # chunks of 128 columns
        m, d, f, held, offset = 77, 200, 300, 3, 1
        sizes = np.array([9, 22, 0, 31, 5])
        x, dy = (rng.normal(size=(m, n)).astype(dtype) for n in (d, f))
        x[sizes.sum() :] = dy[sizes.sum() :] = np.inf
        w = rng.normal(size=(held, f, d) if transpose else (held, d, f)).astype(dtype)
        options = dict(tiles=tiles, interpret=tpu.INTERPRET["interpret"])

        @jax.jit
        def both(x: jax.Array, w: jax.Array, dy: jax.Array, sizes: jax.Array, offset: jax.Array) -> tuple[jax.Array, ...]:
            y = tpu.gmm(x, w, sizes, offset, transpose, **options)
            return y, tpu.tgmm(x, dy, sizes, offset, held, jnp.float32, **options)

        y, dw = jax.block_until_ready(both(x, w, dy, jnp.asarray(sizes), jnp.int32(offset)))
        assert no_races()
        assert y.dtype == dtype
        assert dw.dtype == jnp.float32
        x, w, dy, y = (np.asarray(a, np.float64) for a in (x, w, dy, y))
        expected, ends = np.zeros((m, f)), np.cumsum(sizes)
        for g in range(held):
            rows = slice(ends[offset + g] - sizes[offset + g], ends[offset + g])
            expected[rows] = x[rows] @ (w[g].T if transpose else w[g])
            np.testing.assert_allclose(dw[g], x[rows].T @ dy[rows], rtol=1e-5, atol=1e-5)
        tolerance = dict(rtol=1e-2, atol=1e-1) if dtype == jnp.bfloat16 else dict(rtol=1e-5, atol=1e-4)  # the output's rounding
        np.testing.assert_allclose(y, expected, **tolerance)


class TestTiles:
    def test_fit_vmem_and_the_chips_layout_whatever_the_sizes(self) -> None:
        for kind, chip in TPUS.items():
            for m, d, f, e in [(8, 7, 9, 3), (200, 1000, 3000, 5), (4096, 53248, 16384, 8)]:
                for itemsize, operands, matrices in [(2, 1, 1), (4, 3, 2)]:
                    problem = Problem(m, d, f, e, e, operands, matrices, 1, itemsize, itemsize)
                    for kernel in ("rows_by_groups", "groups_by_rows"):
                        with target(kind):
                            tiles = choose(kernel, problem)
                        assert problem.cost(kernel, tiles).vmem <= 0.64 * chip.vmem
                        assert tiles.rows % tiles.window == 0
                        assert tiles.rows % 16 == 0
                        assert all(t == n or t % 128 == 0 for t, n in [(tiles.inner, d), (tiles.columns, f)])

    def test_a_measured_entry_goes_before_the_model(self, monkeypatch: pytest.MonkeyPatch) -> None:
        problem = Problem(5000, 1024, 4096, 32, 32)
        measured = Tiles(128, 512, 512, 128)
        monkeypatch.setitem(tiles_module.TILES, ("v6e", "rows_by_groups", 8192, 1024, 4096, 32, 32), measured)
        with target("v6e"):
            assert choose("rows_by_groups", problem) == measured
        with target("v5e"):
            assert choose("rows_by_groups", problem) != measured

    def test_the_choice_reads_weights_once_where_a_large_cube_does_not(self) -> None:
        problem = Problem(*SHAPES["wide"][:3], 32, 32)
        cube = Tiles(512, 512, 1024, 512)
        with target("v5e"):
            chosen = choose("rows_by_groups", problem)
            assert chosen.inner == problem.d
            assert seconds("rows_by_groups", problem, chosen, TPUS["v5e"]) < seconds(
                "rows_by_groups", problem, cube, TPUS["v5e"]
            )
        weights = 2 * 32 * 1024 * 4096
        assert problem.cost("rows_by_groups", chosen).bytes < 1.4 * weights < problem.cost("rows_by_groups", cube).bytes


def step(x: jax.Array, w: jax.Array, sizes: jax.Array, dy: jax.Array) -> tuple[jax.Array, ...]:
    y, pull = jax.vjp(lambda x, w: grouped_matmul(x, w, sizes), x, w)
    return y, *pull(dy)


def shapes(m: int, d: int, f: int, e: int, dtype: jnp.dtype) -> list[jax.ShapeDtypeStruct]:
    arrays = [((m, d), dtype), ((e, d, f), dtype), ((e,), jnp.int32), ((m, f), dtype)]
    return [jax.ShapeDtypeStruct(shape, kind) for shape, kind in arrays]


@pytest.mark.slow
@pytest.mark.tpu_aot
class TestCompiled:
    @pytest.mark.parametrize("kind", KINDS)
    @pytest.mark.parametrize(("shape", "dtype"), [("wide", jnp.bfloat16), ("deepseek", jnp.float32)])
    def test_auto_is_three_kernels_and_nothing_of_the_weights_size_beside_them(
        self, kind: str, shape: str, dtype: jnp.dtype
    ) -> None:
        m, d, f, e = SHAPES[shape]
        compiled = compile_for(kind, step, *shapes(m, d, f, e, dtype))
        assert sorted(custom_calls(compiled)) == ["grouped_matmul", "grouped_matmul", "grouped_matmul_dw"]
        text = compiled.as_text()
        weights = rf"\[{e},(?:{d},{f}|{f},{d})\]\S* (?:copy|transpose|convert|fusion)\("
        assert not re.search(weights, text)
        assert compiled.memory_analysis().temp_size_in_bytes < 2**20

    def test_vmem_is_what_the_model_says(self) -> None:
        m, d, f, e = SHAPES["wide"]
        compiled = compile_for("v5e", lambda x, w, s: grouped_matmul(x, w, s), *shapes(m, d, f, e, jnp.bfloat16)[:3])
        [call] = [line for line in compiled.as_text().splitlines() if "tpu_custom_call" in line]
        used = int(re.search(r'"used_scoped_memory_configs":\[\{[^]]*?"size":"(\d+)"', call)[1])
        problem = Problem(m, d, f, e, e)
        with target("v5e"):
            tiles = choose("rows_by_groups", problem)
        assert used == pytest.approx(problem.cost("rows_by_groups", tiles).vmem, rel=0.1)

    def test_sizes_that_no_tile_divides(self) -> None:
        compiled = compile_for("v5p", step, *shapes(700, 200, 330, 5, jnp.bfloat16))
        assert len(custom_calls(compiled)) == 3

    def test_matrices_too_wide_for_vmem(self) -> None:
        """d is contracted tile by tile: of 32,000 columns not even 128 fit VMEM whole."""
        compiled = compile_for("tpu7x", step, *shapes(512, 40_000, 256, 4, jnp.float32))
        assert len(custom_calls(compiled)) == 3

    def test_matmuls_of_a_layer_share_their_visits(self) -> None:
        """Two products with the same row tiles: XLA computes the table of visits once."""

        def program(products: int) -> str:
            def f(x: jax.Array, w: jax.Array, sizes: jax.Array) -> list[jax.Array]:
                return [grouped_matmul(x, w * (i + 1), sizes) for i in range(products)]

            return compile_for("v6e", f, *shapes(1024, 256, 512, 8, jnp.bfloat16)[:3]).as_text()

        one, two = (len(re.findall(r" reduce\(", program(n))) for n in (1, 2))
        assert one == two > 0


def test_other_dtypes_are_refused_by_name_and_skipped_by_auto() -> None:
    args = jnp.ones((4, 2), jnp.float16), jnp.ones((1, 2, 2), jnp.float16), jnp.array([4], jnp.int32)
    with pytest.raises(ValueError, match="'tpu' of grouped_matmul cannot run: it takes float32 or bfloat16"):
        grouped_matmul(*args, implementation="tpu")
    with target("v5e"):
        assert grouped_matmul(*args).dtype == jnp.float16
