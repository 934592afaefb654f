"""The FLOP count against counts by hand."""

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from moejax.parallel import make_mesh, shard_map
from moejax.train.flops import matmul_flops


def count(f, *shapes):
    return matmul_flops(jax.jit(f).trace(*(jax.ShapeDtypeStruct(s, jnp.float32) for s in shapes)).jaxpr)


def scanned(w, x):
    return jax.lax.scan(lambda c, w: (jnp.tanh(c @ w), None), x, w)[0].sum()


def unrolled(w, x):
    for i in range(w.shape[0]):
        x = jnp.tanh(x @ w[i])
    return x.sum()


def test_a_scan_costs_what_its_unrolled_loop_costs():
    one = 2 * 8 * 16 * 16
    assert count(scanned, (5, 16, 16), (8, 16)) == count(unrolled, (5, 16, 16), (8, 16)) == 5 * one
    grad = jax.grad(scanned, argnums=(0, 1))
    assert count(grad, (5, 16, 16), (8, 16)) == 3 * 5 * one
    # Recomputation is work: one more forward pass, less the last product, whose result nobody needs.
    assert count(jax.grad(jax.checkpoint(scanned), argnums=(0, 1)), (5, 16, 16), (8, 16)) >= 4 * 5 * one - one


def test_grouped_products_count_each_row_once():
    sizes = jnp.array([4, 0, 12])

    def f(w, x):
        return jax.lax.ragged_dot(x, w, sizes).sum()

    one = 2 * 16 * 8 * 5
    assert count(f, (3, 8, 5), (16, 8)) == one
    assert count(jax.value_and_grad(f, argnums=(0, 1)), (3, 8, 5), (16, 8)) == 3 * one


def test_convolution_batched_product_and_cond():
    def conv(k, x):
        return jax.lax.conv_general_dilated(x, k, (2, 2), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"))

    assert count(conv, (3, 3, 5, 7), (2, 8, 8, 5)) == 2 * (2 * 4 * 4 * 7) * (3 * 3 * 5)
    assert count(lambda a, b: jnp.einsum("gij,gjk->gik", a, b), (4, 2, 3), (4, 3, 5)) == 2 * 4 * 2 * 3 * 5
    branch = lambda x: jax.lax.cond(x.sum() > 0, lambda x: x @ x @ x, lambda x: x @ x, x)  # noqa: E731
    assert count(branch, (4, 4)) == 2 * 2 * 64


def test_a_program_split_by_hand_counts_on_every_device():
    mesh = make_mesh("data=4,tensor=2")

    def f(x, w):
        return shard_map(lambda x, w: x @ w, mesh, (P("data"), P(None, "tensor")), P("data", "tensor"))(x, w)

    assert count(f, (8, 16), (16, 6)) == 2 * 8 * 16 * 6
