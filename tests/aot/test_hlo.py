"""Reading exchanges out of real compiled programs, against bytes counted by hand."""

import functools

import jax
import jax.numpy as jnp
import pytest
from jax.experimental import topologies
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from moejax.aot.cost import costs
from moejax.aot.hlo import Collective, collectives
from moejax.aot.hlo_text import parse, shape_bytes
from moejax.parallel import make_mesh, shard_map
from pallas_kernels import ahead

ROWS, WIDTH, TURNS = 64, 256, 5  # of one device
F32 = 4


def test_every_kind_on_simulated_devices_has_its_bytes_axes_and_turns():
    mesh = make_mesh("data=2,expert=4")
    found = collectives(_compile(_every_kind, mesh, _every_kind_inputs(mesh)).as_text(), mesh)
    assert _summary(found) == EXPECTED
    assert all(c.known and c.dtype == "f32" for c in found)
    assert {c.kind: c.where for c in found}["all-to-all"].endswith("all_to_all")


@pytest.mark.tpu_aot
def test_every_kind_on_tpu_has_its_bytes_axes_and_turns():
    mesh = _absent("v5e:2x4", "data=2,expert=4")
    # Anything below 'highest' lets the compiler send bfloat16 instead.
    with jax.default_matmul_precision("highest"):
        found = collectives(_compile(_every_kind, mesh, _every_kind_inputs(mesh)).as_text(), mesh)
    assert _summary(found) == EXPECTED
    assert all(c.known and c.dtype == "f32" for c in found)


