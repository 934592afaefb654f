"""Switch (Fedus et al. 2021): one expert for each token, a capacity, a balance loss; the paper's algorithm, token after token."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from numpy_layers import compiled

import moejax as mj

E, D, F, FACTOR = 4, 6, 5, 0.8


def layer() -> mj.MoE:
    bank = mj.FFN(hidden=F, num_experts=E, activation="relu")
    return mj.MoE(mj.Linear(E, init_w=mj.FanIn(2.0)), mj.TopK(k=1, capacity_factor=FACTOR), bank, losses=(mj.Balance(0.01),))


def numpy_switch(params: dict, x: np.ndarray) -> tuple[np.ndarray, np.ndarray, float]:
    """Outputs, who was kept, and the loss of eq. 4 to 6, for groups of one sequence each."""
    p = jax.tree.map(lambda a: np.asarray(a, np.float64), params)
    y, kept, loss = np.zeros_like(x), np.zeros(x.shape[:2], bool), 0.0
    for b, row in enumerate(x):
        logits = row @ p["router"]["w"]
        probs = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
        room = np.full(E, math.ceil(len(row) / E * FACTOR))
        for t, token in enumerate(row):
            i = int(probs[t].argmax())
            if room[i]:
                room[i] -= 1
                kept[b, t] = True
                y[b, t] = probs[t, i] * (np.maximum(token @ p["bank"]["w_in"][i], 0) @ p["bank"]["w_out"][i])
        f = np.bincount(probs.argmax(-1), minlength=E) / len(row)
        loss += 0.01 * E * (f * probs.mean(0)).sum() / len(x)
    return y, kept, loss


@pytest.fixture
def example(rng: np.random.Generator) -> tuple[dict, jax.Array]:
    x = jnp.asarray(rng.normal(size=(2, 13, D)) + 0.5, jnp.float32)
    return jax.jit(layer().init)(jax.random.key(0), x)["params"], x


def test_outputs_drops_and_loss_are_numpys(example: tuple) -> None:
    params, x = example
    y, sown = compiled(layer(), "losses", "stats")({"params": params}, x)
    expected, kept, loss = numpy_switch(params, np.asarray(x, np.float64))
    np.testing.assert_allclose(y, expected, rtol=1e-4, atol=1e-6)
    assert 0 < (~kept).mean() < 0.5
    np.testing.assert_allclose(sown["stats"]["drop_rate"], (~kept).mean(), rtol=1e-5)
    np.testing.assert_allclose(sown["losses"]["balance_loss"], loss, rtol=1e-5)


def test_the_router_learns_through_its_gate(example: tuple) -> None:
    """Central differences of the NumPy layer: where no choice flips, the gate is the only way from the router to the output."""
    params, x = example

    def total(params: dict) -> jax.Array:
        return jnp.sin(layer().apply({"params": params}, x)).sum()

    gradient = np.asarray(jax.jit(jax.grad(total))(params)["router"]["w"])
    w = np.asarray(params["router"]["w"], np.float64)
    for i, j in ((0, 0), (2, 1), (5, 3)):
        ends = []
        for step in (1e-5, -1e-5):
            moved = w.copy()
            moved[i, j] += step
            ends.append(np.sin(numpy_switch({**params, "router": {"w": moved}}, np.asarray(x, np.float64))[0]).sum())
        np.testing.assert_allclose(gradient[i, j], (ends[0] - ends[1]) / 2e-5, rtol=1e-3, atol=1e-5)
