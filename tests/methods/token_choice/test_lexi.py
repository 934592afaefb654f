"""LExI (Chitty-Venkata et al. 2025): what fewer experts cost in each layer, and the k of each layer under a budget."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from numpy_layers import compiled, draw, glu

import moejax as mj
from moejax.core.errors import ConfigError
from moejax.models import build
from moejax.models.stack import to_unrolled
from moejax.parallel.scope import make_parallel, use
from moejax.surgery import budgets
from moejax.surgery.allot import Allot, changes, rises, seen, sites, with_amounts
from moejax.surgery.base import Checkpoint, Target

E, K, D, F, LAYERS = 5, 3, 6, 4, 3


def layer(kind: type[mj.MoE] = mj.AllottedMoE, k: int = K, **fields) -> mj.MoE:
    rule = mj.TopK(k=k, score="softmax_selected", constant_gate=True)
    return kind(mj.Linear(E), rule, mj.GLU(hidden=F, num_experts=E), **fields)


def config(kind: str = "allotted", k: object = K, **fields) -> dict:
    ffn = {
        "kind": kind,
        "num_experts": E,
        "router": {"kind": "linear"},
        "select": {"kind": "top_k", "k": k, "score": "softmax_selected", "constant_gate": True},
        "bank": {"kind": "glu", "hidden": F},
    }
    block = {"kind": "transformer", "mixer": {"kind": "attention", "num_heads": 1}, "norm": {"kind": "rms_norm"}}
    blocks = {"dense": {**block, "ffn": {"kind": "glu", "hidden": F}}, "moe": {**block, "ffn": ffn}}
    size = {"kind": "decoder_lm", "vocab_size": 11, "d_model": D, "num_layers": 2 * LAYERS}
    return {**size, "pattern": ("dense", "moe"), "blocks": blocks, **fields}


def numpy_moe(params: dict, x: np.ndarray, k: int) -> np.ndarray:
    w, y = np.asarray(params["router"]["w"], np.float64), np.zeros_like(x)
    for place in np.ndindex(x.shape[:2]):
        logits = x[place] @ w
        chosen = np.argsort(-logits, kind="stable")[:k]
        share = np.exp(logits[chosen]) / np.exp(logits[chosen]).sum()
        y[place] = sum(s * glu(params["bank"], i, x[place]) for s, i in zip(share, chosen, strict=True))
    return y


@pytest.fixture(scope="module")
def trained() -> tuple[dict, dict]:
    """A scanned model's variables, and two batches of text."""
    rng = np.random.default_rng(0)
    batches = []
    for _ in range(2):
        tokens = rng.integers(0, 11, size=(2, 9))
        batch = {"tokens": tokens, "targets": np.roll(tokens, -1, 1), "positions": np.broadcast_to(np.arange(9), (2, 9))}
        batches.append({**batch, "segments": np.ones((2, 9), int), "valid": np.broadcast_to(np.arange(9) < 8, (2, 9))})
    return draw(build(config("moe")), jnp.asarray(batches[0]["tokens"])), batches


def target(model: dict, batches: list) -> Target:
    return Target({"model": model}, {}, {}, jax.random.key(3), {}, lambda paths: {}, lambda count: batches[:count])


def logits_of(spec: dict, variables: dict, tokens: jax.Array) -> jax.Array:
    return compiled(build(spec))(variables, tokens)


@functools.cache
def shapes_of_state() -> dict:
    """Of an untrained model."""
    return jax.eval_shape(lambda: build(config()).init(jax.random.key(0), jnp.zeros((1, 2), jnp.int32)))["router_state"]


def ks(found: Checkpoint) -> list[int]:
    return found.variables["router_state"]["stack"]["repeats"]["1_moe"]["ffn"]["k"].tolist()


def test_a_layer_uses_the_first_k_of_its_choices_in_value_and_gradient() -> None:
    x = jax.random.normal(jax.random.key(1), (8, 3, D))
    variables = jax.jit(layer().init)(jax.random.key(0), x)
    assert variables["router_state"]["k"] == K
    params = draw(layer(mj.MoE), x)["params"]
    run = jax.jit(lambda p, k: layer().apply({"params": p, "router_state": {"k": k}}, x, mutable=["stats"]))
    gradient = jax.jit(jax.grad(lambda p, k: jnp.sin(run(p, k)[0]).sum()))
    for k in range(1, K + 1):
        y, sown = run(params, jnp.int32(k))
        np.testing.assert_allclose(y, numpy_moe(params, np.asarray(x, np.float64), k), rtol=1e-4, atol=1e-5)
        assert sown["stats"]["experts_per_token"] == k
        plain = jax.jit(jax.grad(lambda p, k=k: jnp.sin(layer(mj.MoE, k).apply({"params": p}, x)).sum()))(params)
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), gradient(params, jnp.int32(k)), plain)
    with use(make_parallel("dp")):  # k is data on every device
        split = jax.jit(lambda p, k: layer().apply({"params": p, "router_state": {"k": k}}, x))(params, jnp.int32(2))
    np.testing.assert_allclose(split, run(params, jnp.int32(2))[0], rtol=1e-5, atol=1e-6)


