"""DynMoE: scores, thresholds and straight-through gates in NumPy; a pool that loses and gains experts while a model trains."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from numpy_layers import draw, glu
from numpy_routing import sigmoid

from moejax import GLU, MoE
from moejax.core.context import Context
from moejax.core.control import Site
from moejax.core.errors import ConfigError
from moejax.layers.registry import ffns
from moejax.optim.base import optimizers
from moejax.routing import AdaptPool, ExpertPool, Routing, TopAny, TopAnyLoss
from moejax.tasks.base import tasks
from moejax.train.step import init_state, make_train_step

G, N, D, E = 2, 8, 5, 4
LAYERS, VOCAB, ROWS, LENGTH = 2, 11, 4, 6
ACTIVE = np.array([True, True, False, True])


def numpy_pool(params: dict, x: np.ndarray, active: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Scores [*t, e] (0 outside the pool, as the paper has it) and thresholds [e]."""
    w, c = np.asarray(params["w"], np.float64), np.exp(min(float(params["temperature"]), np.log(100)))
    cosine = (x / np.linalg.norm(x, axis=-1, keepdims=True)) @ (w / np.linalg.norm(w, axis=0))
    return sigmoid(c * cosine) * active, sigmoid(c * np.asarray(params["threshold"], np.float64))


def numpy_gates(score: np.ndarray, limit: np.ndarray, train: bool) -> np.ndarray:
    """g [e] of one token."""
    g = (score > limit).astype(float)
    if not train and not g.any():
        g[score.argmax()] = 1
    return g


def drawn(rng: np.random.Generator) -> tuple[dict, np.ndarray]:
    params = {"w": rng.normal(size=(D, E)), "threshold": rng.normal(size=E) * 0.2 + 0.3, "temperature": np.array(1.0)}
    return {name: jnp.asarray(value, jnp.float32) for name, value in params.items()}, rng.normal(size=(G, N, D))


@pytest.mark.parametrize("train", [True, False])
def test_router_and_rule_are_numpys(train: bool, rng: np.random.Generator) -> None:
    params, x = drawn(rng)
    valid = rng.random((G, N)) < 0.8
    variables = {"params": params, "router_state": {"active": jnp.asarray(ACTIVE)}}
    logits = ExpertPool(E).apply(variables, jnp.asarray(x, jnp.float32), Context(train=train))
    plan = TopAny()(logits, Context(valid=jnp.asarray(valid), train=train))
    score, limit = numpy_pool(params, x, ACTIVE)
    gates = np.stack([[numpy_gates(t, limit, train) for t in group] for group in score])
    k = gates.sum(-1, keepdims=True)
    np.testing.assert_allclose(plan.dense(), gates / np.maximum(k, 1) * valid[..., None], rtol=1e-5)
    assert ((k == 0) & valid[..., None]).any() == train, "tokens without experts, in training only"
    assert len(np.unique(k)) > 1
    assert not gates[..., ~ACTIVE].any()


def test_the_arg_max_stays_in_the_pool_where_all_scores_are_zero() -> None:
    """At c = 100, a cosine of -1 has the score exp(-100), which is 0 in float32."""
    variables = {
        "params": {"w": -jnp.ones((D, E)), "threshold": jnp.zeros(E)},
        "router_state": {"active": jnp.array([False, False, True, False])},
    }
    router = ExpertPool(E, scale_init=100.0, learn_scale=False)
    plan = TopAny()(router.apply(variables, jnp.ones((1, 1, D)), Context()))
    np.testing.assert_array_equal(plan.dense()[0, 0], [0, 0, 1, 0])


def test_gradients_go_straight_through_where_an_expert_is_taken(rng: np.random.Generator) -> None:
    """d y / d margin_e = E_e(x) / k for taken experts and 0 for others; nothing comes through k."""
    score, limit = rng.random((G, N, E)), rng.random((G, N, E))
    score[0, 0] = 0
    outputs = rng.normal(size=(G, N, E))
    logits = jnp.asarray(np.stack([score, limit], -1).reshape(G, N, 2 * E), jnp.float32)
    gradient = jax.jit(jax.grad(lambda x: (jnp.asarray(outputs) * TopAny()(x, Context(train=True)).dense()).sum()))(logits)
    taken = score > limit
    expected = taken * outputs / np.maximum(taken.sum(-1, keepdims=True), 1)
    np.testing.assert_allclose(gradient.reshape(G, N, E, 2), np.stack([expected, -expected], -1), rtol=1e-5)


