"""GShard's select rule against its algorithm written out one token after the other (Lepikhin et al. 2020, algorithm 1)."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moejax import GLU, Balance, ConfigError, Context, GShard, Linear, MoE, TopK, models
from moejax.core.initializers import FanIn
from moejax.routing.losses.base import Routing


def simulate(logits: np.ndarray, valid: np.ndarray, draws: np.ndarray, capacity_factor: float):
    """Combine matrix [n, e] and balance loss of one group; `draws` are the uniform numbers of the second choices."""
    n, e = logits.shape
    gates = np.exp(logits - logits.max(-1, keepdims=True))
    gates /= gates.sum(-1, keepdims=True)
    tokens = [t for t in range(n) if valid[t]]
    capacity = max(1, int(np.ceil(2 * len(tokens) * capacity_factor / e - 1e-9)))
    count, first_count, mean_gate = np.zeros(e, int), np.zeros(e), np.zeros(e)
    combine, second = np.zeros((n, e)), {}
    for t in tokens:
        one, two = np.argsort(-gates[t], kind="stable")[:2]
        g1, g2 = gates[t, [one, two]] / (gates[t, one] + gates[t, two])
        second[t] = two, g2
        mean_gate += gates[t] / len(tokens)
        first_count[one] += 1
        if count[one] < capacity:
            count[one] += 1
            combine[t, one] = g1
    for t in tokens:
        two, g2 = second[t]
        if min(1.0, 2 * g2) > draws[t] and count[two] < capacity:
            count[two] += 1
            combine[t, two] = g2
    return combine, e * (first_count / len(tokens) * mean_gate).sum()


def example(g: int = 3, n: int = 13, e: int = 4):
    """Skewed logits, so that experts overflow, and the last tokens of two groups as padding."""
    logits = 1.5 * jax.random.normal(jax.random.key(0), (g, n, e)) + jnp.array([1.0, 0.5, 0.0, -1.0])
    valid = jnp.arange(n) < jnp.array([n, n - 3, n - 6])[:, None]
    return logits, valid


@pytest.mark.parametrize("capacity_factor", [0.5, 1.0, 2.0])
def test_it_is_the_papers_algorithm(key: jax.Array, capacity_factor: float) -> None:
    logits, valid = example()
    plan = jax.jit(GShard(capacity_factor))(logits, Context(valid=valid, train=True, key=key))
    draws = np.asarray(jax.random.uniform(key, logits.shape[:2]))
    expected = [simulate(*map(np.asarray, group), capacity_factor) for group in zip(logits, valid, draws, strict=True)]
    np.testing.assert_allclose(plan.dense(), np.stack([combine for combine, _ in expected]), atol=1e-6)

    routing = Routing(logits, jax.nn.softmax(logits), plan, valid)
    per_group = np.array([loss for _, loss in expected])
    mean = (per_group * valid.sum(1)).sum() / valid.sum()
    np.testing.assert_allclose(Balance(0.5, count="first")(routing), 0.5 * mean, rtol=1e-5)


def test_the_second_expert_is_kept_as_often_as_twice_its_gate(key: jax.Array) -> None:
    """Over many draws, without capacity; a second choice that was not drawn is not a drop, and g1 stays."""
    logits, valid = example()
    rule = GShard(capacity_factor=None)
    plans = jax.jit(jax.vmap(lambda k: rule(logits, Context(valid=valid, train=True, key=k))))(jax.random.split(key, 4000))
    two = np.sort(np.asarray(jax.nn.softmax(logits), np.float64), axis=-1)[..., :-3:-1]
    expected = 2 * two[..., 1] / two.sum(-1)
    error = np.where(valid, plans.used[..., 1].mean(0) - expected, 0)
    # Five standard errors of a mean of 4000 draws, at most 0.5 each.
    np.testing.assert_allclose(error, 0, atol=5 * 0.5 / np.sqrt(4000))
    assert expected.min() < 0.2
    assert expected.max() > 0.8
    assert not plans.dropped.any()
    np.testing.assert_array_equal(plans.used[..., 0], np.broadcast_to(valid, (4000, *valid.shape)))
    np.testing.assert_allclose(plans.weight[0, ..., 0][valid], (two[..., 0] / two.sum(-1))[valid], rtol=1e-5)


def test_evaluation_draws_nothing() -> None:
    logits, valid = example()
    plain = jax.jit(TopK(k=2, normalise=True, capacity_factor=1.0, priority="choice"))(logits, Context(valid=valid))
    jax.tree.map(np.testing.assert_array_equal, jax.jit(GShard(1.0))(logits, Context(valid=valid)), plain)
    assert plain.dropped.any()


def test_a_layer_draws_anew_for_every_key_and_the_router_learns(key: jax.Array) -> None:
    layer = MoE(Linear(4, init_w=FanIn(4.0)), GShard(1.0), GLU(hidden=8, num_experts=4), backend="capacity")
    x = jax.random.normal(key, (2, 12, 8))
    params = jax.jit(layer.init)(key, x)["params"]

    @functools.partial(jax.jit, static_argnums=1)
    @functools.partial(jax.value_and_grad, has_aux=True)
    def run(params, train: bool, seed: int):
        ctx, rngs = Context(train=train), {"router": jax.random.key(seed)}
        y, sown = layer.apply({"params": params}, x, ctx, rngs=rngs, mutable=["stats"])
        return jnp.square(y).sum(), sown["stats"]

    (one, stats), gradients = run(params, True, 0)
    (two, _), _ = run(params, True, 1)
    (_, evaluated), _ = run(params, False, 0)
    assert one != two
    assert stats["experts_per_token"] < evaluated["experts_per_token"] <= 2
    assert np.abs(gradients["router"]["w"]).max() > 1e-3


def test_errors_say_what_to_do() -> None:
    logits, _ = example()
    with pytest.raises(
        ConfigError, match=r"GShard lacks Context.key: it draws at random in training; .* a call by hand Context\(key=\.\.\.\)"
    ):
        GShard()(logits, Context(train=True))
    with pytest.raises(ConfigError, match=r"k=2 exceeds num_experts=1"):
        GShard()(logits[..., :1])
    with pytest.raises(ConfigError, match=r"capacity_factor=-1.0 must be a number above 0"):
        GShard(-1.0)


def test_a_decoder_refuses_it_unless_tokens_compete_across_the_batch() -> None:
    """Second choices of early tokens depend on first choices of later ones."""

    def build(**ffn):
        moe = {"kind": "moe", "num_experts": 4, "router": {"kind": "linear"}, "select": {"kind": "gshard"}, **ffn}
        moe["bank"] = {"kind": "glu", "hidden": 8}
        block = {
            "kind": "transformer",
            "mixer": {"kind": "attention", "num_heads": 1},
            "norm": {"kind": "rms_norm"},
            "ffn": moe,
        }
        lm = {"kind": "decoder_lm", "vocab_size": 8, "d_model": 8, "num_layers": 1, "pattern": ("b",), "blocks": {"b": block}}
        return models.build(lm)

    with pytest.raises(ConfigError, match=r"GShard\) selects over later tokens .*group_by='position'"):
        build()
    assert build(group_by="position").blocks[0].module.ffn.select == GShard()
    assert GShard(None).causal
    assert GShard(None).per_token
    assert not GShard(1.0).per_token
