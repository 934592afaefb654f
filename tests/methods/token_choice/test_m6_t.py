"""M6-T (Yang et al. 2021): one expert of each group, and mixtures for attention's projections; the paper's sums, token after token."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from numpy_layers import compiled, draw
from numpy_routing import softmax

import moejax as mj

B, S, D, F, E = 2, 13, 6, 5, 8


def layer(z: int, factor: float | None = 0.8, **rule) -> mj.MoE:
    bank = mj.FFN(hidden=F, num_experts=E, activation="relu")
    return mj.MoE(mj.Linear(E), mj.OnePerGroup(z, capacity_factor=factor, **rule), bank, losses=(mj.Balance(0.01),))


def prototypes(tokens: np.ndarray, w: np.ndarray, z: int, factor: float | None, expert, features: int) -> tuple:
    """Of one sequence: outputs, how many experts each token kept, each group's balance loss, and its smallest lead of a best expert."""
    size, n = E // z, len(tokens)
    y, kept, loss, lead = np.zeros((n, features)), np.zeros(n, int), 0.0, np.inf
    for group in range(z):
        mine = w[:, group * size : (group + 1) * size]  # this group's own router, W_z
        room = [n if factor is None else math.ceil(factor * z * n / E)] * size
        best, mean = np.zeros(size), np.zeros(size)
        for t, token in enumerate(tokens):
            p = softmax(token @ mine)
            i = int(p.argmax())
            best[i], mean = best[i] + 1 / n, mean + p / n
            lead = min([lead, *(p[i] - np.delete(p, i))])
            if room[i]:
                room[i] -= 1
                kept[t] += 1
                y[t] += p[i] * expert(group * size + i, token)
        loss += size * (best * mean).sum()
    return y, kept, loss / z, lead


def numpy_layer(params: dict, x: np.ndarray, z: int, factor: float | None) -> tuple:
    p = jax.tree.map(lambda a: np.asarray(a, np.float64), params)

    def expert(i: int, token: np.ndarray) -> np.ndarray:
        return np.maximum(token @ p["bank"]["w_in"][i], 0) @ p["bank"]["w_out"][i]

    rows = [prototypes(row, p["router"]["w"], z, factor, expert, D) for row in np.asarray(x, np.float64)]
    return tuple(map(np.array, zip(*rows, strict=True)))


@pytest.fixture
def x(rng: np.random.Generator) -> jax.Array:
    return jnp.asarray(rng.normal(size=(B, S, D)) + 0.3, jnp.float32)


@pytest.mark.parametrize(("z", "factor"), [(1, 0.8), (2, 0.8), (4, 0.8), (2, 0.4), (4, None)])
def test_outputs_drops_and_loss_are_numpys(x: jax.Array, z: int, factor: float | None) -> None:
    moe = layer(z, factor)
    variables = draw(moe, x)
    y, sown = compiled(moe, "losses", "stats")(variables, x)
    expected, kept, loss, lead = numpy_layer(variables["params"], x, z, factor)
    assert lead.min() > 1e-4  # no choice hangs on rounding
    np.testing.assert_allclose(y, expected, rtol=1e-4, atol=1e-5)
    dropped = 1 - kept.sum() / (z * B * S)
    assert dropped == 0 if factor is None else 0 < dropped < 0.8
    np.testing.assert_allclose(sown["stats"]["drop_rate"], dropped, rtol=1e-5, atol=1e-7)
    np.testing.assert_allclose(sown["losses"]["balance_loss"], 0.01 * loss.mean(), rtol=1e-5)


