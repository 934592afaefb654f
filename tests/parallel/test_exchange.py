"""Expert parallelism against the oracle: every exchange, mesh, plan and bank, in value and gradient, on eight devices."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moejax.core.context import Context
from moejax.core.errors import ConfigError
from moejax.dispatch import Experts, choose, dispatch, execute, limit
from moejax.dispatch.expert_parallel import count_hosts, exchanges
from moejax.experts import FFN, GLU, Bank, Constant, Copy, LowRank, Mixed, Null
from moejax.parallel import Exchange, Parallel, make_mesh, use
from moejax.routing import ExpertChoice, MergePlan, Plan, SoftSlots, TokenPlan, TopK

G, N, D, E = 8, 6, 4, 8
MESHES = ("expert=8", "data=2,expert=4", "fsdp=2,expert=2,tensor=2", "data=8")


class Wrapped(Bank):
    """Functions of rows around another bank's experts: pieces of `tanh(a + b)`, as devices along `tensor` have them, cannot be added up."""

    bank: FFN
    num_experts: int = E

    def __call__(self, width: int, ctx: Context | None = None) -> Experts:
        return self.bank(width, ctx).wrap(before=lambda x: jax.nn.standardize(x, epsilon=0.1), after=jnp.tanh)


BANKS = {
    "ffn": FFN(hidden=6, num_experts=E, use_bias=True),
    "glu": GLU(hidden=6, num_experts=E),
    "low_rank": LowRank(rank=2, features=5, num_experts=E, scale=0.5),
    "wrapped": Wrapped(FFN(hidden=6, num_experts=E, use_bias=True)),
    "mixed": Mixed((FFN(hidden=6, num_experts=3, use_bias=True), GLU(hidden=4, num_experts=2), Null(), Copy(), Constant())),
}


def logits(seed: int, g: int = G, n: int = N) -> jax.Array:
    return 2 * jax.random.normal(jax.random.key(seed), (g, n, E))


def ragged(plan: TokenPlan, seed: int) -> TokenPlan:
    """Random choices switched off, and signed weights."""
    a, b = jax.random.split(jax.random.key(seed))
    used = plan.used & jax.random.bernoulli(a, 0.5, plan.used.shape)
    return plan.replace(used=used, weight=jax.random.normal(b, plan.weight.shape))


VALID = jnp.arange(N)[None] < jnp.array([N, 3, 0, 5, N, 1, N, 2])[:, None]

# Plans of equal structure share a compiled program.
ROUTINGS: dict[str, Callable[[], TokenPlan]] = {
    "uneven": lambda: TopK(k=2)(logits(0) + 2 * jnp.arange(E) / E),
    "empty_experts": lambda: TopK(k=2)(logits(1).at[..., jnp.array([0, 3, 4, 7])].add(-50.0)),
    "one_expert_takes_all": lambda: TopK(k=2)(logits(2).at[..., 5].add(50.0)),
    "one_shard_takes_all": lambda: TopK(k=2)(logits(3).at[..., 6:].add(50.0)),
    "invalid_tokens": lambda: TopK(k=2, normalise=True)(logits(4), Context(valid=VALID)),
    "ragged": lambda: ragged(TopK(k=2)(logits(5)), 6),
    "nobody": lambda: ragged(TopK(k=2)(logits(6), Context(valid=jnp.zeros((G, N), bool))), 7),
}
OTHERS: dict[str, Callable[[], Plan]] = {
    "capacity": lambda: TopK(k=2, capacity_factor=1.0)(logits(8), Context(valid=VALID)),
    "expert_choice": lambda: ExpertChoice(capacity_factor=1.5)(logits(9), Context(valid=VALID)),
    "expert_choice_over_all": lambda: ExpertChoice(capacity_factor=1.0)(logits(10, 1, G * N)),
    "soft_slots": lambda: SoftSlots(slots=3)(jax.random.normal(jax.random.key(11), (G, N, 3 * E)), Context(valid=VALID)),
    "merge": lambda: MergePlan(jax.nn.softmax(logits(12)[:, 0])),
    "merge_for_few_groups": lambda: MergePlan(jax.nn.softmax(logits(13, 1)[:, 0])),
}


@functools.cache
def params_of(bank: str) -> Any:
    shapes = jax.eval_shape(lambda key: BANKS[bank].init(key, D), jax.random.key(0))
    leaves, tree = jax.tree.flatten(shapes)
    # No zeros, biases and a zero B included, so that none can be ignored unnoticed.
    return tree.unflatten([jax.random.normal(jax.random.key(30 + i), a.shape) / 2 for i, a in enumerate(leaves)])


