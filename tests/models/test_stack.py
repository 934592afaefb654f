"""The repeated pattern: scanned, unrolled and rematerialised networks are one function, losses and collections included."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from numpy_layers import compiled

from moejax.core.context import Context
from moejax.core.errors import ConfigError
from moejax.core.layer import RowWise
from moejax.layers.registry import blocks
from moejax.models import build, to_scanned, to_unrolled
from moejax.models.parts import NamedBlock
from moejax.models.stack import SHALLOW, Stack

NORM = dict(kind="rms_norm")
MIXER = dict(kind="attention", num_heads=2)
DENSE = dict(kind="transformer", mixer=MIXER, norm=NORM, ffn=dict(kind="glu", hidden=16))
MOE = dict(
    kind="transformer",
    mixer=MIXER,
    norm=NORM,
    ffn=dict(
        kind="moe",
        num_experts=4,
        router=dict(kind="linear"),
        select=dict(kind="top_k", k=2),
        bank=dict(kind="glu", hidden=8),
        losses=dict(balance=dict(coef=0.1), z=dict(coef=0.01)),
    ),
)
SPEC = dict(
    kind="decoder_lm", vocab_size=17, d_model=8, num_layers=4, pattern=("dense", "moe"), blocks=dict(dense=DENSE, moe=MOE)
)
TOKENS = jnp.asarray(np.random.default_rng(0).integers(0, 17, (2, 6)))
CTX = Context(train=True)


def model(**fields):
    return build({**SPEC, **fields})


@pytest.fixture(scope="module")
def scanned_params():
    """Drawn without compiling anything; every repeat gets its own."""
    shapes = jax.eval_shape(model().init, jax.random.key(0), TOKENS, CTX)["params"]
    rng = np.random.default_rng(1)

    def draw(leaf):
        noise = rng.normal(size=leaf.shape)
        return jnp.asarray(noise / np.sqrt(leaf.shape[-2]) if leaf.ndim > 2 else 1 + 0.2 * noise, leaf.dtype)

    return jax.tree.map(draw, shapes)


@pytest.fixture(scope="module")
def expected(scanned_params):
    """What the scanned model without rematerialisation computes."""
    return evaluate(model(), scanned_params)


def evaluate(network, params):
    """Logits, sown losses, and the gradient of everything that a training step would sum."""

    def total(p):
        logits, sown = network.apply({"params": p}, TOKENS, CTX, mutable=["losses"])
        return (logits**2).mean() + sum(leaf.sum() for leaf in jax.tree.leaves(sown)), (logits, sown["losses"])

    (_, (logits, losses)), grads = jax.jit(jax.value_and_grad(total, has_aux=True))(params)
    return logits, losses, grads


def assert_trees_close(actual, expected, atol=1e-5):
    assert jax.tree.structure(actual) == jax.tree.structure(expected)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=atol), actual, expected)


@pytest.mark.slow
def test_unrolled_equals_scanned_in_value_losses_and_gradient(scanned_params, expected):
    logits, losses, grads = expected
    unrolled = evaluate(model(scan=False), to_unrolled(scanned_params))
    assert sorted(unrolled[1]["stack"]) == ["repeat_0", "repeat_1"]
    assert_trees_close(unrolled[0], logits)
    assert_trees_close(to_scanned(unrolled[1]), losses)
    assert_trees_close(to_scanned(unrolled[2]), grads)
    ffn = losses["stack"]["repeats"]["1_moe"]["ffn"]
    assert {name: leaf.shape for name, leaf in ffn.items()} == {"balance_loss": (2,), "z_loss": (2,)}
    assert all((leaf > 0).all() for leaf in ffn.values())


@pytest.mark.slow
@pytest.mark.parametrize(("remat", "scan"), [("full", True), ("dots", True), ("full", False)])
def test_remat_changes_neither_values_nor_losses_nor_gradients(scanned_params, expected, remat, scan):
    actual = evaluate(model(scan=scan, remat=remat), scanned_params if scan else to_unrolled(scanned_params))
    for a, b in zip(actual if scan else map(to_scanned, actual[1:]), expected if scan else expected[1:], strict=True):
        assert_trees_close(a, b)


def test_remat_recomputes(scanned_params):
    """`full` runs the products with weights again in the backward pass, `dots` does not."""

    def products(remat):
        network = model(remat=remat)
        grad = jax.grad(lambda p: network.apply({"params": p}, TOKENS, CTX).sum())
        return str(jax.make_jaxpr(grad)(scanned_params)).count("dot_general")

    none, full, dots = products("none"), products("full"), products("dots")
    assert full > dots > none


def test_restacking_is_a_round_trip(scanned_params):
    unrolled = to_unrolled(scanned_params)
    assert sorted(unrolled["stack"]) == ["repeat_0", "repeat_1"]
    assert "repeats" not in unrolled["stack"]
    back = to_scanned(unrolled)
    assert_trees_close(back, scanned_params, atol=0)


def test_repeats_start_different_and_layers_do_not_share():
    plain = model(pattern=("dense",), num_layers=2)
    start = jax.jit(plain.init)(jax.random.key(0), TOKENS)["params"]["stack"]["repeats"]["0_dense"]["mixer"]
    assert all((leaf[0] != leaf[1]).any() for leaf in jax.tree.leaves(start))
    twice = jax.eval_shape(model(pattern=("dense", "dense"), scan=False).init, jax.random.key(0), TOKENS)["params"]
    assert sorted(twice["stack"]["repeat_0"]) == ["0_dense", "1_dense"]
    assert jax.tree.structure(twice["stack"]["repeat_0"]["0_dense"]) == jax.tree.structure(
        twice["stack"]["repeat_0"]["1_dense"]
    )


def test_the_program_does_not_grow_with_depth():
    def size(depth, scan):
        network = model(num_layers=depth, scan=scan)
        params = jax.eval_shape(network.init, jax.random.key(0), TOKENS)
        return len(jax.jit(network.apply).lower(params, TOKENS).as_text().splitlines())

    assert size(SHALLOW + 4, True) == size(24, True)  # below, the loop is written out on a CPU
    assert size(SHALLOW, True) > size(SHALLOW + 4, True)
    assert size(8, False) > 1.5 * size(4, False)


class Counter(nn.Module):
    """A block with state and an intervention: adds the override, counts its calls, passes noise through."""

    @nn.compact
    def __call__(self, x, ctx):
        calls = self.variable("router_state", "calls", lambda: jnp.zeros((), jnp.int32))
        if not self.is_initializing():
            calls.value += 1
        self.sow("stats", "noise", jax.random.normal(self.make_rng("router"), ()))
        shift = self.get_variable("interventions", "shift") if self.has_variable("interventions", "shift") else 0.0
        return x + shift


def test_every_collection_gets_a_layers_axis():
    stack = Stack((NamedBlock("c", "model.blocks.c", Counter()),), ("c",), num_layers=3)
    x, rngs = jnp.zeros((1, 2, 4)), {"router": jax.random.key(1)}
    state = stack.init({"params": jax.random.key(0), **rngs}, x, Context())["router_state"]
    assert state["repeats"]["0_c"]["calls"].tolist() == [0, 0, 0]
    interventions = {"repeats": {"0_c": {"shift": jnp.array([1.0, 10.0, 100.0])}}}
    variables = {"router_state": state, "interventions": interventions}
    y, out = stack.apply(variables, x, Context(), rngs=rngs, mutable=["router_state", "stats"])
    assert (y == 111.0).all()
    assert out["router_state"]["repeats"]["0_c"]["calls"].tolist() == [1, 1, 1]
    (noise,) = out["stats"]["repeats"]["0_c"]["noise"]
    assert len(set(noise.tolist())) == 3  # each layer draws its own


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (dict(num_layers=5), r"num_layers=5 is not a positive multiple of the 2 blocks .* \(in model\)"),
        (dict(pattern=()), r"pattern=\(\)"),
        (dict(pattern=("dense", "moee")), "names block 'moee', not in blocks; did you mean 'moe'"),
        (dict(remat="ful"), "remat='ful' is unknown; did you mean 'full'"),
    ],
)
def test_bad_stacks_are_refused(fields, message):
    with pytest.raises(ConfigError, match=message):
        model(**fields)


def test_errors_name_the_place_in_the_config():
    wrong = {**SPEC, "blocks": {"moe": {**MOE, "ffn": {**MOE["ffn"], "router": dict(kind="linaer")}}}}
    with pytest.raises(ConfigError, match=r"unknown router kind 'linaer' in model\.blocks\.moe\.ffn\.router.*'linear'"):
        build(wrong)
    assert {"transformer", "mixture_of_depths"} <= set(blocks.kinds())


class WhereAmI(RowWise):
    """Adds ten to the power of its layer."""

    @nn.compact
    def __call__(self, x, ctx):
        assert ctx.num_layers == 4
        return x + 10.0**ctx.layer


@pytest.mark.parametrize("scan", [True, False])
@pytest.mark.parametrize("remat", ["none", "full"])
def test_a_block_knows_its_layer_under_scan(scan, remat):
    """Patterns of two in a network of four: layers 0, 1, 2 and 3 add 1, 10, 100 and 1000, also where b sees layer 1 and 3 only."""
    a, b = (NamedBlock(name, f"blocks.{name}", WhereAmI()) for name in "ab")
    stack = Stack((a, b), ("a", "b"), num_layers=4, scan=scan, remat=remat)
    x = jnp.zeros((1, 2, 3))
    np.testing.assert_allclose(
        compiled(stack)(jax.jit(stack.init)(jax.random.key(0), x, Context()), x, Context()), 1111.0, rtol=1e-6
    )


def test_fields_vary_over_depth():
    """k, the number of experts and a width of each layer, in parameters and in statistics; scanned or not it is the same tree."""
    moe = dict(
        kind="moe", num_experts={"over_depth": (2, 3, 3, 5)}, router=dict(kind="linear"),
        select=dict(kind="top_k", k={"over_depth": (2, 1, 1, 2)}), bank=dict(kind="glu", hidden={"over_depth": "linear", "first": 8, "last": 2}),
    )  # fmt: skip
    block = dict(kind="feed_forward", ffn=moe)
    spec = dict(kind="decoder_lm", vocab_size=7, d_model=4, num_layers=4, pattern=("a",), blocks=dict(a=block))
    tokens = jnp.zeros((1, 3), jnp.int32)
    model = build(spec)
    variables = jax.eval_shape(lambda: model.init(jax.random.key(0), tokens))
    layers = variables["params"]["stack"]["repeats"]
    shapes = [layers[f"{i}_a"]["ffn"]["bank"]["w_gate"].shape for i in range(4)]
    assert shapes == [(1, 2, 4, 8), (1, 3, 4, 6), (1, 3, 4, 4), (1, 5, 4, 2)]
    _, sown = jax.jit(lambda key: model.apply(model.init(key, tokens), tokens, mutable=["stats"]))(jax.random.key(0))
    used = [float(sown["stats"]["stack"]["repeats"][f"{i}_a"]["ffn"]["experts_per_token"][0]) for i in range(4)]
    assert used == [2, 1, 1, 2]


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ((1, 2), r"blocks\.a\.ffn\.hidden\.over_depth has 2 values, and the network num_layers=3"),
        ("lineal", r"unknown schedule 'lineal' in model\.blocks\.a\.ffn\.hidden\.over_depth; did you mean 'linear'\?"),
        ("linear", r"model\.blocks\.a\.ffn\.hidden \('linear' over depth\) needs first, last, not nothing"),
    ],
)
def test_wrong_schedules_are_refused(value, message):
    block = dict(kind="feed_forward", ffn=dict(kind="ffn", hidden={"over_depth": value}))
    with pytest.raises(ConfigError, match=message):
        build(dict(kind="decoder_lm", vocab_size=7, d_model=4, num_layers=3, pattern=("a",), blocks=dict(a=block)))