@pytest.mark.parametrize("z", [2, 4])
def test_gradients_are_numpys_central_differences(x: jax.Array, z: int) -> None:
    """Of the output and of the loss: by the groups' routers, the experts and the tokens."""
    moe = layer(z)
    params = draw(moe, x)["params"]

    def total(params: dict, x: jax.Array) -> jax.Array:
        y, sown = moe.apply({"params": params}, x, mutable=["losses"])
        return jnp.sin(y).sum() + 100 * sown["losses"]["balance_loss"]

    def numpy_total(params: dict, x: np.ndarray) -> float:
        y, _, loss, _ = numpy_layer(params, x, z, 0.8)
        return np.sin(y).sum() + loss.mean()

    gradients = jax.jit(jax.grad(total, argnums=(0, 1)))(params, x)
    point = jax.tree.map(lambda a: np.array(a, np.float64), (params, x))
    flat, structure = jax.tree.flatten(point)
    for leaf, gradient in enumerate(jax.tree.leaves(gradients)):
        gradient = np.asarray(gradient)
        for index in [np.unravel_index(i, gradient.shape) for i in np.argsort(-np.abs(gradient).ravel())[:3]]:
            ends = []
            for step in (1e-6, -1e-6):
                moved = [a.copy() for a in flat]
                moved[leaf][index] += step
                ends.append(numpy_total(*jax.tree.unflatten(structure, moved)))
            slope = (ends[0] - ends[1]) / 2e-6
            assert abs(slope) > 1e-3
            np.testing.assert_allclose(gradient[index], slope, rtol=1e-3)


def plan(logits, z: int, ctx: mj.Context | None = None, bias=None, **rule):
    return mj.OnePerGroup(z, **rule)(jnp.asarray(logits, jnp.float32), ctx or mj.Context(), bias=bias)


def test_one_group_is_top_1_and_groups_of_one_are_all_experts(rng: np.random.Generator) -> None:
    logits = jnp.asarray(rng.normal(size=(B, S, E)), jnp.float32)
    ours, switch = plan(logits, 1, capacity_factor=0.7), mj.TopK(k=1, capacity_factor=0.7)(logits)
    jax.tree.map(np.testing.assert_array_equal, ours, switch)
    np.testing.assert_array_equal(plan(logits, E).dense(), np.ones((B, S, E)))


def test_it_takes_of_every_group_and_its_weights_sum_to_more_than_one() -> None:
    """Top-2 would take experts 0 and 1; group 1 gets its token all the same, and is as sure of its choice."""
    logits = [[[9.0, 8.0, 0.0, 0.0, -9.0, -5.0, -9.0, -9.0]]]
    made = plan(logits, 2)
    assert made.expert.tolist() == [[[0, 5]]]
    p = [softmax(np.array(logits[0][0][i : i + 4])).max() for i in (0, 4)]
    np.testing.assert_allclose(made.weight[0, 0], p, rtol=1e-6)
    assert made.weight.sum() > 1.6
    np.testing.assert_allclose(plan(logits, 2, scale=0.5).weight[0, 0], np.array(p) / 2, rtol=1e-6)


def test_ties_go_to_the_first_expert_of_a_group_and_saturation_to_none() -> None:
    assert plan(np.zeros((1, 1, E)), 2).expert.tolist() == [[[0, 4]]]
    logits = np.zeros((1, 1, E))
    logits[..., 2], logits[..., 3], logits[..., 7] = 300, 301, 1e9  # probabilities of groups that are sure of themselves
    made = plan(logits, 2)
    assert made.expert.tolist() == [[[3, 7]]]
    assert np.isfinite(made.weight).all()


def test_a_bias_ranks_within_a_group_and_weighs_nothing(rng: np.random.Generator) -> None:
    logits, bias = rng.normal(size=(1, S, E)), rng.normal(size=E)
    made = plan(logits, 2, bias=jnp.asarray(bias, jnp.float32))
    moved = 0
    for t in range(S):
        for group in range(2):
            p, b = softmax(logits[0, t, 4 * group :][:4]), bias[4 * group :][:4]
            assert made.expert[0, t, group] == 4 * group + (p + b).argmax()
            np.testing.assert_allclose(made.weight[0, t, group], p[(p + b).argmax()], rtol=1e-5)
            moved += p.argmax() != (p + b).argmax()
    assert moved > S / 2


