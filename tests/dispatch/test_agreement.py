"""The heart of the suite: every backend x every plan it accepts, made by hand, in value and gradient, against the oracle.

The oracle itself (`reference`) is compared with a NumPy loop over tokens and experts.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moejax.core.context import Context
from moejax.core.errors import ConfigError
from moejax.dispatch import ACCEPTS, BACKENDS, Experts, choose, dispatch, execute
from moejax.experts import FFN, GLU, Bank, Constant, Copy, LowRank, Mixed, Null
from moejax.parallel import Parallel, make_mesh, use
from moejax.routing import ExpertChoice, ExpertPlan, MergePlan, Plan, SoftSlots, TokenPlan, TopK

G, N, D, E = 2, 11, 6, 5


def norm(x: jax.Array) -> jax.Array:
    """A layer norm without parameters; its eps keeps rows of zeros, which are nobody's, finite."""
    return jax.nn.standardize(x, epsilon=0.1)


class Wrapped(Bank):
    """A user's bank: functions of rows around another bank's experts. Pieces of `tanh(a + b)` cannot be added up."""

    bank: FFN
    num_experts: int = E

    def __call__(self, width: int, ctx: Context | None = None) -> Experts:
        return self.bank(width, ctx).wrap(before=norm, after=jnp.tanh)


BANKS = {
    "ffn": FFN(hidden=7, num_experts=E, use_bias=True),
    "glu": GLU(hidden=7, num_experts=E),
    "low_rank": LowRank(rank=3, features=4, num_experts=E, scale=0.5),
    "wrapped": Wrapped(FFN(hidden=7, num_experts=E, use_bias=True)),
    "mixed": Mixed((FFN(hidden=7, use_bias=True), Null(), GLU(hidden=3), Copy(), Constant())),
}


def logits(seed: int, n: int = N, e: int = E) -> jax.Array:
    return 2 * jax.random.normal(jax.random.key(seed), (G, n, e))


def ragged(plan: TokenPlan, seed: int) -> TokenPlan:
    """Random choices switched off, and signed weights: thresholds, null experts and zero-initialised gates look like this."""
    a, b = jax.random.split(jax.random.key(seed))
    used = plan.used & jax.random.bernoulli(a, 0.6, plan.used.shape)
    return plan.replace(used=used, weight=jax.random.normal(b, plan.weight.shape))


def one_expert_takes_all() -> TokenPlan:
    return TopK(k=2)(logits(3).at[..., 2].add(50.0))


VALID = jnp.arange(N)[None] < jnp.array([N, 7])[:, None]

PLANS: dict[str, Callable[[], Plan]] = {
    "top2_plain": lambda: TopK(k=2)(logits(0)),
    "top2": lambda: TopK(k=2, normalise=True)(logits(1), Context(valid=VALID)),
    "top2_capacity": lambda: TopK(k=2, capacity_factor=0.7, priority="score")(logits(2), Context(valid=VALID)),
    "ragged": lambda: ragged(TopK(k=2)(logits(4)), 5),
    "one_expert_takes_all": one_expert_takes_all,
    "nobody": lambda: ragged(TopK(k=2)(logits(6), Context(valid=jnp.zeros((G, N), bool))), 7),
    "all_experts": lambda: TopK(k=E)(logits(8)),
    "expert_choice": lambda: ExpertChoice(capacity_factor=1.5)(logits(9), Context(valid=VALID)),
    "soft_slots": lambda: SoftSlots(slots=2)(logits(10, e=2 * E), Context(valid=VALID)),
    "merge": lambda: MergePlan(jax.nn.softmax(logits(11)[:, 0])),
}


@functools.cache
def plan_of(name: str) -> Plan:
    return jax.jit(PLANS[name])()


@functools.cache
def top_k(**fields: Any) -> Callable[..., TokenPlan]:
    """A rule, compiled as a whole."""
    return jax.jit(TopK(**fields))


# The same of a dispatch.
dispatched = jax.jit(dispatch, static_argnames="backend")


def accepted() -> list[tuple[str, str]]:
    return [(b, p) for p in PLANS for b, kinds in ACCEPTS.items() if isinstance(plan_of(p), kinds) and b != "reference"]


