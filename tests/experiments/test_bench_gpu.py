"""The bench of the GPU kernels, run on a CPU with interpreted kernels: its checks, its search and what it prints."""

import dataclasses
import re
from collections.abc import Callable, Mapping
from types import SimpleNamespace
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest

from experiments.bench import gpu_kernels
from experiments.bench.gpu_kernels import OPERATIONS, SHAPES, Operation, Result, Shape, candidate_tiles, entries, run, table
from experiments.bench.timing import Timing
from pallas_kernels.grouped_matmul.gpu import SHARED, TILES, Tiles, shared_bytes

TINY = Shape("tiny", m=40, d=16, f=16, e=3)
SMALL = [Tiles(16, 16, 16, 1, 1), Tiles(32, 16, 16, 1, 1), Tiles(16, 32, 16, 1, 1)]


def fake_race(costs: Callable[[Any], float]) -> Callable[..., dict[Any, Timing]]:
    def race(functions: Mapping[Any, Any], pairs: Any, sizes: Any, repeats: int) -> dict[Any, Timing]:
        return {name: Timing(costs(name), costs(name), costs(name), 0.0, 0) for name in functions}

    return race


def test_shapes_share_their_rows_out() -> None:
    for shape in SHAPES.values():
        sizes = shape.sizes()
        assert sizes.sum() == shape.m
        assert sizes.shape == (shape.e,)
    assert SHAPES["skewed"].sizes()[0] > 10 * SHAPES["skewed"].sizes()[-1]
    assert np.ptp(SHAPES["olmoe"].sizes()) == 0


@pytest.mark.slow
def test_kernels_are_checked_timed_and_searched(monkeypatch: pytest.MonkeyPatch) -> None:
    """Interpreted kernels, JAX's own product and the real race; PyTorch has no GPU to time on."""
    monkeypatch.setattr(gpu_kernels, "CALLS", 1)
    monkeypatch.setattr(gpu_kernels, "OPERATIONS", OPERATIONS[:1])
    (result,) = run([TINY], repeats=3, candidates=lambda *_: SMALL[:1], interpret=True)
    assert result.operation == "gmm"
    assert set(result.timings) == {"dense", "ours", "ragged_dot"}
    assert set(result.failed) == {"torch"}
    assert set(result.tiles) == set(SMALL[:1])
    assert 0 < result.error < 1e-2
    assert all(t.median > 0 for t in (*result.timings.values(), *result.tiles.values()))


def test_search_takes_the_fastest_and_leaves_out_what_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    def costs(name: Any) -> float:
        if name in ("ragged_dot", SMALL[0]):
            raise MemoryError("no room\nat all")
        return {SMALL[1]: 3e-3, SMALL[2]: 2e-3}.get(name, 4e-3)

    monkeypatch.setattr(gpu_kernels, "_race", fake_race(costs))
    monkeypatch.setattr(gpu_kernels, "_check", lambda *_: 0.0)
    (result, _) = run([TINY], repeats=3, against=("ragged_dot",), candidates=lambda *_: SMALL)
    assert list(result.tiles) == [SMALL[2], SMALL[1]]
    assert result.failed == {"ragged_dot": "MemoryError: no room"}
    line = next(line for line in table([result]).splitlines() if line.startswith("Tiles(16, 32"))
    assert line.split()[-3:] == ["2.000-2.000", "0.0", "0.50"]
    assert "ragged_dot" + " " * 34 + "MemoryError: no room" in table([result])


def test_entries_can_be_pasted_and_serve_the_worst_of_a_bucket() -> None:
    def result(shape: Shape, seconds: dict[Tiles, float]) -> Result:
        ordered = sorted(seconds.items(), key=lambda item: item[1])
        return Result("gmm", shape, "h100", 0.0, tiles={t: Timing(s, s, s, 0, 0) for t, s in ordered})

    a, b, c = SMALL
    many = Shape("many", m=6400, d=64, f=64, e=4)
    results = [
        result(many, {a: 1.0, b: 1.1, c: 3.0}),
        result(dataclasses.replace(many, name="more"), {b: 2.0, c: 2.1, a: 4.0}),
        result(dataclasses.replace(many, m=32, name="few"), {c: 1.0}),
    ]
    text = entries(results)
    assert "# measured: many, more" in text
    pasted = eval("{" + text + "}", {"Tiles": Tiles, "math": __import__("math")})
    assert pasted == {"h100": {("gmm", 2, 16): c, ("gmm", 2, float("inf")): b}}
    assert set(pasted["h100"]) <= set(TILES["default"])


@pytest.mark.parametrize("chip", ["a100", "h100"])
def test_candidates_fit_the_chip_and_hold_what_the_table_has(chip: str) -> None:
    for (operation, size, _), tiles in (TILES["default"] | TILES[chip]).items():
        dtype = {2: "bfloat16", 4: "float32"}[size]
        found = candidate_tiles(operation, dtype, chip)
        assert 20 < len(found) < 400
        assert all(shared_bytes(t, size) <= SHARED[chip] for t in found)
        if shared_bytes(tiles, size) >= SHARED[chip] // 4 and size == 2 and tiles.rows > 16:
            assert tiles in found


def test_a_wrong_kernel_is_found_before_it_is_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    gmm = OPERATIONS[0]
    wrong = dataclasses.replace(gmm, ours=lambda tiles, **_: lambda x, w, sizes: jnp.zeros((x.shape[0], w.shape[2]), x.dtype))
    monkeypatch.setattr(gpu_kernels, "OPERATIONS", (wrong,))
    with pytest.raises(RuntimeError, match=re.escape("gmm is wrong by 1.0e+00 of its largest value in bfloat16")):
        run([TINY], repeats=3)


@pytest.mark.parametrize("operation", OPERATIONS, ids=lambda o: o.name)
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_contestants_compute_the_same(operation: Operation, dtype: str, rng: np.random.Generator) -> None:
    """PyTorch is stood in for by NumPy, with the few functions that are used of it."""
    sizes = TINY.sizes()
    left, right = (rng.normal(size=side(TINY)).astype(np.float32) for side in (operation.left, operation.right))
    exact = operation.exact(left, right, sizes)
    ragged = operation.ragged_dot(jnp.asarray(left), jnp.asarray(right), jnp.asarray(sizes))
    np.testing.assert_allclose(ragged, exact, rtol=1e-4, atol=1e-4)

    def grouped(a: np.ndarray, b: np.ndarray, offs: np.ndarray) -> np.ndarray:
        starts = [0, *offs[:-1]]
        if b.ndim == 3:
            return np.concatenate([a[i:j] @ w for i, j, w in zip(starts, offs, b, strict=True)])
        return np.stack([a[:, i:j] @ b[i:j] for i, j in zip(starts, offs, strict=True)])

    torch = SimpleNamespace(
        bfloat16=np.dtype(np.float32 if dtype == "bfloat16" else np.float64),
        split=lambda x, parts: np.split(x, np.cumsum(parts)[:-1]),
        cat=np.concatenate,
        stack=np.stack,
        _grouped_mm=grouped,
    )
    other = operation.torch(torch, left, right, sizes, np.cumsum(sizes))
    np.testing.assert_allclose(other, exact, rtol=1e-4, atol=1e-4)
