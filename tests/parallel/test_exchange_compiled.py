"""What programs with expert parallelism exchange and compute, read from the programs that XLA compiles for CPU and for TPU."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from moejax.aot.hlo import Collective, collectives
from moejax.core.params import record_axes
from moejax.dispatch import dispatch
from moejax.dispatch.expert_parallel import Sizes, exchanged_bytes, overlap_options
from moejax.dispatch.expert_parallel.hops import Ragged
from moejax.experts import FFN
from moejax.parallel import Exchange, Parallel, make_mesh, shard_map, use
from moejax.parallel.mesh import BATCH_AXES
from moejax.parallel.rules import param_specs
from moejax.routing import SoftSlots, TopK
from moejax.routing.select import Select
from moejax.train.flops import matmul_flops
from pallas_kernels.ahead import custom_calls, devices_of
from pallas_kernels.implementations import target

E, D, F, G, N = 8, 16, 32, 8, 12
GROUPS = PartitionSpec(BATCH_AXES)
TOP_2, EXPERTS = TopK(k=2), FFN(F, num_experts=E)


class Program:
    """Routing and experts, forward or with gradients, for a mesh."""

    def __init__(
        self, mesh: str, exchange: Exchange, select: Select = TOP_2, bank: Any = EXPERTS, backend: str = "auto",
        gradients: bool = True, devices: Any = None, sizes: tuple[int, int, int] = (G, N, D), dtype: Any = jnp.float32,
    ) -> None:  # fmt: skip
        self.mesh = make_mesh(mesh, devices)
        g, n, d = sizes
        parallel = Parallel(self.mesh, exchange) if self.mesh.size > 1 else None

        def loss(params: Any, x: jax.Array, logits: jax.Array) -> jax.Array:
            plan = shard_map(select, self.mesh, in_specs=(GROUPS,), out_specs=GROUPS)(logits) if parallel else select(logits)
            y = dispatch(plan, bank.apply(params, d), x, backend)
            return (y.astype(jnp.float32) ** 2).sum()

        with record_axes() as axes:
            shapes = jax.eval_shape(lambda key: bank.init(key, d), jax.random.key(0))
        specs = {"params": param_specs(shapes["params"], axes, self.mesh)}
        self.params = jax.tree.map(self._placed, shapes, specs)
        outputs = E * getattr(select, "slots", 1)
        x = self._placed(jax.ShapeDtypeStruct((g, n, d), dtype), GROUPS)
        logits = self._placed(jax.ShapeDtypeStruct((g, n, outputs), jnp.float32), GROUPS)
        args = self.params, x, logits
        step = jax.grad(loss, argnums=(0, 1, 2)) if gradients else loss
        placed = jax.tree.map(lambda a: a.sharding, args) if gradients else None
        with use(parallel):
            self.traced = jax.jit(lambda *a: step(*a), out_shardings=placed).trace(*args)

    def _placed(self, shape: jax.ShapeDtypeStruct, spec: PartitionSpec) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape.shape, shape.dtype, sharding=NamedSharding(self.mesh, spec))

    @functools.cached_property
    def compiled(self) -> jax.stages.Compiled:
        return self.traced.lower().compile()

    def exchanges(self) -> list[Collective]:
        """Collectives in which a device gets something from another."""
        return [c for c in collectives(self.compiled.as_text(), self.mesh) if c.group > 1]


def total(found: list[Collective], kind: str, *axes: str) -> int:
    return sum(c.operand_bytes * c.times for c in found if c.kind == kind and c.axes == axes)


class TestBytes:
    """Both ways, forward and backward: the formula, twice. Nothing else crosses the expert axis."""

    def test_padded(self) -> None:
        found = Program("expert=8", Exchange("padded")).exchanges()
        each = exchanged_bytes("padded", Sizes(N, 2, E, shards=8), D, D, 4)
        assert each == 8 * N * (2 * D + 2 * 2) * 4
        assert {c.kind for c in found} == {"all-to-all"}
        assert total(found, "all-to-all", "expert") == 2 * each

    def test_bound(self) -> None:
        found = Program("expert=8", Exchange("padded", bound=1.0), gradients=False).exchanges()
        assert total(found, "all-to-all", "expert") == 8 * 3 * (2 * D + 2 * 2) * 4  # 12 tokens, 2 choices, 8 shards: 3 rows

    def test_hierarchical_crosses_hosts_with_one_copy_of_a_token(self) -> None:
        found = Program("expert=8", Exchange("hierarchical", hosts=2)).exchanges()
        each = exchanged_bytes("hierarchical", Sizes(N, 2, E, shards=8, hosts=2), D, D, 4)
        assert {c.kind for c in found} == {"all-to-all"}
        assert total(found, "all-to-all", "expert") == 2 * each
        across = sum(c.operand_bytes for c in found if c.group == 2)
        assert across == 2 * 2 * N * (2 * D + 2 * 2) * 4  # of 2 hosts, where padded sends to 8 shards
        assert {c.group for c in found} == {2, 4}

    @pytest.mark.parametrize("kind", ["padded", "capacity"])
    def test_tensor_ranks_share_their_tokens_and_fsdp_gathers_its_parameters_once(self, kind: str) -> None:
        capacity = 4
        select = TopK(k=2, capacity_factor=4 * E / (2 * N)) if kind == "capacity" else TOP_2
        program = Program("fsdp=2,expert=2,tensor=2", Exchange(kind), select)
        found = program.exchanges()
        # A device along `tensor` has half of the 2 x 12 tokens of its part, or half of their slots.
        each = exchanged_bytes(kind, Sizes(N, 2, E, shards=2), D, D, 4, slots=capacity)
        assert total(found, "all-to-all", "expert") == 2 * each
        params = sum(p.size * 4 // 8 for p in jax.tree.leaves(program.params))
        assert total(found, "all-gather", "fsdp") == total(found, "reduce-scatter", "fsdp") / 2 == params
        assert {c.kind for c in found if "expert" in c.axes} == {"all-to-all"}

    def test_soft_slots(self) -> None:
        found = Program("data=2,expert=4", Exchange(), SoftSlots(slots=3)).exchanges()
        each = exchanged_bytes("capacity", Sizes(N, 1, E, shards=4), D, D, 4, slots=3)
        assert total(found, "all-to-all", "expert") == 2 * each
        assert {(c.kind, c.axes) for c in found} == {("all-to-all", ("expert",)), ("all-reduce", ("data",))}

    def test_ragged_sends_what_is_needed(self) -> None:
        """Its sizes are data: those that the hop sends, against a count in NumPy."""
        expert = np.random.default_rng(0).integers(0, E, (8 * N, 3))
        mesh = make_mesh("expert=8")

        def sent(expert: jax.Array) -> tuple[jax.Array, jax.Array]:
            hop = Ragged.plan((expert[..., None] == jnp.arange(8)).any(1), most=3 * N, capacity=8 * N)
            return hop.sent, hop.received

        place = PartitionSpec("expert")
        sends, receives = jax.jit(shard_map(sent, mesh, in_specs=(place,), out_specs=place))(jnp.asarray(expert))
        counted = np.array([[sum(j in row for row in expert[i * N : (i + 1) * N]) for j in range(8)] for i in range(8)])
        np.testing.assert_array_equal(sends.reshape(8, 8), counted)
        np.testing.assert_array_equal(receives.reshape(8, 8), counted.T)
        copies = counted.sum(1).mean() / N
        mean = exchanged_bytes("ragged", Sizes(N, 3, E, shards=8), D, D, 4, copies=copies)
        assert mean == pytest.approx(counted.sum(1).mean() * (2 * D + 2 * 3) * 4)

    def test_without_an_expert_axis_nothing_travels_but_gradients(self) -> None:
        found = Program("data=8", Exchange()).exchanges()
        assert {(c.kind, c.axes) for c in found} == {("all-reduce", ("data",))}


class TestFlops:
    def test_slots_of_eight_devices_cost_an_eighth_each(self) -> None:
        select = TopK(k=2, capacity_factor=1.0)
        whole = Program("single", Exchange(), select, backend="capacity").compiled.cost_analysis()["flops"]
        mine = Program("expert=8", Exchange("capacity"), select).compiled.cost_analysis()["flops"]
        assert 0.9 * whole / 8 < mine < 1.15 * whole / 8

    def test_bounded_rows_of_eight_devices_cost_together_what_one_device_pays(self) -> None:
        whole = matmul_flops(Program("single", Exchange(), backend="grouped").traced.jaxpr)
        together = matmul_flops(Program("expert=8", Exchange("padded", bound=1.0)).traced.jaxpr)
        assert 0.9 * whole < together < 1.15 * whole


class TestTpu:
    @pytest.mark.tpu_aot
    @pytest.mark.slow
    def test_ragged_rows_there_and_back_and_in_the_backward_pass(self) -> None:
        n, d, k = 64, 256, 2
        with target("v5e"):
            program = Program(
                "fsdp=2,expert=4", Exchange("ragged"), TopK(k), FFN(128, num_experts=E), devices=devices_of("v5e:2x4"),
                sizes=(G, n, d), dtype=jnp.bfloat16,
            )  # fmt: skip
            parameters = [c.kind for c in program.exchanges() if c.axes == ("fsdp",)]
            found = [c for c in program.exchanges() if c.axes == ("expert",)]
        ragged = [c for c in found if c.kind == "ragged-all-to-all"]
        rows = {c.operand_bytes // (2 * d) for c in ragged if c.dtype == "bf16"}
        assert rows == {n * k, 4 * n}  # what may leave, and what may arrive
        assert sum(c.dtype == "bf16" for c in ragged) == 4  # there and back, twice
        assert all(c.operand_bytes <= 2 * 4 * 8 for c in found if c.kind != "ragged-all-to-all")  # sizes and offsets
        assert sorted(parameters) == ["all-gather"] * 2 + ["reduce-scatter"] * 2
        assert {"grouped_matmul", "grouped_matmul_dw"} <= set(custom_calls(program.compiled))

    @pytest.mark.tpu_aot
    @pytest.mark.slow
    @pytest.mark.parametrize("kind", ["padded", "ragged"])
    def test_one_chunk_travels_while_another_is_computed(self, kind: str) -> None:
        exchange = Exchange(kind, chunks=2, bound=2.0)
        with target("v5e"):
            program = Program(
                "expert=8", exchange, TopK(2), FFN(256, num_experts=E), gradients=False,
                devices=devices_of("v5e:2x4"), sizes=(G, 512, 256), dtype=jnp.bfloat16,
            )  # fmt: skip
            text = program.traced.lower().compile(compiler_options=overlap_options(Parallel(program.mesh, exchange))).as_text()
        rows = [c for c in collectives(text, program.mesh) if c.dtype == "bf16"]
        assert len(rows) == 4
        assert all(c.overlapped for c in rows)
        # The experts of one chunk run between start and end of the other's exchange.
        order = [
            line
            for line in text.splitlines()
            if "all-to-all-start(" in line or "all-to-all-done(" in line or "custom-call(" in line
        ]
        under_way, hidden = 0, 0
        for line in order:
            if "bf16" in line and "all-to-all-start(" in line:
                under_way += 1
            elif "bf16" in line and "all-to-all-done(" in line:
                under_way -= 1
            elif "grouped_matmul" in line and under_way:
                hidden += 1
        assert hidden == 4  # two matmuls of each chunk
