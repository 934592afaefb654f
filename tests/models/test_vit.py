"""The vision transformer: patches, positions, pooling, masks, and the published size of ViT-L/16."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moejax.core.context import Context
from moejax.core.errors import ConfigError
from moejax.models import build, count_params
from moejax.models.vit import patches, sincos2d

NORM = dict(kind="layer_norm")
BLOCK = dict(kind="transformer", norm=NORM, mixer=dict(kind="attention", num_heads=2), ffn=dict(kind="ffn", hidden=16))
MOE = dict(
    BLOCK,
    ffn=dict(
        kind="moe",
        num_experts=3,
        router=dict(kind="linear"),
        select=dict(kind="expert_choice", capacity_factor=1.0),
        bank=dict(kind="ffn", hidden=8),
    ),
)
SPEC = dict(
    kind="vit", image_size=6, channels=2, patch_size=2, num_classes=5, d_model=8, num_layers=2, pattern=("a", "b"),
    blocks=dict(a=BLOCK, b=MOE),
)  # fmt: skip


def images():
    return jnp.asarray(np.random.default_rng(0).normal(size=(3, 6, 6, 2)), jnp.float32)


def init(model):
    """Parameters away from their start, so that no layer is near the identity; drawn without compiling anything."""
    shapes = jax.eval_shape(model.init, jax.random.key(0), images())["params"]
    rng = np.random.default_rng(1)

    def draw(leaf):
        noise = rng.normal(size=leaf.shape)
        return jnp.asarray(noise / np.sqrt(leaf.shape[-2]) if leaf.ndim > 1 else 1 + 0.2 * noise, leaf.dtype)

    return jax.tree.map(draw, shapes)


@functools.cache
def compiled(model):
    return jax.jit(model.apply)


def run(model, params, x, ctx=None):
    return compiled(model)({"params": params}, x, ctx)


def test_patches_are_in_reading_order():
    x = np.asarray(images())
    out = np.asarray(patches(jnp.asarray(x), 2))
    assert out.shape == (3, 9, 8)
    for row, column in np.ndindex(3, 3):
        expected = x[:, 2 * row : 2 * row + 2, 2 * column : 2 * column + 2].reshape(3, -1)
        np.testing.assert_array_equal(out[:, 3 * row + column], expected)


def test_sincos2d_against_a_loop():
    table = sincos2d(3, 8, base=100.0)
    for index, (row, column) in enumerate(np.ndindex(3, 3)):
        expected = []
        for coordinate in (row, column):
            angles = [coordinate / 100.0 ** (i / 2) for i in range(2)]
            expected += [np.sin(a) for a in angles] + [np.cos(a) for a in angles]
        np.testing.assert_allclose(table[index], expected, atol=1e-6)


@pytest.mark.parametrize("pooling", ["mean", "cls"])
def test_permuting_patches_with_their_positions_changes_nothing(pooling):
    """The network knows places by the position table alone, and every patch can reach the result."""
    model = build({**SPEC, "pooling": pooling})
    params, x = init(model), images()
    order = np.random.default_rng(2).permutation(9)
    tiles = np.asarray(x).reshape(3, 3, 2, 3, 2, 2).transpose(0, 1, 3, 2, 4, 5).reshape(3, 9, 2, 2, 2)[:, order]
    shuffled = jnp.asarray(tiles.reshape(3, 3, 3, 2, 2, 2).transpose(0, 1, 3, 2, 4, 5).reshape(3, 6, 6, 2))
    moved = {**params, "position": params["position"][order]}
    logits = run(model, params, x)
    np.testing.assert_allclose(run(model, moved, shuffled), logits, atol=1e-5)
    assert (abs(run(model, params, shuffled) - logits) > 1e-3).all(axis=1).any()
    changed = run(model, params, x.at[:, -1, -1].add(5.0))
    assert (abs(changed - logits) > 1e-4).any(axis=1).all()


@pytest.mark.parametrize("pooling", ["mean", "cls"])
def test_invalid_patches_and_images_are_inert(pooling):
    model = build({**SPEC, "pooling": pooling})
    params, x = init(model), images()
    valid = jnp.ones((3, 9), bool).at[1, 8].set(False).at[2].set(False)
    ctx = Context(valid=valid)
    logits = run(model, params, x, ctx)
    np.testing.assert_allclose(run(model, params, x.at[1, 4:, 4:].add(9.0), ctx), logits, atol=1e-5)
    assert (abs(run(model, params, x.at[1, :2, :2].add(9.0), ctx) - logits)[1] > 1e-3).any()
    per_image = run(model, params, x, Context(valid=jnp.array([[True], [True], [False]])))
    np.testing.assert_allclose(per_image[0], run(model, params, x)[0], atol=1e-5)
    assert np.isfinite(per_image).all()


def test_head_starts_at_zero_and_learns():
    model = build({**SPEC, "pattern": ("a",), "positions": "sincos2d", "dtype": "bfloat16"})
    variables = jax.jit(model.init)(jax.random.key(0), images())
    assert "position" not in variables["params"]
    logits = run(model, variables["params"], images())
    assert logits.dtype == jnp.float32
    assert not logits.any()
    grads = jax.jit(jax.grad(lambda p: model.apply({"params": p}, images())[:, 0].sum()))(variables["params"])
    assert grads["head"]["kernel"].any()


def test_vit_large_has_its_published_size():
    """ViT-L/16 at 224 pixels with 1000 classes: 304.3 million (here the class token needs no position of its own)."""
    d, f, layers, heads, n = 1024, 4096, 24, 16, 14 * 14
    block = dict(
        kind="transformer",
        norm=NORM,
        mixer=dict(kind="attention", num_heads=heads, use_bias=True),
        ffn=dict(kind="ffn", hidden=f, use_bias=True),
    )
    sizes = dict(image_size=224, channels=3, patch_size=16, num_classes=1000, d_model=d, num_layers=layers)
    model = build(dict(kind="vit", pooling="cls", pattern=("a",), blocks=dict(a=block), **sizes))
    params = jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 224, 224, 3)))["params"]
    layer = 4 * (d * d + d) + (d * f + f) + (f * d + d) + 4 * d
    expected = (16 * 16 * 3 * d + d) + n * d + d + layers * layer + 2 * d + (d * 1000 + 1000)
    assert count_params(params) == expected == 304_326_632 - d


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (dict(patch_size=4), r"patch_size=4 does not divide image_size=6 \(in model\)"),
        (dict(positions="sincos"), "did you mean 'sincos2d'"),
        (dict(positions="sincos2d", d_model=6), "d_model=6 must be a multiple of 4"),
        (dict(pooling="max"), "pooling='max' is unknown; did you mean 'mean'"),
        (dict(pattern=("a", "c")), "names block 'c'"),
    ],
)
def test_bad_fields_are_refused(fields, message):
    with pytest.raises(ConfigError, match=message):
        build({**SPEC, **fields})


def test_images_of_another_size_are_refused():
    with pytest.raises(ConfigError, match=r"images of shape \(8, 8, 2\) given to a ViT for \(6, 6, 2\)"):
        build(SPEC).init(jax.random.key(0), jnp.zeros((1, 8, 8, 2)))
