"""Numbers that are tiny, padding that is not a number, and zeros of both signs: values stay exact and gradients finite.

Every rule and every loss that is registered is tried on padding; examples with a value known by hand are one of a kind each.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from numpy_routing import softmax

from moejax.core.context import Context
from moejax.experts import FFN
from moejax.layers import Competition
from moejax.routing import (
    Balance,
    ExpertChoice,
    ExpertDropout,
    GShard,
    Importance,
    Linear,
    NullExperts,
    ReLU,
    Routing,
    SoftSlots,
    TopAny,
    TopK,
    TopP,
)  # fmt: skip
from moejax.routing.losses.adaptive_l1 import AdaptiveLoss
from moejax.routing.losses.base import Loss, losses, masked_mean
from moejax.routing.scores import best
from moejax.routing.select.base import Select, selects
from moejax.routing.stats import routing_stats

G, N, E = 2, 9, 4
VALID = np.array([[True] * 7 + [False] * 2, [True, False, True, True, False, True, False, True, False]])


def one(*logits: float) -> jax.Array:
    """One group of one token."""
    return jnp.array(logits, jnp.float32)[None, None]


def dense_gradient(rule: Select, logits: jax.Array, i: int) -> np.ndarray:
    """Of the first token's weight for expert i."""
    return np.asarray(jax.jit(jax.grad(lambda x: rule(x).dense()[0, 0, i]))(logits))


class TestTinyTotals:
    def test_weights_over_true_experts_where_null_ones_have_all_the_probability(self) -> None:
        for null in (45.0, 90.0):
            one_true = NullExperts(k=2, num_null=1)
            logits = one(0.0, -1.0, null)
            np.testing.assert_array_equal(jax.jit(one_true)(logits).dense(), [[[1, 0]]])
            np.testing.assert_array_equal(dense_gradient(one_true, logits, 0), 0)
            both = NullExperts(k=3, num_null=1)
            p = softmax(np.array([0.0, -1.0]))
            np.testing.assert_allclose(jax.jit(both)(logits).dense()[0, 0], p, rtol=1e-6)
            np.testing.assert_allclose(dense_gradient(both, logits, 0)[0, 0], [p[0] * p[1], -p[0] * p[1], 0], rtol=1e-5)

    @pytest.mark.parametrize("score", ["softmax", "sigmoid"])
    def test_an_expert_choice_that_one_expert_alone_made(self, score: str) -> None:
        """Each expert takes one token; the first one takes it at a score of about e^-50."""
        logits, rule = jnp.array([[[-50.0, 0.0, 0.1], [-60.0, 9.0, 0.0], [-60.0, 0.0, 9.0]]]), ExpertChoice(1.0, score, True)
        np.testing.assert_array_equal(jax.jit(rule)(logits).dense(), [np.eye(3)])
        np.testing.assert_array_equal(dense_gradient(rule, logits, 0), 0)

    @pytest.mark.parametrize("bias", [None, (0.0, 0.0, 9.0, 9.0)])
    def test_normalised_sigmoids(self, bias: tuple | None) -> None:
        """Whatever brings experts of a tiny score to be chosen: `e^-50 / (e^-50 + e^-51)`."""
        logits = one(-50.0, -51.0, -52.0) if bias is None else one(0.0, 0.0, -50.0, -51.0)
        first = 0 if bias is None else 2
        ranked = None if bias is None else jnp.array(bias)
        rule = TopK(k=2, score="sigmoid", normalise=True)
        p = softmax(np.array([0.0, -1.0]))
        np.testing.assert_allclose(jax.jit(rule)(logits, bias=ranked).weight[0, 0], p, rtol=1e-5)
        gradient = jax.jit(jax.grad(lambda x: rule(x, bias=ranked).dense()[0, 0, first]))(logits)[0, 0]
        np.testing.assert_allclose(gradient[first : first + 2], [p[0] * p[1], -p[0] * p[1]], rtol=1e-5)

    def test_normalised_probabilities_of_experts_that_a_bias_chose(self) -> None:
        bias = jnp.array([0.0, 2.0, 2.0])
        for rule in (TopK(k=2, normalise=True), GShard(None)):
            plan = jax.jit(rule)(one(0.0, -120.0, -121.0), bias=bias)
            np.testing.assert_array_equal(plan.expert, [[[1, 2]]])
            np.testing.assert_allclose(plan.weight[0, 0], softmax(np.array([0.0, -1.0])), rtol=1e-6)

    def test_probabilities_from_sigmoids_and_what_balance_makes_of_them(self) -> None:
        logits = jnp.array([[[-50.0, -51.0, -52.0], [0.1, 0.2, 0.3]]])
        rule = TopK(k=1, score="sigmoid")
        probs = rule.probabilities(logits)
        np.testing.assert_allclose(probs[0, 0], softmax(np.array([0.0, -1.0, -2.0])), rtol=1e-5)

        def balance(x: jax.Array) -> jax.Array:
            return Balance(1.0)(Routing(x, rule.probabilities(x), rule(x), jnp.ones((1, 2), bool)))

        # d/dx of e sum_i f_i p_i / n with constant f: here log p is the logit minus its logarithm of the sum.
        share, gradient = np.array([0.5, 0, 0.5]), jax.jit(jax.grad(balance))(logits)
        p = np.asarray(probs[0, 0], np.float64)
        np.testing.assert_allclose(gradient[0, 0], 3 / 2 * p * (share - (p * share).sum()), rtol=1e-4)
        assert np.isfinite(gradient).all()

    @pytest.mark.parametrize("size", [1e-30, 1.0])
    def test_probabilities_from_gates_do_not_depend_on_their_size(self, size: float) -> None:
        gates = size * np.array([1.0, 3.0, 0.0, -1.0])
        expected, slope = np.array([0.25, 0.75, 0, 0]), np.array([0.75, -0.25, 0, 0]) / 4 / size
        for rule, logits, picked in (
            (ReLU(), one(*gates), slice(None)),
            (TopAny(), jnp.stack([one(*gates), jnp.zeros((1, 1, 4))], -1).reshape(1, 1, 8), slice(None, None, 2)),
        ):
            np.testing.assert_allclose(rule.probabilities(logits)[0, 0], expected, rtol=1e-6)
            gradient = jax.jit(jax.grad(lambda x, rule=rule: rule.probabilities(x)[0, 0, 0]))(logits)[0, 0, picked]
            np.testing.assert_allclose(gradient, slope, rtol=1e-5, atol=1e-6 * np.abs(slope).max())
            nobody = rule.probabilities(-jnp.abs(logits))
            np.testing.assert_array_equal(nobody, 0)

    def test_importance_does_not_depend_on_the_gates_size(self) -> None:
        logits = jnp.array([[[-50.0, -51.0], [-50.5, -50.0]]])
        rule = TopK(k=2, score="sigmoid")
        summed = np.exp(np.asarray(logits[0], np.float64)).sum(0)

        def importance(x: jax.Array) -> jax.Array:
            return Importance(1.0)(Routing(x, rule.probabilities(x), rule(x), jnp.ones((1, 2), bool)))

        step = jax.jit(jax.value_and_grad(importance))
        value, gradient = step(logits)
        np.testing.assert_allclose(value, (summed.std() / summed.mean()) ** 2, rtol=1e-4)
        # The scale of all gates is nothing to it; at -5 a sigmoid is still nearly an exponential.
        np.testing.assert_allclose(gradient, step(logits + 45)[1], rtol=0.02, atol=1e-4)

    def test_winners_of_equal_zeros(self) -> None:
        """A token whose outputs are all zero answers nobody: weights of 0 and finite gradients, not 0 / 0."""
        layer = Competition(Linear(3), FFN(4, num_experts=3), k=2, affinity="silu", rate=1.0)
        x = jnp.zeros((1, 2, 5)).at[0, 0].set(1.0)
        variables = jax.jit(layer.init)({"params": jax.random.key(0)}, x)

        def loss(variables: dict) -> jax.Array:
            y, sown = layer.apply(variables, x, Context(train=True, step=jnp.int32(0)), mutable=["losses"])
            return jnp.square(y).sum() + sum(jax.tree.leaves(sown["losses"]))

        gradient = jax.jit(jax.grad(lambda p: loss({**variables, "params": p})))(variables["params"])
        assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(gradient))


