"""Null experts: AdaMoE's rule and loss in NumPy from their equations, tokens that take nothing, and a layer that has them."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from numpy_layers import compiled, draw, weighted_experts
from numpy_routing import best, softmax

from moejax import GLU, Linear, MoE
from moejax.core.context import Context
from moejax.core.errors import ConfigError
from moejax.layers.registry import ffns
from moejax.routing import NullBalance, NullExperts, Router, Routing

G, N, D, E, NULL, K = 2, 9, 5, 4, 3, 3
RULE = NullExperts(k=K, num_null=NULL)


def numpy_weights(logits: np.ndarray, k: int = K, e: int = E, normalise: str = "true") -> np.ndarray:
    """Combine weights [e] of one token with logits [e + m]."""
    p = softmax(logits)
    chosen = best(logits, k)
    true = [i for i in chosen if i < e]
    total = {"true": sum(p[true]), "selected": sum(p[chosen]), "none": 1.0}[normalise]
    weights = np.zeros(e)
    for i in true:
        weights[i] = p[i] / total
    return weights


def numpy_loss(logits: np.ndarray, mean_null: bool) -> float:
    """(e + m) * sum of f~ P over tokens [t, e + m]."""
    p, f = softmax(logits), np.zeros(E + NULL)
    for row in logits:
        f[best(row, K)] += 1 / (len(logits) * K)
    if mean_null:
        f[E:] = f[E:].sum() / NULL
    return (E + NULL) * (f * p.mean(0)).sum()


def draw_logits(rng: np.random.Generator) -> np.ndarray:
    return (2 * rng.normal(size=(G, N, E + NULL))).astype(np.float32)


@pytest.mark.parametrize("normalise", ["true", "selected", "none"])
def test_it_is_numpys(normalise: str, rng: np.random.Generator) -> None:
    logits, valid = draw_logits(rng), rng.random((G, N)) < 0.8
    logits[0, 0, E:] += 20  # three null experts and nothing else
    plan = NullExperts(K, NULL, normalise)(jnp.asarray(logits), Context(valid=jnp.asarray(valid)))
    expected = np.apply_along_axis(numpy_weights, -1, logits, normalise=normalise) * valid[..., None]
    np.testing.assert_allclose(plan.dense(), expected, rtol=1e-5, atol=1e-7)
    counts = np.asarray(plan.assigned()).sum(-1)
    np.testing.assert_array_equal(counts, (expected > 0).sum(-1))
    assert {0, 1, 2} <= set(counts[valid])
    assert plan.num_experts == E


def test_gradients_are_those_of_renormalised_probabilities_and_finite_where_nothing_is_chosen(rng: np.random.Generator) -> None:
    logits, v = draw_logits(rng), jnp.asarray(rng.normal(size=(G, N, E)), jnp.float32)
    logits[0, 0, E:] += 20
    chosen = np.apply_along_axis(numpy_weights, -1, logits) > 0

    def dense(x: jax.Array) -> jax.Array:
        p = jnp.where(chosen, jax.nn.softmax(x)[..., :E], 0)
        return (v * p / jnp.where(chosen.any(-1, keepdims=True), p.sum(-1, keepdims=True), 1)).sum()

    gradient = jax.jit(jax.grad(lambda x: (v * RULE(x).dense()).sum()))(jnp.asarray(logits))
    np.testing.assert_allclose(gradient, jax.jit(jax.grad(dense))(jnp.asarray(logits)), rtol=1e-4, atol=1e-6)
    np.testing.assert_array_equal(gradient[0, 0], 0)


@pytest.mark.parametrize("null", ["mean", "each"])
def test_the_loss_is_numpys_and_pulls_on_probabilities_only(null: str, rng: np.random.Generator) -> None:
    logits, valid = draw_logits(rng), rng.random((G, N)) < 0.8

    def loss(x: jax.Array) -> jax.Array:
        plan = RULE(x, Context(valid=jnp.asarray(valid)))
        return NullBalance(0.3, null)(Routing(x, RULE.probabilities(x), plan, jnp.asarray(valid)))

    np.testing.assert_allclose(loss(jnp.asarray(logits)), 0.3 * numpy_loss(logits[valid], null == "mean"), rtol=1e-5)
    gradient = jax.jit(jax.grad(loss))(jnp.asarray(logits))
    np.testing.assert_array_equal(np.asarray(gradient)[~valid], 0)
    # d/dx of a sum a_i p_i with constant a: p_i (a_i - sum a p).
    share = np.zeros(E + NULL)
    for row in logits[valid]:
        share[best(row, K)] += 1 / (valid.sum() * K)
    if null == "mean":
        share[E:] = share[E:].mean()
    p, a = softmax(logits[valid]), 0.3 * (E + NULL) * share / valid.sum()
    np.testing.assert_allclose(np.asarray(gradient)[valid], p * (a - (p * a).sum(-1, keepdims=True)), rtol=1e-4, atol=1e-7)


def test_the_loss_does_not_mind_which_null_experts_are_taken() -> None:
    """Ten tokens that always take the first null expert cost what ten that take them in turn cost, unless balanced one by one."""
    same = jnp.zeros((1, 10, 6)).at[..., 4].set(3.0)
    turns = jnp.zeros((1, 10, 6)).at[0, jnp.arange(10), 4 + jnp.arange(10) % 2].set(3.0)
    rule, valid = NullExperts(k=1, num_null=2), jnp.ones((1, 10), bool)

    def cost(x: jax.Array, null: str) -> float:
        return float(NullBalance(1.0, null)(Routing(x, rule.probabilities(x), rule(x), valid)))

    np.testing.assert_allclose(cost(same, "mean"), cost(turns, "mean"), rtol=1e-5)
    assert cost(same, "each") > 1.5 * cost(turns, "each")


def test_a_layer_gives_its_router_the_outputs_and_tokens_without_experts_zeros(rng: np.random.Generator) -> None:
    x = jnp.asarray(rng.normal(size=(G, N, D)), jnp.float32)
    layer = MoE(Linear(E), RULE, GLU(3, num_experts=E), losses=(NullBalance(),))
    variables = draw(layer, x)
    router = variables["params"]["router"]["w"]
    assert router.shape == (D, E + NULL)
    y, sown = compiled(layer, "losses", "stats")(variables, x, Context())
    logits = np.asarray(x, np.float64) @ np.asarray(router, np.float64)
    combine = np.apply_along_axis(numpy_weights, -1, logits)
    for g in range(G):
        expected = weighted_experts(variables["params"]["bank"], combine[g], np.asarray(x[g], np.float64))
        np.testing.assert_allclose(y[g], expected, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(sown["stats"]["experts_per_token"], (combine > 0).sum(-1).mean(), rtol=1e-5)
    np.testing.assert_allclose(sown["stats"]["unrouted"], (combine.sum(-1) == 0).mean(), atol=1e-6)
    nothing = {"params": {**variables["params"], "router": {"w": jnp.zeros_like(router).at[:, E:].set(0.0)}}}
    bias = {"logit_bias": jnp.zeros(E + NULL).at[E:].set(9.0)}
    np.testing.assert_array_equal(compiled(layer, "stats")({**nothing, "interventions": bias}, x, Context())[0], 0)


def test_copied_null_experts_start_behind_the_experts_they_copy(rng: np.random.Generator) -> None:
    """Two copies of each expert: of three choices the best expert and both its copies, so every token takes one expert, its best."""
    moe = MoE(Linear(E, null_start="copied"), NullExperts(k=3, num_null=2 * E), GLU(3, num_experts=E), backend="reference")
    x = jnp.asarray(rng.normal(size=(G, N, D)), jnp.float32)
    variables = jax.jit(moe.init)(jax.random.key(0), x)
    w = np.asarray(variables["params"]["router"]["w"])
    np.testing.assert_array_equal(w, np.tile(w[:, :E], 3))
    assert len(np.unique(w)) == D * E
    _, sown = compiled(moe, "routing")(variables, x)
    plan = sown["routing"]["plan"]
    logits = np.einsum("gnd,de->gne", x, w[:, :E])
    np.testing.assert_array_equal(np.asarray(plan.dense()), np.eye(E)[logits.argmax(-1)])


def test_it_is_built_from_a_config_and_counts_active_experts() -> None:
    spec = dict(kind="moe", num_experts=8, router=dict(kind="cosine"), bank=dict(kind="glu", hidden=3))
    layer = ffns.build({**spec, "select": dict(kind="null_experts", k=4, num_null=8), "losses": dict(null_balance={})}, "ffn")
    assert layer.router.outputs == (1, 8)
    assert layer.active_fraction() == 2 / 8
    assert layer.decodable() is None
    assert NullExperts(4, 16).mean_experts(8) == pytest.approx(4 / 3)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"k": 0}, "k=0"),
        ({"num_null": 0}, "num_null=0 must be a whole number of at least 1"),
        ({"normalise": "all"}, "normalise='all' is unknown"),
    ],
)
def test_bad_settings_raise(fields: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        NullExperts(**fields)


def test_parts_that_do_not_fit_raise() -> None:
    with pytest.raises(ConfigError, match="k=9 exceeds num_experts=4 and num_null=3 together"):
        MoE(Linear(E), NullExperts(9, NULL), GLU(3, num_experts=E))
    with pytest.raises(ConfigError, match="null='none' is unknown"):
        NullBalance(null="none")
    layer = MoE(Stubborn(E), RULE, GLU(3, num_experts=E))
    with pytest.raises(ConfigError, match=r"gives 4 logits .* needs 1 for each of the 4 experts and 3 for null experts"):
        jax.eval_shape(layer.init, jax.random.key(0), jnp.zeros((1, 2, D)))


class Stubborn(Router):
    """A router that does not listen."""

    def __call__(self, x: jax.Array, ctx: Context) -> jax.Array:
        return jnp.zeros((*x.shape[:2], self.num_experts))
