"""Parameters gathered over a mesh axis, and the sums of their gradients along the dimensions of a torus."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec

from moejax.aot import ahead
from moejax.dispatch.expert_parallel.parameters import _all_gather, torus_ways
from moejax.parallel import make_mesh
from moejax.parallel.mesh import shard_map


@pytest.mark.parametrize("dim", [0, 1, 2])
@pytest.mark.parametrize("ways", [(8,), (2, 4), (2, 2, 2)])
def test_gradients_are_summed_along_one_dimension_of_the_torus_after_the_other(ways: tuple[int, ...], dim: int) -> None:
    """Each device weighs the gathered matrix in its own way; its piece of the gradient is the sum of all weights there."""
    mesh = make_mesh("fsdp=8")
    p = jax.random.normal(jax.random.key(0), (8, 16, 24))
    weights = jax.random.normal(jax.random.key(1), (8, 8, 16, 24))
    spec = PartitionSpec(*(None,) * dim, "fsdp")

    def loss(p: jax.Array) -> jax.Array:
        def own(p: jax.Array, w: jax.Array) -> jax.Array:
            return (_all_gather(p, "fsdp", dim, ways) * w[0]).sum()[None]

        return shard_map(own, mesh, (spec, PartitionSpec("fsdp")), PartitionSpec("fsdp"))(p, weights).sum()

    value, gradient = jax.jit(jax.value_and_grad(loss))(p)
    np.testing.assert_allclose(value, (p * weights).sum(), rtol=1e-4)
    np.testing.assert_allclose(gradient, weights.sum(0), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("slice_", "spec", "expected"),
    [
        ("v5e:16x16", "fsdp=256", (16, 16)),
        ("v5e:16x16", "fsdp=32,expert=8", (2, 16)),
        ("v5p:4x4x8", "fsdp=128", (4, 4, 8)),
        ("v5e:4x4", "fsdp=16", (16,)),  # laid out as a ring, which is no set of lines
    ],
)
def test_a_mesh_axis_knows_the_lines_of_the_torus(slice_: str, spec: str, expected: tuple[int, ...]) -> None:
    mesh = make_mesh(spec, ahead.topology(slice_).devices)
    ways = torus_ways(mesh, "fsdp")
    assert ways == expected
    lines = np.moveaxis(mesh.devices, mesh.axis_names.index("fsdp"), -1).reshape(-1, *ways)
    for i in range(1, lines.ndim) if len(ways) > 1 else ():
        for line in np.moveaxis(lines, i, -1).reshape(-1, lines.shape[i]):
            coords = np.array([device.coords for device in line])
            assert (coords != coords[0]).any(0).sum() == 1  # a line leaves its place in one dimension only


def test_devices_without_coordinates_are_one_line() -> None:
    assert torus_ways(make_mesh("fsdp=4,expert=2"), "fsdp") == (4,)


def test_bfloat16_sums_stay_bfloat16() -> None:
    mesh = make_mesh("fsdp=8")
    own = shard_map(lambda p: _all_gather(p, "fsdp", 0, (2, 4)), mesh, PartitionSpec("fsdp"), PartitionSpec("fsdp"))
    gradient = jax.eval_shape(jax.grad(lambda p: own(p).astype(jnp.float32).sum()), jnp.ones((8, 4), jnp.bfloat16))
    assert gradient.dtype == jnp.bfloat16