def weights_of(plan: Plan) -> dict[str, jax.Array]:
    """The plan's differentiable leaves."""
    return {name: getattr(plan, name) for name in ("weight", "dispatch", "combine") if hasattr(plan, name)}


@functools.cache
def compiled(mesh: str | None, exchange: Exchange, bank: str) -> Callable[..., tuple]:
    """Output, and gradients of a random projection of it in parameters, tokens and plan weights."""

    def run(params: Any, x: jax.Array, weights: Any, plan: Plan) -> tuple[jax.Array, jax.Array]:
        backend = "reference" if mesh is None else "expert_parallel"
        y = dispatch(plan.replace(**weights), BANKS[bank].apply(params, D), x, backend)
        return (y * jnp.cos(jnp.arange(y.size)).reshape(y.shape)).sum(), y

    step = jax.jit(jax.value_and_grad(run, argnums=(0, 1, 2), has_aux=True))
    parallel = None if mesh is None else Parallel(make_mesh(mesh), exchange)

    def traced(*args: Any) -> tuple:
        with use(parallel):
            (_, y), gradients = step(*args)
        return y, gradients

    return traced


def check(plan: Plan, mesh: str, exchange: Exchange, bank: str = "ffn") -> None:
    g = jax.tree.leaves(plan)[0].shape[0]
    n = plan.expert.shape[1] if isinstance(plan, TokenPlan) else getattr(plan, "num_tokens", N)
    args = params_of(bank), jax.random.normal(jax.random.key(20), (g, n, D)), weights_of(plan), plan
    expected, actual = compiled(None, Exchange(), bank)(*args), compiled(mesh, exchange, bank)(*args)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-4, atol=2e-5), actual, expected)


class TestTokens:
    @pytest.mark.parametrize("routing", ROUTINGS)
    @pytest.mark.parametrize("mesh", MESHES)
    def test_padded_rows_on_every_mesh(self, mesh: str, routing: str) -> None:
        check(ROUTINGS[routing](), mesh, Exchange("padded"))

    @pytest.mark.parametrize("routing", ROUTINGS)
    def test_a_bank_without_pieces_along_tensor(self, routing: str) -> None:
        check(ROUTINGS[routing](), "fsdp=2,expert=2,tensor=2", Exchange("padded"), "low_rank")

    @pytest.mark.parametrize("routing", ["uneven", "ragged"])
    @pytest.mark.parametrize("bank", ["wrapped", "mixed"])
    @pytest.mark.parametrize("mesh", MESHES)
    def test_experts_that_are_wrapped_or_of_several_kinds(self, mesh: str, bank: str, routing: str) -> None:
        check(ROUTINGS[routing](), mesh, Exchange("padded"), bank)

    def test_experts_of_several_kinds_under_auto(self) -> None:
        """Light ones stay where their tokens are, under automatic sharding, beside others that are exchanged for."""
        plan, x, bank = ROUTINGS["ragged"](), jax.random.normal(jax.random.key(20), (G, N, D)), BANKS["mixed"]

        def loss(params: Any, x: jax.Array, weight: jax.Array, backend: str) -> tuple[jax.Array, jax.Array]:
            y = dispatch(plan.replace(weight=weight), bank.apply(params, D), x, backend)
            return jnp.sin(y).sum(), y

        step = jax.jit(jax.value_and_grad(loss, argnums=(0, 1, 2), has_aux=True), static_argnums=3)
        expected = step(params_of("mixed"), x, plan.weight, "reference")
        with use(Parallel(make_mesh("data=2,expert=4"))):
            actual = jax.jit(lambda *args: step(*args, "auto"))(params_of("mixed"), x, plan.weight)
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-4, atol=2e-5), actual, expected)

    @pytest.mark.parametrize("routing", ROUTINGS)
    def test_by_way_of_hosts(self, routing: str) -> None:
        check(ROUTINGS[routing](), "expert=8", Exchange("hierarchical", hosts=2))

    def test_one_token_a_device_as_in_decoding(self) -> None:
        check(TopK(k=1)(logits(14, G, 1)), "data=8", Exchange())

    @pytest.mark.parametrize("routing", ROUTINGS)
    def test_in_chunks(self, routing: str) -> None:
        check(ROUTINGS[routing](), "fsdp=2,expert=2,tensor=2", Exchange("padded", chunks=2), "glu")

    @pytest.mark.parametrize("routing", ROUTINGS)
    def test_ragged_rows(self, emulated: None, routing: str) -> None:
        check(ROUTINGS[routing](), "data=2,expert=4", Exchange("ragged"))


