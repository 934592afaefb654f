"""The MoE layer against NumPy, and everything that is plugged into it or asked of it."""

import itertools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from numpy_layers import close, compiled, draw, glu, weighted_experts
from numpy_routing import admit, capacity, combine, expert_choice, service_order, top_k

from moejax import GLU, Balance, ConfigError, Context, ExpertChoice, Linear, MoE, SoftSlots, TopK, ZLoss
from moejax.dispatch import BACKENDS, backend_index, backend_name
from moejax.layers.registry import ffns
from moejax.routing import Random

B, S, D, E = 2, 6, 5, 4
TOP_2 = TopK(k=2)
VALID = np.array([[True, True, False, True, True, True], [True, True, True, True, False, False]])


def inputs(rng: np.random.Generator, dtype: str = "float32") -> jax.Array:
    return jnp.asarray(rng.normal(size=(B, S, D)), dtype)


def layer(select=TOP_2, **fields) -> MoE:
    return MoE(Linear(E), select, GLU(hidden=3, num_experts=E), **fields)


def numpy_plan(rule, logits: np.ndarray, valid: np.ndarray) -> np.ndarray:
    """The combine matrix of one group under a `TopK` with token priority, or an `ExpertChoice`."""
    n = len(logits)
    if isinstance(rule, ExpertChoice):
        dense = np.zeros((n, E))
        for e, tokens in enumerate(expert_choice(logits, valid, rule.capacity_factor)):
            for t, weight in tokens:
                dense[t, e] = weight
        return dense
    expert, weight = top_k(logits, rule.k, normalise=rule.normalise)
    used = np.repeat(valid[:, None], rule.k, 1)
    if rule.capacity_factor is not None:
        slots = capacity(int(valid.sum()), E, rule.k, rule.capacity_factor)
        used = admit(expert, used, service_order("token", logits.max(-1), rule.k), slots)
    return combine(expert, weight, used, E)


def numpy_layer(params, rule, x: np.ndarray, valid: np.ndarray, group_by: str) -> np.ndarray:
    x = np.asarray(x, np.float64)
    rows = {
        "sequence": lambda a: a,
        "batch": lambda a: a.reshape(1, B * S, *a.shape[2:]),
        "position": lambda a: a.swapaxes(0, 1),
    }
    groups, masks = rows[group_by](x), rows[group_by](valid)
    logits = groups @ np.asarray(params["router"]["w"], np.float64)
    y = np.stack(
        [weighted_experts(params["bank"], numpy_plan(rule, *a), b) for *a, b in zip(logits, masks, groups, strict=True)]
    )
    return y.swapaxes(0, 1) if group_by == "position" else y.reshape(B, S, D)


