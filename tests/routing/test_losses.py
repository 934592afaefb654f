"""Routing losses: closed forms, NumPy, where gradients go, and what does not change them."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from numpy_routing import sigmoid, softmax, top_k

from moejax.core.context import Context
from moejax.core.errors import ConfigError
from moejax.experts import FFN
from moejax.layers import MoE
from moejax.routing import Balance, ExpertChoice, Importance, Linear, Routing, SoftSlots, TokenPlan, TopAnyLoss, TopK, ZLoss
from moejax.routing.losses.base import Loss, losses, masked_mean

G, N, E = 2, 9, 4
VALID = np.array([[True] * N, [True, False, True, True, False, True, False, True, False]])


def decide(logits: jax.Array, rule: TopK, valid: np.ndarray | None = VALID) -> Routing:
    mask = jnp.ones(logits.shape[:2], bool) if valid is None else jnp.asarray(valid)
    return Routing(logits, rule.probabilities(logits), rule(logits, Context(valid=mask)), mask)


def make_logits(rng: np.random.Generator) -> jax.Array:
    return jnp.asarray(2 * rng.normal(size=(G, N, E)), jnp.float32)


def by_hand(probs: np.ndarray, expert: np.ndarray, weight: np.ndarray | None = None) -> Routing:
    """Tokens `[n, k]` of one group that chose `expert`."""
    plan = TokenPlan(
        jnp.asarray(expert, jnp.int32)[None],
        jnp.ones((1, *expert.shape)) if weight is None else jnp.asarray(weight, jnp.float32)[None],
        jnp.ones((1, *expert.shape), bool),
        jnp.zeros((1, *expert.shape), bool),
        num_experts=probs.shape[-1],
    )
    probs = jnp.asarray(probs, jnp.float32)[None]
    return Routing(jnp.log(probs + 1e-30), probs, plan, jnp.ones(probs.shape[:2], bool))


class TestBalance:
    @pytest.mark.parametrize("k", [1, 2])
    @pytest.mark.parametrize("over", ["group", "batch"])
    def test_uniform_routing_costs_coef_and_one_expert_for_all_costs_e_times_that(self, k: int, over: str) -> None:
        """For every k: published versions differ here by a factor of k."""
        loss = Balance(0.5, over=over)
        rotating = (np.arange(2 * E)[:, None] + np.arange(k)) % E
        np.testing.assert_allclose(loss(by_hand(np.full((2 * E, E), 1 / E), rotating)), 0.5, rtol=1e-6)
        always_2 = np.eye(E)[np.full(2 * E, 2)]
        np.testing.assert_allclose(loss(by_hand(always_2, np.full((2 * E, k), 2))), 0.5 * E, rtol=1e-6)

    @pytest.mark.parametrize("count", ["all", "first"])
    @pytest.mark.parametrize("over", ["group", "batch"])
    @pytest.mark.parametrize("score", ["softmax", "sigmoid"])
    def test_it_is_numpys(self, rng: np.random.Generator, count: str, over: str, score: str) -> None:
        logits = make_logits(rng)
        # Drops and padding: f counts what valid tokens want before capacity.
        routing = decide(logits, TopK(k=2, score=score, capacity_factor=0.5))
        assert routing.plan.dropped.any()
        probs = softmax(logits) if score == "softmax" else sigmoid(logits) / sigmoid(logits).sum(-1, keepdims=True)
        groups = []
        for g in range(G):
            expert = top_k(logits[g], 2)[0][VALID[g]][:, : 1 if count == "first" else 2]
            groups.append((expert, probs[g][VALID[g]]))
        if over == "batch":
            groups = [tuple(np.concatenate(parts) for parts in zip(*groups, strict=True))]
        values = []
        for expert, p in groups:
            share = np.array([(expert == i).mean() for i in range(E)])
            values.append(E * (share * p.mean(0)).sum())
        expected = np.average(values, weights=[len(p) for _, p in groups])
        np.testing.assert_allclose(Balance(0.3, count, over)(routing), 0.3 * expected, rtol=1e-5)

    def test_gradient_flows_through_probabilities_only(self, rng: np.random.Generator) -> None:
        """d loss / d logits with f held constant, in closed form."""
        logits, rule = make_logits(rng), TopK(k=1)
        gradient = jax.grad(lambda x: Balance(1.0, over="batch")(decide(x, rule)))(logits)
        probs = softmax(logits)
        share = np.bincount(np.asarray(logits).argmax(-1)[VALID], minlength=E) / VALID.sum()
        d_probs = np.where(VALID[..., None], E * share / VALID.sum(), 0)
        expected = probs * (d_probs - (probs * d_probs).sum(-1, keepdims=True))
        np.testing.assert_allclose(gradient, expected, rtol=1e-4, atol=1e-7)
        # Soft plans count by their weights: those pass no gradient either.
        soft = SoftSlots()
        _, pullback = jax.vjp(
            lambda plan: Balance()(Routing(logits, soft.probabilities(logits), plan, jnp.asarray(VALID))), soft(logits)
        )
        assert not any(np.any(leaf) for leaf in jax.tree.leaves(pullback(jnp.float32(1))))

    def test_groups_make_it_the_same_for_every_cut_into_microbatches(self, rng: np.random.Generator) -> None:
        logits, rule = make_logits(rng), TopK(k=2)
        whole = Balance(over="group")(decide(logits, rule, None))
        parts = [Balance(over="group")(decide(logits[g : g + 1], rule, None)) for g in range(G)]
        np.testing.assert_allclose(np.mean(parts), whole, rtol=1e-6)
        batch = Balance(over="batch")(decide(logits, rule, None))
        assert abs(batch - whole) > 1e-4

    def test_an_empty_group_counts_nothing(self, rng: np.random.Generator) -> None:
        logits = make_logits(rng)
        valid = np.array([[True] * N, [False] * N])
        one = Balance()(decide(logits[:1], TopK(k=2), None))
        np.testing.assert_allclose(Balance()(decide(logits, TopK(k=2), valid)), one, rtol=1e-6)
        assert Balance()(decide(logits, TopK(k=2), np.zeros((G, N), bool))) == 0

    def test_first_choices_need_token_choice(self, rng: np.random.Generator) -> None:
        with pytest.raises(
            ConfigError, match=r"losses.balance.count='first' needs token choice, not ExpertPlan; use count='all'"
        ):
            Balance(count="first")(decide(make_logits(rng), ExpertChoice()))


class TestImportance:
    def test_it_is_the_squared_coefficient_of_variation(self, rng: np.random.Generator) -> None:
        logits = make_logits(rng)
        routing = decide(logits, TopK(k=2, normalise=True))
        summed = np.zeros(E)
        for g, t in np.argwhere(VALID):
            expert, weight = top_k(np.asarray(logits[g, t : t + 1]), 2, normalise=True)
            np.add.at(summed, expert[0], weight[0])
        np.testing.assert_allclose(Importance(0.2)(routing), 0.2 * (summed.std() / summed.mean()) ** 2, rtol=1e-5)
        probs = (softmax(logits) * VALID[..., None]).sum((0, 1))
        np.testing.assert_allclose(Importance(0.2, gates="probs")(routing), 0.2 * (probs.std() / probs.mean()) ** 2, rtol=1e-5)

    def test_closed_forms(self) -> None:
        """Equal gates cost nothing; one expert with all of them has CV^2 = e - 1."""
        rotating = np.arange(2 * E)[:, None] % E
        assert Importance()(by_hand(np.full((2 * E, E), 1 / E), rotating)) == 0
        all_to_one = by_hand(np.eye(E)[np.full(2 * E, 1)], np.full((2 * E, 1), 1))
        np.testing.assert_allclose(Importance(1.0)(all_to_one), E - 1, rtol=1e-5)


class TestZLoss:
    def test_it_is_numpys_and_ignores_padding(self, rng: np.random.Generator) -> None:
        logits = make_logits(rng)
        z = np.log(np.exp(np.asarray(logits, np.float64)).sum(-1)) ** 2
        np.testing.assert_allclose(ZLoss(0.5)(decide(logits, TopK())), 0.5 * z[VALID].mean(), rtol=1e-5)
        junk = jnp.where(VALID[..., None], logits, 1e3)
        np.testing.assert_allclose(ZLoss(0.5)(decide(junk, TopK())), ZLoss(0.5)(decide(logits, TopK())), rtol=1e-6)

    def test_zero_logits_cost_the_squared_log_of_the_number_of_experts(self) -> None:
        np.testing.assert_allclose(ZLoss(1.0)(decide(jnp.zeros((G, N, E)), TopK())), np.log(E) ** 2, rtol=1e-6)


@dataclasses.dataclass(frozen=True)
class ZeroOneLoss(Loss):
    """A user's own, registered nowhere."""

    def cost(self, routing: Routing) -> jax.Array:
        return masked_mean(routing.plan.assigned(), routing.valid, (0, 1)).max()


