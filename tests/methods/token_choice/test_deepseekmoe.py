"""DeepSeekMoE: the layer's equations and both balance losses in NumPy, groups that limit a token's reach, and what lesions remove."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from numpy_layers import compiled, draw, glu
from numpy_routing import best, sigmoid, softmax

from moejax.core.context import Context
from moejax.core.errors import ConfigError
from moejax.experts import GLU, TrainOnly
from moejax.layers import MoE
from moejax.routing import Balance, DeviceBalance, Linear, Routing, TopK

B, S, D, ROUTED, ACTIVE, SHARED = 2, 5, 4, 6, 3, 2
VALID = np.array([[True] * S, [True, True, False, True, False]])


def layer(**fields) -> MoE:
    shared = fields.pop("shared", GLU(3, num_experts=SHARED))
    return MoE(Linear(ROUTED), TopK(k=ACTIVE), GLU(3, num_experts=ROUTED), shared=shared, backend="reference", **fields)


def test_the_layer_is_the_papers(rng: np.random.Generator) -> None:
    """Softmax over the routed experts alone, gates not normalised after selection, shared experts without a gate."""
    x = jnp.asarray(rng.normal(size=(B, S, D)), jnp.float32)
    variables = draw(layer(), x)
    y = compiled(layer())(variables, x)
    p = variables["params"]
    for b, t in np.ndindex(B, S):
        u = np.asarray(x[b, t], np.float64)
        gates = softmax(u @ np.asarray(p["router"]["w"], np.float64))
        expected = sum(gates[i] * glu(p["bank"], i, u) for i in best(gates, ACTIVE))
        expected = expected + sum(glu(p["shared"], i, u) for i in range(SHARED))
        np.testing.assert_allclose(y[b, t], expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("over", ["group", "batch"])
def test_both_losses_are_the_papers(rng: np.random.Generator, over: str) -> None:
    """f_i = N'/(K'T) * tokens that select i; devices: f' the mean of f, P' the sum of P."""
    logits, devices = jnp.asarray(2 * rng.normal(size=(B, S, ROUTED)), jnp.float32), 3
    rule = TopK(k=ACTIVE)
    routing = Routing(logits, rule.probabilities(logits), rule(logits, Context(valid=jnp.asarray(VALID))), jnp.asarray(VALID))
    probs = [softmax(logits[g])[VALID[g]] for g in range(B)]
    expert_loss, device_loss = [], []
    for p in [np.concatenate(probs)] if over == "batch" else probs:
        chosen = np.array([np.isin(np.arange(ROUTED), best(row, ACTIVE)) for row in p])
        f = ROUTED / (ACTIVE * len(p)) * chosen.sum(0)
        mean = p.mean(0)
        expert_loss.append((f * mean).sum())
        device_loss.append((f.reshape(devices, -1).mean(1) * mean.reshape(devices, -1).sum(1)).sum())
    weights = None if over == "batch" else VALID.sum(1)
    np.testing.assert_allclose(Balance(0.3, over=over)(routing), 0.3 * np.average(expert_loss, weights=weights), rtol=1e-5)
    actual = DeviceBalance(0.3, over=over, devices=devices)(routing)
    np.testing.assert_allclose(actual, 0.3 * np.average(device_loss, weights=weights), rtol=1e-5)
    np.testing.assert_allclose(
        DeviceBalance(0.3, over=over, devices=ROUTED)(routing), Balance(0.3, over=over)(routing), rtol=1e-6
    )
    with pytest.raises(ConfigError, match="devices=4 must divide num_experts=6"):
        DeviceBalance(devices=4)(routing)


@pytest.mark.parametrize("score", ["softmax", "sigmoid"])
@pytest.mark.parametrize("group_score", ["best", "best_two"])
@pytest.mark.parametrize("biased", [False, True])
def test_experts_come_from_the_best_groups(rng: np.random.Generator, score: str, group_score: str, biased: bool) -> None:
    e, groups, kept, k = 12, 4, 2, 3
    logits = rng.normal(size=(B, S, e)).astype(np.float32)
    bias = 0.3 * rng.normal(size=e).astype(np.float32) if biased else np.zeros(e)
    rule = TopK(k=k, score=score, expert_groups=groups, groups_kept=kept, group_score=group_score)
    plan = rule(jnp.asarray(logits), bias=jnp.asarray(bias) if biased else None)
    unlike = 0
    for b, t in np.ndindex(B, S):
        scores = softmax(logits[b, t]) if score == "softmax" else sigmoid(logits[b, t])
        ranking = (scores + bias).reshape(groups, -1)
        rank = np.sort(ranking, 1)[:, -(1 if group_score == "best" else 2) :].sum(1)
        reach = np.isin(np.arange(groups), best(rank, kept)).repeat(e // groups)
        chosen = best(np.where(reach, scores + bias, -np.inf), k)
        np.testing.assert_array_equal(plan.expert[b, t], chosen)
        np.testing.assert_allclose(plan.weight[b, t], scores[chosen], rtol=1e-5)
        unlike += set(chosen) != set(best(scores + bias, k))
    assert unlike


def test_skipping_the_best_experts_takes_the_next_with_their_own_gates(rng: np.random.Generator) -> None:
    logits = jnp.asarray(rng.normal(size=(B, S, ROUTED)), jnp.float32)
    every = TopK(k=5)(logits)
    skipped = TopK(k=3, skip=2)(logits)
    np.testing.assert_array_equal(skipped.expert, every.expert[..., 2:])
    np.testing.assert_array_equal(skipped.weight, every.weight[..., 2:])


def test_a_shared_expert_can_fall_silent_in_evaluation(rng: np.random.Generator) -> None:
    x = jnp.asarray(rng.normal(size=(B, S, D)), jnp.float32)
    lesioned = layer(shared=TrainOnly(GLU(3, num_experts=SHARED)))
    variables = draw(layer(), x)
    params = variables["params"] | {"shared": {"bank": variables["params"]["shared"]}}
    whole = compiled(layer())(variables, x)
    np.testing.assert_allclose(compiled(lesioned)({"params": params}, x, Context(train=True)), whole, rtol=1e-6)
    routed_only = compiled(layer(shared=None))(variables, x)
    np.testing.assert_allclose(compiled(lesioned)({"params": params}, x), routed_only, rtol=1e-6)
    assert np.abs(whole - routed_only).max() > 0.1
    assert jax.eval_shape(lesioned.init, jax.random.key(0), x)["params"]["shared"]["bank"]["w_up"].shape == (SHARED, D, 3)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"expert_groups": 4}, "expert_groups=4 does not divide num_experts=6"),
        ({"expert_groups": 3, "groups_kept": 1}, r"k=3 and skip=0 exceed the 2 experts in a token's reach"),
        ({"expert_groups": 2, "groups_kept": 3}, "groups_kept=3 exceeds expert_groups=2"),
        ({"skip": 4}, "skip=4 exceed the 6 experts"),
        ({"skip": -1}, "skip=-1"),
        ({"group_score": "mean"}, "group_score='mean' is unknown"),
    ],
)
def test_errors_name_the_value(fields: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        TopK(k=3, **fields)(jnp.zeros((1, 1, ROUTED)))
