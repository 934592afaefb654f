"""Loss-free balancing: the update of the paper, what it may touch, and that it balances."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from controlled import train_call

from moejax.core.context import Context
from moejax.core.control import Site
from moejax.core.errors import ConfigError
from moejax.core.initializers import FanIn
from moejax.experts import FFN
from moejax.layers import MoE
from moejax.routing import Linear, LossFree, Routing, TopK
from moejax.routing.balancers import STATE

E, K = 4, 2


def routed(rng: np.random.Generator, bias: jax.Array, valid: np.ndarray | None = None) -> tuple[np.ndarray, Routing]:
    """Sigmoid routing of random logits that favour the first expert."""
    logits = jnp.asarray(rng.normal(size=(2, 9, E)) + np.array([2.0, 0, 0, 0]), jnp.float32)
    mask = jnp.ones((2, 9), bool) if valid is None else jnp.asarray(valid)
    rule = TopK(k=K, score="sigmoid", normalise=True)
    return np.asarray(logits), Routing(logits, rule.probabilities(logits), rule(logits, Context(valid=mask), bias=bias), mask)


def site(routing: Routing, state: dict, balancer: LossFree) -> Site:
    return Site({}, state, balancer.measure(routing), {}, jnp.int32(1))


@pytest.mark.parametrize("rule", ["sign", "proportional"])
def test_the_bias_answers_what_was_counted(rule: str, rng: np.random.Generator) -> None:
    """NumPy: counts of valid tokens' choices, mean minus count, sign or share, times the speed."""
    balancer, state, bias = LossFree(0.1, rule), {STATE: jnp.zeros(E)}, np.zeros(E)
    valid = rng.random((2, 9)) < 0.7
    for _ in range(4):
        np.testing.assert_allclose(state[STATE], bias, rtol=1e-5)
        logits, routing = routed(rng, state[STATE], valid)
        state = balancer.after_step(site(routing, state, balancer)).state
        scores = 1 / (1 + np.exp(-logits))
        chosen = np.argsort(-(scores + bias), axis=-1, kind="stable")[..., :K]
        counts = np.bincount(chosen[valid].ravel(), minlength=E)
        lack = counts.mean() - counts
        bias = bias + 0.1 * (np.sign(lack) if rule == "sign" else lack / counts.mean())


def test_an_expert_exactly_at_the_mean_stays() -> None:
    """As shares, 8 of 56 and the mean of seven shares differ in the last bit."""
    counts = jnp.array([8, 9, 9, 8, 6, 8, 8])
    moved = LossFree(1.0).after_step(Site({}, {STATE: jnp.zeros(7)}, {"choices": counts}, {}, jnp.int32(1)))
    np.testing.assert_array_equal(moved.state[STATE], [0, -1, -1, 0, 1, 0, 0])


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
    return MoE(Linear(E, init_w=FanIn(1.0)), TopK(k=1, score="sigmoid"), FFN(8, num_experts=E), balancer=LossFree(0.005))


def test_a_layer_keeps_the_bias_as_state_and_balances(rng: np.random.Generator) -> None:
    """Skewed tokens: the load's largest excess falls below half of what it was; no parameter has changed."""
    x = jnp.asarray(rng.normal(size=(4, 16, 6)) + 1.0, jnp.float32)
    moe = layer()
    variables = jax.jit(moe.init)(jax.random.key(0), x)
    assert set(variables["params"]) == {"router", "bank"}
    state = variables["router_state"]

    @jax.jit
    def step(state: dict) -> tuple:
        now = {"params": variables["params"], "router_state": state}
        _, sown, after = train_call(moe, now, x, Context(train=True), mutable=("stats",))
        return after["router_state"], sown["stats"]["max_violation"]

    violations = []
    for _ in range(150):
        state, violation = step(state)
        violations.append(float(violation))
    assert violations[0] > 0.5
    assert np.mean(violations[-5:]) < violations[0] / 2


def test_evaluation_uses_the_bias_and_leaves_it(rng: np.random.Generator) -> None:
    x = jnp.asarray(rng.normal(size=(2, 5, 6)), jnp.float32)
    moe = layer()
    variables = jax.jit(moe.init)(jax.random.key(0), x)
    forbid = {STATE: jnp.array([-9.0, 0, 0, 0])}
    evaluate = jax.jit(lambda variables: train_call(moe, variables, x, Context(), mutable=("stats",))[1:])
    sown, after = evaluate({**variables, "router_state": forbid})
    assert sown["stats"]["load"][0] == 0
    jax.tree.map(np.testing.assert_array_equal, after["router_state"], forbid)


def test_the_bias_gets_no_gradient_and_gives_none(rng: np.random.Generator) -> None:
    x = jnp.asarray(rng.normal(size=(2, 5, 6)), jnp.float32)
    moe = layer()
    variables = jax.jit(moe.init)(jax.random.key(0), x)

    def loss(state: dict) -> jax.Array:
        y, *_ = train_call(moe, {**variables, "router_state": state}, x, Context(train=True))
        return jnp.square(y).sum()

    gradient = jax.jit(jax.grad(loss))({STATE: jnp.arange(E) * 0.1})
    jax.tree.map(lambda g: np.testing.assert_array_equal(g, 0), gradient)


def test_bad_settings_raise() -> None:
    with pytest.raises(ConfigError, match="rule='signs' is unknown"):
        LossFree(rule="signs")
    with pytest.raises(ConfigError, match="must be a number of at least 0"):
        LossFree(-0.1)


def test_microbatches_count_one_batch(rng: np.random.Generator) -> None:
    """What halves of a batch measure adds up to what the whole measures: what the train step's accumulation does with it."""
    balancer = LossFree(0.1)
    _, whole = routed(rng, jnp.zeros(E))
    halves = [balancer.measure(jax.tree.map(lambda a, i=i: a[i : i + 1], whole))["choices"] for i in range(2)]
    np.testing.assert_array_equal(sum(halves), balancer.measure(whole)["choices"])
