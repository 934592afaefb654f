"""ReMoE: ReLU gates and the adaptive L1 loss in NumPy, and lambda over optimizer steps of a model with several layers."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from numpy_layers import compiled, draw, weighted_experts

from moejax import GLU, Linear, MoE
from moejax.core.context import Context
from moejax.core.errors import ConfigError
from moejax.layers.registry import ffns
from moejax.optim.base import optimizers
from moejax.routing import AdaptiveL1, ReLU, Routing
from moejax.tasks.base import tasks
from moejax.train.step import init_state, make_train_step

G, N, D, E = 2, 7, 5, 4
LAYERS, VOCAB, ROWS, LENGTH = 3, 11, 4, 6


def draw_logits(rng: np.random.Generator) -> np.ndarray:
    logits = rng.normal(size=(G, N, E)).astype(np.float32)
    logits[0, 0] = -np.abs(logits[0, 0])  # a token without experts
    return logits


def test_gates_are_relus_and_padding_has_none(rng: np.random.Generator) -> None:
    logits, valid = draw_logits(rng), rng.random((G, N)) < 0.8
    plan = ReLU()(jnp.asarray(logits), Context(valid=jnp.asarray(valid)))
    np.testing.assert_allclose(plan.dense(), np.maximum(logits, 0) * valid[..., None], rtol=1e-6)
    np.testing.assert_array_equal(plan.assigned(), (logits > 0) & valid[..., None])
    gradient = jax.jit(jax.grad(lambda x: (jnp.arange(1.0, E + 1) * ReLU()(x).dense()).sum()))(jnp.asarray(logits))
    np.testing.assert_allclose(gradient, (logits > 0) * np.arange(1, E + 1))
    np.testing.assert_allclose(ReLU().probabilities(jnp.asarray(logits)).sum(-1), (logits > 0).any(-1), rtol=1e-6)


def test_a_bound_keeps_the_largest_gates(rng: np.random.Generator) -> None:
    logits = draw_logits(rng)
    kept = logits >= np.sort(logits, axis=-1)[..., -2:-1]
    np.testing.assert_allclose(ReLU(max_experts=2)(jnp.asarray(logits)).dense(), np.maximum(logits, 0) * kept, rtol=1e-6)


@pytest.mark.parametrize("balanced", [True, False])
def test_the_loss_is_numpys_in_value_and_gradient(balanced: bool, rng: np.random.Generator) -> None:
    """lambda * sum_e f_e mean_t R_te with f_e = e / (k T) * the tokens that use expert e; f is a constant to the gradient."""
    logits, valid, k, weight = draw_logits(rng), rng.random((G, N)) < 0.8, 1.5, 0.3

    def loss(x: jax.Array) -> jax.Array:
        routing = Routing(x, ReLU().probabilities(x), ReLU()(x, Context(valid=jnp.asarray(valid))), jnp.asarray(valid))
        return AdaptiveL1(k, balanced=balanced)(routing, jnp.float32(weight))

    tokens = logits[valid].astype(np.float64)
    f = E / k * (tokens > 0).mean(0) if balanced else np.ones(E)
    value, gradient = jax.jit(jax.value_and_grad(loss))(jnp.asarray(logits))
    np.testing.assert_allclose(value, weight * (f * np.maximum(tokens, 0).mean(0)).sum(), rtol=1e-5)
    np.testing.assert_allclose(np.asarray(gradient)[valid], weight * f * (tokens > 0) / len(tokens), rtol=1e-5)
    np.testing.assert_array_equal(np.asarray(gradient)[~valid], 0)


def test_a_layer_is_the_sum_of_gated_experts_and_zero_where_all_gates_are(rng: np.random.Generator) -> None:
    x = jnp.asarray(rng.normal(size=(G, N, D)), jnp.float32)
    layer = MoE(Linear(E), ReLU(2), GLU(3, num_experts=E), losses=(AdaptiveL1(2),))
    variables = draw(layer, x)
    router = np.asarray(variables["params"]["router"]["w"], np.float64)
    state = {"router_state": {"adaptive_l1": jnp.float32(0.5)}}
    y, sown = compiled(layer, "losses", "stats", "measured")({**variables, **state}, x, Context())
    gates = np.maximum(np.asarray(x, np.float64) @ router, 0)
    for g in range(G):
        expected = weighted_experts(variables["params"]["bank"], gates[g], np.asarray(x[g], np.float64))
        np.testing.assert_allclose(y[g], expected, rtol=1e-4, atol=1e-5)
    loss = 0.5 * (E / 2 * (gates > 0).mean((0, 1)) * gates.mean((0, 1))).sum()
    np.testing.assert_allclose(sown["losses"]["adaptive_l1_loss"], loss, rtol=1e-4)
    assert sown["measured"]["adaptive_l1_measured"] == {"active": (gates > 0).sum(), "tokens": G * N}
    dead = {"params": variables["params"], **state, "interventions": {"logit_bias": jnp.full(E, -99.0)}}
    np.testing.assert_array_equal(compiled(layer, "losses")(dead, x, Context())[0], 0)
    assert layer.active_fraction() == 0.5


class Model(nn.Module):
    """Scanned residual mixtures between an embedding and a head."""

    @nn.compact
    def __call__(self, tokens: jax.Array, ctx: Context) -> jax.Array:
        init = nn.initializers.uniform(1.0)
        x = nn.Embed(VOCAB, D, embedding_init=init)(tokens) - 0.5
        body = nn.scan(Residual, variable_axes={True: 0}, split_rngs={True: True}, in_axes=(nn.broadcast,), length=LAYERS)
        return nn.Dense(VOCAB, kernel_init=init)(body(name="layers")(x, ctx)[0])


class Residual(nn.Module):
    @nn.compact
    def __call__(self, x: jax.Array, ctx: Context) -> tuple[jax.Array, None]:
        loss = AdaptiveL1(1, coef=0.1, rate=1.5)
        moe = MoE(
            Linear(E, parent=None), ReLU(), GLU(3, num_experts=E, parent=None), losses=(loss,), backend="reference", name="ffn"
        )
        return x + moe(x, ctx), None


def text() -> dict[str, jax.Array]:
    rng = np.random.default_rng(0)
    tokens = rng.integers(1, VOCAB, (ROWS, LENGTH + 1)).astype(np.int32)
    # Every row has a different number of tokens, so that a mean of microbatches' means would be wrong.
    segments = (np.arange(LENGTH) < np.array([6, 2, 5, 3])[:, None]).astype(np.int32)
    batch = {"tokens": tokens[:, :-1], "targets": tokens[:, 1:], "valid": segments > 0, "segments": segments}
    positions = np.broadcast_to(np.arange(LENGTH, dtype=np.int32), segments.shape)
    return {name: jnp.asarray(value) for name, value in (batch | {"positions": positions}).items()}


def test_lambda_follows_the_mean_over_layers_tokens_and_microbatches_and_sparsity_reaches_its_target() -> None:
    task, batch = tasks.build({"kind": "next_token"}, "task"), text()
    optimizer = optimizers.build({"kind": "adamw", "learning_rate": 0.02, "schedule": "constant"}, "optimizer", steps=100)
    state = jax.jit(lambda key: init_state(Model(), task, optimizer, batch, key))(jax.random.key(1))
    step = jax.jit(make_train_step(Model(), task, optimizer, accumulation=2, jit=False))
    measure = jax.jit(lambda v: Model().apply(v, *task.inputs(batch, jnp.int32(0), train=True), mutable=["stats"])[1]["stats"])
    expected, history = 0.1, []
    for i in range(60):
        used = measure({"params": state.params, **state.collections})["layers"]["ffn"]["experts_per_token"]
        state, _ = step(state, batch)
        history.append(float(used.mean()))
        expected *= 1.5 if history[-1] > 1 else 1 / 1.5
        value = state.collections["router_state"]["layers"]["ffn"]["adaptive_l1"]
        assert (value.dtype, value.shape) == (jnp.float32, (LAYERS,))
        if i < 20:
            np.testing.assert_allclose(value, expected, rtol=1e-4)
    assert history[0] > 1.5, "about half of the experts at the start"
    assert 0.5 < np.mean(history[-20:]) < 1.3
    assert len({round(float(u), 3) for u in used}) > 1, "layers differ; only their mean is held"


def test_it_is_built_from_a_config() -> None:
    spec = dict(kind="moe", num_experts=8, router=dict(kind="linear"), bank=dict(kind="glu", hidden=3))
    layer = ffns.build({**spec, "select": dict(kind="relu", k=2), "losses": dict(adaptive_l1=dict(k=2, rate=1.1))}, "ffn")
    assert layer.losses == (AdaptiveL1(2, rate=1.1),)
    assert layer.decodable() is None
    layer.check_causal("ffn")
    bfloat16 = jnp.zeros((1, 2, D), jnp.bfloat16)
    state = jax.eval_shape(layer.init, jax.random.key(0), bfloat16)["router_state"]
    assert state["adaptive_l1"].dtype == jnp.float32


@pytest.mark.parametrize(
    ("rule", "fields", "message"),
    [
        (ReLU, {"k": 0}, "k=0"),
        (ReLU, {"max_experts": 0}, "max_experts=0"),
        (AdaptiveL1, {"rate": 1.0}, "rate=1.0 must be a number above 1"),
        (AdaptiveL1, {"coef": 0.0}, "coef=0.0 must be a number above 0"),
    ],
)
def test_bad_settings_raise(rule: type, fields: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        rule(**fields)


def test_more_experts_than_there_are_raise() -> None:
    with pytest.raises(ConfigError, match="k=5 exceeds num_experts=4"):
        MoE(Linear(E), ReLU(5), GLU(3, num_experts=E))