def test_costs_are_norms_of_the_change_of_one_layer_s_output(trained: tuple) -> None:
    variables, _ = trained
    found = sites(build(config()))
    assert [site.layer for site in found] == [1, 3, 5]
    unrolled = with_amounts({"params": to_unrolled(variables["params"])}, found, [K] * LAYERS)
    inputs = np.random.default_rng(1).normal(size=(3, 2, 5, D))
    for j, site in enumerate(found):
        params = unrolled["params"]["stack"][f"repeat_{j}"]["1_moe"]["ffn"]
        for relative in (False, True):
            cost = changes(site, unrolled, jnp.asarray(inputs, jnp.float32), [mj.Context()] * 3, relative)
            expected = np.zeros(K)
            for x in inputs:
                base = numpy_moe(params, x, K)
                norms = [np.sqrt(((numpy_moe(params, x, k) - base) ** 2).sum()) for k in range(1, K + 1)]
                expected += np.array(norms) / (np.sqrt((base**2).sum()) if relative else 1) / 3
            np.testing.assert_allclose(cost, expected, rtol=1e-3, atol=1e-5)
            assert cost[-1] == 0
            assert (cost[:-1] > 1e-2).all()


def test_hidden_states_and_losses_are_those_of_the_model(trained: tuple) -> None:
    variables, batches = trained
    model = build(config())
    found = sites(model)
    unrolled = with_amounts({"params": to_unrolled(variables["params"])}, found, [K] * LAYERS)
    tokens, ctx = jnp.asarray(batches[0]["tokens"]), mj.Context()
    batch = {name: jnp.asarray(batches[0][name]) for name in ("targets", "valid")}
    (given,) = seen(model, found, unrolled, [(tokens, ctx, batch)])
    # What a mixture makes of its input is what the model has there.
    plain = build(config("moe", scan=False))
    _, kept = jax.jit(lambda v: plain.apply(v, tokens, ctx, capture_intermediates=True))({"params": unrolled["params"]})
    for j, x in enumerate(given):
        here = kept["intermediates"]["stack"][f"repeat_{j}"]["1_moe"]
        np.testing.assert_allclose(x, here["ffn_norm"]["__call__"][0], rtol=1e-5, atol=1e-6)

    rows = rises(model, found, unrolled, [(tokens, ctx, batch)])

    def loss(amounts: list[int]) -> float:
        """Of a model whose config has these k."""
        k = {"over_depth": tuple(a for k in amounts for a in (1, k))}
        logits = np.asarray(
            logits_of(config("moe", k, scan=False), {"params": _unrepeated(unrolled["params"])}, tokens), np.float64
        )
        logp = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
        each = -np.take_along_axis(logp, batches[0]["targets"][..., None], -1)[..., 0]
        return each[batches[0]["valid"]].mean()

    base = loss([K] * LAYERS)
    np.testing.assert_allclose(rows[1][0], loss([K, 1, K]) - base, rtol=1e-3, atol=1e-5)
    np.testing.assert_allclose(rows[2][1], loss([K, K, 2]) - base, rtol=1e-3, atol=1e-5)
    assert all(row[-1] == 0 for row in rows)


def _unrepeated(params: dict) -> dict:
    """Unrolled parameters as those of a model in which nothing repeats: one repeat of all layers."""
    stack = params["stack"]
    blocks = {
        f"{2 * r + i}_{name}": stack[f"repeat_{r}"][f"{i}_{name}"]
        for r in range(LAYERS)
        for i, name in enumerate(("dense", "moe"))
    }
    return {**params, "stack": {"repeat_0": blocks}}


