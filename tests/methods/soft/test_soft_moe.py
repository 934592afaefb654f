"""Soft MoE against the equations of the paper (Puigcerver et al. 2023, algorithm 1 and section 2.3), in NumPy loops."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from numpy_layers import compiled, draw, glu

from moejax import GLU, ConfigError, Context, SoftMoE
from moejax.layers.registry import ffns

B, M, D, E, P = 2, 6, 5, 3, 2  # m tokens = n experts * p slots, as in the paper
VALID = np.array([[True] * M, [True, True, False, True, False, True]])


def paper(params, x: np.ndarray, valid: np.ndarray, normalise: bool, dispatch: str, combine: str) -> np.ndarray:
    """One sequence `x[m, d]`."""
    router = next(tree for tree in params.values() if "scale" in tree)
    phi, scale = np.asarray(router["w"], np.float64).reshape(D, E, P), float(router["scale"])
    tokens = np.flatnonzero(valid)
    unit = x / np.linalg.norm(x, axis=1, keepdims=True) if normalise else x
    phi = phi / np.linalg.norm(phi, axis=0) if normalise else phi
    logits = np.einsum("md,dnp->mnp", unit, scale * phi)
    into = np.exp(logits if dispatch == "soft" else 0 * logits)
    out = np.exp(logits if combine == "soft" else 0 * logits)
    y = np.zeros_like(x)
    for e in range(E):
        for p in range(P):
            weights = into[tokens, e, p] / into[tokens, e, p].sum()
            slot = glu(params["bank"], e, weights @ x[tokens])  # the raw tokens are mixed, not the normalised ones
            for t in tokens:
                y[t] += out[t, e, p] / out[t].sum() * slot
    return y


@pytest.mark.parametrize(
    "fields",
    [{}, dict(normalise=False), dict(dispatch="uniform"), dict(combine="uniform"), dict(dispatch="uniform", combine="uniform")],
    ids=["paper", "not_normalised", "uniform_dispatch", "uniform_combine", "uniform"],
)
def test_it_is_the_papers(rng: np.random.Generator, fields: dict) -> None:
    layer = SoftMoE(GLU(4, num_experts=E), num_experts=E, slots=P, **fields)
    x = rng.normal(size=(B, M, D))
    variables = draw(layer, jnp.asarray(x, jnp.float32))
    y = compiled(layer)(variables, jnp.asarray(x, jnp.float32), Context(valid=jnp.asarray(VALID)))
    how = dict(normalise=True, dispatch="soft", combine="soft") | fields
    for b in range(B):
        expected = paper(variables["params"], x[b], VALID[b], **how)
        np.testing.assert_allclose(y[b], expected, rtol=1e-4, atol=1e-5)


def test_every_token_and_every_parameter_gets_a_gradient(rng: np.random.Generator) -> None:
    """Nothing is selected: unlike sparse routing, all experts learn from all tokens."""
    layer = SoftMoE(GLU(4, num_experts=E), num_experts=E, slots=P)
    x = jnp.asarray(rng.normal(size=(B, M, D)), jnp.float32)
    variables = draw(layer, x)
    dv, dx = jax.jit(jax.grad(lambda v, x: jnp.sin(layer.apply(v, x)[:, 0]).sum(), argnums=(0, 1)))(variables, x)
    assert (np.abs(dx).max(-1) > 0).all()
    for leaf in jax.tree.leaves(dv):
        assert (leaf != 0).mean() > 0.99


def test_it_comes_from_a_config_and_is_refused_in_decoders() -> None:
    spec = dict(kind="soft_moe", num_experts=E, slots=P, bank=dict(kind="glu", hidden=4))
    layer = ffns.build(spec, where="ffn")
    assert layer == SoftMoE(GLU(4, num_experts=E), num_experts=E, slots=P)
    with pytest.raises(ConfigError, match=r"model\.ffn \(soft_moe\) averages over all tokens and leaks the future"):
        layer.check_causal("model.ffn")
    assert layer.decodable() == "soft slots average over the whole sequence"
    assert layer.active_fraction() == 1.0
    with pytest.raises(ConfigError, match="dispatch='hard' is unknown"):
        jax.eval_shape(SoftMoE(GLU(4, num_experts=E), E, dispatch="hard").init, jax.random.key(0), jnp.ones((1, M, D)))