def test_losses_are_numpys_and_finite_where_embeddings_are_orthogonal(rng: np.random.Generator) -> None:
    params, x = drawn(rng)
    variables = {"params": params, "router_state": {"active": jnp.asarray(ACTIVE)}}
    router, tokens = ExpertPool(E, diversity=0.5), jnp.asarray(x, jnp.float32)

    def apply(v: dict) -> dict:
        return router.apply(v, tokens, Context(), mutable=["losses", "stats"])[1]

    sown = apply(variables)
    w = np.asarray(params["w"], np.float64)
    unit = w / np.linalg.norm(w, axis=0)
    mask = np.outer(ACTIVE, ACTIVE)
    diversity = np.linalg.norm((unit.T @ unit) * mask - np.eye(E) * mask) + np.linalg.norm(w, axis=0).mean()
    np.testing.assert_allclose(sown["losses"]["diversity_loss"], 0.5 * diversity, rtol=1e-5)
    assert sown["stats"]["pool_size"] == 3
    orthogonal = {**variables, "params": {**params, "w": jnp.eye(D, E)}}
    gradient = jax.grad(lambda v: apply(v)["losses"]["diversity_loss"], allow_int=True)(orthogonal)["params"]["w"]
    np.testing.assert_allclose(gradient, 0.5 * np.eye(D, E) / E, atol=1e-5)

    score, limit = numpy_pool(params, x, ACTIVE)
    logits = ExpertPool(E).apply(variables, jnp.asarray(x, jnp.float32), Context())
    valid = jnp.ones((G, N), bool)
    gates = (score > limit).reshape(-1, E).astype(float)
    g = gates[gates.any(-1)]
    balance = E**2 * ((g / g.sum(-1, keepdims=True)).mean(0) * g.mean(0)).mean()
    assert len(g) < len(gates), "tokens without experts count in the second term alone"
    plan = TopAny()(logits, Context(valid=valid, train=True))
    loss = TopAnyLoss(0.1, balance=2.0, efficiency=3.0)(Routing(logits, TopAny().probabilities(logits), plan, valid))
    np.testing.assert_allclose(loss, 0.1 * (2 * balance + 3 * gates.mean()), rtol=1e-5)


def test_the_released_models_loss_on_four_tokens() -> None:
    """By hand, as their code has it: the second factor of the balance is a constant, the first passes a gradient through its sum."""
    score = jnp.array([[0.9, 0.8], [0.9, 0.1], [0.1, 0.1], [0.8, 0.9]])
    logits = jnp.stack([score, jnp.full_like(score, 0.5)], axis=-1).reshape(1, 4, 4)

    def loss(x: jax.Array, **weights: float) -> jax.Array:
        plan = TopAny()(x, Context(train=True))
        return TopAnyLoss(1.0, **weights)(Routing(x, TopAny().probabilities(x), plan, jnp.ones((1, 4), bool)))

    np.testing.assert_allclose(loss(logits, balance=0.0), 5 / 8, rtol=1e-6)
    # Of the three tokens with experts: shares (1/2, 1/2), (1, 0), (1/2, 1/2) and gates (1, 1), (1, 0), (1, 1).
    np.testing.assert_allclose(loss(logits, efficiency=0.0), 2 * (2 / 3 * 1 + 1 / 3 * 2 / 3), rtol=1e-6)
    gradient = jax.grad(loss)(logits, efficiency=0.0).reshape(4, 2, 2)
    pull = np.array([2 * 1 / 3, 2 * (2 / 3) / 3])  # on a share, of either expert
    expected = np.array([pull / 2 - pull.sum() / 4, [0, 0], [0, 0], pull / 2 - pull.sum() / 4])
    np.testing.assert_allclose(gradient[..., 0], expected, atol=1e-6)
    np.testing.assert_allclose(expected[0], [1 / 18, -1 / 18], rtol=1e-5)
    np.testing.assert_allclose(gradient[..., 1], -expected, atol=1e-6)


