"""Sparse upcycling (Komatsuzaki et al. 2022): copies, what the model computes at the start, and how its symmetry breaks."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict
from numpy_layers import compiled

import moejax as mj
from moejax import models
from moejax.core import roles
from moejax.core.errors import ConfigError
from moejax.surgery.base import Checkpoint, Target, spelt, surgeries

E, D, F = 4, 6, 5
UPCYCLE, EXTEND = {"kind": "upcycle"}, {"kind": "extend", "paths": ("*/router",)}


class Holder(nn.Module):
    """A layer where a model would have it."""

    layer: nn.Module

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        return self.layer.copy(name="ffn")(x)


def variables(model: nn.Module, x: jax.Array, seed: int) -> dict:
    return {"params": jax.jit(model.init)(jax.random.key(seed), x)["params"]}


def upcycle(dense: nn.Module, mixture: nn.Module, x: jax.Array, /, **fields) -> tuple[dict, dict]:
    """Parameters of the dense model, and those that the mixture starts with."""
    before, fresh = variables(dense, x, 0), variables(mixture, x, 1)
    untrained = flatten_dict(fresh)
    target = Target(
        {}, jax.eval_shape(lambda: fresh), roles.describe(mixture, x), jax.random.key(2), {},
        lambda paths: {path: untrained[path] for path in paths}, lambda count: [],
    )  # fmt: skip
    found = Checkpoint({}, before)
    for spec in ({**UPCYCLE, **fields}, EXTEND):
        found = surgeries.build(spec, "init.surgeries.x")(found, target)
    shapes = [{spelt(path): leaf.shape for path, leaf in flatten_dict(tree).items()} for tree in (found.variables, fresh)]
    assert shapes[0] == shapes[1]
    return before["params"], found.params


def layers(kind: str = "glu", **select) -> tuple[nn.Module, nn.Module]:
    dense, bank = {"glu": (mj.DenseGLU, mj.GLU), "ffn": (mj.DenseFFN, mj.FFN)}[kind]
    rule = mj.ExpertChoice(**select) if "in_order" in select else mj.TopK(k=2, **select)
    more = {"use_bias": True} if kind == "ffn" else {}
    router = mj.Linear(E, init_w=mj.Normal(0.5))
    return Holder(dense(F, **more)), Holder(mj.MoE(router, rule, bank(F, num_experts=E, **more)))


@pytest.fixture
def x(rng: np.random.Generator) -> jax.Array:
    return jnp.asarray(rng.normal(size=(2, 7, D)), jnp.float32)


def gates(params: dict, x: jax.Array) -> np.ndarray:
    """Softmax over all experts."""
    z = np.asarray(x, np.float64) @ np.asarray(params["ffn"]["router"]["w"], np.float64)
    return np.exp(z) / np.exp(z).sum(-1, keepdims=True)


@pytest.mark.parametrize("kind", ["glu", "ffn"])
def test_with_normalised_weights_the_mixture_starts_as_the_dense_layer(x: jax.Array, kind: str) -> None:
    dense, mixture = layers(kind, normalise=True)
    before, after = upcycle(dense, mixture, x)
    for name, w in before["ffn"]["expert"].items():
        for e in range(E):
            np.testing.assert_array_equal(after["ffn"]["bank"][name][e], w[0])
    np.testing.assert_allclose(
        compiled(mixture)({"params": after}, x), compiled(dense)({"params": before}, x), rtol=1e-5, atol=1e-6
    )


def test_without_them_it_is_scaled_by_the_gates_of_the_chosen(x: jax.Array) -> None:
    dense, mixture = layers(normalise=False)
    before, after = upcycle(dense, mixture, x)
    chosen = np.sort(gates(after, x), -1)[..., -2:].sum(-1, keepdims=True)
    assert chosen.mean() < 0.9
    expected = chosen * np.asarray(compiled(dense)({"params": before}, x))
    np.testing.assert_allclose(compiled(mixture)({"params": after}, x), expected, rtol=1e-5, atol=1e-6)


def test_under_expert_choice_tokens_that_nobody_chose_are_missing(x: jax.Array) -> None:
    """As in vision, with c = 1: normalised for those with an expert, nothing for those without."""
    dense, mixture = layers(normalise=True, capacity_factor=1.0, in_order=False)
    before, after = upcycle(dense, mixture, x)
    chosen = np.zeros(x.shape[:2], bool)
    room = int(np.ceil(x.shape[1] / E))
    for b, probabilities in enumerate(gates(after, x)):
        for e in range(E):
            chosen[b, np.argsort(-probabilities[:, e], kind="stable")[:room]] = True
    assert 0 < chosen.mean() < 1
    expected = chosen[..., None] * np.asarray(compiled(dense)({"params": before}, x))
    np.testing.assert_allclose(compiled(mixture)({"params": after}, x), expected, rtol=1e-5, atol=1e-6)


def test_at_the_start_the_router_has_no_gradient_and_experts_share_that_of_the_dense_layer(x: jax.Array) -> None:
    """Equal experts, weights that sum to 1: which of them runs makes no difference. Different tokens make them differ."""
    dense, mixture = layers(normalise=True)
    before, after = upcycle(dense, mixture, x)

    def slope(model: nn.Module, params: dict) -> dict:
        return jax.jit(jax.grad(lambda p: jnp.sin(model.apply({"params": p}, x)).sum()))(params)["ffn"]

    ours, theirs = slope(mixture, after), slope(dense, before)
    np.testing.assert_allclose(ours["router"]["w"], 0.0, atol=1e-5)
    for name, g in theirs["expert"].items():
        np.testing.assert_allclose(ours["bank"][name].sum(0), g[0], rtol=1e-4, atol=1e-5)
        assert np.abs(ours["bank"][name][0] - ours["bank"][name][1]).max() > 1e-2
    # Without normalisation the router learns from the first step on: dy/dz_i of a chosen i is g_i (1 - g_i - g_j) * dense.
    raw = layers(normalise=False)[1]
    probabilities, y = gates(after, x), np.asarray(compiled(dense)({"params": before}, x), np.float64)
    expected = np.zeros((D, E))
    for b, t in np.ndindex(x.shape[:2]):
        p = probabilities[b, t]
        top = np.argsort(-p)[:2]
        dy = (np.cos(p[top].sum() * y[b, t]) * y[b, t]).sum()
        dz = np.array([p[i] * ((i in top) - p[top].sum()) for i in range(E)])
        expected += np.outer(np.asarray(x, np.float64)[b, t], dy * dz)
    np.testing.assert_allclose(slope(raw, after)["router"]["w"], expected, rtol=1e-3, atol=1e-5)


def test_a_whole_model_with_scanned_layers_keeps_its_function_and_its_other_parameters() -> None:
    def model(ffn: dict) -> nn.Module:
        attention = {"kind": "attention", "num_heads": 2}
        blocks = {
            name: {"kind": "transformer", "norm": {"kind": "rms_norm"}, "mixer": dict(attention), "ffn": part}
            for name, part in (("dense", {"kind": "glu", "hidden": 7}), ("moe", ffn))
        }
        spec = {"kind": "decoder_lm", "vocab_size": 11, "d_model": 8, "num_layers": 4, "blocks": blocks}
        return models.build({**spec, "pattern": ("dense", "moe")})

    moe = {"kind": "moe", "num_experts": E, "router": {"kind": "linear"}, "bank": {"kind": "glu", "hidden": 7}}
    mixture = model({**moe, "select": {"kind": "top_k", "k": 2, "normalise": True}})
    dense = model({"kind": "glu", "hidden": 7})
    tokens = jnp.arange(22).reshape(2, 11) % 11
    before, after = upcycle(dense, mixture, tokens)
    found, expected = (jax.jit(m.apply)({"params": p}, tokens) for m, p in ((mixture, after), (dense, before)))
    np.testing.assert_allclose(found, expected, atol=2e-6)
    old, new = flatten_dict(before, sep="/"), flatten_dict(after, sep="/")
    for name, w in old.items():
        if "1_moe/ffn/expert" in name:
            copies = new[name.replace("expert", "bank")]
            assert copies.shape == (2, E, *w.shape[2:])
            np.testing.assert_array_equal(copies, np.repeat(w, E, 1))
        else:
            np.testing.assert_array_equal(new[name], w)


def test_noise_is_each_experts_own_and_as_large_as_asked(x: jax.Array) -> None:
    dense, mixture = layers()
    before, after = upcycle(dense, mixture, x, noise=0.1)
    w, experts = before["ffn"]["expert"]["w_up"][0], after["ffn"]["bank"]["w_up"]
    noise = np.asarray(experts - w)
    np.testing.assert_allclose(noise.std() / w.std(), 0.1, rtol=0.2)
    assert abs(np.corrcoef(noise[0].ravel(), noise[1].ravel())[0, 1]) < 0.6
    assert not np.allclose(noise[0], after["ffn"]["bank"]["w_gate"][0] - before["ffn"]["expert"]["w_gate"][0])


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"banks": ("*/bnak",)}, r"'\*/bnak' in upcycle.banks matches no parameter; the nearest are .*ffn/bank"),
        ({"banks": ("*/router",)}, r"'\*/router' in upcycle.banks \(of what has experts\) matches no parameter"),
        (
            {"dense": "mlp"},
            r"'ffn/bank/w_\w+' is to be copies of 'ffn/mlp/w_\w+', which the checkpoint lacks; it has ffn/expert/",
        ),
        ({"noise": -1.0}, r"init.surgeries.x.noise=-1.0 must be a number of at least 0"),
    ],
)
def test_what_does_not_fit_is_named(x: jax.Array, fields: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        upcycle(*layers(), x, **fields)


def test_experts_of_another_width_are_no_copies(x: jax.Array) -> None:
    with pytest.raises(
        ConfigError, match=r"'ffn/expert/w_\w+' \[1, \d, \d\] cannot be each expert .* as wide as the dense layer"
    ):
        upcycle(Holder(mj.DenseGLU(F + 1)), layers()[1], x)
