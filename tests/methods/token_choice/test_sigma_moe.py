"""sigma-MoE: the layer in NumPy, expert dropout before the selection, its balance loss, its start, and its settings."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from numpy_layers import draw
from numpy_routing import best, sigmoid, softmax

from moejax import models
from moejax.core.context import Context
from moejax.core.errors import ConfigError
from moejax.core.initializers import DenseMatched
from moejax.core.params import per_expert
from moejax.experts import FFN
from moejax.layers import MoE
from moejax.routing import EqualNorm, ExpertDropout, Routing, SoftSlots, Spread, TopK

B, S, D, E, F, K = 2, 5, 6, 4, 3, 2
VALID = np.arange(S)[None] < np.array([5, 3])[:, None]
RULE = ExpertDropout(TopK(k=K, score="sigmoid"), 0.5)


def chosen(logits: np.ndarray, here: np.ndarray) -> np.ndarray:
    """Combine weights [e] of one token: sigmoids, zeroed where missing, the k largest, as they are."""
    s = sigmoid(logits) * here
    weights = np.zeros(E)
    weights[best(s, K)] = s[best(s, K)]
    return weights


def test_the_layer_is_numpys() -> None:
    layer = MoE(EqualNorm(E), RULE, FFN(F, num_experts=E, activation="relu"), losses=(Spread(0.5),))
    x = jax.random.normal(jax.random.key(0), (B, S, D))
    variables = draw(layer, x)
    ctx = Context(valid=jnp.asarray(VALID))
    y, sown = jax.jit(lambda v, x: layer.apply(v, x, ctx, mutable=["losses"]))(variables, x)
    p = jax.tree.map(lambda a: np.asarray(a, np.float64), variables["params"])
    tokens = np.asarray(x, np.float64)
    logits = tokens @ p["router"]["w"]
    weights = np.apply_along_axis(chosen, -1, logits, np.ones(E)) * VALID[..., None]
    experts = [np.maximum(tokens @ p["bank"]["w_in"][e], 0) @ p["bank"]["w_out"][e] for e in range(E)]
    np.testing.assert_allclose(y, sum(weights[..., [e]] * experts[e] for e in range(E)), rtol=1e-4, atol=1e-5)
    mean = softmax(logits)[VALID].mean(0)
    np.testing.assert_allclose(sown["losses"]["spread_loss"], 0.5 * (mean * np.log(mean)).sum(), rtol=1e-5)


def test_experts_go_missing_before_the_selection_and_in_training_only(rng: np.random.Generator, key: jax.Array) -> None:
    logits = rng.normal(size=(B, S, E)).astype(np.float32)
    plan = RULE(jnp.asarray(logits), Context(valid=jnp.asarray(VALID), train=True, key=key))
    here = np.asarray(jax.random.bernoulli(key, 0.5, logits.shape))
    expected = np.array([[chosen(logits[i, t], here[i, t]) * VALID[i, t] for t in range(S)] for i in range(B)])
    np.testing.assert_allclose(plan.dense(), expected, rtol=1e-5)
    # k of those that are left, not what is left of k.
    np.testing.assert_array_equal(plan.used.sum(-1), np.minimum(here.sum(-1), K) * VALID)
    outside = RULE(jnp.asarray(logits), Context(valid=jnp.asarray(VALID)))
    np.testing.assert_allclose(
        outside.dense(), TopK(k=K, score="sigmoid")(jnp.asarray(logits), Context(valid=jnp.asarray(VALID))).dense()
    )
    assert RULE.needs == ("key",)
    assert not ExpertDropout(TopK(), 0.0).needs


def test_a_missing_expert_gets_no_gradient() -> None:
    """Even under the raw-logit score, whose stand-in is not a weight of zero."""
    logits, key = jnp.array([[[0.3, -0.2, 0.1, 0.5]]]), jax.random.key(1)  # one expert is missing
    here = np.asarray(jax.random.bernoulli(key, 0.5, logits.shape))
    for score in ("sigmoid", "logit"):
        rule = ExpertDropout(TopK(k=E, score=score), 0.5)
        grad = jax.jit(jax.grad(lambda z, rule=rule: jnp.sin(rule(z, Context(train=True, key=key)).dense()).sum()))(logits)
        assert (np.asarray(grad)[~here] == 0).all()
        assert (np.asarray(grad)[here] != 0).all()


@pytest.mark.parametrize("over", ["batch", "group"])
def test_spread_has_an_axis(over: str, rng: np.random.Generator) -> None:
    logits = jnp.asarray(2 * rng.normal(size=(B, S, E)), jnp.float32)
    rule = TopK(k=K, score="sigmoid")
    routing = Routing(logits, rule.probabilities(logits), rule(logits), jnp.asarray(VALID))
    parts = [VALID] if over == "batch" else [VALID & (np.arange(B)[:, None] == i) for i in range(B)]
    means = [softmax(logits)[part].mean(0) for part in parts]
    expected = sum((m * np.log(m)).sum() * part.sum() for m, part in zip(means, parts, strict=True)) / VALID.sum()
    np.testing.assert_allclose(Spread(0.1, over)(routing), 0.1 * expected, rtol=1e-5)
    flat = Routing(jnp.zeros_like(logits), routing.probs, routing.plan, routing.valid)
    np.testing.assert_allclose(Spread(1.0, over)(flat), -np.log(E), rtol=1e-5)


def test_it_starts_as_pieces_of_a_dense_layer() -> None:
    """Standard deviations by the whole width and the model's depth, which a config fills in; router vectors of one length."""
    d, e, f, layers = 32, 16, 8, 3
    ffn = dict(
        kind="moe", num_experts=e, router=dict(kind="equal_norm"),
        bank=dict(kind="ffn", hidden=f, init_in=dict(kind="dense_matched"), init_out=dict(kind="dense_matched", fan_in="all")),
        select=dict(kind="expert_dropout", select=dict(kind="top_k", k=4, score="sigmoid")), losses=dict(spread=dict(coef=1e-3)),
    )  # fmt: skip
    block = dict(kind="transformer", mixer=dict(kind="attention", num_heads=1), norm=dict(kind="rms_norm"), ffn=ffn)
    model = models.build(
        dict(kind="decoder_lm", vocab_size=9, d_model=d, num_layers=layers, pattern=("a",), blocks={"a": block})
    )
    layer = model.blocks[0].module.ffn
    params = jax.jit(layer.init)(jax.random.key(0), jnp.zeros((1, 1, d)))["params"]
    np.testing.assert_allclose(params["bank"]["w_in"].std(), np.sqrt(2 / (d * layers)), rtol=0.05)
    np.testing.assert_allclose(params["bank"]["w_out"].std(), np.sqrt(2 / (e * f * layers)), rtol=0.05)
    one = per_expert(DenseMatched("expert", layers))(jax.random.key(1), (e, f, d))
    np.testing.assert_allclose(one.std(), np.sqrt(2 / (f * layers)), rtol=0.05)
    w = np.asarray(params["router"]["w"])
    np.testing.assert_allclose(w.std(), np.sqrt(2 / (d * layers)), rtol=1e-5)
    np.testing.assert_allclose(np.linalg.norm(w, axis=0), np.linalg.norm(w, axis=0)[0], rtol=1e-5)
    assert layer.active_fraction() == 4 / e
    assert layer.decodable() is None


def test_bad_settings_raise() -> None:
    with pytest.raises(ConfigError, match=r"rate=1\.0"):
        ExpertDropout(TopK(), 1.0)
    with pytest.raises(ConfigError, match=r"select=SoftSlots.* must be a TokenChoice"):
        ExpertDropout(SoftSlots())
    with pytest.raises(ConfigError, match="k=9 exceeds num_experts=4"):
        MoE(EqualNorm(E), ExpertDropout(TopK(k=9)), FFN(F, num_experts=E))
    with pytest.raises(ConfigError, match="fan_in='alll'"):
        DenseMatched("alll")
    with pytest.raises(ConfigError, match="over='batches'"):
        Spread(over="batches")
