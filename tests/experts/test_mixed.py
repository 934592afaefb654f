"""Experts of several widths and kinds in one layer: from a config, through a layer, and what it counts. Dispatch is tested beside the others."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from numpy_layers import compiled, draw

from moejax import models
from moejax.core.errors import ConfigError
from moejax.dispatch import Batched
from moejax.experts import FFN, GLU, Copy, Mixed, Null
from moejax.layers.registry import ffns
from moejax.models.inspection import active_params, count_params

D, E = 6, 9
PARTS = {
    "small": {"kind": "ffn", "hidden": 4, "num_experts": 3, "activation": "relu"},
    "wide": {"kind": "ffn", "hidden": 8, "num_experts": 2, "activation": "relu"},
    "null": {"num_experts": 2},
    "copy": {},
    "constant": {},
}
LAYER = {
    "kind": "moe",
    "num_experts": E,
    "router": {"kind": "linear"},
    "select": {"kind": "top_k", "k": 3},
    "bank": {"kind": "mixed", "parts": PARTS},
}


def test_a_layer_from_a_config_is_numpys(rng: np.random.Generator) -> None:
    layer, x = ffns.build(LAYER, "ffn"), rng.normal(size=(2, 5, D))
    variables = draw(layer, jnp.asarray(x, jnp.float32))
    p = jax.tree.map(lambda a: np.asarray(a, np.float64), variables["params"])
    bank = p["bank"]
    assert set(bank) == {"parts_0", "parts_1", "parts_4"}
    outputs = [np.maximum(x @ w, 0) @ v for part in ("parts_0", "parts_1") for w, v in zip(*bank[part].values(), strict=True)]
    outputs += [0 * x, 0 * x, x, np.broadcast_to(bank["parts_4"]["v"][0], x.shape)]
    logits = x @ p["router"]["w"]
    probs = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
    kept = np.argsort(np.argsort(-logits, -1), -1) < 3
    expected = np.einsum("bse,ebsd->bsd", probs * kept, np.stack(outputs))
    np.testing.assert_allclose(compiled(layer)(variables, jnp.asarray(x, jnp.float32)), expected, rtol=1e-4, atol=1e-5)


def test_parts_say_how_many_they_are_and_the_layer_how_many_together() -> None:
    assert ffns.build(LAYER, "ffn").bank.num_experts == E
    as_list = [{"kind": "copy"}, {"kind": "null", "num_experts": 2}]
    assert ffns.build({**LAYER, "num_experts": 3, "bank": {"kind": "mixed", "parts": as_list}}, "ffn").bank.parts == (
        Copy(),
        Null(2),
    )
    with pytest.raises(ConfigError, match=r"router\.num_experts=8 but bank\.num_experts=9; give both the same number"):
        ffns.build({**LAYER, "num_experts": 8}, "ffn")
    with pytest.raises(ConfigError, match=r"unknown key 'hiden' in ffn\.bank\.parts\.wide .*did you mean 'hidden'"):
        ffns.build({**LAYER, "bank": {"kind": "mixed", "parts": {"wide": {"kind": "ffn", "hiden": 3}}}}, "ffn")
    with pytest.raises(ConfigError, match=r"parts=\(\) holds no bank"):
        Mixed(())


def test_a_token_is_counted_by_the_parameters_that_it_uses_not_by_experts() -> None:
    """On average over all choices of 3 of 9 experts, whose sizes differ."""
    block = {"kind": "transformer", "mixer": {"kind": "attention", "num_heads": 1}, "norm": {"kind": "rms_norm"}, "ffn": LAYER}
    model = models.build(
        {"kind": "decoder_lm", "vocab_size": 9, "d_model": D, "num_layers": 2, "pattern": ("a",), "blocks": {"a": block}}
    )
    params = jax.eval_shape(lambda key: model.init(key, jnp.zeros((1, 2), jnp.int32)), jax.random.key(0))["params"]
    sizes = np.array([2 * D * 4] * 3 + [2 * D * 8] * 2 + [0, 0, 0, D])
    choices = [sizes[[i, j, k]].sum() for i in range(E) for j in range(i) for k in range(j)]
    assert active_params(model, params) == count_params(params) - 2 * (sizes.sum() - np.mean(choices))


def test_widths_of_outputs_must_agree_but_null_experts_have_none() -> None:
    wide = Mixed((FFN(hidden=3, features=4), Null(), GLU(hidden=2, features=4)))
    variables = draw(wide, D)
    experts = wide.apply(variables, D)
    assert [part.num_experts for part in experts.parts] == [1, 1, 1]
    x = jnp.ones((3, 2, D))
    y = experts.run(x, Batched())
    assert y.shape == (3, 2, 4)
    np.testing.assert_array_equal(y[1], np.zeros((2, 4)))
    np.testing.assert_array_equal(y[0], experts.parts[0].run(x[:1], Batched())[0])