class TestOutput:
    @pytest.mark.parametrize(
        ("rule", "group_by"),
        [
            (TopK(k=2, normalise=True), "sequence"),
            (TopK(k=2, capacity_factor=0.7), "sequence"),
            (TopK(k=2, capacity_factor=0.7), "batch"),
            (ExpertChoice(1.5), "sequence"),
            (ExpertChoice(2.0), "position"),
        ],
        ids=["dropless", "capacity", "capacity_over_the_batch", "expert_choice", "expert_choice_at_one_position"],
    )
    def test_it_is_numpys(self, rng: np.random.Generator, rule, group_by: str) -> None:
        moe, x = layer(rule, group_by=group_by, backend="reference"), inputs(rng)
        variables = draw(moe, x)
        y = compiled(moe)(variables, x, Context(valid=jnp.asarray(VALID)))
        np.testing.assert_allclose(y, numpy_layer(variables["params"], rule, x, VALID, group_by), rtol=1e-4, atol=1e-5)

    def test_shared_experts_are_added_with_weight_one(self, rng: np.random.Generator) -> None:
        x = inputs(rng)
        moe = layer(backend="reference", shared=GLU(hidden=7, num_experts=2))
        params = draw(moe, x)["params"]
        y = compiled(moe)({"params": params}, x, Context(valid=jnp.asarray(VALID)))
        shared = sum(glu(params["shared"], e, np.asarray(x, np.float64)) for e in range(2))
        np.testing.assert_allclose(y, numpy_layer(params, TopK(k=2), x, VALID, "sequence") + shared, rtol=1e-4, atol=1e-5)

    def test_bfloat16_tokens_are_routed_in_float32(self, rng: np.random.Generator) -> None:
        moe, x = layer(backend="reference"), inputs(rng, "bfloat16")
        variables = draw(moe, x)
        y, state = compiled(moe, "routing", "losses")(variables, x, Context())
        routing = state["routing"]
        assert (y.dtype, routing["logits"].dtype, routing["plan"].weight.dtype) == (jnp.bfloat16, jnp.float32, jnp.float32)
        expert, _ = zip(
            *(top_k(g, 2) for g in np.asarray(x, np.float64) @ np.asarray(variables["params"]["router"]["w"], np.float64)),
            strict=True,
        )
        np.testing.assert_array_equal(routing["plan"].expert, expert)
        expected = numpy_layer(variables["params"], TopK(k=2), x, np.ones_like(VALID), "sequence")
        # Three products with 8 bits of mantissa.
        np.testing.assert_allclose(np.asarray(y, np.float32), expected, rtol=0.05, atol=0.05 * np.abs(expected).max())

    def test_training_and_evaluation_may_select_differently(self, rng: np.random.Generator) -> None:
        moe, x = layer(TopK(k=2), eval_select=TopK(k=1), backend="reference"), inputs(rng)
        variables = draw(moe, x)
        for train, rule in ((True, TopK(k=2)), (False, TopK(k=1))):
            y = compiled(moe)(variables, x, Context(train=train))
            expected = numpy_layer(variables["params"], rule, x, np.ones_like(VALID), "sequence")
            np.testing.assert_allclose(y, expected, rtol=1e-4, atol=1e-5)

    def test_top_1_passes_the_task_gradient_to_the_router_and_a_constant_gate_none(self, rng: np.random.Generator) -> None:
        x = inputs(rng)
        for rule, learns in ((TopK(k=1), True), (TopK(k=1, normalise=True, constant_gate=True), False)):
            moe = layer(rule, backend="reference")
            gradient = jax.jit(jax.grad(lambda v, moe=moe: jnp.square(moe.apply(v, x)).sum()))(draw(moe, x))["params"]
            assert (np.abs(gradient["router"]["w"]).max() > 1e-3) == learns
            assert np.abs(gradient["bank"]["w_out"]).max() > 1e-3


class TestBackends:
    @pytest.mark.parametrize("backend", ["einsum", "capacity", "grouped", "gather"])
    def test_every_backend_gives_the_same_and_says_that_it_ran(self, rng: np.random.Generator, backend: str) -> None:
        rule, x, ctx = TopK(k=2, capacity_factor=0.7), inputs(rng), Context(valid=jnp.asarray(VALID))
        variables = draw(layer(rule), x)
        expected, _ = compiled(layer(rule, backend="reference"), "stats")(variables, x, ctx)
        y, state = compiled(layer(rule, backend=backend), "stats")(variables, x, ctx)
        np.testing.assert_allclose(y, expected, rtol=1e-4, atol=1e-5)
        assert state["stats"]["backend"] == backend_index(backend) == list(BACKENDS).index(backend)

    @pytest.mark.parametrize(
        ("rule", "tokens", "backend"),
        [(TopK(k=2), S, "grouped"), (ExpertChoice(1.0), S, "capacity"), (SoftSlots(1), S, "einsum"), (TopK(k=1), 1, "gather")],
        ids=["token_choice", "expert_choice", "soft_slots", "one_token"],
    )
    def test_auto_says_what_ran(self, rng: np.random.Generator, rule, tokens: int, backend: str) -> None:
        moe, x = layer(rule), inputs(rng)[:1, :tokens]
        ran = jax.jit(lambda v: moe.apply(v, x, mutable=["stats"])[1]["stats"]["backend"])(draw(moe, x))
        assert backend_name(ran) == backend

    def test_a_named_backend_runs_or_raises(self, rng: np.random.Generator) -> None:
        x = inputs(rng)
        with pytest.raises(
            ConfigError, match="backend='grouped' cannot execute a SlotPlan plan; use one of: reference, einsum, auto"
        ):
            jax.eval_shape(layer(SoftSlots(1), backend="grouped").init, jax.random.key(0), x)
        with pytest.raises(ConfigError, match="backend='groupd' is unknown; did you mean 'grouped'"):
            jax.eval_shape(layer(backend="groupd").init, jax.random.key(0), x)


