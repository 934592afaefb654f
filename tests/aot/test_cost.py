"""Counting FLOPs and bytes of compiled programs: against arithmetic by hand, and against XLA where it has no loop to miscount."""

import jax
import jax.numpy as jnp
import pytest

from moejax.aot.cost import costs
from moejax.aot.hlo import Collective
from moejax.aot.hlo_text import parse
from pallas_kernels.ahead import compile_for
from pallas_kernels.chips import TPUS

LAYERS, N, D = 20, 64, 256
X, W = jax.ShapeDtypeStruct((N, D), jnp.float32), jax.ShapeDtypeStruct((LAYERS, D, D), jnp.float32)


def scanned(x, w):
    return jax.lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, w)[0]


def test_a_loop_counts_as_often_as_it_turns():
    compiled = jax.jit(scanned).lower(X, W).compile()
    found = costs(parse(compiled.as_text()))
    assert found.flops == LAYERS * 2 * N * D * D
    assert compiled.cost_analysis()["flops"] < found.flops / 2  # XLA counts one turn
    assert found.seconds is None


def test_of_stacked_weights_a_turn_reads_its_slice():
    found = costs(parse(jax.jit(scanned).lower(X, W).compile().as_text()))
    layer, rows = D * D * 4, N * D * 4
    assert LAYERS * layer < found.bytes < LAYERS * (5 * layer + 8 * rows) < LAYERS * LAYERS * layer


@pytest.mark.tpu_aot
@pytest.mark.parametrize(
    ("equation", "shapes"),
    [
        ("nd,df->nf", ((2048, 1024), (1024, 4096))),
        ("gnd,gdf->gnf", ((4, 512, 256), (4, 256, 512))),
        ("bshc,bthc->bhst", ((2, 256, 4, 128), (2, 256, 4, 128))),
        ("bsjgc,btjc->bjgst", ((1, 256, 2, 4, 128), (1, 256, 2, 128))),
    ],
)
def test_products_on_tpu_count_what_xla_counts(equation, shapes):
    """TPUs have one instruction for products and convolutions; batches are windows that mostly lie outside."""
    arrays = [jax.ShapeDtypeStruct(shape, jnp.bfloat16) for shape in shapes]
    compiled = compile_for("v5e", lambda a, b: jnp.einsum(equation, a, b), *arrays)
    expected = jax.jit(lambda a, b: jnp.einsum(equation, a, b)).lower(*arrays).cost_analysis()["flops"]
    assert costs(parse(compiled.as_text())).flops == expected


@pytest.mark.tpu_aot
def test_times_are_those_of_the_slower_of_arithmetic_and_memory():
    chip = TPUS["v5e"]
    big = jax.ShapeDtypeStruct((8192, 8192), jnp.bfloat16)
    product = costs(parse(compile_for("v5e", jnp.dot, big, big).as_text()), chip=chip)
    assert product.seconds == pytest.approx(2 * 8192**3 / chip.flops, rel=0.01)
    addition = compile_for("v5e", jnp.add, big, big)
    added = costs(parse(addition.as_text()), chip=chip)
    assert added.bytes == 3 * 2 * 8192**2
    assert added.seconds == pytest.approx(added.bytes / chip.bandwidth, rel=0.01)
    assert added.seconds == pytest.approx(addition.cost_analysis()["optimal_seconds"], rel=0.1)


@pytest.mark.tpu_aot
def test_kernels_say_their_own_flops():
    from pallas_kernels.grouped_matmul import grouped_matmul

    m, d, f, e = 1024, 512, 1024, 8
    x, w = jax.ShapeDtypeStruct((m, d), jnp.bfloat16), jax.ShapeDtypeStruct((e, d, f), jnp.bfloat16)
    compiled = compile_for("v5e", grouped_matmul, x, w, jax.ShapeDtypeStruct((e,), jnp.int32))
    assert costs(parse(compiled.as_text())).flops >= 2 * m * d * f


def test_exchanges_wait_unless_something_is_computed_beside_them():
    compiled = jax.jit(jnp.dot).lower(X, jax.ShapeDtypeStruct((D, D), jnp.float32)).compile()
    chip, module = TPUS["v5p"], parse(compiled.as_text())
    alone = costs(module, chip=chip)
    size = int(chip.links / 10)  # a tenth of a second

    def exchange(overlapped):
        return Collective("collective-permute", ("data",), 2, size, size, 3, True, overlapped, "f32", "", "p")

    waiting, hidden = (costs(module, [exchange(o)], chip) for o in (False, True))
    assert waiting.seconds == pytest.approx(alone.seconds + 0.3)
    assert hidden.seconds == pytest.approx(0.3)  # nothing is faster than its exchanges
    assert (hidden.exposed_seconds, hidden.compute_seconds) == (0.0, alone.compute_seconds)
