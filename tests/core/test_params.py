"""Parameters carry logical axis names, found by tracing a model without computing it."""

import flax.linen as nn
import flax.traverse_util
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import moejax as mj
from moejax.core.params import Dense, logical_axes, param
from moejax.models import build

NORM, MIXER = dict(kind="rms_norm"), dict(kind="attention", num_heads=2, qk_norm="head")
DENSE = dict(kind="transformer", mixer=MIXER, norm=NORM, ffn=dict(kind="ffn", hidden=6, use_bias=True))
MOE = dict(
    kind="moe", num_experts=4, router=dict(kind="linear", use_bias=True), select=dict(kind="top_k", k=2),
    bank=dict(kind="glu", hidden=6), shared=dict(kind="glu", hidden=3),
)  # fmt: skip
BLOCKS = dict(
    dense=DENSE,
    moe=dict(DENSE, ffn=MOE),
    mod=dict(kind="mixture_of_depths", block=DENSE),
)


def language_model(**fields) -> nn.Module:
    fields = dict(pattern=("dense", "moe", "mod"), blocks=BLOCKS, tied=False, learned_positions=True) | fields
    return build(dict(kind="decoder_lm", vocab_size=7, d_model=8, num_layers=2 * len(fields["pattern"]), **fields))


@pytest.mark.parametrize("scan", [True, False])
def test_names_cover_every_parameter_of_a_language_model(scan: bool) -> None:
    model, tokens = language_model(scan=scan), jnp.zeros((1, 4), jnp.int32)
    axes = logical_axes(model, tokens)
    shapes = flax.traverse_util.flatten_dict(jax.eval_shape(model.init, jax.random.key(0), tokens)["params"])
    # Flax's own norms are vectors of the model's width: there is nothing to shard.
    unnamed = {path for path in shapes if path not in axes}
    assert all(path[-2:] == ("norm", "scale") for path in unnamed)
    assert set(axes) <= set(shapes)
    for path, names in axes.items():
        layers = 1 if "repeats" in path else 0
        assert len(names) + layers == len(shapes[path].shape), path
        if "expert" in names:
            assert shapes[path].shape[layers + names.index("expert")] == (1 if path[-2] in ("expert", "shared") else 4)
    root = ("stack", "repeats") if scan else ("stack", "repeat_1")
    assert axes["embedding",] == ("vocab", "embed")
    assert axes[(*root, "1_moe", "ffn", "bank", "w_gate")] == ("expert", "embed", "mlp")
    assert axes[(*root, "1_moe", "ffn", "bank", "w_out")] == ("expert", "mlp", "embed")
    assert axes[(*root, "2_mod", "block", "mixer", "o", "kernel")] == ("heads", "embed")


def test_names_cover_lora_and_the_cosine_router() -> None:
    x = jnp.zeros((1, 3, 8))
    lora = {"targets": ("*",), "rank": 3, "scale": 1.0}
    mixture = mj.Adapted(Dense(5, axes=("embed", "mlp")), {"main": mj.LoRA(num_experts=2, **lora)})
    for layer in (
        mixture,
        mj.Adapted(Dense(5, axes=("embed", "mlp")), {"main": mj.LoRA(**lora)}),
        mj.SoftMoE(mj.GLU(4, num_experts=2), num_experts=2),
    ):
        shapes = flax.traverse_util.flatten_dict(jax.eval_shape(layer.init, jax.random.key(0), x)["params"])
        axes = logical_axes(layer, x)
        assert {path: len(names) for path, names in axes.items()} == {path: len(leaf.shape) for path, leaf in shapes.items()}
    assert logical_axes(mixture, x)["adapter_main", "moe", "bank", "a"] == ("expert", "embed", "rank")
    bias = mj.Adapted(Dense(5, use_bias=False, axes=("mlp", "embed")), {"main": mj.LoRA(**lora)})
    assert logical_axes(bias, x)["adapter_main", "a"] == ("mlp", "rank")


def test_dense_is_flaxs_with_names() -> None:
    ours, flaxs, x = Dense(5, axes=("embed", "mlp")), nn.Dense(5), jnp.ones((2, 3))
    variables = ours.init(jax.random.key(0), x)
    jax.tree.map(np.testing.assert_array_equal, variables, flaxs.init(jax.random.key(0), x))
    assert logical_axes(ours, x) == {("kernel",): ("embed", "mlp"), ("bias",): ("mlp",)}
    assert logical_axes(Dense(5, use_bias=False, axes=("embed", "mlp")), x) == {("kernel",): ("embed", "mlp")}


@pytest.mark.parametrize("axes", [("embed",), ("embed", "width")])
def test_names_that_do_not_fit_are_refused(axes: tuple[str, ...]) -> None:
    class Layer(nn.Module):
        @nn.compact
        def __call__(self) -> jax.Array:
            return param(self, "w", nn.initializers.ones, (2, 3), axes)

    with pytest.raises(ValueError, match=r"of w do not fit shape \(2, 3\); valid names: \['batch', 'embed', "):
        logical_axes(Layer())
    np.testing.assert_array_equal(Layer().init(jax.random.key(0))["params"]["w"], np.ones((2, 3)))


def test_nothing_is_recorded_or_kept_between_models() -> None:
    x = jnp.ones((2, 3))
    first = logical_axes(Dense(5, axes=("embed", "mlp")), x)
    Dense(5, axes=("embed", "heads")).init(jax.random.key(0), x)
    assert logical_axes(Dense(5, use_bias=False, axes=("embed", None)), x) == {("kernel",): ("embed", None)}
    assert first["kernel",] == ("embed", "mlp")