def cases() -> list[tuple[str, str, str]]:
    """Every backend and plan, with one bank, with one that is wrapped, and with experts of several kinds.

    The library's other banks and rules are the battery's affair; other banks on a mesh are in tests/parallel/test_exchange.py.
    """
    banks = [bank for bank in BANKS if bank in ("ffn", "wrapped", "mixed")]
    found = [(b, p, bank) for bank in banks for b, p in accepted() if bank != "mixed" or b != "expert_parallel"]
    return [(b, p, bank) for b, p, bank in found if bank != "mixed" or p != "merge"]


def weights_of(plan: Plan) -> dict[str, jax.Array]:
    """The plan's differentiable leaves."""
    names = {f.name for f in dataclasses.fields(plan)} & {"weight", "dispatch", "combine"}
    return {name: getattr(plan, name) for name in sorted(names)}


@functools.cache
def compiled(backend: str, bank_name: str) -> Callable[..., tuple]:
    """Output and gradients of a random projection of it, in parameters, tokens and plan weights.

    One function for all plans of equal structure, so that they share one compilation.
    """

    def run(params: dict, x: jax.Array, weights: dict, plan: Plan) -> tuple[jax.Array, jax.Array]:
        bank = BANKS[bank_name]
        y = dispatch(plan.replace(**weights), bank.apply(params, D), x, backend)
        return (y * jnp.cos(jnp.arange(y.size)).reshape(y.shape)).sum(), y

    # Nothing divides here: 5 experts on 4 shards, 2 groups of 11 tokens on 8 devices.
    parallel = Parallel(make_mesh("data=2,expert=4")) if backend == "expert_parallel" else None
    step = jax.jit(jax.value_and_grad(run, argnums=(0, 1, 2), has_aux=True))

    def traced(*args: Any) -> tuple:
        with use(parallel):
            return step(*args)

    return traced


def value_and_gradients(backend: str, plan: Plan, bank_name: str, params: dict, x: jax.Array) -> tuple:
    (_, y), grads = compiled(backend, bank_name)(params, x, weights_of(plan), plan)
    return y, *grads


@functools.cache
def setup(bank_name: str, n: int = N) -> tuple:
    bank = BANKS[bank_name]
    x = jax.random.normal(jax.random.key(20), (G, n, D))
    params = jax.jit(lambda key: bank.init(key, D))(jax.random.key(21))
    leaves, tree = jax.tree.flatten(params)
    # Every parameter non-zero, biases and a zero B included, so that none can be ignored unnoticed.
    leaves = [jax.random.normal(jax.random.key(30 + i), a.shape) * 0.5 for i, a in enumerate(leaves)]
    return bank, jax.tree.unflatten(tree, leaves), x


@pytest.mark.parametrize(("backend", "plan_name", "bank_name"), cases())
def test_backend_agrees_with_reference_in_value_and_gradient(backend: str, plan_name: str, bank_name: str) -> None:
    _, params, x = setup(bank_name)
    plan = plan_of(plan_name)
    expected = value_and_gradients("reference", plan, bank_name, params, x)
    actual = value_and_gradients(backend, plan, bank_name, params, x)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-4, atol=2e-5), actual, expected)


def numpy_expert(bank_name: str, params: dict, e: int, x: np.ndarray) -> np.ndarray:
    """One expert on one token, from its parameters, in NumPy."""
    if bank_name == "wrapped":
        x = (x - x.mean()) / np.sqrt(x.var() + 0.1)
        return np.tanh(numpy_expert("ffn", {"params": params["params"]["bank"]}, e, x))
    if bank_name == "mixed":
        part = {"params": params["params"].get(f"parts_{e}")}
        if e == 4:
            return np.asarray(part["params"]["v"][0])
        return np.zeros_like(x) if e == 1 else x if e == 3 else numpy_expert("ffn" if e == 0 else "glu", part, 0, x)
    p = {k: np.asarray(v[e], np.float64) for k, v in params["params"].items()}
    if bank_name == "low_rank":
        return 0.5 * (x @ p["a"] @ p["b"])
    if bank_name == "glu":
        gate = x @ p["w_gate"]
        return (gate / (1 + np.exp(-gate)) * (x @ p["w_up"])) @ p["w_out"]
    h = x @ p["w_in"] + p["b_in"]
    gelu = 0.5 * h * (1 + np.tanh(np.sqrt(2 / np.pi) * (h + 0.044715 * h**3)))
    return gelu @ p["w_out"] + p["b_out"]