class TestInterventions:
    def test_a_logit_bias_is_added_to_the_logits(self, rng: np.random.Generator) -> None:
        moe, x = layer(TopK(k=1), backend="reference"), inputs(rng)
        variables = draw(moe, x)
        bias = jnp.array([0.0, 0.0, 100.0, 0.0])
        y, state = compiled(moe, "routing")({**variables, "interventions": {"logit_bias": bias}}, x)
        np.testing.assert_array_equal(state["routing"]["plan"].expert, 2)
        np.testing.assert_allclose(y, glu(variables["params"]["bank"], 2, np.asarray(x, np.float64)), rtol=1e-4, atol=1e-5)
        np.testing.assert_allclose(
            state["routing"]["logits"], x @ variables["params"]["router"]["w"] + bias, rtol=1e-4, atol=1e-5
        )

    @pytest.mark.parametrize("train", [False, True])
    def test_given_experts_are_run_with_the_routers_weights_for_them(self, rng: np.random.Generator, train: bool) -> None:
        """Weights are normalised over the given experts, and capacity is that of the mode."""
        rule = TopK(k=2, normalise=True, capacity_factor=0.6, eval_capacity_factor=None)
        moe, x = layer(rule, backend="reference"), inputs(rng)
        variables = draw(moe, x)
        expert = np.stack([np.stack([rng.permutation(E)[:2] for _ in range(S)]) for _ in range(B)])
        forced = {"expert": jnp.asarray(expert, jnp.int32)}
        y, state = compiled(moe, "routing")({**variables, "interventions": forced}, x, Context(train=train))
        logits = np.asarray(x, np.float64) @ np.asarray(variables["params"]["router"]["w"], np.float64)
        for b in range(B):
            scores = np.take_along_axis(np.exp(logits[b]), expert[b], 1)
            used = np.ones((S, 2), bool)
            if train:
                used = admit(expert[b], used, service_order("token", scores[:, 0], 2), capacity(S, E, 2, 0.6))
                assert not used.all()
            dense = combine(expert[b], scores / scores.sum(-1, keepdims=True), used, E)
            np.testing.assert_allclose(state["routing"]["plan"].dense()[b], dense, rtol=1e-4, atol=1e-6)
            expected = weighted_experts(variables["params"]["bank"], dense, np.asarray(x[b], np.float64))
            np.testing.assert_allclose(y[b], expected, rtol=1e-4, atol=1e-5)

    def test_experts_are_given_to_token_choice_only(self, rng: np.random.Generator) -> None:
        moe, x = layer(ExpertChoice()), inputs(rng)
        variables = {**draw(moe, x), "interventions": {"expert": jnp.zeros((B, S, 1), jnp.int32)}}
        with pytest.raises(ConfigError, match=r"interventions\.expert in .* needs token choice, not ExpertChoice"):
            jax.eval_shape(moe.apply, variables, x)

    def test_another_k_at_inference(self, rng: np.random.Generator) -> None:
        """As the layer with that k computes it, from a number that is data: what one scanned program takes for all its layers."""
        x, ctx = inputs(rng), Context(valid=jnp.asarray(VALID))
        moe = layer(TopK(k=2, normalise=True), backend="reference")
        variables = draw(moe, x)
        forced = compiled(moe, "stats")
        for k in (1, 3):
            other = layer(TopK(k=k, normalise=True, constant_gate=True), backend="reference")
            y, state = forced({**variables, "interventions": {"k": jnp.int32(k)}}, x, ctx)
            np.testing.assert_allclose(y, compiled(other)(variables, x, ctx), rtol=1e-5, atol=1e-6)
            assert state["stats"]["experts_per_token"] == k
        by_number = moe.apply({**variables, "interventions": {"k": 3}}, x, ctx)
        np.testing.assert_allclose(by_number, y, rtol=1e-5, atol=1e-6)

    def test_what_cannot_be_forced(self, rng: np.random.Generator) -> None:
        x, moe = inputs(rng), layer()
        variables = draw(moe, x)
        for forced, message in (
            ({"logits_bias": jnp.zeros(E)}, "unknown 'logits_bias' in the interventions of MoE; did you mean 'logit_bias'"),
            ({"k": jnp.int32(1), "expert": jnp.zeros((B, S, 1), jnp.int32)}, "give both expert and k"),
        ):
            with pytest.raises(ConfigError, match=message):
                jax.eval_shape(moe.apply, {**variables, "interventions": forced}, x)