def test_dynamic_programming_finds_the_best_and_evolution_nothing_better(rng: np.random.Generator) -> None:
    for most, least in (((4, 4, 4, 4), 1), ((4, 2, 3, 4), 1), ((4, 4, 3, 4), 2)):
        cost = np.full((4, 4), np.inf)
        for j, k in enumerate(most):
            cost[j, :k] = rng.random(k)
        for budget in range(4 * least, sum(most) + 1):
            every = [a for a in itertools.product(*(range(least, k + 1) for k in most)) if sum(a) == budget]
            best = min(sum(cost[j, k - 1] for j, k in enumerate(a)) for a in every)
            found = budgets.exact(cost, budget, least)
            assert tuple(found) in every
            np.testing.assert_allclose(budgets.total(cost, found), best)
            for other in (budgets.evolved(cost, budget, rng, least, 8, 6), budgets.drawn(cost, budget, rng, least)):
                assert tuple(other) in every
                assert budgets.total(cost, other) >= best - 1e-12


def test_evolution_gets_there(rng: np.random.Generator) -> None:
    cost = rng.random((12, 8)) * np.arange(8, 0, -1)
    best, poor = budgets.total(cost, budgets.exact(cost, 50)), budgets.total(cost, budgets.drawn(cost, 50, rng))
    found = budgets.total(cost, budgets.evolved(cost, 50, rng))
    assert found - best < 0.2 * (poor - best)


@pytest.mark.parametrize("by", ["gaussian", "hidden", "loss", "nothing"])
def test_the_surgery_writes_state_and_changes_nothing_else(trained: tuple, by: str) -> None:
    variables, batches = trained
    budget = 6
    found = Allot(budget, by=by, draws=2, shape=(2, 8))(Checkpoint({}, variables), target(config(), batches))
    chosen = ks(found)
    assert sum(chosen) == budget
    assert all(1 <= k <= K for k in chosen)
    assert found.variables["params"] is variables["params"]
    jax.tree.map(
        lambda a, b: None if (a.shape, a.dtype) == (b.shape, b.dtype) else pytest.fail("shape"),
        shapes_of_state(),
        found.variables["router_state"],
    )
    # A scanned model with this state is the one whose config has these k.
    tokens = jnp.asarray(batches[0]["tokens"])
    k = {"over_depth": tuple(a for k in chosen for a in (1, k))}
    static = logits_of(config("moe", k, scan=False), {"params": _unrepeated(to_unrolled(variables["params"]))}, tokens)
    np.testing.assert_allclose(logits_of(config(), found.variables, tokens), static, rtol=1e-4, atol=1e-5)


def test_layers_that_fewer_experts_hurt_keep_more(trained: tuple) -> None:
    """Where all experts of a layer are alike, one is as good as three."""
    variables, batches = trained
    bank = variables["params"]["stack"]["repeats"]["1_moe"]["ffn"]["bank"]
    alike = jax.tree.map(lambda w: w.at[1].set(w[1, :1]), bank)
    stack = variables["params"]["stack"]["repeats"]
    ffn = {**stack["1_moe"]["ffn"], "bank": alike}
    params = {**variables["params"], "stack": {"repeats": {**stack, "1_moe": {**stack["1_moe"], "ffn": ffn}}}}
    for fields in ({}, {"search": "evolution"}, {"by": "hidden"}, {"by": "loss"}, {"relative": True}):
        found = Allot(2 * K + 1, draws=1, shape=(2, 8), **fields)(Checkpoint({}, {"params": params}), target(config(), batches))
        if fields.get("by") != "loss":  # a loss may fall where a layer has less
            assert ks(found) == [K, 1, K], fields


def test_what_does_not_fit_is_named(trained: tuple) -> None:
    variables, batches = trained
    start = Checkpoint({}, variables)
    with pytest.raises(ConfigError, match=r"budget=13 must lie between 3 and 9: 3 layers of at least 1"):
        Allot(13, by="nothing")(start, target(config(), batches))
    with pytest.raises(ConfigError, match="least=4 must lie between 1 and 3"):
        Allot(9, by="nothing", least=4)(start, target(config(), batches))
    with pytest.raises(ConfigError, match="the model has no mixture of kind 'allotted'"):
        Allot(6)(start, target(config("moe"), batches))
    with pytest.raises(ConfigError, match="by='hidden' and by='loss' read text"):
        Allot(6, by="hidden")(start, target(config(), [{"image": 0}]))
    with pytest.raises(ConfigError, match="by='gausian'"):
        Allot(6, by="gausian")
    with pytest.raises(ConfigError, match=r"must be a rule under which a token takes its k best experts.*, not ReLU"):
        mj.AllottedMoE(mj.Linear(E), mj.ReLU(), mj.GLU(hidden=F, num_experts=E))
