"""The base of all rules: what a rule of ten lines gets for nothing, given experts, another k, and what is refused."""

import dataclasses
from typing import ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from numpy_routing import softmax

from moejax.core.context import Context
from moejax.core.errors import ConfigError
from moejax.layers.routed import plan_tokens
from moejax.parallel import Parallel, make_mesh, use
from moejax.routing import ExpertChoice, ExpertDropout, GShard, NullExperts, ReLU, SoftSlots, TopK, TopP
from moejax.routing.scores import best
from moejax.routing.select.base import CapacityLimited, Select, TokenChoice

G, N, E = 2, 9, 4
VALID = np.array([[True] * N, [True, False, True, True, False, True, False, True, False]])


@dataclasses.dataclass(frozen=True)
class GrowingK(TopK):
    """SMoE-Dropout: k grows from `start` to `k` over training, the same in all layers; outside training it is `k`."""

    start: int = 1
    steps: int = 100
    needs: ClassVar[tuple[str, ...]] = ("step",)

    def choose(self, logits, ctx, bias):
        expert, wanted = super().choose(logits, ctx, bias)
        k = self.start + jnp.round((self.k - self.start) * ctx.step / self.steps) if ctx.train else self.k
        return expert, wanted & (jnp.arange(self.k) < k)


@dataclasses.dataclass(frozen=True)
class VisibleExperts(TopK):
    """MaskMoE: a token chooses among the experts that its id may see: here, those whose number its id is no multiple of."""

    needs: ClassVar[tuple[str, ...]] = ("token_ids",)

    def reach(self, logits, ctx):
        return ctx.token_ids[..., None] % (jnp.arange(logits.shape[-1]) + 2) != 0


@dataclasses.dataclass(frozen=True)
class KOfLayer(TopK):
    """LExI: each layer has its own k."""

    ks: tuple[int, ...] = ()
    needs: ClassVar[tuple[str, ...]] = ("layer",)

    def choose(self, logits, ctx, bias):
        expert, wanted = super().choose(logits, ctx, bias)
        return expert, wanted & (jnp.arange(self.k) < jnp.asarray(self.ks)[ctx.layer])


def numpy_top(row: np.ndarray, k: int) -> np.ndarray:
    """Combine weights [e]: a softmax over the k largest logits."""
    chosen = np.argsort(-row, kind="stable")[:k]
    out = np.zeros(len(row))
    out[chosen] = softmax(row[chosen])
    return out


def draw(rng: np.random.Generator, o: int = E) -> np.ndarray:
    return rng.normal(size=(G, N, o)).astype(np.float32)


class Planner(nn.Module):
    """What a layer does with its router's logits."""

    rule: Select

    def __call__(self, logits: jax.Array, ctx: Context) -> jax.Array:
        return plan_tokens(self, logits, self.rule, E, ctx).plan.dense()


