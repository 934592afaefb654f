"""The bench of the GPU kernels, run on a CPU with interpreted kernels: its checks, its search and what it prints."""

import math
import re
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments.bench import gpu_kernels
from experiments.bench.gpu_contestants import OPERATIONS, SHAPES, Operation, Shape
from experiments.bench.gpu_kernels import Result, candidate_tiles, check, entries, inputs, run, table
from experiments.bench.timing import Timing
from pallas_kernels.grouped_matmul.gpu import SHARED, Tiles, shared_bytes

TINY = Shape("tiny", m=40, d=16, f=24, e=3)
SMALL = [Tiles(16, 16, 16, 1, 1), Tiles(32, 16, 16, 1, 1), Tiles(16, 32, 16, 1, 1)]
GMM = OPERATIONS[0]


def fake_race(costs: Callable[[Any], float]) -> Callable[..., dict[Any, Timing]]:
    def timed(contestants: Mapping[Any, Any], operands: Any, sizes: Any, repeats: int) -> dict[Any, Timing]:
        return {name: Timing(costs(name), costs(name), costs(name), 0.0, 0) for name in contestants}

    return timed


def test_shapes_share_their_rows_out() -> None:
    for shape in SHAPES.values():
        sizes = shape.sizes()
        assert sizes.sum() == shape.m
        assert sizes.shape == (shape.e,)
    assert SHAPES["skewed"].sizes()[0] > 10 * SHAPES["skewed"].sizes()[-1]
    assert np.ptp(SHAPES["olmoe"].sizes()) == 0


@pytest.mark.slow
def test_a_kernel_is_checked_timed_and_searched(monkeypatch: pytest.MonkeyPatch) -> None:
    """Interpreted kernels, JAX's own product and the real race; PyTorch has no GPU to time on."""
    monkeypatch.setattr(gpu_kernels, "CALLS", 1)
    monkeypatch.setattr(gpu_kernels, "OPERATIONS", OPERATIONS[:1])
    (result,) = run([TINY], repeats=3, candidates=lambda *_: SMALL[:1], interpret=True)
    assert result.operation is GMM
    assert set(result.timings) == {"dense", "ours", "ragged_dot"}
    assert set(result.failed) == {"tokamax", "torch"}
    assert set(result.tiles) == set(SMALL[:1])
    assert 0 < result.error < 1e-2
    assert all(t.median > 0 for t in (*result.timings.values(), *result.tiles.values()))


@pytest.mark.parametrize("operation", OPERATIONS, ids=lambda o: o.name)
def test_kernels_pass_their_check(operation: Operation) -> None:
    assert 0 < check(operation, replace(TINY, dtype="float32"), interpret=True) < 1e-5


def test_search_takes_the_fastest_and_leaves_out_what_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    def costs(name: Any) -> float:
        if name in ("ragged_dot", SMALL[0]):
            raise MemoryError("no room\nat all")
        return {SMALL[1]: 3e-3, SMALL[2]: 2e-3}.get(name, 4e-3)

    monkeypatch.setattr(gpu_kernels, "timed", fake_race(costs))
    monkeypatch.setattr(gpu_kernels, "check", lambda *_: 0.0)
    results = run([TINY], repeats=3, against=("ragged_dot",), candidates=lambda *_: SMALL)
    assert [r.operation.name for r in results] == ["gmm", "tgmm", "glu", "glu_dx"]
    assert list(results[0].tiles) == [SMALL[2], SMALL[1]]
    assert results[0].failed == {"ragged_dot": "MemoryError: no room"}
    text = table(results[:1])
    line = next(line for line in text.splitlines() if line.startswith("Tiles(16, 32"))
    assert line.split()[-4:] == ["2.000", "2.000-2.000", "0.0", "0.50"]
    assert "ragged_dot" + " " * 34 + "MemoryError: no room" in text


def test_calls_differ_in_rows_only() -> None:
    for operation in OPERATIONS:
        first, second, *_ = inputs(operation, TINY)
        assert [a.shape for a in first] == list(operation.sides(TINY))
        assert all(a.dtype == jnp.bfloat16 for a in first)
        for i, (a, b) in enumerate(zip(first, second, strict=True)):
            assert (np.asarray(a) == np.asarray(b)).all() == (i >= operation.rows)


