"""BASE layers: the auction against the exact optimum, the layer against its equation, and where routing does not look ahead."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from numpy_layers import draw
from numpy_routing import sigmoid
from scipy.optimize import linear_sum_assignment

from moejax.core.context import Context
from moejax.core.errors import ConfigError
from moejax.core.initializers import Orthogonal
from moejax.dispatch.layout import Batched, Grouped
from moejax.experts import Residual
from moejax.layers import MoE
from moejax.layers.blocks.feed_forward import FeedForward
from moejax.models import build
from moejax.routing import BalancedAssignment, Linear, Sinkhorn, TopK
from moejax.routing.select.assignment import auction

N, E, D = 22, 4, 5
GREEDY = TopK(k=1, score="sigmoid")
solve = jax.jit(jax.vmap(functools.partial(auction, max_rounds=500)))


def optimum(scores: np.ndarray, valid: np.ndarray) -> float:
    """Largest sum of scores of the valid tokens with at most ceil(V / e) for each expert, where what is left of a share is filled
    with dummies of the lowest score."""
    rows = np.float64(scores[valid])
    share = -(-len(rows) // scores.shape[1])
    dummies = np.full((share * scores.shape[1] - len(rows), scores.shape[1]), rows.min())
    table = np.repeat(np.concatenate([rows, dummies]), share, axis=1)
    token, place = linear_sum_assignment(table, maximize=True)
    return table[token, place][token < len(rows)].sum()


def examples(rng: np.random.Generator) -> dict[str, np.ndarray]:
    scores = rng.normal(size=(N, E))
    twins = np.repeat(scores[:6], 4, axis=0)[:N]
    holes = scores.copy()
    holes[rng.random((N, E)) < 0.1] = -np.inf
    holes[3, 1] = np.nan
    return {
        "plain": scores,
        "skewed": scores + [3.0, 1.0, 0.0, -2.0],
        "far_from_zero": 1e-2 * scores + 1e3,
        "twins": twins,
        "equal": np.zeros((N, E)),
        "holes": holes,
    }


@pytest.mark.parametrize("padded", [False, True])
def test_the_auction_is_balanced_and_nearly_optimal(rng: np.random.Generator, padded: bool) -> None:
    cases = examples(rng)
    valid = np.ones((len(cases), N), bool)
    if padded:
        valid = rng.random((len(cases), N)) < 0.7
    scores = np.stack(list(cases.values())).astype(np.float32)
    expert = np.asarray(solve(jnp.asarray(scores), jnp.asarray(valid)))
    for name, x, ok, chosen in zip(cases, scores, valid, expert, strict=True):
        counts = np.bincount(chosen[ok], minlength=E)
        assert counts.max() <= -(-ok.sum() // E), name
        finite = x[ok][np.isfinite(x[ok])]
        x = np.where(np.isfinite(x), x, finite.min())
        value = np.take_along_axis(np.float64(x), chosen[:, None], 1)[ok].sum()
        best, eps = optimum(x, ok), max((finite.max() - finite.min()) / 50, 1e-4)
        assert best - N * eps <= value <= best + 1e-3, name
        if name in ("plain", "skewed"):
            greedy = np.bincount(x[ok].argmax(1), minlength=E)
            assert greedy.max() > counts.max()


def test_the_auctions_bound_holds_on_ties(rng: np.random.Generator) -> None:
    """Whole numbers from 0 to 3, whose optimum is often reached in many ways: within share * e * eps of it, eps being 3 / 50."""
    scores = rng.integers(0, 4, size=(1000, N, E)).astype(np.float32)
    expert = np.asarray(solve(jnp.asarray(scores), jnp.ones(scores.shape[:2], bool)))
    for x, chosen in zip(scores, expert, strict=True):
        assert np.bincount(chosen, minlength=E).max() <= -(-N // E)
        value = np.take_along_axis(x, chosen[:, None], 1).sum()
        assert value >= optimum(x, np.ones(N, bool)) - 24 * 3 / 50


def test_whoever_is_left_after_the_last_round_gets_a_free_place(rng: np.random.Generator) -> None:
    scores = np.stack(list(examples(rng).values())).astype(np.float32)
    expert = jax.jit(BalancedAssignment(max_rounds=1))(jnp.asarray(scores)).expert[..., 0]
    for chosen in np.asarray(expert):
        assert np.bincount(chosen, minlength=E).max() <= -(-N // E)
    one = BalancedAssignment()(jnp.zeros((1, 3, 1)))
    np.testing.assert_array_equal(one.expert, 0)


def test_the_plan_has_room_for_exactly_what_is_assigned(rng: np.random.Generator) -> None:
    logits = jnp.asarray(rng.normal(size=(2, N, E)), jnp.float32)
    valid = jnp.arange(N) < jnp.array([N, 9])[:, None]
    assign = jax.jit(BalancedAssignment())
    plan = assign(logits, Context(valid=valid))
    assert plan.capacity == 6
    np.testing.assert_array_equal(plan.limit, [6, 3])
    np.testing.assert_array_equal(plan.used[..., 0], valid)
    np.testing.assert_array_equal(plan.assigned().sum(1).max(1), [6, 3])
    gates = sigmoid(np.take_along_axis(logits, plan.expert, 2))
    np.testing.assert_allclose(plan.weight[valid], gates[valid], rtol=1e-5)
    assert not assign(logits, Context(valid=jnp.zeros((2, N), bool))).used.any()


def test_sinkhorn_takes_the_largest_entry_of_the_scaled_matrix(rng: np.random.Generator) -> None:
    logits = (2 * rng.normal(size=(1, 64, E)) + [2.0, 0.0, 0.0, -1.0]).astype(np.float32)
    valid = np.arange(64)[None] < 60
    plan = Sinkhorn(iterations=30, temperature=0.5)(jnp.asarray(logits), Context(valid=jnp.asarray(valid)))
    matrix = np.exp(np.float64(logits[0, :60]) / 0.5)
    for _ in range(30):
        matrix /= matrix.sum(0)
        matrix /= matrix.sum(1, keepdims=True)
    np.testing.assert_array_equal(plan.expert[0, :60, 0], matrix.argmax(1))
    load, greedy = (np.bincount(x[0, :60].ravel(), minlength=E) for x in (np.asarray(plan.expert), logits.argmax(-1)))
    assert load.max() < 0.75 * greedy.max()
    np.testing.assert_array_equal(plan.used[..., 0], valid)


def layer(sublayers: int = 2, **fields) -> FeedForward:
    moe = MoE(
        Linear(E, init_w=Orthogonal(0.1)),
        BalancedAssignment(),
        Residual(3, num_experts=E, sublayers=sublayers),
        eval_select=GREEDY,
        group_by="batch",
        backend="reference",
        **fields,
    )
    return FeedForward(moe)


def numpy_expert(bank: dict, e: int, u: np.ndarray, sublayers: int) -> np.ndarray:
    for i in range(sublayers):
        norm = (u - u.mean()) / np.sqrt(u.var() + 1e-5) * bank[f"scale_{i}"][e] + bank[f"bias_{i}"][e]
        u = u + np.maximum(norm @ bank[f"w_in_{i}"][e], 0) @ bank[f"w_out_{i}"][e]
    return u


@pytest.mark.parametrize("train", [True, False])
def test_the_layer_is_the_papers_equation(rng: np.random.Generator, train: bool) -> None:
    """y = alpha f(h) + (1 - alpha) h with alpha = sigmoid(h . w_a): a balanced a in training, the best one outside."""
    x = jnp.asarray(rng.normal(size=(2, 6, D)), jnp.float32)
    variables = draw(layer(), x, Context())
    p = jax.tree.map(lambda a: np.asarray(a, np.float64), variables["params"]["ffn"])
    rows = np.asarray(x, np.float64).reshape(-1, D)
    scores = rows @ p["router"]["w"]
    chosen = scores.argmax(1)
    if train:
        chosen = np.asarray(solve(jnp.asarray(scores, jnp.float32)[None], jnp.ones((1, 12), bool)))[0]
        np.testing.assert_array_equal(np.bincount(chosen, minlength=E), 3)
    alpha = sigmoid(scores[np.arange(12), chosen])[:, None]
    f = np.stack([numpy_expert(p["bank"], e, u, 2) for e, u in zip(chosen, rows, strict=True)])
    y = jax.jit(layer().apply)(variables, x, Context(train=train))
    np.testing.assert_allclose(y.reshape(-1, D), alpha * f + (1 - alpha) * rows, rtol=1e-3, atol=1e-4)


def test_centroids_learn_through_the_gate_alone(rng: np.random.Generator) -> None:
    """The gradient is that of the dense formula with the assignment held fixed."""
    x = jnp.asarray(rng.normal(size=(1, 8, D)), jnp.float32)
    variables = draw(layer(1), x, Context())

    def loss(w: jax.Array) -> jax.Array:
        params = {"ffn": {**variables["params"]["ffn"], "router": {"w": w}}}
        return jnp.sin(layer(1).apply({"params": params}, x, Context(train=True))).sum()

    w = variables["params"]["ffn"]["router"]["w"]
    chosen = solve(x @ w, jnp.ones((1, 8), bool))
    bank = {k: np.asarray(v, np.float64) for k, v in variables["params"]["ffn"]["bank"].items()}
    added = np.stack(
        [numpy_expert(bank, int(e), np.float64(u), 1) - u for e, u in zip(chosen[0], np.asarray(x[0]), strict=True)]
    )

    def formula(w: jax.Array) -> jax.Array:
        alpha = jax.nn.sigmoid(jnp.take_along_axis(x @ w, chosen[..., None], 2))
        return jnp.sin(x + alpha * added).sum()

    gradient = jax.jit(jax.grad(loss))(w)
    np.testing.assert_allclose(gradient, jax.jit(jax.grad(formula))(w), rtol=1e-3, atol=1e-4)
    assert np.abs(gradient).max() > 1e-2


def test_at_the_start_it_is_the_identity_with_orthogonal_centroids_of_length_a_tenth(rng: np.random.Generator) -> None:
    x = jnp.asarray(rng.normal(size=(1, 8, D)), jnp.float32)
    variables = jax.jit(layer().init)(jax.random.key(0), x, Context())
    w = np.asarray(variables["params"]["ffn"]["router"]["w"])
    np.testing.assert_allclose(w.T @ w, 0.01 * np.eye(E), atol=1e-6)
    np.testing.assert_array_equal(jax.jit(layer().apply)({"params": variables["params"]}, x, Context()), x)


def test_deep_experts_are_the_same_in_every_layout(rng: np.random.Generator) -> None:
    bank = Residual(3, num_experts=2, sublayers=2)
    x = jnp.asarray(rng.normal(size=(2, 3, D)), jnp.float32)
    variables = draw(bank, D)
    p = {k: np.asarray(v, np.float64) for k, v in variables["params"].items()}
    expected = [[numpy_expert(p, e, u, 2) - u for u in np.asarray(x[e], np.float64)] for e in range(2)]
    np.testing.assert_allclose(bank.apply(variables, D).run(x, Batched()), expected, rtol=1e-3, atol=1e-4)
    layout = Grouped(jnp.full(2, 3), num_rows=6)
    grouped = jax.jit(lambda v, rows: bank.apply(v, D).run(rows, layout))(variables, x.reshape(6, D))
    np.testing.assert_allclose(np.reshape(grouped, x.shape), expected, rtol=1e-3, atol=1e-4)


def decoder(**fields) -> dict:
    moe = {
        "kind": "moe",
        "num_experts": 2,
        "router": {"kind": "linear", "init_w": {"kind": "orthogonal", "scale": 0.1}},
        "select": {"kind": "balanced_assignment"},
        "bank": {"kind": "residual", "hidden": 4},
        **fields,
    }
    block = {"kind": "feed_forward", "ffn": moe}
    return {"kind": "decoder_lm", "vocab_size": 8, "d_model": 4, "num_layers": 1, "pattern": ("b",), "blocks": {"b": block}}


def test_a_decoder_takes_it_if_only_training_looks_ahead() -> None:
    causal = {"kind": "top_k", "k": 1, "score": "sigmoid"}
    for fields in ({}, {"leaky_training": True}, {"eval_select": causal}):
        with pytest.raises(ConfigError, match=r"BalancedAssignment\) selects over later tokens"):
            build(decoder(**fields))
    with pytest.raises(ConfigError, match=r"eval_select \(Sinkhorn\) selects over later tokens"):
        build(decoder(leaky_training=True, eval_select={"kind": "sinkhorn"}))
    model = build(decoder(leaky_training=True, eval_select=causal))
    assert model.blocks[0].module.ffn.decodable() is None
    with pytest.raises(ConfigError, match="max_rounds=0"):
        BalancedAssignment(0)
    with pytest.raises(ConfigError, match="iterations=0"):
        Sinkhorn(0)
