"""Loss-free balancing: the update of the paper, what it may touch, and that it balances."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moejax.core.context import Context
from moejax.core.errors import ConfigError
from moejax.experts import FFN
from moejax.layers import MoE
from moejax.routing import Linear, LossFree, Routing, TopK
from moejax.routing.balancers import BalanceState, fresh_state

E, K = 4, 2


def routed(rng: np.random.Generator, bias: jax.Array, valid: np.ndarray | None = None) -> tuple[np.ndarray, Routing]:
    """Sigmoid routing of random logits that favour the first expert."""
    logits = jnp.asarray(rng.normal(size=(2, 9, E)) + np.array([2.0, 0, 0, 0]), jnp.float32)
    mask = jnp.ones((2, 9), bool) if valid is None else jnp.asarray(valid)
    rule = TopK(k=K, score="sigmoid", normalise=True)
    return np.asarray(logits), Routing(logits, rule.probabilities(logits), rule(logits, Context(valid=mask), bias=bias), mask)


@pytest.mark.parametrize("rule", ["sign", "proportional"])
def test_the_update_answers_the_last_batch(rule: str, rng: np.random.Generator) -> None:
    """NumPy: counts of valid tokens' choices, mean minus count, sign or share, times the speed; one batch late."""
    balancer, state, bias = LossFree(0.1, rule), fresh_state(E), np.zeros(E)
    valid = rng.random((2, 9)) < 0.7
    for _ in range(4):
        np.testing.assert_allclose(balancer.bias(state), bias, rtol=1e-5)
        logits, routing = routed(rng, balancer.bias(state), valid)
        state = balancer.update(state, routing)
        scores = 1 / (1 + np.exp(-logits))
        chosen = np.argsort(-(scores + bias), axis=-1, kind="stable")[..., :K]
        counts = np.bincount(chosen[valid].ravel(), minlength=E)
        lack = counts.mean() - counts
        bias = bias + 0.1 * (np.sign(lack) if rule == "sign" else lack / counts.mean())


def test_the_bias_selects_and_does_not_weigh(rng: np.random.Generator) -> None:
    bias = jnp.array([-9.0, 0, 0, 0])
    logits, routing = routed(rng, bias)
    expert, weight = np.asarray(routing.plan.expert), np.asarray(routing.plan.weight)
    assert (expert != 0).all()
    scores = np.take_along_axis(1 / (1 + np.exp(-logits)), expert, -1)
    np.testing.assert_allclose(weight, scores / scores.sum(-1, keepdims=True), rtol=1e-5)


def test_a_multiplied_bias_scales_the_scores(rng: np.random.Generator) -> None:
    """NumPy: ranked by s (1 + b), weighed by s; at b = 0 nothing changes."""
    bias = jnp.asarray(rng.normal(size=E) * 0.5, jnp.float32)
    logits = rng.normal(size=(2, 9, E)).astype(np.float32)
    rule = TopK(k=K, score="sigmoid", apply_bias="multiply")
    plan, scores = rule(jnp.asarray(logits), bias=bias), 1 / (1 + np.exp(-logits))
    chosen = np.argsort(-(scores * (1 + np.asarray(bias))), axis=-1, kind="stable")[..., :K]
    np.testing.assert_array_equal(plan.expert, chosen)
    np.testing.assert_allclose(plan.weight, np.take_along_axis(scores, chosen, -1), rtol=1e-5)
    added = TopK(k=K, score="sigmoid")(jnp.asarray(logits), bias=bias)
    assert (np.asarray(added.expert) != chosen).any()
    np.testing.assert_array_equal(rule(jnp.asarray(logits), bias=jnp.zeros(E)).expert, rule(jnp.asarray(logits)).expert)


def layer() -> MoE:
    return MoE(Linear(E, init_scale=1.0), TopK(k=1, score="sigmoid"), FFN(8, E), balancer=LossFree(0.005))


def test_a_layer_keeps_the_bias_as_state_and_balances(rng: np.random.Generator) -> None:
    """Skewed tokens: the load's largest excess falls below half of what it was; no parameter has changed."""
    x = jnp.asarray(rng.normal(size=(4, 16, 6)) + 1.0, jnp.float32)
    moe = layer()
    variables = moe.init(jax.random.key(0), x)
    assert set(variables["params"]) == {"router", "bank"}
    state = variables["router_state"]

    @jax.jit
    def step(state: dict) -> tuple:
        _, changed = moe.apply(
            {"params": variables["params"], "router_state": state}, x, Context(train=True), mutable=["router_state", "stats"]
        )
        return changed["router_state"], changed["stats"]["max_violation"]

    violations = []
    for _ in range(150):
        state, violation = step(state)
        violations.append(float(violation))
    assert violations[0] > 0.5
    assert np.mean(violations[-5:]) < violations[0] / 2


def test_evaluation_uses_the_bias_and_leaves_it(rng: np.random.Generator) -> None:
    x = jnp.asarray(rng.normal(size=(2, 5, 6)), jnp.float32)
    moe = layer()
    variables = moe.init(jax.random.key(0), x)
    forbid = {"selection_bias": jnp.array([-9.0, 0, 0, 0]), "load": jnp.zeros(E)}
    _, changed = moe.apply({**variables, "router_state": {"balance": forbid}}, x, Context(), mutable=["router_state", "stats"])
    assert changed["stats"]["load"][0] == 0
    jax.tree.map(np.testing.assert_array_equal, changed["router_state"]["balance"], forbid)


def test_the_bias_gets_no_gradient_and_gives_none(rng: np.random.Generator) -> None:
    x = jnp.asarray(rng.normal(size=(2, 5, 6)), jnp.float32)
    moe = layer()
    variables = moe.init(jax.random.key(0), x)

    def loss(state: BalanceState) -> jax.Array:
        y, _ = moe.apply({**variables, "router_state": {"balance": state}}, x, Context(train=True), mutable=["router_state"])
        return jnp.square(y).sum()

    gradient = jax.grad(loss)({"selection_bias": jnp.arange(E) * 0.1, "load": jnp.arange(E) * 1.0})
    jax.tree.map(lambda g: np.testing.assert_array_equal(g, 0), gradient)


def test_bad_settings_raise() -> None:
    with pytest.raises(ConfigError, match="rule='signs' is unknown"):
        LossFree(rule="signs")
    with pytest.raises(ConfigError, match="must not be negative"):
        LossFree(-0.1)


def test_microbatches_count_one_batch(rng: np.random.Generator) -> None:
    """The state of a whole batch is the mean of its halves' states: what the train step's accumulation does with them."""
    balancer, state = LossFree(0.1), {"selection_bias": jnp.zeros(E), "load": jnp.array([3.0, 1, 1, 1])}
    _, whole = routed(rng, balancer.bias(state))
    halves = [jax.tree.map(lambda a, i=i: a[i : i + 1], whole) for i in range(2)]
    states = [balancer.update(state, half) for half in halves]
    mean = jax.tree.map(lambda a, b: (a + b) / 2, *states)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), mean, balancer.update(state, whole))