class TestTenLineRules:
    def test_a_k_that_follows_the_step(self, rng: np.random.Generator) -> None:
        x, rule = draw(rng), GrowingK(k=4, score="softmax_selected", start=2)
        run = jax.jit(lambda step, train: rule(jnp.asarray(x), Context(train=train, step=step)).dense(), static_argnums=1)
        for step, train, k in ((0, True, 2), (40, True, 3), (100, True, 4), (0, False, 4)):
            expected = np.apply_along_axis(numpy_top, -1, x, k)
            np.testing.assert_allclose(run(jnp.int32(step), train), expected, rtol=1e-5, atol=1e-7)

    def test_experts_that_follow_the_token_id(self, rng: np.random.Generator) -> None:
        x, ids = draw(rng), rng.integers(1, 30, (G, N))
        ids[0, 0] = 12  # which has fewer experts in reach than k
        rule = VisibleExperts(k=2, score="softmax_selected", capacity_factor=0.5)
        plan = rule(jnp.asarray(x), Context(token_ids=jnp.asarray(ids), valid=jnp.asarray(VALID)))
        hidden = ids[..., None] % (np.arange(E) + 2) == 0
        dense = np.apply_along_axis(numpy_top, -1, np.where(hidden, -1e9, x), 2) * VALID[..., None]
        wanted = np.asarray(plan.wanted())
        np.testing.assert_array_equal(wanted > 0, dense > 0)
        np.testing.assert_allclose(plan.dense(), dense * np.asarray(plan.assigned()), rtol=1e-5)
        assert plan.dropped.any()
        seen = rule.probabilities(rule.within_reach(jnp.asarray(x), Context(token_ids=jnp.asarray(ids))))
        np.testing.assert_allclose(seen, softmax(np.where(hidden, -1e9, x)), rtol=1e-5, atol=1e-9)
        assert rule.causal
        assert not rule.per_token

    def test_a_k_that_follows_the_layer(self, rng: np.random.Generator) -> None:
        x, rule = draw(rng), KOfLayer(k=3, normalise=True, ks=(3, 1, 2))
        run = jax.jit(jax.vmap(lambda layer: rule(jnp.asarray(x), Context(layer=layer)).dense()))
        for dense, k in zip(run(jnp.arange(3)), rule.ks, strict=True):
            np.testing.assert_allclose(dense, np.apply_along_axis(numpy_top, -1, x, k), rtol=1e-5, atol=1e-7)

    def test_what_a_rule_says_nothing_about(self, rng: np.random.Generator) -> None:
        """Weights are probabilities, padding gets nothing, null experts run nothing, and it may not be used in a decoder."""

        @dataclasses.dataclass(frozen=True)
        class Worst(TokenChoice):
            null_outputs: ClassVar[int] = 1

            def choose(self, logits, ctx, bias):
                expert = best(-logits, 2)
                return expert, jnp.ones(expert.shape, bool)

            def probabilities(self, logits):
                return jax.nn.softmax(logits, axis=-1)

        rule, x = Worst(), draw(rng, E + 1)
        plan = rule(jnp.asarray(np.where(VALID[..., None], x, np.nan)), Context(valid=jnp.asarray(VALID)))
        expected = np.zeros((G, N, E + 1))
        for g, t in np.argwhere(VALID):
            worst = np.argsort(x[g, t], kind="stable")[:2]
            expected[g, t, worst] = softmax(x[g, t])[worst]
        np.testing.assert_allclose(plan.dense(), expected[..., :E], rtol=1e-5)
        assert (expected[..., E] > 0).any()
        assert (rule.causal, rule.per_token, rule.needs, rule.outputs) == (False, False, (), (1, 1))
        assert (rule.num_outputs(E), rule.num_experts(E + 1), rule.mean_experts(E)) == (E + 1, E, E)

    def test_the_context_reaches_every_device_of_a_mesh(self, rng: np.random.Generator) -> None:
        """What a rule knows of its tokens is cut like they are; what it draws is drawn once for all."""
        x, ids = np.tile(draw(rng), (4, 1, 1)), rng.integers(1, 30, (4 * G, N))
        mesh = Parallel(make_mesh("data=4,expert=2"))
        rules = (
            VisibleExperts(k=2, capacity_factor=0.5),
            KOfLayer(k=3, ks=(3, 1, 2)),
            GrowingK(k=4, start=2),
            ExpertDropout(TopK(k=2), rate=0.4),
        )
        for rule in rules:

            def run(x: jax.Array, rule: Select = rule) -> jax.Array:
                ctx = Context(train=True, token_ids=jnp.asarray(ids), layer=jnp.int32(2), step=jnp.int32(50))
                ctx, rngs = ctx.replace(valid=jnp.ones(x.shape[:2], bool)), {"router": jax.random.key(7)}
                return Planner(rule).apply({}, x, ctx, rngs=rngs)

            alone = jax.jit(run)(jnp.asarray(x))
            with use(mesh):
                together = jax.jit(lambda x, run=run: run(x))(jnp.asarray(x))
            np.testing.assert_allclose(together, alone, rtol=1e-6, err_msg=type(rule).__name__)


