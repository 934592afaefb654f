"""Top-p: the released rule in NumPy, its gradient, its losses, and every backend on plans whose k varies."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from numpy_routing import softmax

from moejax.core.context import Context
from moejax.core.errors import ConfigError
from moejax.dispatch import Experts, dispatch
from moejax.routing import Balance, Entropy, Routing, TopP

G, N, E = 2, 7, 5


def numpy_top_p(probs: np.ndarray, p: float) -> np.ndarray:
    """Combine weights [e] of one token: sort, accumulate, keep up to and with the expert that crosses p."""
    weights, total = np.zeros_like(probs), 0.0
    for i in np.argsort(-probs, kind="stable"):
        weights[i] = probs[i]
        total += probs[i]
        if total >= p:
            break
    return weights


@pytest.mark.parametrize("p", [0.2, 0.4, 0.9])
def test_it_is_numpys(p: float, rng: np.random.Generator) -> None:
    logits = jnp.asarray(2 * rng.normal(size=(G, N, E)), jnp.float32)
    valid = rng.random((G, N)) < 0.8
    plan = TopP(p)(logits, Context(valid=jnp.asarray(valid)))
    expected = np.apply_along_axis(numpy_top_p, -1, softmax(logits), p) * valid[..., None]
    np.testing.assert_allclose(plan.dense(), expected, rtol=1e-5, atol=1e-7)
    assert len(np.unique(np.asarray(plan.used).sum(-1))) > 1 or p == 0.2


def test_a_flat_router_takes_its_share_and_a_peaked_one_a_single_expert() -> None:
    flat = TopP(0.5)(jnp.zeros((1, 1, 8)))
    assert int(flat.used.sum()) == 4 == TopP(0.5).mean_experts(8)
    assert np.asarray(flat.expert)[0, 0, :4].tolist() == [0, 1, 2, 3]
    peaked = TopP(0.5)(jnp.zeros((1, 1, 8)).at[..., 3].set(9.0))
    assert int(peaked.used.sum()) == 1
    assert int(TopP(0.9, max_experts=3)(jnp.zeros((1, 1, 8))).used.sum()) == 3


@pytest.mark.parametrize("backend", ["grouped", "gather", "auto"])
def test_backends_agree_with_the_oracle_in_value_and_gradient(backend: str, rng: np.random.Generator) -> None:
    x = jnp.asarray(rng.normal(size=(G, N, 3)), jnp.float32)
    w = jnp.asarray(rng.normal(size=(E, 3, 3)), jnp.float32)
    logits = jnp.asarray(2 * rng.normal(size=(G, N, E)), jnp.float32)

    def run(name: str) -> tuple:
        def loss(logits: jax.Array, x: jax.Array, w: jax.Array) -> jax.Array:
            experts = Experts(lambda p, rows, layout: jnp.tanh(layout.dot(rows, p)), w)
            return jnp.square(dispatch(TopP(0.6)(logits), experts, x, name)).sum()

        return jax.value_and_grad(loss, argnums=(0, 1, 2))(logits, x, w)

    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), run(backend), run("reference"))


def test_losses_are_numpys(rng: np.random.Generator) -> None:
    """Entropy in nats, and the balance loss that counts a token as often as it has experts."""
    logits = jnp.asarray(2 * rng.normal(size=(G, N, E)), jnp.float32)
    valid, rule = rng.random((G, N)) < 0.8, TopP(0.6)
    routing = Routing(logits, rule.probabilities(logits), rule(logits, Context(valid=jnp.asarray(valid))), jnp.asarray(valid))
    probs = softmax(logits)[valid]
    np.testing.assert_allclose(Entropy(0.5)(routing), 0.5 * -(probs * np.log(probs)).sum(-1).mean(), rtol=1e-5)
    used = np.apply_along_axis(numpy_top_p, -1, probs, 0.6) > 0
    expected = 0.1 * E * (used.mean(0) * probs.mean(0)).sum()
    np.testing.assert_allclose(Balance(0.1, share="tokens", over="batch")(routing), expected, rtol=1e-5)


def test_the_entropy_loss_is_finite_where_probabilities_are_zero() -> None:
    def loss(logits: jax.Array) -> jax.Array:
        rule = TopP(0.6)
        return Entropy(1.0)(Routing(logits, rule.probabilities(logits), rule(logits), jnp.ones((1, 1), bool)))

    value, gradient = jax.value_and_grad(loss)(jnp.array([[[0.0, -1e9, 1.0]]]))
    p = 1 / (1 + np.e)
    np.testing.assert_allclose(value, -p * np.log(p) - (1 - p) * np.log(1 - p), rtol=1e-5)
    assert np.isfinite(gradient).all()


@pytest.mark.parametrize(("fields", "message"), [({"p": 1.0}, "p=1.0"), ({"max_experts": 0}, "max_experts=0")])
def test_bad_settings_raise(fields: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        TopP(**fields)
    with pytest.raises(ConfigError, match="max_experts=9 exceeds num_experts=5"):
        TopP(max_experts=9)(jnp.zeros((1, 1, 5)))