class TestErrorsAndQuestions:
    def test_parts_that_do_not_fit(self, rng: np.random.Generator) -> None:
        with pytest.raises(ConfigError, match=r"router\.num_experts=8 but bank\.num_experts=4"):
            MoE(Linear(8), TopK(), GLU(hidden=3, num_experts=4))
        with pytest.raises(ConfigError, match="k=5 exceeds num_experts=4; lower k or add experts"):
            layer(TopK(k=5))
        with pytest.raises(
            ConfigError, match="select=Linear is registered as a kind of router, and what goes here is a kind of select"
        ):
            MoE(Linear(4), Linear(4), GLU(hidden=3, num_experts=4))
        with pytest.raises(ConfigError, match="group_by='sentence' is unknown; did you mean 'sequence'"):
            layer(group_by="sentence")
        x = inputs(rng)
        both = MoE(Linear(4), TopK(), GLU(hidden=3, num_experts=4), eval_select=SoftSlots(2))
        with pytest.raises(ConfigError, match="gives 4 logits a token, but SoftSlots needs 2 for each of the 4 experts; give"):
            jax.eval_shape(both.init, jax.random.key(0), x)

    def test_causality_is_asked_of_both_rules(self) -> None:
        layer(TopK(k=2, capacity_factor=1.0), eval_select=TopK(k=2)).check_causal("ffn")
        layer(ExpertChoice(), group_by="position").check_causal("ffn")
        for fields, rule in (
            (dict(select=ExpertChoice()), "select"),
            (dict(eval_select=TopK(k=2, capacity_factor=1.0, priority="choice")), "eval_select"),
        ):
            with pytest.raises(
                ConfigError,
                match=rf"model\.ffn\.{rule} \(.*\) selects over later tokens and leaks the future .*group_by='position'",
            ):
                layer(**fields).check_causal("model.ffn")

    def test_decodable_says_why_not(self) -> None:
        assert layer().decodable() is None
        assert layer(TopK(capacity_factor=1.0), eval_select=TopK()).decodable() is None
        assert layer(TopK(capacity_factor=1.0, eval_capacity_factor=None)).decodable() is None
        assert (
            "TopK plans several tokens together at inference; set eval_select" in layer(TopK(capacity_factor=1.0)).decodable()
        )
        assert "ExpertChoice plans several tokens together" in layer(eval_select=ExpertChoice()).decodable()

    def test_groups_of_one_position_hide_the_future_from_expert_choice(self, rng: np.random.Generator) -> None:
        x = inputs(rng)
        changed = x.at[:, 3:].set(inputs(rng)[:, 3:])
        for group_by, leaks in (("position", False), ("sequence", True)):
            moe = layer(ExpertChoice(1.5), group_by=group_by, backend="reference")
            variables = draw(moe, x)
            before, after = (compiled(moe)(variables, value) for value in (x, changed))
            assert np.array_equal(before[:, :3], after[:, :3]) == (not leaks)

    def test_active_fraction(self) -> None:
        assert layer(TopK(k=2)).active_fraction() == 0.5
        assert layer(ExpertChoice(1.0)).active_fraction() == 0.25
        assert layer(ExpertChoice(9.0)).active_fraction() == 1.0