class TestGivenExperts:
    def test_weights_and_capacity_are_the_rules(self, rng: np.random.Generator) -> None:
        x = jnp.asarray(draw(rng))
        expert = jnp.asarray(np.stack([[rng.permutation(E)[:2] for _ in range(N)] for _ in range(G)]))
        plan = TopK(k=2, normalise=True, capacity_factor=0.5).given(x, expert)
        chosen = np.take_along_axis(np.asarray(x), np.asarray(expert), -1)
        np.testing.assert_allclose(plan.weight, np.apply_along_axis(softmax, -1, chosen), rtol=1e-5)
        assert plan.dropped.any()
        np.testing.assert_array_equal(ReLU().given(x, expert).used, chosen > 0)
        first = np.take_along_axis(softmax(np.asarray(x)), np.asarray(expert), -1)[..., 0]
        np.testing.assert_array_equal(TopP(0.3).given(x, expert).used[..., 1], first < 0.3)
        null = NullExperts(k=2, num_null=1).given(
            jnp.pad(x, ((0, 0), (0, 0), (0, 1))), jnp.full((G, N, 2), E).at[..., 0].set(1)
        )
        np.testing.assert_array_equal(null.used, np.broadcast_to([True, False], (G, N, 2)))
        np.testing.assert_array_equal(null.weight[..., 0], 1)

    def test_another_k_is_the_rule_with_that_k(self, rng: np.random.Generator) -> None:
        for rule, o in (
            (TopK(k=2, normalise=True), E),
            (TopK(k=1, score="sigmoid", scale=2.0), E),
            (TopK(k=1, score="logit", skip=1, expert_groups=2, groups_kept=2), E),
            (NullExperts(k=2, num_null=3), E + 3),
        ):
            x, ctx = jnp.asarray(draw(rng, o)), Context(valid=jnp.asarray(VALID))
            forced = jax.jit(lambda k, rule=rule, x=x, ctx=ctx: rule.with_k(x, k, ctx).dense())
            for k in (1, 3):
                expected = dataclasses.replace(rule, k=k, **({"constant_gate": True} if isinstance(rule, TopK) else {}))
                np.testing.assert_allclose(forced(jnp.int32(k)), expected(x, ctx).dense(), rtol=1e-5, atol=1e-7)
        inner = TopK(k=1, score="sigmoid")
        x = jnp.asarray(draw(rng))
        np.testing.assert_array_equal(
            ExpertDropout(inner).with_k(x, jnp.int32(2)).dense(), dataclasses.replace(inner, k=2)(x).dense()
        )

    def test_rules_without_a_k_refuse_another_one(self) -> None:
        for rule in (ReLU(), GShard(), TopP()):
            with pytest.raises(ConfigError, match=f"take the k best of their experts, not on {type(rule).__name__}"):
                rule.with_k(jnp.zeros((1, 2, E)), jnp.int32(1))


class TestRefusals:
    @pytest.mark.parametrize(
        ("rule", "given", "message"),
        [
            (GrowingK(), {"train": True}, r"GrowingK lacks Context.step: .* a task gives it"),
            (VisibleExperts(), {}, r"VisibleExperts lacks Context.token_ids: .* models of tokens give them"),
            (KOfLayer(), {}, r"KOfLayer lacks Context.layer: .* a model's stack gives it"),
            (GShard(), {"train": True}, r"GShard lacks Context.key: .* a layer gives it a key of its rng stream 'router'"),
        ],
    )
    def test_a_context_that_lacks_what_the_rule_needs(self, rule: Select, given: dict, message: str) -> None:
        with pytest.raises(ConfigError, match=message):
            rule(jnp.zeros((1, 2, E)), Context(**given))

    def test_key_and_step_are_of_training(self) -> None:
        for rule in (GrowingK(), GShard()):
            assert rule(jnp.zeros((1, 2, E))).used.any()

    @pytest.mark.parametrize(
        ("rule", "outputs", "message"),
        [
            (SoftSlots(3), 4, "SoftSlots cannot read 4 logits a token: it needs 3 for each expert and 0 for null experts"),
            (NullExperts(), 8, "NullExperts cannot read 8 logits a token: it needs 1 for each expert and 8 for null experts"),
            (TopK(k=5), 4, "k=5 exceeds num_experts=4; lower k or add experts"),
            (TopP(max_experts=5), 4, "max_experts=5 exceeds num_experts=4; lower max_experts or add experts"),
        ],
    )
    def test_logits_that_do_not_fit(self, rule: Select, outputs: int, message: str) -> None:
        with pytest.raises(ConfigError, match=message):
            rule(jnp.zeros((1, 2, outputs)))

    def test_capacity_is_checked_for_whoever_has_one(self) -> None:
        @dataclasses.dataclass(frozen=True)
        class First(CapacityLimited):
            def choose(self, logits, ctx, bias):
                expert = jnp.zeros((*logits.shape[:2], 1), jnp.int32)
                return expert, jnp.ones(expert.shape, bool)

        with pytest.raises(ConfigError, match="capacity_factor=-1 must be a number above 0"):
            First(capacity_factor=-1)
        plan = First(capacity_factor=1.0)(jnp.zeros((1, 8, E)))
        np.testing.assert_array_equal(plan.used[0, :, 0], np.arange(8) < 2)
        assert First().causal
        assert First(capacity_factor=1.0, priority="choice").causal is False
        assert ExpertChoice().causal is False