def test_entries_can_be_pasted_and_serve_the_worst_of_a_bucket() -> None:
    def result(shape: Shape, seconds: dict[Tiles, float]) -> Result:
        ordered = sorted(seconds.items(), key=lambda item: item[1])
        return Result(GMM, shape, "h100", 0.0, tiles={t: Timing(s, s, s, 0, 0) for t, s in ordered})

    a, b, c = SMALL
    many = Shape("many", m=6400, d=64, f=64, e=4)
    results = [
        result(many, {a: 1.0, b: 1.1, c: 3.0}),
        result(replace(many, name="more"), {b: 2.0, c: 2.1, a: 4.0}),
        result(replace(many, m=32, name="few"), {c: 1.0}),
    ]
    text = entries(results)
    assert "# measured: many, more" in text
    pasted = eval("{\n" + text + "\n}", {"Tiles": Tiles, "math": math})
    assert pasted == {("gmm", 2, 16): c, ("gmm", 2, math.inf): b}
    assert set(pasted) <= set(GMM.table["default"])


@pytest.mark.parametrize("operation", OPERATIONS, ids=lambda o: o.name)
@pytest.mark.parametrize("chip", ["a100", "h100"])
def test_candidates_fit_the_chip_and_hold_what_the_table_has(operation: Operation, chip: str) -> None:
    found = candidate_tiles(operation, "bfloat16", chip)
    assert 20 < len(found) < 400
    assert all(shared_bytes(t, 2, *operation.tiles_read) <= SHARED[chip] for t in found)
    large = (operation.table["default"] | operation.table[chip])[operation.name, 2, math.inf]
    assert large in found


def test_a_wrong_kernel_is_found_before_it_is_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    wrong = replace(GMM, ours=lambda *_: lambda x, w, sizes: jnp.zeros((x.shape[0], w.shape[2]), x.dtype))
    monkeypatch.setattr(gpu_kernels, "OPERATIONS", (wrong,))
    with pytest.raises(RuntimeError, match=re.escape("gmm is wrong by 1.0e+00 of its largest value in bfloat16")):
        run([TINY], repeats=3)


@pytest.mark.parametrize("operation", OPERATIONS, ids=lambda o: o.name)
def test_peers_compute_the_same(operation: Operation, rng: np.random.Generator) -> None:
    """PyTorch is stood in for by NumPy, with the few functions that are used of it, with and without its grouped product."""
    sizes = TINY.sizes()
    operands = [rng.normal(size=side).astype(np.float32) for side in operation.sides(TINY)]
    exact = operation.exact(*operands, sizes)
    ragged = jax.jit(partial(operation.ragged, jax.lax.ragged_dot_general))(*map(jnp.asarray, operands), jnp.asarray(sizes))
    np.testing.assert_allclose(ragged, exact, rtol=1e-4, atol=1e-4)

    def grouped(a: np.ndarray, b: np.ndarray, offs: np.ndarray) -> np.ndarray:
        starts = [0, *offs[:-1]]
        if b.ndim == 3:
            return np.concatenate([a[i:j] @ w for i, j, w in zip(starts, offs, b, strict=True)])
        return np.stack([a[:, i:j] @ b[i:j] for i, j in zip(starts, offs, strict=True)])

    for native in (np.float32, np.float64):
        torch = SimpleNamespace(
            bfloat16=np.dtype(native),
            split=lambda x, parts: np.split(x, np.cumsum(parts)[:-1]),
            cat=np.concatenate,
            stack=np.stack,
            nn=SimpleNamespace(functional=SimpleNamespace(silu=lambda a: a / (1 + np.exp(-a)))),
            _grouped_mm=grouped,
        )
        other = operation.torch(torch, *operands, sizes, np.cumsum(sizes))
        np.testing.assert_allclose(other, exact, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("operation", OPERATIONS, ids=lambda o: o.name)
def test_the_dense_product_has_the_same_flops(operation: Operation) -> None:
    shapes = [jax.ShapeDtypeStruct(side, jnp.float32) for side in operation.sides(TINY)]
    cost = jax.jit(operation.dense).lower(*shapes, jax.ShapeDtypeStruct((TINY.e,), jnp.int32)).compile().cost_analysis()
    assert operation.flops(TINY) <= cost["flops"] < 1.2 * operation.flops(TINY)