def numpy_dispatch(plan: Plan, bank_name: str, params: dict, x: np.ndarray) -> np.ndarray:
    """The definition of each plan type, one token and one expert at a time."""
    g, n, _ = x.shape
    out = numpy_expert(bank_name, params, 0, x[0, 0]).shape[0]
    y = np.zeros((g, n, out))
    if isinstance(plan, TokenPlan):
        for i, t, j in np.ndindex(*plan.expert.shape):
            if plan.used[i, t, j]:
                y[i, t] += float(plan.weight[i, t, j]) * numpy_expert(bank_name, params, int(plan.expert[i, t, j]), x[i, t])
    elif isinstance(plan, ExpertPlan):
        for i, e, c in np.ndindex(*plan.token.shape):
            if plan.used[i, e, c]:
                t = int(plan.token[i, e, c])
                y[i, t] += float(plan.weight[i, e, c]) * numpy_expert(bank_name, params, e, x[i, t])
    elif isinstance(plan, MergePlan):
        for i in range(g):
            mean = jax.tree.map(lambda v, i=i: np.tensordot(np.asarray(plan.weight[i]), np.asarray(v), 1)[None], params)
            for t in range(n):
                y[i, t] = numpy_expert(bank_name, mean, 0, x[i, t])
    else:
        dispatch_, combine = np.asarray(plan.dispatch), np.asarray(plan.combine)
        for i, e, s in np.ndindex(g, plan.num_experts, dispatch_.shape[-1]):
            out_slot = numpy_expert(bank_name, params, e, dispatch_[i, :, e, s] @ x[i])
            y[i] += combine[i, :, e, s][:, None] * out_slot
    return y


@pytest.mark.parametrize("bank_name", BANKS)
@pytest.mark.parametrize("plan_name", ["top2_capacity", "ragged", "expert_choice", "soft_slots", "merge"])
def test_reference_is_the_definition(plan_name: str, bank_name: str) -> None:
    bank, params, x = setup(bank_name)
    plan = plan_of(plan_name)
    if (plan_name, bank_name) == ("merge", "mixed"):
        with pytest.raises(ConfigError, match="experts of several kinds have no common parameters to merge"):
            dispatch(plan, bank.apply(params, D), x)
        return
    actual, *_ = value_and_gradients("reference", plan, bank_name, params, x)
    expected = numpy_dispatch(plan, bank_name, params, np.asarray(x, np.float64))
    np.testing.assert_allclose(actual, expected, rtol=1e-4, atol=1e-5)


@settings(max_examples=6, deadline=None, derandomize=True)
@given(
    n=st.sampled_from([1, 13, 17]), k=st.sampled_from([1, 3]), used=st.floats(0, 1), skew=st.floats(0, 30), seed=st.integers(0, 2**16),
    backend=st.sampled_from(["einsum", "capacity", "grouped", "gather"]),
)  # fmt: skip
@pytest.mark.slow
def test_any_shape_agrees(n: int, k: int, used: float, skew: float, seed: int, backend: str) -> None:
    """Numbers of tokens divisible by nothing, ragged and empty experts, under every degree of skew."""
    _, params, x = setup("ffn", n)
    plan = top_k(k=k)(logits(seed, n).at[..., 0].add(skew))
    plan = plan.replace(used=jax.random.bernoulli(jax.random.key(seed), used, plan.used.shape))
    expected = value_and_gradients("reference", plan, "ffn", params, x)
    actual = value_and_gradients(backend, plan, "ffn", params, x)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-4, atol=5e-5), actual, expected)


