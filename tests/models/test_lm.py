"""The decoder: nothing leaks from the future, packing and padding are invisible, and full sizes have their published counts."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moejax.core.context import Context
from moejax.core.errors import ConfigError
from moejax.core.layer import Layer
from moejax.core.params import logical_axes
from moejax.layers.registry import ffns
from moejax.models import active_params, build, count_params
from moejax.models.inspection import why_not_decodable

V, S = 19, 8
NORM = dict(kind="rms_norm")
MIXER = dict(kind="attention", num_heads=4, num_kv_heads=2)
DENSE = dict(kind="transformer", mixer=MIXER, norm=NORM, ffn=dict(kind="glu", hidden=16))
MOE = dict(
    DENSE,
    ffn=dict(
        kind="moe",
        num_experts=4,
        router=dict(kind="linear"),
        select=dict(kind="top_k", k=2),
        bank=dict(kind="glu", hidden=8),
        losses=dict(balance=dict(coef=0.1)),
    ),
)
MOD = dict(kind="mixture_of_depths", capacity_factor=0.5, block=DENSE)
WINDOW = dict(DENSE, mixer=dict(MIXER, window=2, qk_norm="head"))
BLOCKS = dict(dense=DENSE, moe=MOE, mod=MOD, window=WINDOW)


def spec(*pattern, **fields):
    blocks = {name: BLOCKS[name] for name in set(pattern)}
    return dict(kind="decoder_lm", vocab_size=V, d_model=16, num_layers=len(pattern), pattern=pattern, blocks=blocks, **fields)


def tokens(seed=0, b=2, s=S):
    return jnp.asarray(np.random.default_rng(seed).integers(0, V, (b, s)))


def init(model, tokens):
    """Parameters away from their start, so that no layer is near the identity; drawn without compiling anything."""
    shapes = jax.eval_shape(model.init, jax.random.key(0), tokens)["params"]
    rng = np.random.default_rng(1)

    def draw(leaf):
        noise = rng.normal(size=leaf.shape)
        return jnp.asarray(noise / np.sqrt(leaf.shape[-2]) if leaf.ndim > 1 else 1 + 0.2 * noise, leaf.dtype)

    return {"params": jax.tree.map(draw, shapes)}


@functools.cache
def compiled(model):
    return jax.jit(model.apply)


def run(model, variables, x, ctx=None, **kwargs):
    return compiled(model)(variables, x, ctx, **kwargs)


@pytest.mark.parametrize("pattern", [("dense", "moe"), ("mod", "window"), ("mod", "moe")])
def test_changing_the_future_never_changes_the_past(pattern):
    model = build(spec(*pattern))
    x = tokens()
    variables = init(model, x)
    before = run(model, variables, x)
    for cut in (1, 4, 7):
        after = run(model, variables, x.at[:, cut:].set((x[:, cut:] + 1) % V))
        np.testing.assert_allclose(after[:, :cut], before[:, :cut], atol=1e-5)
        assert (abs(after[:, cut:] - before[:, cut:]) > 1e-3).any(axis=(1, 2)).all()


@pytest.mark.slow
def test_packed_documents_equal_separate_ones():
    model = build(spec("dense", "moe"))
    packed = tokens(b=1)
    variables = init(model, packed)
    ctx = Context(positions=jnp.array([[0, 1, 2, 0, 1, 2, 3, 4]]), segments=jnp.array([[1, 1, 1, 2, 2, 2, 2, 2]], jnp.int32))
    together = run(model, variables, packed, ctx)
    apart = [run(model, variables, packed[:, :3]), run(model, variables, packed[:, 3:])]
    np.testing.assert_allclose(together, np.concatenate(apart, axis=1), atol=1e-5)
    assert (abs(run(model, variables, packed) - together)[:, 3:] > 1e-3).any()  # the fields did something


@pytest.mark.slow
def test_padding_is_inert_in_value_losses_and_gradient():
    """Rows padded with junk, right and left, equal the compact rows."""
    model = build(spec("dense", "moe"))
    x = tokens(s=5)
    variables = init(model, x)

    def objective(params, x, ctx, keep):
        logits, sown = model.apply(params, x, ctx, mutable=["losses"])
        logits = logits[:, keep[0] : keep[1]]
        return (logits**2).mean() + sum(leaf.sum() for leaf in jax.tree.leaves(sown)), logits

    step = jax.jit(jax.value_and_grad(objective, has_aux=True), static_argnums=3)
    (compact, logits), grads = step(variables, x, Context(), (0, 5))
    padded = jnp.concatenate([jnp.full((2, 1), 7), x, jnp.full((2, 3), 3)], axis=1)
    valid = jnp.broadcast_to(jnp.array([False, *[True] * 5, *[False] * 3]), (2, 9))
    positions = jnp.broadcast_to(jnp.array([0, 0, 1, 2, 3, 4, 0, 0, 0]), (2, 9))
    (loss, actual), padded_grads = step(variables, padded, Context(valid=valid, positions=positions), (1, 6))
    np.testing.assert_allclose(actual, logits, atol=1e-5)
    np.testing.assert_allclose(loss, compact, rtol=1e-5)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-5), padded_grads, grads)


def test_head_tied_or_not_and_cap():
    x = tokens()
    tied, untied, capped = build(spec("dense")), build(spec("dense", tied=False)), build(spec("dense", logit_cap=0.5))
    variables = init(tied, x)
    logits = run(tied, variables, x)
    own_head = {"params": {**variables["params"], "head": variables["params"]["embedding"].T}}
    np.testing.assert_allclose(run(untied, own_head, x), logits, atol=1e-5)
    other = {"params": {**own_head["params"], "head": 2.0 * own_head["params"]["head"]}}
    np.testing.assert_allclose(run(untied, other, x), 2.0 * logits, rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(run(capped, variables, x), 0.5 * np.tanh(logits / 0.5), atol=1e-5)
    assert "head" in jax.eval_shape(untied.init, jax.random.key(0), x)["params"]
    assert "head" not in variables["params"]


def test_learned_positions_are_added_by_position():
    x = tokens()
    model = build(spec("dense", learned_positions=True, max_length=12))
    variables = init(model, x)
    positions = jnp.broadcast_to(jnp.arange(S) + 3, (2, S))
    shifted = {**variables["params"], "position": jnp.roll(variables["params"]["position"], 3, axis=0)}
    expected = run(model, {"params": shifted}, x, Context(positions=positions))
    np.testing.assert_allclose(expected, run(model, variables, x), atol=1e-5)  # rotary parts see distances only
    assert (abs(run(model, variables, x, Context(positions=positions)) - expected) > 1e-3).any()


def test_bfloat16_computation_keeps_parameters_and_logits_float32():
    x = tokens()
    variables = init(build(spec("dense", "moe")), x)
    half = build(spec("dense", "moe", dtype="bfloat16"))
    logits = run(half, variables, x)
    assert logits.dtype == jnp.float32
    own = jax.eval_shape(half.init, jax.random.key(0), x)["params"]
    assert {leaf.dtype for leaf in jax.tree.leaves(own)} == {np.dtype("float32")}
    exact = run(build(spec("dense", "moe")), variables, x)
    assert 1e-4 < abs(logits - exact).max() < 0.2 * abs(exact).max()


def test_dropout_only_in_training():
    x = tokens()
    model = build({**spec("dense"), "blocks": dict(dense=dict(DENSE, dropout=0.5))})
    variables, plain = init(model, x), build(spec("dense"))
    np.testing.assert_allclose(run(model, variables, x), run(plain, variables, x), atol=1e-6)
    rngs = {"dropout": jax.random.key(1)}
    assert (abs(run(model, variables, x, Context(train=True), rngs=rngs) - run(model, variables, x)) > 1e-3).any()


@ffns.register("silent_for_test")
class Silent(Layer):
    """A layer that averages over its sequence and says nothing."""

    @nn.compact
    def __call__(self, x, ctx):
        return jnp.broadcast_to(x.mean(1, keepdims=True), x.shape)


@pytest.mark.parametrize(
    ("block", "message"),
    [
        (dict(DENSE, mixer=dict(MIXER, causal=False)), r"model\.blocks\.b\.mixer\.causal=False"),
        (dict(kind="mixture_of_depths", block=dict(DENSE, mixer=dict(MIXER, causal=False))), r"model\.blocks\.b\.block\.mixer"),
        (dict(kind="mixture_of_depths", block=DENSE, remedy=None), r"model\.blocks\.b\.remedy=None"),
        (dict(MOE, ffn=dict(MOE["ffn"], select=dict(kind="expert_choice"))), r"model\.blocks\.b\.ffn\.select.*group_by"),
        (dict(DENSE, ffn=dict(kind="silent_for_test")), r"model\.blocks\.b\.ffn \(Silent\) does not say"),
        (
            dict(DENSE, ffn=dict(kind="soft_moe", num_experts=2, bank=dict(kind="glu", hidden=4))),
            r"model\.blocks\.b\.ffn \(soft_moe\)",
        ),
    ],
)
def test_blocks_that_see_the_future_are_refused(block, message):
    with pytest.raises(ConfigError, match=message):
        build({**spec("dense"), "pattern": ("b",), "blocks": dict(b=block)})


def test_a_remedy_or_an_unused_block_is_accepted():
    remedied = dict(MOE, ffn=dict(MOE["ffn"], select=dict(kind="expert_choice"), group_by="position"))
    model = build({**spec("dense"), "pattern": ("b",), "blocks": dict(b=remedied)})
    assert "model.blocks.b.ffn" in why_not_decodable(model)
    unused = dict(DENSE, mixer=dict(MIXER, causal=False))
    assert why_not_decodable(build({**spec("dense"), "blocks": dict(dense=DENSE, unused=unused)})) is None


def test_active_params_counts_the_experts_that_run():
    """Scanned and unrolled, against a count by hand."""
    x = tokens()
    for scan in (True, False):
        model = build(spec("dense", "moe", "dense", "moe", scan=scan))
        params = jax.eval_shape(model.init, jax.random.key(0), x)["params"]
        inactive = 2 * (4 - 2) * 3 * 16 * 8  # layers, experts, matrices, d, f
        assert active_params(model, params) == count_params(params) - inactive
        nested = build(spec("mod", scan=scan))
        shapes = jax.eval_shape(nested.init, jax.random.key(0), x)["params"]
        assert active_params(nested, shapes) == count_params(shapes)


def test_mixtral_has_its_published_size():
    """Mixtral 8x7B (Jiang et al. 2024): 46.7 billion parameters, 12.9 billion of them active."""
    d, f, layers, heads, kv, size, v, experts = 4096, 14336, 32, 32, 8, 128, 32000, 8
    block = dict(
        kind="transformer",
        norm=NORM,
        mixer=dict(kind="attention", num_heads=heads, num_kv_heads=kv, head_dim=size, rope_base=1e6),
        ffn=dict(
            kind="moe",
            num_experts=experts,
            router=dict(kind="linear"),
            select=dict(kind="top_k", k=2),
            bank=dict(kind="glu", hidden=f),
        ),
    )
    fields = dict(vocab_size=v, d_model=d, num_layers=layers, tied=False, dtype="bfloat16")
    model = build(dict(kind="decoder_lm", pattern=("moe",), blocks=dict(moe=block), **fields))
    params = jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 8), jnp.int32))["params"]
    attention = 2 * d * heads * size + 2 * d * kv * size
    layer = attention + experts * 3 * d * f + d * experts + 2 * d
    assert count_params(params) == layers * layer + 2 * v * d + d == 46_702_792_704
    active = layers * (layer - 6 * 3 * d * f) + 2 * v * d + d
    assert active_params(model, params) == active == 12_879_925_248


def test_every_parameter_has_axis_names_that_fit():
    model, x = build(spec("dense", "moe", learned_positions=True, tied=False)), tokens()
    axes = logical_axes(model, x)
    shapes = jax.eval_shape(model.init, jax.random.key(0), x)["params"]
    paths = {tuple(k.key for k in path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(shapes)}
    assert {path for path in paths if "norm" not in path} <= set(axes)
    for path, names in axes.items():
        assert len(names) + ("repeats" in path) == paths[path].ndim
    assert axes[("stack", "repeats", "0_dense", "mixer", "q", "kernel")] == ("embed", "heads")
    assert axes[("stack", "repeats", "0_dense", "mixer", "k", "kernel")] == ("embed", "kv")
    assert axes[("stack", "repeats", "0_dense", "mixer", "o", "kernel")] == ("heads", "embed")