class TestOtherPlans:
    @pytest.mark.parametrize("plan", OTHERS)
    @pytest.mark.parametrize("mesh", ["fsdp=2,expert=2,tensor=2", "expert=8"])
    def test_every_plan(self, mesh: str, plan: str) -> None:
        check(OTHERS[plan](), mesh, Exchange("capacity", chunks=2 if "tensor" in mesh else 1))

    @pytest.mark.parametrize("plan", ["capacity", "expert_choice", "soft_slots", "merge"])
    @pytest.mark.parametrize("bank", ["wrapped", "mixed"])
    def test_experts_that_are_wrapped_or_of_several_kinds(self, bank: str, plan: str) -> None:
        if (bank, plan) != ("mixed", "merge"):  # which is refused
            check(OTHERS[plan](), "fsdp=2,expert=2,tensor=2", Exchange("capacity"), bank)


class TestBound:
    def test_the_first_choices_of_a_device_are_kept_for_each_shard(self) -> None:
        plan = ROUTINGS["uneven"]()
        parallel = Parallel(make_mesh("data=2,expert=4"), Exchange("padded", bound=0.5))
        most = 2  # 0.5 times the mean of 6 tokens with 2 choices on 4 shards, rounded up
        used = np.array(plan.used)
        for g in range(G):
            rows = [0] * 4
            for n, j in np.ndindex(N, 2):
                shard = int(plan.expert[g, n, j]) // 2
                used[g, n, j] = rows[shard] < most
                rows[shard] += 1
        limited = limit(plan, parallel)
        np.testing.assert_array_equal(limited.used, used)
        np.testing.assert_array_equal(limited.dropped, np.asarray(plan.used) & ~used)
        assert 0 < used.sum() < np.asarray(plan.used).sum()
        jax.tree.map(np.testing.assert_array_equal, limit(limited, parallel), limited)

    @pytest.mark.parametrize(
        ("mesh", "exchange"),
        [("data=2,expert=4", Exchange("padded", bound=0.5)), ("expert=8", Exchange("hierarchical", hosts=2, bound=1.0))],
        ids=["padded", "hierarchical"],
    )
    def test_what_is_not_dropped_is_computed(self, mesh: str, exchange: Exchange) -> None:
        parallel = Parallel(make_mesh(mesh), exchange)
        plan = limit(ROUTINGS["uneven"](), parallel)
        assert plan.dropped.any()
        check(plan, mesh, exchange)

    def test_it_holds_for_each_kind_of_experts_and_the_executed_plan_says_so(self) -> None:
        plan, bank = ROUTINGS["uneven"](), BANKS["mixed"]
        x = jax.random.normal(jax.random.key(20), (G, N, D))
        names = []

        @jax.jit
        def run(params: Any, plan: TokenPlan, x: jax.Array) -> tuple[jax.Array, TokenPlan]:
            y, executed, name = execute(plan, bank.apply(params, D), x)
            names.append(name)
            return y, executed

        with use(Parallel(make_mesh("expert=8"), Exchange("padded", bound=0.5))):
            y, executed = run(params_of("mixed"), plan, x)
        assert names == ["expert_parallel"]
        assert executed.dropped.any()
        np.testing.assert_array_equal(executed.used | executed.dropped, plan.used)
        # Null, copy and constant experts are not exchanged for.
        assert not (executed.dropped & (plan.expert >= 5)).any()
        expected = jax.jit(lambda params, plan, x: dispatch(plan, bank.apply(params, D), x, "reference"))
        np.testing.assert_allclose(y, expected(params_of("mixed"), executed, x), rtol=2e-4, atol=2e-5)

    def test_without_a_bound_nothing_is(self) -> None:
        plan = ROUTINGS["one_expert_takes_all"]()
        assert limit(plan, Parallel(make_mesh("expert=8"))) is plan