class TestOnesOwn:
    def test_a_layer_sows_it_weighted_under_its_own_name(self, rng: np.random.Generator) -> None:
        x = jnp.asarray(rng.normal(size=(1, N, 5)), jnp.float32)
        layer = MoE(Linear(E), TopK(), FFN(3, num_experts=E), losses=(ZeroOneLoss(0.5), ZLoss()), backend="reference")
        y, variables = layer.init_with_output(jax.random.key(0), x)
        _, sown = jax.jit(lambda v: layer.apply(v, x, mutable=["losses", "stats"]))({"params": variables["params"]})
        np.testing.assert_allclose(sown["losses"]["zero_one_loss"], 0.5 * sown["stats"]["load"].max(), rtol=1e-6)
        assert set(sown["losses"]) == {"zero_one_loss", "z_loss"}

    def test_names(self) -> None:
        """Registered losses are called as they always were."""
        assert {cls().name for _, cls in losses.items()} == {f"{kind}_loss" for kind in losses.kinds()}
        assert (ZLoss().name, TopAnyLoss().name, ZeroOneLoss().kind) == ("z_loss", "top_any_loss", "zero_one_loss")
        assert type("LogitSize", (Loss,), {})().name == "logit_size_loss"

    def test_what_is_no_loss_is_refused(self) -> None:
        for given, message in (
            ((TopK(),), r"losses\[0\]=TopK is registered as a kind of select, and what goes here is a kind of loss"),
            ((3,), r"losses=\(3,\) must be a tuple of items, each a Loss"),
            (Balance(), r"losses=Balance\(.*\) must be a tuple of items, each a Loss; write \(Balance\(.*\),\)"),
        ):
            with pytest.raises(ConfigError, match=message):
                MoE(Linear(E), TopK(), FFN(3, num_experts=E), losses=given)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Balance(count="second"), "count='second' is unknown; valid names: all, first"),
        (lambda: Balance(over="layer"), r"over='layer' is unknown; did you mean 'layers'\?"),
        (lambda: Importance(gates="logits"), "gates='logits' is unknown; valid names: probs, weights"),
    ],
)
def test_errors_name_the_value(make, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        make()
