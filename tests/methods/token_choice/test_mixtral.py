"""Mixtral (Jiang et al. 2024): two of eight SwiGLU experts, weighted by a softmax over the two; one token after another."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from numpy_layers import compiled, draw, silu

import moejax as mj

E, K, D, F = 8, 2, 6, 5
COEF = 0.02


def layer(k: int = K, **select) -> mj.MoE:
    rule = mj.TopK(k=k, **(select or {"score": "softmax_selected"}))
    return mj.MoE(mj.Linear(E), rule, mj.GLU(hidden=F, num_experts=E), losses=(mj.Balance(COEF, over="batch"),))


@pytest.fixture(scope="module")
def example() -> tuple[dict, jax.Array]:
    x = jax.random.normal(jax.random.key(1), (2, 9, D))
    return draw(layer(), x)["params"], x


def numpy_layer(params: dict, x: np.ndarray) -> tuple[np.ndarray, float]:
    """Outputs, and the auxiliary loss of the public training code for one layer, without its factor k."""
    p = jax.tree.map(lambda a: np.asarray(a, np.float64), params)
    w1, w3, w2 = (p["bank"][name] for name in ("w_gate", "w_up", "w_out"))
    y, chosen, mean = np.zeros_like(x), np.zeros((K, E)), np.zeros(E)
    tokens = x.shape[0] * x.shape[1]
    for place in np.ndindex(x.shape[:2]):
        token = x[place]
        logits = token @ p["router"]["w"]
        first = int(logits.argmax())
        second = max((i for i in range(E) if i != first), key=lambda i, logits=logits: logits[i])
        # softmax over the two: a logistic function of the distance of their logits
        w = 1 / (1 + math.exp(logits[second] - logits[first]))
        for slot, (expert, weight) in enumerate(((first, w), (second, 1 - w))):
            y[place] += weight * ((silu(token @ w1[expert]) * (token @ w3[expert])) @ w2[expert])
            chosen[slot, expert] += 1 / tokens
        mean += np.exp(logits) / np.exp(logits).sum() / tokens
    return y, COEF * E * (chosen * mean).sum()


def test_outputs_are_numpys_and_every_token_has_two_experts(example: tuple) -> None:
    params, x = example
    y, sown = compiled(layer(), "losses", "stats", "routing")({"params": params}, x)
    expected, loss = numpy_layer(params, np.asarray(x, np.float64))
    np.testing.assert_allclose(y, expected, rtol=1e-4, atol=1e-5)
    # The public code counts each of the k choices with weight 1: its loss is k times ours.
    np.testing.assert_allclose(sown["losses"]["balance_loss"], loss / K, rtol=1e-5)
    assert sown["stats"]["experts_per_token"] == K
    assert sown["stats"]["drop_rate"] == 0
    np.testing.assert_allclose(sown["routing"]["plan"].weight.sum(-1), 1, rtol=1e-6)


def test_gradients_are_numpys(example: tuple) -> None:
    params, x = example

    def total(params: dict) -> jax.Array:
        y, sown = layer().apply({"params": params}, x, mutable=["losses"])
        return jnp.sin(y).sum() + sown["losses"]["balance_loss"]

    gradient = jax.jit(jax.grad(total))(params)
    for part, name, place in (
        ("router", "w", (1, 2)),
        ("router", "w", (4, 7)),
        ("bank", "w_gate", (3, 1, 2)),
        ("bank", "w_up", (5, 0, 4)),
    ):
        ends = []
        for step in (1e-5, -1e-5):
            moved = jax.tree.map(lambda a: np.array(a, np.float64), params)
            moved[part][name][place] += step
            y, loss = numpy_layer(moved, np.asarray(x, np.float64))
            ends.append(np.sin(y).sum() + loss / K)
        np.testing.assert_allclose(gradient[part][name][place], (ends[0] - ends[1]) / 2e-5, rtol=2e-3, atol=1e-5)


def test_softmax_over_the_selected_is_the_whole_softmax_renormalised_and_not_the_raw_one(example: tuple) -> None:
    params, x = example
    selected = compiled(layer())({"params": params}, x)
    renormalised = compiled(layer(score="softmax", normalise=True))({"params": params}, x)
    raw = compiled(layer(score="softmax"))({"params": params}, x)
    np.testing.assert_allclose(renormalised, selected, rtol=1e-5, atol=1e-6)
    assert np.abs(raw - selected).max() > 0.1


def test_equal_experts_are_the_dense_layer(example: tuple) -> None:
    """Weights sum to 1: where all experts are alike, routing changes nothing."""
    params, x = example
    bank = jax.tree.map(lambda w: jnp.broadcast_to(w[:1], w.shape), params["bank"])
    y = compiled(layer())({"params": {**params, "bank": bank}}, x)
    dense = mj.DenseGLU(F).apply({"params": {"expert": jax.tree.map(lambda w: w[:1], params["bank"])}}, x)
    np.testing.assert_allclose(y, dense, rtol=1e-4, atol=1e-5)


def test_the_dense_twins_have_equal_compute_or_equal_parameters(example: tuple) -> None:
    params, x = example

    def experts(layer: object) -> int:
        shapes = jax.eval_shape(lambda: layer.init(jax.random.key(0), x))["params"]
        return sum(leaf.size for leaf in jax.tree.leaves(shapes))

    bank = sum(leaf.size for leaf in jax.tree.leaves(params["bank"]))
    assert experts(mj.DenseGLU(K * F)) == layer().active_fraction() * bank
    assert experts(mj.DenseGLU(E * F)) == bank


def test_one_expert_with_its_weight_made_one_is_refused() -> None:
    with pytest.raises(mj.core.errors.ConfigError, match="gives the router no task gradient"):
        layer(k=1, score="softmax_selected")