SPEC = dict(
    kind="moe", num_experts=E, router=dict(kind="linear"), select=dict(kind="top_k", k=2), bank=dict(kind="glu", hidden=3)
)


class TestConfig:
    def test_a_config_makes_the_same_layer(self) -> None:
        built = ffns.build({**SPEC, "losses": dict(balance=dict(coef=0.1), z=dict(coef=0.2))}, where="ffn")
        assert built == layer(losses=(Balance(0.1), ZLoss(0.2)), num_experts=E)

    def test_rules_of_both_modes_and_shared_experts_come_from_the_config(self) -> None:
        shared, eval_select = dict(kind="glu", hidden=3), dict(kind="top_k", k=1)
        built = ffns.build({**SPEC, "shared": shared, "eval_select": eval_select}, where="ffn")
        assert built.eval_select == TopK(k=1)
        assert built.shared.num_experts == 1  # not as many as the routed ones beside it
        two = ffns.build({**SPEC, "shared": dict(shared, num_experts=2)}, where="ffn")
        assert two.shared.num_experts == 2
        assert built.bank.num_experts == two.bank.num_experts == E

    def test_errors_name_the_place(self) -> None:
        with pytest.raises(
            ConfigError, match=r"unknown loss kind 'balanse' in ffn\.losses\.balanse\.kind; did you mean 'balance'"
        ):
            ffns.build({**SPEC, "losses": dict(balanse=dict(coef=1.0))}, where="ffn")


def test_a_users_own_model_in_five_lines(rng: np.random.Generator) -> None:
    class Classifier(nn.Module):
        @nn.compact
        def __call__(self, x: jax.Array) -> jax.Array:
            x = x + layer(losses=(Balance(0.01), ZLoss(1e-3)))(nn.LayerNorm()(x))
            return nn.Dense(3)(x.mean(1))

    model, x, labels = Classifier(), inputs(rng), jnp.array([0, 2])
    variables = draw(model, x)

    @jax.jit
    def step(params):
        def objective(params):
            logits, sown = model.apply({"params": params}, x, mutable=["losses", "stats"])
            task = optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()
            return task + sum(jax.tree.leaves(sown["losses"])), sown

        (loss, sown), grads = jax.value_and_grad(objective, has_aux=True)(params)
        return jax.tree.map(lambda p, g: p - 0.1 * g, params, grads), loss, sown

    params, history = variables["params"], []
    for _ in range(5):
        params, loss, sown = step(params)
        history.append(float(loss))
    assert all(b < a for a, b in itertools.pairwise(history))
    (path,) = sown["losses"]
    assert set(sown["losses"][path]) == {"balance_loss", "z_loss"}
    np.testing.assert_allclose(sown["stats"][path]["load"].sum(), 1, rtol=1e-6)


def test_randomness_comes_from_the_router_stream(rng: np.random.Generator) -> None:
    x = inputs(rng)
    moe = MoE(Random(E), TopK(k=1), GLU(hidden=3, num_experts=E), backend="reference")
    variables = draw(moe, x)

    def run(seed: int, train: bool) -> jax.Array:
        return compiled(moe)(variables, x, Context(train=train), rngs={"router": jax.random.key(seed)})

    assert (run(0, True) != run(1, True)).any()
    close([run(0, True), run(0, False)], [run(0, True), run(1, False)], 0, 0)