@pytest.mark.parametrize("backend", ["einsum", "capacity", "grouped", "gather"])
def test_bfloat16_rows_on_float32_parameters(backend: str) -> None:
    bank, params, x = setup("ffn")
    plan = plan_of("top2")
    y = dispatched(plan, bank.apply(params, D), x.astype(jnp.bfloat16), backend)
    expected, *_ = value_and_gradients("reference", plan, "ffn", params, x)
    assert y.dtype == jnp.bfloat16
    np.testing.assert_allclose(y.astype(np.float32), expected, rtol=0.05, atol=0.15)


def test_choices_of_auto_are_all_in_the_agreement_test() -> None:
    tested = {b for b, _ in accepted()}
    sizes = [(1, 1, 1, 2), (1, 8, 2, 64), (4, 64, 2, 8), (1, 4096, 2, 32), (8, 512, 8, 256)]
    for platform in ("cpu", "gpu", "tpu"):
        chosen = {choose(plan_of(p), width, platform) for p in PLANS for width in (8, 4096)}
        for g, n, k, e in sizes:
            zeros = jnp.zeros((g, n, k), jnp.int32)
            plan = TokenPlan(zeros, zeros.astype(jnp.float32), zeros > 0, zeros > 0, num_experts=e)
            chosen |= {choose(p, width, platform) for p in (plan, plan.replace(capacity=n)) for width in (8, 4096)}
        assert chosen <= tested


@pytest.mark.parametrize("backend", sorted(set(BACKENDS) - {"reference"}))
def test_named_backend_runs_or_raises(backend: str) -> None:
    bank, params, x = setup("ffn")
    for name in PLANS:
        plan = plan_of(name)
        if isinstance(plan, ACCEPTS[backend]):
            continue
        with pytest.raises(ConfigError, match=rf"backend='{backend}' cannot execute a {type(plan).__name__} plan; use one of"):
            dispatch(plan, bank.apply(params, D), x, backend)


def test_unknown_backend_names_the_nearest() -> None:
    bank, params, x = setup("ffn")
    with pytest.raises(ConfigError, match="backend='groupd' is unknown; did you mean 'grouped'"):
        dispatch(plan_of("top2"), bank.apply(params, D), x, "groupd")


def test_what_are_no_experts_or_not_as_many_is_refused() -> None:
    bank, params, x = setup("ffn")
    with pytest.raises(ConfigError, match=r"must be moejax.Experts, and this is a FFN; call the bank first: experts = bank\("):
        dispatch(plan_of("top2"), bank, x)
    with pytest.raises(ConfigError, match="the plan has num_experts=5, but there are 3 experts"):
        dispatch(plan_of("top2"), bank.apply(params, D)[:3], x)
    narrow = Mixed((FFN(hidden=3, num_experts=2), LowRank(rank=2, features=4, num_experts=3)))
    experts = narrow.apply(jax.jit(lambda key: narrow.init(key, D))(jax.random.key(0)), D)
    with pytest.raises(ConfigError, match="experts of one layer give outputs of widths 4, 6; give all banks one width"):
        dispatch(plan_of("top2"), experts, x)


class TestExperts:
    """The value itself."""

    def test_some_of_them_are_experts_too(self) -> None:
        bank, params, x = setup("ffn")
        experts = bank.apply(params, D)
        plan = top_k(k=2)(logits(0, e=3))
        for index, taken in (
            (slice(1, 4), [1, 2, 3]),
            ([4, 0, 4], [4, 0, 4]),
            (jnp.array([2, 2, 1]), [2, 2, 1]),
            (np.arange(E) > 1, [2, 3, 4]),
        ):
            some = experts[index]
            assert some.num_experts == 3
            expected = numpy_dispatch(plan, "ffn", jax.tree.map(lambda p, t=taken: p[np.array(t)], params), np.float64(x))
            np.testing.assert_allclose(dispatched(plan, some, x, "capacity"), expected, rtol=1e-4, atol=1e-5)
        assert experts[3].num_experts == 1
        np.testing.assert_array_equal(experts[3].params["w_in"], experts.params["w_in"][3:4])

    def test_other_parameters_tell_anew_how_many_they_are(self) -> None:
        bank, params, _ = setup("ffn")
        experts = bank.apply(params, D)
        assert experts.replace(params=jax.tree.map(lambda p: p[:2], experts.params)).num_experts == 2
        assert experts.replace(summed=None).num_experts == E
        with pytest.raises(ConfigError, match="give Experts its num_experts"):
            Experts(lambda p, x, layout: x, {})

    def test_it_is_a_tree_of_its_parameters(self) -> None:
        bank, params, _ = setup("ffn")
        experts = bank.apply(params, D)
        half = jax.tree.map(lambda p: p.astype(jnp.bfloat16), experts)
        assert half.axes == experts.axes == {**experts.axes}
        assert half.params["w_in"].dtype == jnp.bfloat16
        assert hash(jax.tree.structure(experts)) == hash(jax.tree.structure(half))
        leaves, tree = jax.tree.flatten(experts)
        assert len(leaves) == len(jax.tree.leaves(params))
        assert jax.tree.unflatten(tree, leaves).axes == experts.axes

    def test_what_comes_after_an_expert_ends_its_sum(self) -> None:
        experts = setup("ffn")[0].apply(setup("ffn")[1], D)
        assert experts.summed == experts.wrap(before=norm).summed == "mlp"
        assert experts.wrap(after=jnp.tanh).summed is None


