"""CompeteSMoE: competition steps, their losses and gradients in NumPy, the schedule, and inference by the router alone."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from numpy_layers import draw, glu
from numpy_routing import best, softmax, top_k

from moejax import GLU, Linear, MoE, TopK
from moejax.core.context import Context
from moejax.core.errors import ConfigError
from moejax.layers import Competition
from moejax.layers.registry import ffns
from moejax.optim.base import optimizers
from moejax.routing import Balance, ZLoss
from moejax.tasks.base import tasks
from moejax.train.step import init_state, make_train_step

B, S, D, E, K = 2, 6, 5, 4, 2
VALID = np.array([[True, True, False, True, True, True], [True, True, True, True, False, False]])
LOSSES = (Balance(0.5), ZLoss(0.1))


def layer(**fields) -> Competition:
    return Competition(Linear(E), GLU(3, num_experts=E), K, **{"losses": LOSSES, "backend": "reference", **fields})


@functools.cache
def setup() -> tuple[dict, jax.Array]:
    x = jnp.asarray(np.random.default_rng(0).normal(size=(B, S, D)), jnp.float32)
    return {**draw(layer(), x), "router_state": {"seed": jnp.uint32(7)}}, x


@functools.cache
def apply(moe: Competition, train: bool):
    def run(variables: dict, x: jax.Array, step: jax.Array) -> tuple:
        ctx = Context(valid=jnp.asarray(VALID), train=train, step=step)
        return moe.apply(variables, x, ctx, mutable=["losses", "stats"])

    return jax.jit(run)


AFFINITY = {"softplus": lambda y: np.log1p(np.exp(y)).mean(-1), "norm": lambda y: np.linalg.norm(y, axis=-1)}


def numpy_competition(params: dict, x: np.ndarray, version: int) -> tuple[np.ndarray, dict[str, float]]:
    """Outputs [b, s, d] and the three losses of one competition step, token by token from the card."""
    y, router, diversity, probs, firsts = np.zeros(x.shape), [], [], [], []
    for b, t in np.argwhere(VALID):
        g = np.stack([glu(params["bank"], e, x[b, t]) for e in range(E)])
        a = AFFINITY["softplus" if version == 2 else "norm"](g)
        chosen = best(a, K)
        w = a[chosen] / a[chosen].sum() if version == 2 else softmax(a[chosen])
        y[b, t] = w @ g[chosen]
        p = softmax(x[b, t] @ np.asarray(params["router"]["w"], np.float64))
        if version == 2:
            target = softmax(a)
            router.append(((p - target) ** 2).mean() + 0.1 * ((p - target)[chosen] ** 2).mean())
        else:
            target = np.zeros(E)
            target[chosen] = w
            router.append(((p - target) ** 2).mean())
        unit = g[chosen] / np.linalg.norm(g[chosen], axis=-1, keepdims=True)
        diversity.append((unit @ unit.T * (1 - np.eye(K))).mean())
        probs.append(softmax(a))
        firsts.append(np.eye(E)[chosen[0]])
    balance = E**2 * (np.mean(probs, 0) * np.mean(firsts, 0)).mean()
    return y, {"router": np.mean(router), "diversity": np.mean(diversity), "balance": balance}


FIRST = dict(affinity="norm", gate="softmax", target="winners", winners_coef=0.0)


@pytest.mark.parametrize("version", [1, 2])
def test_a_competition_step_is_numpys(version: int) -> None:
    variables, x = setup()
    moe = layer(rate=1.0, router_coef=2.0, diversity_coef=3.0, balance_coef=4.0, **(FIRST if version == 1 else {}))
    y, sown = apply(moe, True)(variables, x, jnp.int32(0))
    expected, losses = numpy_competition(variables["params"], np.asarray(x, np.float64), version)
    np.testing.assert_allclose(y, expected, rtol=1e-4, atol=1e-5)
    for name, coef in (("router", 2), ("diversity", 3), ("balance", 4)):
        np.testing.assert_allclose(sown["losses"][f"compete_{name}_loss"], coef * losses[name], rtol=1e-4)
    assert sown["losses"]["balance_loss"] == sown["losses"]["z_loss"] == 0
    assert sown["stats"]["competing"] == 1


def test_a_router_step_and_inference_are_those_of_a_plain_mixture() -> None:
    variables, x = setup()
    plain = MoE(Linear(E), TopK(K, normalise=True), GLU(3, num_experts=E), losses=LOSSES, backend="reference")
    ctx = Context(valid=jnp.asarray(VALID))
    expected, wanted = jax.jit(lambda v: plain.apply(v, x, ctx, mutable=["losses", "stats"]))({"params": variables["params"]})
    for moe, train in ((layer(rate=1.0, warmup=5), True), (layer(rate=1.0), False), (layer(rate=0.0), True)):
        y, sown = apply(moe, train)(variables, x, jnp.int32(4))
        np.testing.assert_allclose(y, expected, rtol=1e-5, atol=1e-6)
        for name, value in wanted["losses"].items():
            np.testing.assert_allclose(sown["losses"][name], value, rtol=1e-5)
        for name in ("router", "diversity", "balance"):
            assert sown["losses"][f"compete_{name}_loss"] == 0
        for name, value in wanted["stats"].items():
            np.testing.assert_allclose(sown["stats"][name], value, rtol=1e-5)


def test_gradients_flow_through_winners_weights_and_not_from_the_routers_target() -> None:
    """Against jax.grad of a dense formula; the router learns from its own loss only, and that loss moves no expert."""
    variables, x = setup()
    params, chosen = variables["params"], []
    for b, t in np.ndindex(B, S):
        g = np.stack([glu(params["bank"], e, np.asarray(x[b, t], np.float64)) for e in range(E)])
        chosen.append(np.eye(E)[best(AFFINITY["softplus"](g), K)].sum(0))
    mask = jnp.asarray(np.array(chosen).reshape(B, S, E) * VALID[..., None], jnp.float32)

    def dense(p: dict) -> jax.Array:
        h = jax.nn.silu(jnp.einsum("bsd,edf->bsef", x, p["bank"]["w_gate"])) * jnp.einsum("bsd,edf->bsef", x, p["bank"]["w_up"])
        g = jnp.einsum("bsef,efd->bsed", h, p["bank"]["w_out"])
        a = jax.nn.softplus(g).mean(-1) * mask
        return jnp.sin(jnp.einsum("bse,bsed->bsd", a / jnp.maximum(a.sum(-1, keepdims=True), 1e-9), g)).sum()

    def loss(p: dict, moe: Competition, task: float) -> jax.Array:
        ctx = Context(valid=jnp.asarray(VALID), train=True, step=jnp.int32(0))
        y, sown = moe.apply({**variables, "params": p}, x, ctx, mutable=["losses"])
        return task * jnp.sin(y).sum() + sum(jax.tree.leaves(sown["losses"]))

    silent = layer(rate=1.0, router_coef=0.0, diversity_coef=0.0, balance_coef=0.0)
    gradient = jax.jit(jax.grad(lambda p: loss(p, silent, 1.0)))(params)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-5), gradient, jax.jit(jax.grad(dense))(params)
    )
    np.testing.assert_array_equal(gradient["router"]["w"], 0)
    router_only = layer(rate=1.0, router_coef=1.0, diversity_coef=0.0, balance_coef=0.0)
    gradient = jax.jit(jax.grad(lambda p: loss(p, router_only, 0.0)))(params)
    assert np.abs(gradient["router"]["w"]).max() > 1e-4
    jax.tree.map(lambda leaf: np.testing.assert_array_equal(leaf, 0), gradient["bank"])


def test_the_router_of_a_watched_layer_is_compared_with_the_winners() -> None:
    variables, x = setup()
    _, sown = apply(layer(watch=True), False)(variables, x, jnp.int32(0))
    params, agreement = variables["params"], []
    for b, t in np.argwhere(VALID):
        token = np.asarray(x[b, t], np.float64)
        g = np.stack([glu(params["bank"], e, token) for e in range(E)])
        routed, _ = top_k(token[None] @ np.asarray(params["router"]["w"], np.float64), K)
        agreement.append(len(set(routed[0]) & set(best(AFFINITY["softplus"](g), K))) / K)
    np.testing.assert_allclose(sown["stats"]["agreement"], np.mean(agreement), rtol=1e-5)
    _, losses = numpy_competition(params, np.asarray(x, np.float64), 2)
    np.testing.assert_allclose(sown["stats"]["similarity"], 2 * losses["diversity"], rtol=1e-4)


class Residual(nn.Module):
    @nn.compact
    def __call__(self, x: jax.Array, ctx: Context) -> tuple[jax.Array, None]:
        moe = Competition(Linear(E, parent=None), GLU(3, num_experts=E, parent=None), K, rate=0.5, warmup=2, name="ffn")
        return x + nn.remat(lambda module, x: module(x, ctx))(moe, x), None


class Model(nn.Module):
    @nn.compact
    def __call__(self, tokens: jax.Array, ctx: Context) -> jax.Array:
        x = nn.Embed(9, D, embedding_init=nn.initializers.uniform(1.0))(tokens)
        body = nn.scan(Residual, variable_axes={True: 0}, split_rngs={True: True}, in_axes=(nn.broadcast,), length=3)
        return nn.Dense(9, kernel_init=nn.initializers.uniform(1.0))(body(name="layers")(x, ctx)[0])


def test_scanned_and_recomputed_layers_draw_for_themselves_and_all_microbatches_draw_alike() -> None:
    tokens = jnp.asarray(np.random.default_rng(0).integers(0, 9, (4, S)), jnp.int32)
    ones = jnp.ones((4, S), jnp.int32)
    batch = {"tokens": tokens, "targets": tokens, "valid": ones > 0, "segments": ones, "positions": jnp.cumsum(ones, 1) - 1}
    task = tasks.build({"kind": "next_token"}, "task")
    optimizer = optimizers.build({"kind": "adamw", "learning_rate": 1e-3}, "optimizer", steps=40)
    state = jax.jit(lambda key: init_state(Model(), task, optimizer, batch, key))(jax.random.key(0))
    seeds = np.asarray(state.collections["router_state"]["layers"]["ffn"]["seed"])
    assert len(set(seeds.tolist())) == 3
    step = jax.jit(make_train_step(Model(), task, optimizer, accumulation=2, jit=False))
    drawn = []
    for _ in range(40):
        state, metrics = step(state, batch)
        drawn.append(np.asarray(metrics["stats/layers.ffn/competing"]))
        assert np.isfinite(metrics["train/objective"])
    drawn = np.array(drawn)
    assert set(np.unique(drawn)) == {0, 1}, "a mean over microbatches of anything else would lie between"
    assert not drawn[:2].any()
    assert (np.abs(drawn[2:].mean(0) - 0.5) < 0.3).all()
    assert (drawn[:, 0] != drawn[:, 1]).any()
    expected = [
        [i >= 2 and jax.random.uniform(jax.random.fold_in(jax.random.key(s), i)) < 0.5 for s in seeds] for i in range(6)
    ]
    np.testing.assert_array_equal(drawn[:6], np.array(expected, float))
    np.testing.assert_array_equal(state.collections["router_state"]["layers"]["ffn"]["seed"], seeds)


def test_the_first_versions_schedule_decays() -> None:
    """2 / (2 + sqrt(i + 1)): two thirds of the first steps, a sixth of those near the hundredth."""
    variables, x = setup()
    moe = layer(rate=1.0, schedule="decaying", warmup=3)
    competing = [float(apply(moe, True)(variables, x, jnp.int32(i))[1]["stats"]["competing"]) for i in range(40)]
    draws = [float(jax.random.uniform(jax.random.fold_in(jax.random.key(7), i))) for i in range(40)]
    np.testing.assert_array_equal(competing, [i >= 3 and draws[i] < 2 / (2 + np.sqrt(i + 1)) for i in range(40)])
    with pytest.raises(ConfigError, match=r"needs Context\.step"):
        moe.apply(variables, x, Context(train=True), rngs={"router": jax.random.key(0)}, mutable=["losses", "stats"])


def test_it_is_built_from_a_config() -> None:
    spec = dict(kind="competition", num_experts=8, k=2, router=dict(kind="linear"), bank=dict(kind="glu", hidden=3))
    moe = ffns.build({**spec, "losses": dict(balance=dict(coef=0.01), z={})}, "ffn")
    assert moe.losses == (Balance(0.01), ZLoss())
    assert moe.active_fraction() == 0.25


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"rate": 1.5}, "rate=1.5 must be a number between 0 and 1"),
        ({"schedule": "falling"}, "schedule='falling' is unknown"),
        ({"affinity": "gelu"}, "affinity='gelu' is unknown"),
        ({"gate": "sum"}, "gate='sum' is unknown"),
        ({"target": "some"}, "target='some' is unknown"),
        ({"k": 5}, "k=5 exceeds num_experts=4"),
    ],
)
def test_bad_settings_raise(fields: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Competition(Linear(E), GLU(3, num_experts=E), **fields)
