"""ST-MoE: the second expert's threshold, who is served first, the scaled gated expert, the extra dense layer, the rough router."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from ml_dtypes import bfloat16
from numpy_layers import compiled, draw
from numpy_routing import admit, best, capacity, combine, service_order, softmax

from moejax import GLU, ConfigError, Context, GShard, Linear, MoE
from moejax.dispatch.layout import Batched, Grouped, PerToken
from moejax.layers.registry import blocks

G, N, E = 2, 12, 4
VALID = np.arange(N) < np.array([N, 7])[:, None]


def second_experts(rng: np.random.Generator) -> np.ndarray:
    """Logits under which second gates lie on both sides of the threshold and experts overflow."""
    return (2 * rng.normal(size=(G, N, E)) + [1.0, 0.5, 0.0, -1.0]).astype(np.float32)


@pytest.mark.parametrize("priority", ["choice", "score"])
def test_training_is_the_papers_algorithm(rng: np.random.Generator, key: jax.Array, priority: str) -> None:
    logits = second_experts(rng)
    rule = GShard(0.75, 2.0, threshold=0.2, priority=priority)
    plan = jax.jit(rule)(jnp.asarray(logits), Context(valid=jnp.asarray(VALID), train=True, key=key))
    draws, expected, kept = np.asarray(jax.random.uniform(key, (G, N))), [], []
    for g in range(G):
        probs = softmax(logits[g])
        expert = np.array([best(row, 2) for row in probs])
        gate = np.take_along_axis(probs, expert, 1)
        gate = gate / gate.sum(1, keepdims=True)
        wanted = np.stack([VALID[g], VALID[g] & (np.minimum(1, gate[:, 1] / 0.2) > draws[g])], 1)
        # Padding is never served, wherever it comes in the order.
        order = service_order(priority, np.where(VALID[g], probs.max(1), -1), 2)
        used = admit(expert, wanted, order, capacity(int(VALID[g].sum()), E, 2, 0.75))
        expected.append(combine(expert, gate, used, E))
        kept.append(wanted[:, 1][VALID[g] & (gate[:, 1] < 0.2)])
        assert wanted[:, 1][VALID[g] & (gate[:, 1] > 0.2)].all()
    np.testing.assert_allclose(plan.dense(), expected, atol=1e-6)
    assert plan.dropped.any()
    assert not np.concatenate(kept).all()


def test_evaluation_draws_nothing_and_has_more_room(rng: np.random.Generator) -> None:
    logits, rule = jnp.asarray(second_experts(rng)), GShard(0.75, 2.0, threshold=0.2)
    plan = rule(logits, Context(valid=jnp.asarray(VALID)))
    assert not plan.dropped.any()
    np.testing.assert_array_equal(plan.used.sum(-1), 2 * VALID)
    np.testing.assert_allclose(np.where(VALID, plan.weight.sum(-1), 1), 1, rtol=1e-6)


@pytest.mark.parametrize("threshold", [0.0, 0.6])
def test_a_threshold_that_compares_nothing_is_refused(threshold: float) -> None:
    with pytest.raises(ConfigError, match=f"threshold={threshold}"):
        GShard(threshold=threshold)


@pytest.mark.parametrize("layout", ["batched", "grouped", "per_token"])
def test_the_scaled_expert_is_numpys(rng: np.random.Generator, layout: str) -> None:
    bank, d, m = GLU(5, num_experts=3, activation="gelu", scaled=True), 4, 6
    x = jnp.asarray(rng.normal(size=(3, 2, d)), jnp.float32)
    assert (bank.init(jax.random.key(0), d)["params"]["scale"] == 1).all()
    variables = draw(bank, d)
    p = {name: np.asarray(value, np.float64) for name, value in variables["params"].items()}
    gate = np.asarray(jax.nn.gelu(jnp.einsum("ecd,edf->ecf", x, p["w_gate"])))
    hidden = gate * np.einsum("ecd,edf->ecf", x, p["w_up"]) * p["scale"][:, None]
    expected = np.einsum("ecf,efd->ecd", hidden, p["w_out"])
    rows = x if layout == "batched" else x.reshape(m, d)
    kinds = {
        "batched": Batched(),
        "grouped": Grouped(jnp.full(3, 2), num_rows=m),
        "per_token": PerToken(jnp.arange(3).repeat(2)),
    }
    actual = jax.jit(lambda v, rows: bank.apply(v, d).run(rows, kinds[layout]))(variables, rows)
    np.testing.assert_allclose(np.reshape(actual, expected.shape), expected, rtol=1e-3, atol=1e-4)


def test_a_dense_layer_beside_the_sparse_one(rng: np.random.Generator) -> None:
    """A block of its own: x + ffn(norm(x)), with or without the norm, and with its own dropout in training."""
    x = jnp.asarray(rng.normal(size=(2, 3, 8)), jnp.float32)

    def block(**fields):
        spec = {"kind": "feed_forward", "ffn": {"kind": "glu", "hidden": 4, "scaled": True}, **fields}
        return blocks.build(spec, "block")

    normed = block(norm={"kind": "rms_norm"})
    variables = draw(normed, x, Context())
    p = jax.tree.map(np.asarray, variables["params"])
    u = np.asarray(x, np.float64)

    def ffn(u: np.ndarray) -> np.ndarray:
        gate, up, out, scale = (np.float64(p["ffn"]["expert"][name][0]) for name in ("w_gate", "w_up", "w_out", "scale"))
        return ((u @ gate) / (1 + np.exp(-u @ gate)) * (u @ up) * scale) @ out

    norm = u / np.sqrt((u**2).mean(-1, keepdims=True) + 1e-6) * p["ffn_norm"]["norm"]["scale"]
    np.testing.assert_allclose(compiled(normed)(variables, x, Context()), u + ffn(norm), rtol=1e-4, atol=1e-5)
    plain = {"params": {"ffn": variables["params"]["ffn"]}}
    np.testing.assert_allclose(compiled(block())(plain, x, Context()), u + ffn(u), rtol=1e-4, atol=1e-5)
    rngs = {"dropout": jax.random.key(0)}
    dropped = np.asarray(block(dropout=0.5).apply(plain, x, Context(train=True), rngs=rngs)) == u
    assert 0.2 < dropped.mean() < 0.8


def test_a_rough_router_rounds_where_the_usual_one_does_not(rng: np.random.Generator) -> None:
    x = rng.normal(size=(1, 64, 16)).astype(np.float32)
    w = rng.normal(size=(16, E)).astype(np.float32)
    logits = [
        np.asarray(Linear(E, precision=p).apply({"params": {"w": jnp.asarray(w)}}, jnp.asarray(x), Context()), np.float64)
        for p in ("float32", "bfloat16")
    ]
    rounded = x.astype(bfloat16).astype(np.float64) @ w.astype(bfloat16).astype(np.float64)
    np.testing.assert_allclose(logits[0], x.astype(np.float64) @ w, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(logits[1], rounded, rtol=2e-2, atol=2e-2)
    np.testing.assert_array_equal(logits[1], logits[1].astype(bfloat16))
    assert np.abs(logits[1] - logits[0]).max() > 1e-3
    with pytest.raises(ConfigError, match="precision='half' is unknown"):
        Linear(E, precision="half")


def test_the_largest_logit_is_reported(rng: np.random.Generator) -> None:
    layer = MoE(Linear(E), GShard(), GLU(2, num_experts=E), backend="reference")
    x = jnp.asarray(rng.normal(size=(G, N, 3)), jnp.float32).at[1, 9].set(1e4)
    variables = draw(layer, x)
    _, sown = compiled(layer, "stats")(variables, x, Context(valid=jnp.asarray(VALID)))
    logits = np.abs(np.asarray(x) @ np.asarray(variables["params"]["router"]["w"]))
    np.testing.assert_allclose(sown["stats"]["max_logit"], logits[VALID].max(), rtol=1e-4)