class TestPadding:
    """NaN and infinity in padding touch neither values nor gradients."""

    @pytest.mark.parametrize("kind", selects.kinds())
    def test_every_rule(self, rng: np.random.Generator, kind: str) -> None:
        cls = selects[kind]
        complete = all(f.default is not dataclasses.MISSING for f in dataclasses.fields(cls))
        rule = cls() if complete else selects.build({"kind": kind, "select": {"kind": "top_k", "k": 2}}, "select")
        clean = rng.normal(size=(G, N, rule.num_outputs(E))).astype(np.float32)

        def run(x: jax.Array) -> tuple[jax.Array, tuple]:
            ctx = Context(valid=jnp.asarray(VALID), train=True, key=jax.random.key(0), step=jnp.int32(0))
            plan, logits = rule(x, ctx), ctx.clean(x)  # what layers do
            real = Routing(logits, rule.probabilities(logits), plan, jnp.asarray(VALID))
            return plan.assigned().sum() + Importance(1.0)(real), (plan, routing_stats(real))

        step = jax.jit(jax.value_and_grad(run, has_aux=True))
        expected = step(jnp.asarray(clean))
        for junk in (np.nan, np.inf, -np.inf):
            dirty = np.where(VALID[..., None], clean, junk)
            actual = step(jnp.asarray(dirty))
            jax.tree.map(np.testing.assert_array_equal, actual, expected)
            np.testing.assert_array_equal(np.asarray(actual[1])[~VALID], 0)

    @pytest.mark.parametrize("kind", losses.kinds())
    def test_every_loss(self, rng: np.random.Generator, kind: str) -> None:
        loss = losses[kind]()
        rule = NullExperts(k=2, num_null=3) if kind == "null_balance" else TopK(k=2)
        x = rng.normal(size=(G, N, rule.num_outputs(E))).astype(np.float32)
        plan, valid = rule(jnp.asarray(x), Context(valid=jnp.asarray(VALID))), jnp.asarray(VALID)

        def run(logits: jax.Array, probs: jax.Array) -> jax.Array:
            routing = Routing(logits, probs, plan, valid)
            return loss(routing, jnp.float32(1)) if isinstance(loss, AdaptiveLoss) else loss(routing)

        step, probs = jax.jit(jax.value_and_grad(run, (0, 1))), np.asarray(rule.probabilities(jnp.asarray(x)))
        expected = step(x, probs)
        for junk in (np.nan, np.inf):
            actual = step(*(np.where(VALID[..., None], a, np.float32(junk)) for a in (x, probs)))
            jax.tree.map(np.testing.assert_array_equal, actual, expected)

    def test_masked_mean(self) -> None:
        values = jnp.array([[1.0, jnp.nan, 3.0], [jnp.inf, jnp.nan, 5.0]])
        valid = jnp.array([[True, False, True], [False, False, False]])
        np.testing.assert_array_equal(masked_mean(values, valid, (1,)), [2, 0])
        gradient = jax.jit(jax.grad(lambda v: masked_mean(v, valid, (0, 1))))(values)
        np.testing.assert_array_equal(gradient, [[0.5, 0, 0.5], [0, 0, 0]])


