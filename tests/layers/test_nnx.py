"""NNX users put a layer into their own modules through Flax's bridge."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from flax.nnx import bridge
from numpy_layers import compiled

from moejax import GLU, Balance, Linear, MoE, TopK, ZLoss

B, S, D, E = 2, 6, 5, 4
MOE = MoE(Linear(E), TopK(k=2), GLU(3, num_experts=E), losses=(Balance(0.1), ZLoss(0.01)), backend="reference")


class Model(nnx.Module):
    def __init__(self, x: jax.Array, rngs: nnx.Rngs):
        self.moe = bridge.ToNNX(MOE, rngs=rngs).lazy_init(x)
        self.head = nnx.Linear(D, 1, rngs=rngs)

    def __call__(self, x: jax.Array) -> tuple[jax.Array, dict]:
        y = x + self.moe(x, mutable=["losses", "stats"])
        losses, stats = (
            nnx.pop(self.moe, nnx.variable_type_from_name(name, allow_register=True)) for name in ("losses", "stats")
        )
        return self.head(y.mean(1)), {"losses": nnx.to_pure_dict(losses), "stats": nnx.to_pure_dict(stats)}


@pytest.mark.slow
def test_a_layer_learns_inside_an_nnx_module_and_its_losses_are_in_reach(rng: np.random.Generator) -> None:
    x = jnp.asarray(rng.normal(size=(B, S, D)), jnp.float32)
    model = Model(x, nnx.Rngs(0))

    @nnx.jit
    def step(model: Model):
        def objective(model: Model):
            y, sown = model(x)
            return jnp.square(y - 3).mean() + sum(jax.tree.leaves(sown["losses"])), sown

        (loss, sown), grads = nnx.value_and_grad(objective, has_aux=True)(model)
        nnx.update(model, jax.tree.map(lambda p, g: p - 0.05 * g, nnx.state(model, nnx.Param), grads))
        return loss, sown

    params = nnx.to_pure_dict(nnx.state(model.moe, nnx.Param))
    assert params["bank"]["w_gate"].shape == (E, D, 3)
    _, expected = compiled(MOE, "losses", "stats")({"params": params}, x)
    history = [step(model) for _ in range(4)]
    losses = [float(loss) for loss, _ in history]
    assert losses == sorted(losses, reverse=True)
    assert losses[-1] < 0.8 * losses[0]
    for collection in ("losses", "stats"):
        jax.tree.map(
            lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5), history[0][1][collection], dict(expected[collection])
        )
    # Nothing accumulates from call to call.
    assert abs(history[1][1]["losses"]["balance_loss"] - history[0][1]["losses"]["balance_loss"]) < 0.05
