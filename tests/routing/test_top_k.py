"""Top-k token choice against NumPy: who is chosen, with which weight, and what reaches the router's gradient."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from numpy_routing import softmax, top_k

from moejax.core.context import Context
from moejax.core.errors import ConfigError
from moejax.routing import TopK

G, N, E = 2, 7, 5
VALID = np.array([[True] * N, [True, False, True, True, False, True, False]])


def make_logits(rng: np.random.Generator) -> np.ndarray:
    return rng.normal(size=(G, N, E)).astype(np.float32) * 2


def expected(logits: np.ndarray, *args, **kwargs) -> tuple[np.ndarray, np.ndarray]:
    experts, weights = zip(*(top_k(group, *args, **kwargs) for group in logits), strict=True)
    return np.stack(experts), np.stack(weights)


@pytest.mark.parametrize("k", [1, 2, E])
@pytest.mark.parametrize("score", ["softmax", "softmax_selected", "sigmoid", "logit"])
@pytest.mark.parametrize(("normalise", "scale"), [(False, 1.0), (True, 2.5)])
def test_choices_and_weights(rng: np.random.Generator, k: int, score: str, normalise: bool, scale: float) -> None:
    # Positive logits, so that normalised raw logits mean something.
    logits = make_logits(rng) + (8 if score == "logit" else 0)
    plan = TopK(k=k, score=score, normalise=normalise, scale=scale, constant_gate=k == 1)(jnp.asarray(logits))
    experts, weights = expected(logits, k, score, normalise, scale)
    np.testing.assert_array_equal(plan.expert, experts)
    np.testing.assert_allclose(plan.weight, weights, rtol=1e-5)
    assert plan.used.all()
    assert not plan.dropped.any()
    assert plan.capacity is None
    assert plan.weight.dtype == jnp.float32


def test_softmax_of_the_selected_is_the_normalised_softmax(rng: np.random.Generator) -> None:
    logits = jnp.asarray(make_logits(rng))
    after, before = TopK(k=2, score="softmax_selected")(logits), TopK(k=2, normalise=True)(logits)
    np.testing.assert_allclose(after.weight, before.weight, rtol=1e-5)


@pytest.mark.parametrize("score", ["softmax", "sigmoid"])
def test_a_bias_ranks_but_never_weighs(rng: np.random.Generator, score: str) -> None:
    logits = make_logits(rng)
    bias = np.array([0.5, -0.4, 0.0, 0.3, -0.2], np.float32)
    plan = TopK(k=2, score=score)(jnp.asarray(logits), bias=jnp.asarray(bias))
    experts, weights = expected(logits, 2, score, bias=bias)
    np.testing.assert_array_equal(plan.expert, experts)
    np.testing.assert_allclose(plan.weight, weights, rtol=1e-5)
    assert (plan.expert != TopK(k=2, score=score)(jnp.asarray(logits)).expert).any()


def test_ties_go_to_the_lowest_index() -> None:
    logits = jnp.array([[[0.0, 0.0, 0.0, 0.0, 0.0], [1.0, 2.0, 2.0, 1.0, 2.0]]])
    for bias in (None, jnp.zeros(E)):
        np.testing.assert_array_equal(TopK(k=3)(logits, bias=bias).expert, [[[0, 1, 2], [1, 2, 4]]])


def test_saturated_scores_do_not_hide_the_order_of_the_logits() -> None:
    """float32 softmax gives 0 to all but the first of these, sigmoid gives 1 to all: a ranking of scores would take 0 and 1."""
    logits = jnp.array([[[300.0, 100.0, 101.0, 103.0, 102.0]]])
    for score in ("softmax", "sigmoid"):
        np.testing.assert_array_equal(TopK(k=3, score=score)(logits).expert, [[[0, 3, 4]]])


def test_padding_uses_nothing_and_changes_nobody(rng: np.random.Generator) -> None:
    logits = jnp.asarray(make_logits(rng))
    plan, free = TopK(k=2)(logits, Context(valid=jnp.asarray(VALID))), TopK(k=2)(logits)
    np.testing.assert_array_equal(plan.used, np.broadcast_to(VALID[..., None], (G, N, 2)))
    np.testing.assert_array_equal(plan.dense(), np.where(VALID[..., None], free.dense(), 0))


def test_top_1_weight_carries_the_routers_gradient(rng: np.random.Generator) -> None:
    """d p_i / d logits = p_i (1[j = i] - p_j): the gradient of Switch's gate, non-zero everywhere."""
    logits = jnp.asarray(make_logits(rng))
    gradient = jax.jit(jax.grad(lambda x: TopK(k=1)(x).weight.sum()))(logits)
    probs = softmax(logits)
    one_hot = np.eye(E)[np.asarray(logits).argmax(-1)]
    p = (probs * one_hot).sum(-1, keepdims=True)
    np.testing.assert_allclose(gradient, p * (one_hot - probs), rtol=1e-4, atol=1e-6)
    assert (np.abs(gradient).max(-1) > 1e-3).all()


@pytest.mark.parametrize(
    "fields", [dict(normalise=True), dict(score="softmax_selected"), dict(score="sigmoid", normalise=True)]
)
def test_a_constant_gate_is_refused_unless_asked_for(rng: np.random.Generator, fields: dict) -> None:
    with pytest.raises(ConfigError, match="gives the router no task gradient; use score='softmax' with normalise=False"):
        TopK(k=1, **fields)
    logits = jnp.asarray(make_logits(rng))
    rule = TopK(k=1, constant_gate=True, **fields)
    np.testing.assert_allclose(rule(logits).weight, 1, rtol=1e-6)
    np.testing.assert_allclose(jax.jit(jax.grad(lambda x: rule(x).weight.sum()))(logits), 0, atol=1e-6)
    assert (np.abs(jax.jit(jax.grad(lambda x: TopK(k=2, **fields)(x).weight[..., 0].sum()))(logits)).max(-1) > 1e-5).all()


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (dict(k=0), "k=0 must be a whole number of at least 1"),
        (dict(score="softmin"), "score='softmin' is unknown; did you mean 'softmax'"),
        (dict(priority="first"), "priority='first' is unknown; valid names: choice, score, token"),
        (dict(capacity_factor=0.0), "capacity_factor=0.0 must be a number above 0, or None"),
        (dict(eval_capacity_factor=-1.0), "eval_capacity_factor=-1.0 must be a number above 0"),
    ],
)
def test_errors_name_the_value(fields: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        TopK(**fields)


def test_more_choices_than_experts_is_an_error() -> None:
    with pytest.raises(ConfigError, match="k=3 exceeds num_experts=2; lower k or add experts"):
        TopK(k=3)(jnp.zeros((1, 2, 2)))


def test_probabilities_and_mean_experts(rng: np.random.Generator) -> None:
    logits = make_logits(rng)
    gates = 1 / (1 + np.exp(-logits.astype(np.float64)))
    np.testing.assert_allclose(
        TopK(score="sigmoid").probabilities(jnp.asarray(logits)), gates / gates.sum(-1, keepdims=True), rtol=1e-5
    )
    np.testing.assert_allclose(TopK().probabilities(jnp.asarray(logits)), softmax(logits), rtol=1e-5)
    assert TopK(k=3).mean_experts(8) == 3.0