class TestLight:
    """Copy, constant and null experts are not worth a journey."""

    @pytest.mark.parametrize(
        "bank", [Copy(num_experts=E), Constant(num_experts=E), Null(num_experts=E)], ids=["copy", "constant", "null"]
    )
    def test_tokens_stay_where_they_are(self, bank: Bank) -> None:
        plan, x = plan_of("ragged"), setup("ffn")[2]
        experts = bank.apply({"params": {"v": jax.random.normal(jax.random.key(5), (E, D))}}, D)
        assert execute(plan, experts, x)[2] == "gather"
        text = jax.jit(lambda plan, x: dispatch(plan, experts, x)).lower(plan, x).as_text()
        assert "stablehlo.sort" not in text
        assert "stablehlo.scatter" not in text
        named = jax.jit(lambda plan, x: dispatch(plan, experts, x, "grouped"))(plan, x)
        np.testing.assert_allclose(dispatch(plan, experts, x), named, rtol=1e-5, atol=1e-6)
        dense = np.asarray(plan.dense())
        expected = {Copy: dense.sum(-1, keepdims=True) * x, Null: 0 * x}.get(
            type(bank), dense @ experts.params.get("v", np.zeros((E, D)))
        )
        np.testing.assert_allclose(named, expected, rtol=1e-4, atol=1e-5)

    def test_a_choice_costs_what_its_own_expert_costs(self) -> None:
        """Compiled FLOPs of slots: half of the experts are null, and so is half of the cost."""
        wide = FFN(hidden=64, num_experts=4)
        half = Mixed((FFN(hidden=64, num_experts=2), Null(num_experts=2)))
        plan, x = top_k(k=1, capacity_factor=1.0)(logits(2, n=64, e=4)), jnp.ones((G, 64, D))

        def flops(bank: Bank) -> float:
            params = jax.eval_shape(lambda key: bank.init(key, D), jax.random.key(0))
            step = jax.jit(lambda params, x: dispatch(plan, bank.apply(params, D), x, "capacity"))
            return step.lower(params, x).compile().cost_analysis()["flops"]

        assert 0.45 < flops(half) / flops(wide) < 0.6


def test_cost_follows_the_routed_rows_not_the_number_of_experts() -> None:
    """FLOPs in the compiled program: a masked dense product (ragged_dot on CPU) would multiply them by the number of experts."""
    e, n, d, f = 32, 256, 16, 32
    plan = top_k(k=1)(jax.random.normal(jax.random.key(0), (1, n, e)))
    w = jnp.ones((e, d, f))
    x = jnp.ones((1, n, d))

    def dots(backend: str) -> float:
        compiled = (
            jax.jit(lambda x, w: dispatch(plan, Experts(lambda p, r, layout: layout.dot(r, p), w), x, backend))
            .lower(x, w)
            .compile()
        )
        return compiled.cost_analysis()["flops"]

    assert dots("reference") >= 2 * n * d * f * e
    # XLA counts a loop's body once, so the grouped path shows one tile; what matters is that no dense product is there.
    assert dots("grouped") < 0.5 * 2 * n * d * f * e