class TestTies:
    def test_zeros_are_equal_whatever_their_sign(self) -> None:
        zeros = one(-0.0, 0.0, -0.0, 0.0)
        np.testing.assert_array_equal(jax.jit(lambda x: best(x, 4))(zeros[0, 0]), [0, 1, 2, 3])
        for rule in (TopK(k=2), TopP(0.4), ReLU(max_experts=2), GShard(None), NullExperts(k=2, num_null=1)):
            logits = jnp.pad(zeros, ((0, 0), (0, 0), (0, rule.null_outputs)))
            np.testing.assert_array_equal(jax.jit(rule)(logits).expert[0, 0, :2], [0, 1], err_msg=str(rule))
        tokens = ExpertChoice(1.0, score="logit")(zeros.reshape(1, 4, 1).repeat(2, -1)).token
        np.testing.assert_array_equal(tokens, [[[0, 1]] * 2])

    def test_groups_of_experts_and_biased_scores(self) -> None:
        logits = one(-0.0, -1.0, 0.0, -1.0)
        rule = TopK(k=1, score="logit", expert_groups=2, groups_kept=1)
        np.testing.assert_array_equal(rule(logits).expert, [[[0]]])
        np.testing.assert_array_equal(TopK(k=1, score="logit")(one(-0.0, 0.0), bias=jnp.array([-0.0, 0.0])).expert, [[[0]]])


def test_experts_that_are_missing_take_nobodys_place(rng: np.random.Generator) -> None:
    """Against NumPy: choices of missing experts are never made, so they neither fill an expert nor push anybody out."""
    rule = ExpertDropout(TopK(k=3, capacity_factor=0.7, priority="token"), rate=0.6)
    run = jax.jit(rule)
    for seed in range(10):
        logits, key = jnp.asarray(rng.normal(size=(1, N, E)), jnp.float32), jax.random.key(seed)
        plan = run(logits, Context(train=True, key=key))
        here = np.asarray(jax.random.bernoulli(key, 0.4, logits.shape))[0]
        room, taken = int(plan.capacity), np.zeros(E, int)
        for t in range(N):
            order = np.argsort(-np.where(here[t], logits[0, t], -np.inf), kind="stable")[:3]
            for i in order[here[t][order]]:
                assert bool(plan.assigned()[0, t, i]) == (taken[i] < room)
                taken[i] += taken[i] < room


def test_soft_slots_and_a_loss_of_ones_own_ignore_padding_in_a_batch(rng: np.random.Generator) -> None:
    """What is averaged over tokens is averaged over the real ones."""

    @dataclasses.dataclass(frozen=True)
    class Size(Loss):
        def cost(self, routing: Routing) -> jax.Array:
            return jnp.square(routing.logits).sum()  # forgets the mask; the base has zeroed padding

    x = jnp.asarray(np.where(VALID[..., None], rng.normal(size=(G, N, E)), np.nan), jnp.float32)
    rule = SoftSlots()
    routing = Routing(x, rule.probabilities(x), rule(x, Context(valid=jnp.asarray(VALID))), jnp.asarray(VALID))
    np.testing.assert_allclose(Size(2.0)(routing), 2 * np.square(np.asarray(x)[VALID]).sum(), rtol=1e-6)
    np.testing.assert_allclose(routing.plan.dispatch.sum(1), 1, rtol=1e-6)