class NumpyPool:
    """The paper's bookkeeping, one step after the other."""

    def __init__(self, active: np.ndarray, w: np.ndarray, threshold: np.ndarray, rule: AdaptPool):
        self.active, self.w, self.threshold, self.rule = active.copy(), w.copy(), threshold.copy(), rule
        self.counts, self.lost, self.alone = np.zeros(len(active)), np.zeros(len(w)), 0.0

    def step(self, number: int, counts: np.ndarray, lost: np.ndarray, alone: float) -> int | None:
        """The slot that joined, if any."""
        phase = (number - 1) % self.rule.cycle + 1
        if self.rule.record < phase <= self.rule.update:
            self.counts, self.lost, self.alone = self.counts + counts, self.lost + lost, self.alone + alone
        if phase != self.rule.update:
            return None
        self.active &= self.counts > 0
        joined = None
        if self.alone and not self.active.all():
            joined = int(np.argmin(self.active))
            self.active[joined] = True
            self.w[:, joined], self.threshold[joined] = self.lost / np.linalg.norm(self.lost), 0
        self.counts, self.lost, self.alone = np.zeros_like(self.counts), np.zeros_like(self.lost), 0.0
        return joined


def test_the_pool_is_kept_as_numpy_keeps_it(rng: np.random.Generator) -> None:
    """Twelve steps of two and a half cycles: removals, one addition at a time, a full pool, nobody alone, idle stretches."""
    rule, w, threshold = AdaptPool(cycle=5, record=1, update=4), rng.normal(size=(D, E)), rng.normal(size=E)
    pool = NumpyPool(ACTIVE, w, threshold, rule)
    params = {"w": jnp.asarray(w, jnp.float32), "threshold": jnp.asarray(threshold, jnp.float32)}
    state = {"active": jnp.asarray(ACTIVE), "chosen": jnp.zeros(E), "lost": jnp.zeros(D), "alone": jnp.zeros(())}
    sizes, after = [], jax.jit(rule.after_step)
    for number in range(1, 20):
        # In the first cycle expert 1 has no tokens, in the second only while nothing is recorded; in the third nobody is alone.
        cycle, phase = divmod(number - 1, 5)
        counts = rng.integers(1, 9, E) * pool.active
        if cycle == 0 or (cycle == 1 and phase != 0):
            counts[1] = 0
        alone = 0.0 if cycle == 2 else 2.0
        lost = rng.normal(size=D) * (alone > 0)
        joined = pool.step(number, counts, lost, alone)
        measured = {
            "chosen": jnp.asarray(counts, jnp.float32),
            "lost": jnp.asarray(lost, jnp.float32),
            "alone": jnp.float32(alone),
        }
        site = after(Site(params, state, measured, measured, jnp.int32(number)))
        params, state = site.params, site.state
        np.testing.assert_array_equal(state["active"], pool.active)
        np.testing.assert_allclose(params["w"], pool.w, rtol=1e-4, atol=1e-5)
        np.testing.assert_allclose(params["threshold"], pool.threshold, rtol=1e-5)
        np.testing.assert_allclose(state["chosen"], pool.counts)
        np.testing.assert_allclose(state["lost"], pool.lost, rtol=1e-4, atol=1e-5)
        np.testing.assert_array_equal(site.restarted["threshold"], np.arange(E) == (-1 if joined is None else joined))
        np.testing.assert_array_equal(site.restarted["w"][0], site.restarted["threshold"])
        sizes.append(int(pool.active.sum()))
    assert sizes[3] == 3, "expert 1 has gone and the first free slot, its own, has joined"
    assert sizes[-1] == 4


def moe(pool: ExpertPool) -> MoE:
    return MoE(pool, TopAny(), GLU(3, num_experts=E, parent=None), backend="reference", name="ffn")


class Residual(nn.Module):
    @nn.compact
    def __call__(self, x: jax.Array, ctx: Context) -> tuple[jax.Array, None]:
        self.sow("shown", "x", x)
        pool = ExpertPool(E, initial=2, cycle=3, record=1, update=3, parent=None)
        return x + moe(pool)(x, ctx), None


class Model(nn.Module):
    @nn.compact
    def __call__(self, tokens: jax.Array, ctx: Context) -> jax.Array:
        x = nn.Embed(VOCAB, D, embedding_init=nn.initializers.uniform(2.0))(tokens) - 1
        body = nn.scan(Residual, variable_axes={True: 0}, split_rngs={True: True}, in_axes=(nn.broadcast,), length=LAYERS)
        return nn.Dense(VOCAB, kernel_init=nn.initializers.uniform(1.0))(body(name="layers")(x, ctx)[0])