def test_service_by_choice_is_service_by_token(rng: np.random.Generator) -> None:
    """Only one group's choices meet in an expert, so that no later token comes first; with top-k one does."""
    logits = jnp.asarray(rng.normal(size=(B, S, E)), jnp.float32)
    by_token, by_choice = (plan(logits, 4, capacity_factor=0.5, priority=p) for p in ("token", "choice"))
    jax.tree.map(np.testing.assert_array_equal, by_token, by_choice)
    assert by_token.dropped.sum() > 0
    assert not mj.TopK(k=4, capacity_factor=0.5, priority="choice").causal
    assert mj.OnePerGroup(4, capacity_factor=0.5, priority="choice").causal
    assert not mj.OnePerGroup(4, capacity_factor=0.5, priority="score").causal


def test_capacity_is_the_papers_in_both_settings(rng: np.random.Generator) -> None:
    """`ceil(gamma k T / E)`, or as many slots as top-1 has."""
    logits = rng.normal(size=(1, 40, E))
    assert plan(logits, 4, capacity_factor=1.25).capacity == math.ceil(1.25 * 4 * 40 / E) == 25
    assert plan(logits, 4, capacity_factor=1.25 / 4).capacity == math.ceil(1.25 * 40 / E) == 7


def test_the_balance_loss_is_1_when_even_and_the_groups_size_when_each_collapses() -> None:
    def cost(logits: np.ndarray) -> float:
        logits = jnp.asarray(logits, jnp.float32)
        rule = mj.OnePerGroup(2)
        probs = rule.probabilities(logits)
        np.testing.assert_allclose(probs.sum(-1), 1, rtol=1e-6)
        return float(mj.Balance(1.0).cost(mj.routing.losses.base.Routing(logits, probs, rule(logits), jnp.ones((1, 4), bool))))

    even = 50 * np.tile(np.eye(4), 2)[None]
    np.testing.assert_allclose(cost(even), 1, rtol=1e-5)
    np.testing.assert_allclose(cost(np.broadcast_to(even[:, :1], (1, 4, E))), 4, rtol=1e-5)


@pytest.mark.parametrize(
    ("rule", "message"),
    [
        (lambda: mj.OnePerGroup(0), "expert_groups=0 must be a whole number of at least 1"),
        (lambda: plan(np.zeros((1, 1, E)), 3), "expert_groups=3 does not divide num_experts=8"),
        (lambda: plan(np.zeros((1, 1, E)), 16), "expert_groups=16 does not divide num_experts=8"),
        (lambda: mj.RoutedProjections(2, select=mj.OnePerGroup(3)), "expert_groups=3 does not divide num_experts=8"),
        (lambda: mj.RoutedProjections(2, router=mj.Linear(4)), "router.num_experts=4 but bank.num_experts=8"),
        (lambda: mj.RoutedProjections(2, projections=("q", "w")), "projections='w'"),
        (lambda: mj.RoutedProjections(2, projections=()), r"projections=\(\) leaves plain attention"),
    ],
)
def test_errors_name_the_value_and_the_fix(rule, message: str) -> None:
    with pytest.raises(mj.ConfigError, match=message):
        rule()


HEADS, KV = 3, 1


def numpy_attention(params: dict, x: np.ndarray, z: int, factor: float | None, projections: str) -> np.ndarray:
    """Causal attention without positions; each projection in `projections` is the groups' sum, with its own router and losses."""
    p = jax.tree.map(lambda a: np.asarray(a, np.float64), params)
    out = np.zeros_like(x, np.float64)
    size = D // HEADS

    def project(name: str, tokens: np.ndarray, features: int) -> np.ndarray:
        if name not in projections:
            return tokens @ p[name]["kernel"]
        experts = p[name]["bank"]["w"]
        return prototypes(tokens, p[name]["router"]["w"], z, factor, lambda i, token: token @ experts[i], features)[0]

    for row, tokens in enumerate(np.asarray(x, np.float64)):
        q, k, v = (project(name, tokens, (HEADS if name == "q" else KV) * size) for name in "qkv")
        mixed = np.zeros((S, HEADS * size))
        for t in range(S):
            for h in range(HEADS):
                scores = softmax(k[: t + 1] @ q[t, h * size :][:size] / np.sqrt(size))
                mixed[t, h * size :][:size] = scores @ v[: t + 1]
        out[row] = project("o", mixed, D)
    return out