class TestChoice:
    def test_auto_on_a_mesh_cuts_every_plan_that_can_be_cut(self) -> None:
        plans = [make() for name, make in (ROUTINGS | OTHERS).items() if name != "merge_for_few_groups"]
        with use(Parallel(make_mesh("data=8"))):
            assert {choose(plan, D) for plan in plans} == {"expert_parallel"}
            assert choose(SoftSlots(slots=1)(logits(0, 1)), D) == "einsum"
            assert choose(MergePlan(jnp.ones((1, E))), D) == "merged"
        with use(Parallel(make_mesh("single"))):
            assert "expert_parallel" not in {choose(plan, D) for plan in plans}

    @pytest.mark.parametrize(
        ("capacity", "devices", "expected"),
        [
            (None, exchanges.Devices(8, "cpu"), "padded"),
            (None, exchanges.Devices(256, "tpu", "TPU v6 lite"), "ragged"),
            (None, exchanges.Devices(16, "tpu", "TPU v5 lite"), "ragged"),
            (None, exchanges.Devices(32, "tpu", "TPU v5 lite"), "padded"),
            (4, exchanges.Devices(8, "tpu", "TPU v5p"), "capacity"),
            (100, exchanges.Devices(8, "gpu"), "ragged"),
        ],
    )
    def test_auto_takes_what_moves_least(self, capacity: int | None, devices: exchanges.Devices, expected: str) -> None:
        plan = ROUTINGS["uneven"]().replace(capacity=capacity)
        sizes = exchanges.Sizes(N, 2, E, shards=8)
        assert exchanges.choose_exchange(plan, "auto", devices, sizes, local_groups=1) == expected

    @pytest.mark.parametrize(
        ("exchange", "message"),
        [
            (Exchange("raged"), "exchange.kind='raged' is unknown; did you mean 'ragged'"),
            (
                Exchange("ragged"),
                "exchange.kind='ragged' does not run here: XLA has no ragged all-to-all for CPU; use exchange.kind='padded'",
            ),
            (Exchange("capacity"), "exchange.kind='capacity' exchanges slots, and this plan has none; set capacity_factor"),
            (Exchange(hosts=3), "exchange.hosts=3 does not divide mesh axis expert=8"),
        ],
    )
    def test_what_cannot_be_done_is_refused(self, exchange: Exchange, message: str) -> None:
        with use(Parallel(make_mesh("expert=8"), exchange)), pytest.raises(ConfigError, match=message):
            dispatch(ROUTINGS["uneven"](), BANKS["ffn"].apply(params_of("ffn"), D), jnp.ones((G, N, D)))

    def test_a_named_backend_needs_its_mesh(self) -> None:
        with pytest.raises(ConfigError, match="backend='expert_parallel' needs a mesh"):
            dispatch(ROUTINGS["uneven"](), BANKS["ffn"].apply(params_of("ffn"), D), jnp.ones((G, N, D)), "expert_parallel")

    def test_experts_that_share_parameters(self) -> None:
        """Eight experts of the plan are four: one may be taken several times."""
        plan, slots = ROUTINGS["uneven"](), [0, 1, 2, 3, 3, 2, 1, 0]
        w = jnp.arange(4.0)[:, None, None] * jnp.eye(D)
        x = jax.random.normal(jax.random.key(0), (G, N, D))

        def run(plan: TokenPlan, x: jax.Array, w: jax.Array) -> jax.Array:
            return dispatch(plan, Experts(lambda p, x, layout: layout.dot(x, p), w)[slots], x)

        with use(Parallel(make_mesh("data=2,expert=4"))):
            y = jax.jit(run)(plan, x, w)
        factor = np.where(plan.used, plan.weight * np.array(slots)[np.asarray(plan.expert)], 0).sum(-1, keepdims=True)
        np.testing.assert_allclose(y, factor * x, rtol=1e-5, atol=1e-5)

    def test_hosts_are_blocks_of_the_expert_axis(self) -> None:
        for processes, hosts in (([0] * 8, 1), ([0] * 4 + [1] * 4, 2), ([0, 1] * 4, 1), ([0] * 3 + [1] * 5, 1)):
            assert count_hosts(processes) == hosts


@pytest.fixture
def emulated(monkeypatch: pytest.MonkeyPatch) -> None:
    """`ragged_all_to_all`, which XLA has no CPU code for, by its documentation: everybody sees everything and takes its part."""

    def exchange(operand, output, input_offsets, send_sizes, output_offsets, recv_sizes, axis_name):
        rows, starts, sizes, landing = (
            jax.lax.all_gather(a, axis_name) for a in (operand, input_offsets, send_sizes, output_offsets)
        )
        me, place = jax.lax.axis_index(axis_name), jnp.arange(output.shape[0])
        for source in range(rows.shape[0]):
            offset = place - landing[source, me]
            mine = (offset >= 0) & (offset < sizes[source, me])
            taken = rows[source, jnp.clip(starts[source, me] + offset, 0, rows.shape[1] - 1)]
            output = jnp.where(mine[:, None], taken, output)
        return jnp.where((sizes[:, me] == recv_sizes).all(), output, jnp.nan)

    monkeypatch.setattr(jax.lax, "ragged_all_to_all", exchange)
    everywhere = dataclasses.replace(exchanges.TOKEN_EXCHANGES["ragged"], refuses=lambda devices: None)
    monkeypatch.setitem(exchanges.TOKEN_EXCHANGES, "ragged", everywhere)