def test_scanned_layers_change_their_pools_from_all_microbatches_and_forget_the_new_slots_moments() -> None:
    """At a learning rate of 0 every step sees the same tokens, so that two recorded steps are twice one."""
    rng = np.random.default_rng(0)
    tokens = jnp.asarray(rng.integers(1, VOCAB, (ROWS, LENGTH)), jnp.int32)
    segments = jnp.asarray(np.arange(LENGTH) < np.array([6, 2, 5, 3])[:, None], jnp.int32)
    positions = jnp.broadcast_to(jnp.arange(LENGTH, dtype=jnp.int32), segments.shape)
    batch = {"tokens": tokens, "targets": tokens, "valid": segments > 0, "segments": segments, "positions": positions}
    task = tasks.build({"kind": "next_token"}, "task")
    optimizer = optimizers.build({"kind": "adamw", "learning_rate": 0.0}, "optimizer", steps=10)
    state = jax.jit(lambda key: init_state(Model(), task, optimizer, batch, key))(jax.random.key(1))
    ctx = task.inputs(batch, jnp.int32(0), train=True)[1]
    shown = Model().apply({"params": state.params, **state.collections}, tokens, ctx, mutable=["shown"])[1]["shown"]
    xs = np.asarray(shown["layers"]["x"][0], np.float64)[:, np.asarray(segments) > 0]  # layers, tokens, d

    before = jax.device_get(state)
    step = jax.jit(make_train_step(Model(), task, optimizer, accumulation=2, jit=False))
    for _ in range(3):
        state, metrics = step(state, batch)
    router, pool = (
        jax.device_get(tree)["layers"]["ffn"]["router"] for tree in (state.params, state.collections["router_state"])
    )
    adam = next(part for part in state.opt_state if hasattr(part, "mu"))
    start = before.params["layers"]["ffn"]["router"]
    joins = 0
    for layer in range(LAYERS):
        params = {name: value[layer] for name, value in start.items()}
        score, limit = numpy_pool(params, xs[layer], np.arange(E) < 2)
        g = score > limit
        rule = NumpyPool(np.arange(E) < 2, np.asarray(params["w"]), np.asarray(params["threshold"]), AdaptPool(3, 1, 3))
        for number in (1, 2, 3):
            joined = rule.step(number, g.sum(0), xs[layer][~g.any(-1)].sum(0), float((~g.any(-1)).sum()))
        np.testing.assert_array_equal(pool["active"][layer], rule.active)
        np.testing.assert_allclose(router["w"][layer], rule.w, rtol=1e-4, atol=1e-5)
        for memory in (adam.mu, adam.nu):
            w = np.asarray(memory["layers"]["ffn"]["router"]["w"])[layer]
            if joined is not None:
                joins += 1
                np.testing.assert_array_equal(w[:, joined], 0)
                w = np.delete(w, joined, 1)
            assert np.abs(w).max() > 0
    assert joins > 0
    assert metrics["stats/layers.ffn.router/pool_size"].shape == (LAYERS,)


def test_a_layer_averages_its_experts_and_gives_zero_without_any(rng: np.random.Generator) -> None:
    x = jnp.asarray(rng.normal(size=(G, N, D)), jnp.float32)
    layer = MoE(ExpertPool(E), TopAny(), GLU(3, num_experts=E), backend="reference")
    variables = draw(layer, x)
    params, state = variables["params"], {"router_state": {"router": {"active": jnp.asarray(ACTIVE)}}}
    score, limit = numpy_pool(params["router"], np.asarray(x, np.float64), ACTIVE)
    for train in (True, False):
        y = jax.jit(lambda v, train=train: layer.apply(v, x, Context(train=train)))({**variables, **state})
        for g, t in np.ndindex(G, N):
            gates = numpy_gates(score[g, t], limit, train)
            expected = sum(gates[e] * glu(params["bank"], e, np.asarray(x[g, t], np.float64)) for e in range(E)) / max(
                gates.sum(), 1
            )
            np.testing.assert_allclose(y[g, t], expected, rtol=1e-4, atol=1e-5)


def test_it_is_built_from_a_config() -> None:
    router = dict(kind="expert_pool", initial=4, cycle=90)
    spec = dict(kind="moe", num_experts=8, router=router, select=dict(kind="top_any"), bank=dict(kind="glu", hidden=3))
    layer = ffns.build({**spec, "losses": dict(top_any=dict(coef=0.1))}, "ffn")
    assert layer.router._adapt == AdaptPool(90, 30, 60)
    assert layer.decodable() is None
    assert layer.active_fraction() == 0.5


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"initial": 9}, "initial=9 must lie between 1 and num_experts=4"),
        ({"cycle": 9, "record": 5, "update": 5}, "record=5 and update=5 must satisfy"),
    ],
)
def test_bad_settings_raise(fields: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        ExpertPool(E, **fields)
    with pytest.raises(ConfigError, match="must be a number of at least 0"):
        TopAnyLoss(balance=-1.0)