@pytest.mark.parametrize(("projections", "factor"), [("qkvo", 1.0), ("qkvo", None), ("qkv", None), ("o", 0.6)])
def test_attention_with_mixtures_is_numpys(x: jax.Array, projections: str, factor: float | None) -> None:
    select = mj.OnePerGroup(2, capacity_factor=factor)
    mixer = mj.RoutedProjections(
        HEADS, KV, rope_base=None, num_experts=E, select=select, losses=(mj.Balance(0.01),), projections=tuple(projections)
    )
    variables = draw(mixer, x, mj.Context())
    y, sown = compiled(mixer, "losses", "stats")(variables, x, mj.Context())
    np.testing.assert_allclose(y, numpy_attention(variables["params"], x, 2, factor, projections), rtol=1e-3, atol=1e-4)
    assert set(sown["losses"]) == set(projections)
    drops = [float(sown["stats"][name]["drop_rate"]) for name in projections]
    assert max(drops) == 0 if factor is None else max(drops) > 0


def test_attentions_routers_and_experts_learn_as_in_numpy(x: jax.Array) -> None:
    mixer = mj.RoutedProjections(HEADS, KV, rope_base=None, num_experts=E, select=mj.OnePerGroup(2))
    params = draw(mixer, x, mj.Context())["params"]
    gradient = jax.jit(jax.grad(lambda p: jnp.sin(mixer.apply({"params": p}, x, mj.Context())).sum()))(params)
    flat, structure = jax.tree.flatten(jax.tree.map(lambda a: np.array(a, np.float64), params))
    for leaf, slopes in enumerate(map(np.asarray, jax.tree.leaves(gradient))):
        index = np.unravel_index(np.abs(slopes).argmax(), slopes.shape)
        ends = []
        for step in (1e-6, -1e-6):
            moved = [a.copy() for a in flat]
            moved[leaf][index] += step
            ends.append(np.sin(numpy_attention(jax.tree.unflatten(structure, moved), x, 2, None, "qkvo")).sum())
        slope = (ends[0] - ends[1]) / 2e-6
        assert abs(slope) > 1e-3
        np.testing.assert_allclose(slopes[index], slope, rtol=1e-3)


def test_attention_keeps_what_attention_can(x: jax.Array) -> None:
    """With one expert for each projection, whose gate is then 1, it is `Attention`: rotary positions, norms, biases and padding."""
    fields = dict(num_heads=3, num_kv_heads=1, use_bias=True, qk_norm="head")
    ctx = mj.Context(valid=jnp.arange(S) < jnp.array([[S], [S - 4]]))
    plain, mixer = mj.Attention(**fields), mj.RoutedProjections(**fields, num_experts=1, select=mj.TopK(k=1))
    params = draw(plain, x, ctx)["params"]
    mixed = {name: leaf for name, leaf in params.items() if name not in "qkvo"}
    for name in "qkvo":
        bank = {"w": params[name]["kernel"][None], "b": params[name]["bias"][None]}
        mixed[name] = {"bank": bank, "router": {"w": jnp.ones((D, 1))}}
    ours, theirs = (compiled(m)({"params": p}, x, ctx) for m, p in ((mixer, mixed), (plain, params)))
    np.testing.assert_allclose(ours[0], theirs[0], rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(ours[1, : S - 4], theirs[1, : S - 4], rtol=1e-4, atol=1e-5)
