"""Losses and statistics are counted once: under init, remat, scan, repeated calls, microbatches, and over devices.

That a whole step is the same under scan, remat, microbatches and on eight devices is a property of the battery, for every method.
"""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from numpy_layers import close, compiled, draw

from moejax import GLU, Balance, Linear, MoE, TopK, ZLoss

B, S, D, E, LAYERS = 8, 4, 5, 4, 3
SOWN = ("losses", "stats")


def layer(**fields) -> MoE:
    fields = dict(backend="reference", losses=(Balance(0.5), ZLoss(0.1))) | fields
    return MoE(Linear(E), TopK(k=2, capacity_factor=1.0), GLU(3, num_experts=E), **fields)


@functools.cache
def tokens() -> jax.Array:
    return jnp.asarray(np.random.default_rng(0).normal(size=(B, S, D)), jnp.float32)


def objective(model: nn.Module):
    def run(variables, x):
        y, sown = model.apply(variables, x, mutable=SOWN)
        return jnp.sin(y).sum() + sum(leaf.sum() for leaf in jax.tree.leaves(sown["losses"])), (y, sown)

    return run


@functools.cache
def plain_step():
    return jax.jit(jax.value_and_grad(objective(layer()), has_aux=True))


def test_variables_of_init_are_not_counted_again() -> None:
    """What `init` returns is passed to the first `apply`: its losses must not be in there."""
    moe = layer()
    shapes = jax.eval_shape(moe.init, jax.random.key(0), tokens())
    assert set(shapes) == {"params"}


class Residual(nn.Module):
    @nn.compact
    def __call__(self, x: jax.Array) -> tuple[jax.Array, None]:
        call = nn.remat(lambda module, x: module(x))
        return x + call(layer().copy(name="moe"), x), None


class Scanned(nn.Module):
    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        axes = {"params": 0, "losses": 0, "stats": 0}
        return nn.scan(Residual, variable_axes=axes, split_rngs={"params": True}, length=LAYERS)(name="stack")(x)[0]


def test_scan_gives_every_layer_its_own_losses_and_stats_and_remat_counts_once() -> None:
    model, x = Scanned(), tokens()
    variables = draw(model, x)
    (_, (y, sown)), grads = jax.jit(jax.value_and_grad(objective(model), has_aux=True))(variables, x)

    stacked = variables["params"]["stack"]["moe"]
    (_, (expected_y, expected)), expected_grads = unrolled_step()(stacked, x)
    close(y, expected_y)
    close({name: tree["stack"]["moe"] for name, tree in sown.items()}, expected)
    assert sown["losses"]["stack"]["moe"]["balance_loss"].shape == (LAYERS,)
    close(grads["params"]["stack"]["moe"], expected_grads, 1e-3)


@functools.cache
def unrolled_step():
    def unrolled(stacked, x):
        total, every = 0.0, []
        for i in range(LAYERS):
            out, sown = layer().apply({"params": jax.tree.map(lambda p, i=i: p[i], stacked)}, x, mutable=SOWN)
            x, every = x + out, [*every, sown]
            total += sum(jax.tree.leaves(sown["losses"]))
        return jnp.sin(x).sum() + total, (x, jax.tree.map(lambda *leaves: jnp.stack(leaves), *every))

    return jax.jit(jax.value_and_grad(unrolled, has_aux=True))


def test_a_layer_called_twice_sums_its_losses() -> None:
    class Twice(nn.Module):
        @nn.compact
        def __call__(self, x: jax.Array) -> jax.Array:
            moe = layer().copy(name="moe")
            return moe(x + moe(x))

    x = tokens()
    variables = draw(layer(), x)
    _, sown = compiled(Twice(), "losses")({"params": {"moe": variables["params"]}}, x)
    y, first = compiled(layer(), "losses")(variables, x)
    _, second = compiled(layer(), "losses")(variables, x + y)
    close(sown["losses"]["moe"], jax.tree.map(jnp.add, first["losses"], second["losses"]))


def test_microbatches_of_whole_sequences_average_to_the_batch() -> None:
    x = tokens()
    variables = draw(layer(), x)
    _, whole = compiled(layer(), *SOWN)(variables, x)
    parts = [compiled(layer(), *SOWN)(variables, x[i : i + 4])[1] for i in (0, 4)]
    close(jax.tree.map(lambda a, b: (a + b) / 2, *(p["losses"] for p in parts)), whole["losses"])
    linear = ("importance", "drop_rate", "experts_per_token", "entropy", "z", "capacity")
    for name in linear:
        np.testing.assert_allclose(np.mean([p["stats"][name] for p in parts]), np.mean(whole["stats"][name]), rtol=1e-5)


@pytest.mark.parametrize("backend", ["einsum", "capacity", "grouped"])
def test_one_device_equals_eight(backend: str) -> None:
    mesh = Mesh(np.array(jax.devices()), ("data",))
    assert mesh.size == 8
    x, moe = tokens(), layer(backend=backend)
    variables = draw(moe, x)
    split = jax.device_put(x, NamedSharding(mesh, PartitionSpec("data")))
    copied = jax.device_put(variables, NamedSharding(mesh, PartitionSpec()))
    assert len(split.addressable_shards) == 8
    (loss, (y, sown)), grads = jax.jit(jax.value_and_grad(objective(moe), has_aux=True))(copied, split)
    (expected_loss, (expected_y, expected_sown)), expected_grads = plain_step()(variables, x)
    close([loss, y, grads], [expected_loss, expected_y, expected_grads], 1e-3)
    sown["stats"].pop("backend"), expected_sown["stats"].pop("backend")
    close(sown, expected_sown)
