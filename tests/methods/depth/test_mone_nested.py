"""Mixture of nested experts against NumPy, token by token; the budget program against SciPy's; costs counted, decisions made once."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from numpy_layers import draw
from numpy_routing import best, softmax
from scipy.optimize import minimize

from moejax import ConfigError, Context
from moejax.layers import LayerNorm
from moejax.layers.depth.nested import Nested
from moejax.layers.depth.nested_budget import budget_capacities, expert_preferred, token_counts, widths
from moejax.models import Stack
from moejax.models.parts import NamedBlock
from moejax.train.flops import matmul_flops

B, S, D, HEADS, HIDDEN, E, LAYERS = 2, 8, 8, 2, 12, 3, 2


def layer(**fields) -> Nested:
    return Nested(**(dict(num_heads=HEADS, hidden=HIDDEN, norm=LayerNorm(), num_experts=E, budgets=(0.5,)) | fields))


@functools.cache
def inputs() -> jax.Array:
    return jnp.asarray(np.random.default_rng(0).normal(size=(B, S, D)), jnp.float32)


@functools.cache
def compiled(model, *mutable: str):
    return jax.jit(functools.partial(model.apply, mutable=list(mutable) or False))


@pytest.mark.parametrize(("budget", "experts", "beta"), [(0.3, 4, 10.0), (0.5, 3, 10.0), (0.65, 4, 10.0), (0.5, 4, 0.5)])
def test_capacities_are_the_programs_optimum(budget: float, experts: int, beta: float) -> None:
    width, worth = np.array(widths(experts)), 2.0 ** np.arange(experts)
    assert width.tolist() == [2.0**-i for i in range(experts)][::-1]

    def cost(c: np.ndarray) -> float:
        return -(c @ worth) + beta * (c * np.log(c + 1e-12)).sum()

    constraints = [{"type": "eq", "fun": lambda c: c.sum() - 1}, {"type": "eq", "fun": lambda c: c @ width - budget}]
    found = minimize(
        cost, np.full(experts, 1 / experts), bounds=[(0, 1)] * experts, constraints=constraints, method="SLSQP",
        options={"ftol": 1e-12, "maxiter": 500},
    ).x  # fmt: skip
    ours = np.array(budget_capacities(budget, experts, beta=beta))
    np.testing.assert_allclose([ours.sum(), ours @ width], [1, budget], rtol=1e-9)
    np.testing.assert_allclose(ours, found, atol=2e-3)
    assert cost(ours) <= cost(found) + 1e-6


def test_the_ends_of_the_budget_and_counts() -> None:
    assert budget_capacities(1.0, 3) == (0, 0, 1)
    assert budget_capacities(0.25, 3) == (1, 0, 0)
    assert token_counts((0.34, 0.33, 0.33), 10) == (4, 3, 3)
    assert token_counts((0.5, 0.2, 0.3), 10) == (5, 2, 3)
    assert token_counts((0.0, 0.0, 1.0), 7) == (0, 0, 7)
    for budget, message in ((0.2, "budget=0.2"), (1.1, "budget=1.1")):
        with pytest.raises(ConfigError, match=message):
            budget_capacities(budget, 3)


def numpy_preferred(probs: np.ndarray, counts: tuple[int, ...], valid: np.ndarray) -> np.ndarray:
    """Of one sequence: widest first; padding only where nothing else is left."""
    expert, free = np.zeros(len(probs), int), list(range(len(probs)))
    for m in range(len(counts) - 1, 0, -1):
        score = [probs[t, m] if valid[t] else -1 for t in free]
        for t in [free[i] for i in best(np.array(score), counts[m])]:
            expert[t] = m
            free.remove(t)
    return expert


def test_experts_choose_widest_first(rng: np.random.Generator) -> None:
    probs, counts = softmax(2 * rng.normal(size=(4, 11, E))), (5, 2, 4)
    valid = np.arange(11) < np.array([11, 9, 5, 2])[:, None]
    expert = np.asarray(expert_preferred(jnp.asarray(probs, jnp.float32), counts, jnp.asarray(valid)))
    np.testing.assert_array_equal(expert, [numpy_preferred(p, counts, v) for p, v in zip(probs, valid, strict=True)])
    assert [(expert == m).sum(1).tolist() for m in range(E)] == [[c] * 4 for c in counts]
    narrow_first = [np.argsort(-p[:, 0])[:5] for p in probs]
    assert any((row[chosen] != 0).any() for row, chosen in zip(expert, narrow_first, strict=True))


def numpy_norm(p, x: np.ndarray) -> np.ndarray:
    y = (x - x.mean()) / np.sqrt(x.var() + 1e-6) * np.asarray(p["norm"]["scale"])
    return y + np.asarray(p["norm"].get("bias", 0.0))


def numpy_block(p, x: np.ndarray, expert: np.ndarray, weight: np.ndarray, valid: np.ndarray) -> np.ndarray:
    """One sequence, one token after the other, in their own order."""
    p = jax.tree.map(lambda a: np.asarray(a, np.float64), p)
    size, out = D // HEADS, x.copy()
    d = [D >> (E - 1 - m) for m in expert]
    h = [numpy_norm(p["mixer_norm"], row) for row in x]
    q, k, v = ([h[t][: d[t]] @ p[name][: d[t]] for t in range(len(x))] for name in "qkv")
    seen = np.flatnonzero(valid)
    for t in range(len(x)):
        heads = []
        for j in range(HEADS):
            part = slice(j * size, (j + 1) * size)
            a = softmax(np.array([q[t][part] @ k[u][part] for u in seen]) / np.sqrt(size))
            heads.append(a @ np.array([v[u][part] for u in seen]))
        out[t, : d[t]] += (np.concatenate(heads) @ p["o"])[: d[t]]
        g = numpy_norm(p["ffn_norm"], out[t])[: d[t]] @ p["w_in"][: d[t]]
        g = 0.5 * g * (1 + np.tanh(np.sqrt(2 / np.pi) * (g + 0.044715 * g**3)))
        out[t, : d[t]] += (1 + p["alpha"] * weight[t]) * (g @ p["w_out"])[: d[t]]
    return out


def test_a_block_is_numpys(rng: np.random.Generator) -> None:
    valid = np.array([[True] * S, [True, False, True, True, True, True, False, True]])
    nested = layer(num_experts=E)
    variables = draw(nested, inputs(), Context())
    variables["params"]["alpha"] = jnp.float32(0.7)
    y, sown = compiled(nested, "stats")(variables, inputs(), Context(valid=jnp.asarray(valid)))
    x, counts = np.asarray(inputs(), np.float64), token_counts(budget_capacities(0.5, E), S)
    assert min(counts) > 0
    probs = softmax(x @ np.asarray(variables["params"]["w"], np.float64))
    mean = []
    for i in range(B):
        expert = numpy_preferred(probs[i], counts, valid[i])
        expected = numpy_block(variables["params"], x[i], expert, probs[i][np.arange(S), expert], valid[i])
        np.testing.assert_allclose(np.asarray(y[i])[valid[i]], expected[valid[i]], rtol=1e-4, atol=1e-4)
        mean += [widths(E)[m] for m in expert[valid[i]]]
        for t in range(S):  # what lies beyond a token's width passes unchanged
            np.testing.assert_array_equal(y[i, t, D >> (E - 1 - expert[t]) :], inputs()[i, t, D >> (E - 1 - expert[t]) :])
    np.testing.assert_allclose(sown["stats"]["width"], np.mean(mean), rtol=1e-5)


def test_the_first_block_decides_for_all_of_them() -> None:
    """One router beside the repeats, under scan and rematerialisation."""
    model = Stack((NamedBlock("a", "blocks.a", layer()),), ("a",), LAYERS, remat="full")
    variables = draw(model, inputs(), Context())
    assert {n: leaf.shape for n, leaf in variables["params"]["shared"].items()} == {"nested_router_w": (D, E)}

    def total(variables):
        y, sown = model.apply(variables, inputs(), Context(), mutable=["routing"])
        return jnp.sin(y).sum(), (y, sown)

    (_, (y, sown)), grads = jax.jit(jax.value_and_grad(total, has_aux=True))(variables)
    plan = sown["routing"]["repeats"]["0_a"]["plan"]
    np.testing.assert_array_equal(plan.expert[0], plan.expert[1])
    block = jax.tree.map(np.asarray, variables["params"]["repeats"]["0_a"])
    x = np.asarray(inputs()[0], np.float64)
    probs = softmax(x @ np.asarray(variables["params"]["shared"]["nested_router_w"], np.float64))
    expert = numpy_preferred(probs, token_counts(budget_capacities(0.5, E), S), np.ones(S, bool))
    for i in range(LAYERS):
        x = numpy_block(jax.tree.map(lambda a, i=i: a[i], block), x, expert, probs[np.arange(S), expert], np.ones(S, bool))
    np.testing.assert_allclose(y[0], x, rtol=1e-3, atol=1e-3)
    assert np.abs(grads["params"]["shared"]["nested_router_w"]).max() > 1e-3


def test_the_router_learns_through_alpha_alone() -> None:
    nested = layer()
    variables = draw(nested, inputs(), Context())
    gradient = jax.jit(jax.grad(lambda v: jnp.sin(nested.apply(v, inputs(), Context())).sum()))
    for alpha, learns in ((0.0, False), (0.5, True)):
        variables["params"]["alpha"] = jnp.float32(alpha)
        grads = gradient(variables)["params"]
        assert (np.abs(grads["w"]).max() > 1e-4) == learns
        assert np.abs(grads["alpha"]) > 1e-4
    start = jax.eval_shape(nested.init, jax.random.key(0), inputs(), Context())["params"]
    assert start["alpha"].shape == ()


def test_narrow_tokens_really_cost_less() -> None:
    """Counted products: projections cost a token its width, attention itself what it always does."""

    def flops(nested) -> float:
        shapes = jax.eval_shape(nested.init, jax.random.key(0), inputs(), Context())
        return matmul_flops(jax.make_jaxpr(lambda v: nested.apply(v, inputs(), Context()))(shapes))

    full = flops(layer(capacities=(0, 0, 1.0)))
    scores = 2 * 2 * B * S * S * D + 2 * 2 * B * S * E  # and what the statistics count experts with
    projections = 2 * B * S * (4 * D * D + 2 * D * HIDDEN)
    assert full == scores + projections
    assert flops(layer(capacities=(0, 1.0, 0))) == scores + projections / 2
    counts, router = token_counts(budget_capacities(0.5, E), S), 2 * B * S * D * E
    share = sum(n * w for n, w in zip(counts, widths(E), strict=True)) / S
    assert flops(layer()) == scores + projections * share + router
    assert share < 0.55


def experts_of(y: jax.Array) -> list[int]:
    """How many tokens of the first sequence each expert took, by the features that the block wrote."""
    written = (np.asarray(y[0]) != np.asarray(inputs()[0])).sum(-1)
    return [int((written == D * width).sum()) for width in widths(E)]


def test_pretraining_draws_one_width_for_all_tokens() -> None:
    """In its first steps training is that of a plain network of one of the widths; afterwards, of the mixture."""
    nested = layer(pretrain_steps=5)
    variables = draw(nested, inputs(), Context())
    step = jax.jit(lambda n, key: nested.apply(variables, inputs(), Context(train=True, step=n), rngs={"router": key}))
    early = {tuple(experts_of(step(jnp.int32(4), jax.random.key(seed)))) for seed in range(12)}
    assert early == {(S, 0, 0), (0, S, 0), (0, 0, S)}
    assert experts_of(step(jnp.int32(5), jax.random.key(0))) == list(token_counts(budget_capacities(0.5, E), S))


def test_one_model_serves_several_budgets() -> None:
    nested = layer(budgets=(0.3, 0.9), eval_budget=0.5)
    variables = draw(nested, inputs(), Context())
    step = jax.jit(lambda key: nested.apply(variables, inputs(), Context(train=True), rngs={"router": key}))
    seen = {tuple(experts_of(step(jax.random.key(seed)))) for seed in range(8)}
    assert seen == {token_counts(budget_capacities(budget, E), S) for budget in (0.3, 0.9)}
    evaluated = experts_of(compiled(nested)(variables, inputs(), Context()))
    assert evaluated == list(token_counts(budget_capacities(0.5, E), S))


def test_random_and_dense_arms_have_no_router() -> None:
    for nested in (layer(choice="random"), layer(capacities=(0, 1.0, 0))):
        shapes = jax.eval_shape(nested.init, jax.random.key(0), inputs(), Context())["params"]
        assert "w" not in shapes
        assert shapes["q"].shape == (D, D)
    assert layer(capacities=(0, 1.0, 0)).carries(B, S) == {}


def test_bad_settings_raise() -> None:
    for fields, message in (
        ({"budgets": (0.1,)}, r"budget=0\.1 must lie between 0\.25"),
        ({"budgets": (0.3, 0.5)}, "set eval_budget"),
        ({"capacities": (0.5, 0.4, 0.3)}, r"capacities=\(0\.5, 0\.4, 0\.3\)"),
        ({"choice": "learnt"}, "did you mean 'learned'"),
        ({"beta": 0.0}, r"beta=0\.0 must be a number above 0"),
    ):
        with pytest.raises(ConfigError, match=message):
            layer(**fields)
    with pytest.raises(ConfigError, match=r"d_model=8 .* a multiple of num_heads=2 and of 16"):
        jax.eval_shape(layer(num_experts=5).init, jax.random.key(0), inputs(), Context())
    with pytest.raises(ConfigError, match="chooses among all tokens and leaks the future"):
        layer().check_causal("block")