# kind -> axes, devices in a group, bytes in, bytes out, turns, bytes sent
SHARD, WEIGHT = ROWS * WIDTH * F32, WIDTH * WIDTH * F32
EXPECTED = {
    "all-gather": (("data",), 2, WEIGHT, 2 * WEIGHT, 1, WEIGHT),
    "all-to-all": (("expert",), 4, SHARD, SHARD, TURNS, SHARD * 3 / 4),
    "collective-permute": (("data",), 2, SHARD, SHARD, TURNS, SHARD),
    "reduce-scatter": (("expert",), 4, SHARD, SHARD // 4, 1, SHARD * 3 / 4),
    "all-reduce": (("data", "expert"), 8, F32, F32, 1, 2 * F32 * 7 / 8),
}


def _every_kind(x, w):
    w = jax.lax.all_gather(w, "data", axis=0, tiled=True)

    def turn(x, _):
        x = jax.lax.all_to_all(x, "expert", 0, 0, tiled=True)
        return jax.lax.ppermute(x @ (w[:WIDTH] + w[WIDTH:]), "data", [(0, 1), (1, 0)]), None

    x, _ = jax.lax.scan(turn, x, None, length=TURNS)
    x = jax.lax.psum_scatter(x, "expert", scatter_dimension=0, tiled=True)
    return x, jax.lax.psum(jnp.sum(x), ("data", "expert"))


def _every_kind_inputs(mesh):
    rows = P(("data", "expert"))
    return [_shape(mesh, (8 * ROWS, WIDTH), rows), _shape(mesh, (2 * WIDTH, WIDTH), P("data"))], (rows, P())


def test_a_loop_of_unknown_length_counts_once_and_says_so():
    mesh = make_mesh("expert=8")

    def until(x):
        return jax.lax.while_loop(lambda x: x[0] < 100.0, lambda x: jax.lax.psum(x, "expert") + 1.0, x)

    (found,) = collectives(_compile(until, mesh, ([_shape(mesh, (8 * ROWS,), P("expert"))], P("expert"))).as_text(), mesh)
    assert (found.kind, found.times, found.known, found.operand_bytes) == ("all-reduce", 1, False, ROWS * F32)


def test_nested_loops_multiply():
    mesh = make_mesh("fsdp=2,tensor=4")

    def inner(x, _):
        return jax.lax.psum(x, "tensor") * 0.5, None

    def nested(x):
        return jax.lax.scan(lambda x, _: (jax.lax.scan(inner, x, None, length=3)[0], None), x, None, length=4)[0]

    (found,) = collectives(_compile(nested, mesh, ([_shape(mesh, (16, WIDTH), P("fsdp"))], P("fsdp"))).as_text(), mesh)
    assert (found.axes, found.group, found.times) == (("tensor",), 4, 12)


@pytest.mark.tpu_aot
def test_overlapped_is_computation_between_start_and_end():
    mesh = _absent("v5e:2x4", "data=2,expert=4")

    def beside(x, w):  # the product does not wait for the transfer
        return jax.lax.ppermute(x, "data", [(0, 1), (1, 0)]), w @ w

    def before(x, w):  # there is nothing else to do
        return jax.lax.ppermute(x, "data", [(0, 1), (1, 0)]), w

    inputs = [_shape(mesh, (2048, 1024), P("data")), _shape(mesh, (2048, 2048), P())], (P("data"), P())
    for function, overlapped in ((beside, True), (before, False)):
        (found,) = collectives(_compile(function, mesh, inputs).as_text(), mesh)
        assert (found.kind, found.axes, found.overlapped) == ("collective-permute", ("data",), overlapped)
        assert found.sent == 1024 * 1024 * F32


@pytest.mark.tpu_aot
def test_a_partitioned_layer_on_tpu_gathers_weights_beside_its_products():
    """What the partitioner inserts: carried along inside fusions, reductions with a slice, groups along XLA's own axes."""
    mesh = _absent("v5e:4x4", "data=2,fsdp=8")
    layers, d = 3, 512

    def loss(w, x):
        def layer(x, w):
            y = jax.nn.relu(x @ w[0].astype(x.dtype)) @ w[1].astype(x.dtype)
            return jax.lax.with_sharding_constraint(x + y, NamedSharding(mesh, P(("data", "fsdp")))), None

        return jnp.mean(jax.lax.scan(jax.checkpoint(layer), x, w)[0].astype(jnp.float32) ** 2)

    w = _shape(mesh, (layers, d, d), P(None, None, "fsdp")), _shape(mesh, (layers, d, d), P(None, "fsdp"))
    x = _shape(mesh, (8192, d), P(("data", "fsdp")), jnp.bfloat16)
    step = jax.jit(jax.grad(loss), out_shardings=jax.tree.map(lambda a: a.sharding, w))
    module = parse(step.lower(w, x).compile().as_text())
    found = collectives(module, mesh)
    gathers = [c for c in found if c.kind == "all-gather"]
    assert {(c.axes, c.group, c.times, c.result_bytes) for c in gathers} == {(("fsdp",), 8, layers, d * d * 2)}
    assert len(gathers) == 4  # two matrices, forward and backward
    assert any(c.overlapped for c in gathers)
    # Gradients of both matrices: scattered over fsdp in one way or another, and summed over data.
    summed = [c for c in found if c.kind in ("all-reduce", "reduce-scatter") and c.times == layers]
    assert {c.axes for c in summed} == {("fsdp",), ("data",)}
    assert sum(c.operand_bytes for c in summed if c.axes == ("data",)) == 2 * d * d * 2 // 8
    # Two products forward, one of them again, four backward, of 512 rows. Matrices that only pass by are not counted as read.
    counted = costs(module)
    assert counted.flops == layers * 7 * 2 * 512 * d * d
    assert counted.bytes < layers * 7 * 6 * d * d * 2


@pytest.mark.tpu_aot
def test_a_ragged_exchange_counts_rows_and_not_offsets():
    mesh = _absent("v5e:2x4", "expert=8")

    def exchange(x, sizes):
        out = jnp.zeros((4 * ROWS, WIDTH), x.dtype)
        offsets = jnp.cumsum(sizes) - sizes
        return jax.lax.ragged_all_to_all(x, out, offsets, sizes, offsets, sizes, axis_name="expert")

    split = P("expert")
    inputs = [_shape(mesh, (8 * ROWS, WIDTH), split), _shape(mesh, (64,), split, jnp.int32)], split
    found = collectives(_compile(exchange, mesh, inputs).as_text(), mesh)
    (ragged,) = [c for c in found if c.kind == "ragged-all-to-all"]
    assert (ragged.axes, ragged.group, ragged.operand_bytes) == (("expert",), 8, ROWS * WIDTH * F32)
    assert ragged.result_bytes == 4 * ROWS * WIDTH * F32


@pytest.mark.parametrize(
    ("groups", "axes"),
    [
        ("{{0,1},{2,3},{4,5},{6,7}}", ("tensor",)),
        ("[4,2]<=[8]", ("tensor",)),
        ("[4,2]<=[2,4]T(1,0)", ("data",)),
        ("[1,8]<=[8]", ("data", "fsdp", "tensor")),
        ("{}", ("data", "fsdp", "tensor")),
        ("mesh['a'=4,'b'=2] {'b'}", ("tensor",)),
        ("mesh['a'=4,'b'=2], device_ids=([2,4]T(1,0)) {'b'}", ("data",)),
        ("mesh['a'=8] {'a':(2)2}", ("fsdp",)),
    ],
)
def test_groups_in_every_spelling(groups, axes):
    """Devices 0..7 of a mesh data=2, fsdp=2, tensor=2: tensor is the fastest, data the slowest."""
    text = (
        "HloModule m\n\nENTRY %main (x: f32[4]) -> f32[4] {\n  %x = f32[4]{0} parameter(0)\n"
        f"  ROOT %a = f32[4]{{0}} all-reduce(%x), channel_id=1, replica_groups={groups}, to_apply=%add\n}}\n"
    )
    (found,) = collectives(text, {"data": 2, "fsdp": 2, "expert": 1, "tensor": 2})
    assert found.axes == axes
    assert found.group == 2 ** len(axes)


def test_bytes_of_shapes():
    assert shape_bytes("bf16[4,8]{1,0:T(8,128)(2,1)S(1)}") == 64
    assert shape_bytes("(f32[3], /*index=1*/pred[5]{0}, u32[])") == 12 + 5 + 4
    assert shape_bytes("s4[3]") == 2
    assert shape_bytes("f8e4m3fn[7]") == 7


def test_other_text_is_refused():
    with pytest.raises(ValueError, match="no ENTRY"):
        parse("module @jit_f { }")


def _summary(found: list[Collective]):
    assert len({c.kind for c in found}) == len(found)
    return {c.kind: (c.axes, c.group, c.operand_bytes, c.result_bytes, c.times, c.sent) for c in found}


def _compile(function, mesh, inputs):
    arguments, outputs = inputs
    specs = tuple(a.sharding.spec for a in arguments)
    return jax.jit(shard_map(function, mesh, specs, outputs)).lower(*arguments).compile()


def _shape(mesh, shape, spec, dtype=jnp.float32):
    return jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(mesh, spec))


@functools.cache
def _absent(topology, mesh):
    ahead.device_of("v5e")  # tells libtpu that there is no machine
    return make_mesh(mesh, topologies.get_topology_desc(platform="tpu", topology_name=topology).devices)
