"""Other transformations than a gradient: forward mode, derivatives of derivatives, and export with a batch of any size."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moejax import FFN, Linear, MoE, TopK
from moejax.core.errors import ConfigError

D = 4


def layer(backend, **select):
    return MoE(Linear(3), TopK(k=2, **select), FFN(hidden=5, num_experts=3), backend=backend)


@pytest.fixture(scope="module")
def params():
    return jax.jit(layer("reference").init)(jax.random.key(0), jnp.zeros((1, 2, D)))["params"]


@pytest.mark.parametrize("backend", ["capacity", "gather", "einsum", "reference"])
def test_forward_mode_and_hessian_vector_products(params, rng, backend):
    """Against differences of values and of gradients."""
    x, v = (jnp.asarray(rng.normal(size=(1, 3, D)), jnp.float32) for _ in range(2))
    f = jax.jit(lambda x: jnp.sin(layer(backend).apply({"params": params}, x)).sum())
    df, (_, slope), (_, curved) = jax.grad(f), jax.jvp(f, (x,), (v,)), jax.jvp(jax.grad(f), (x,), (v,))
    h = 1e-2
    np.testing.assert_allclose(slope, (f(x + h * v) - f(x - h * v)) / (2 * h), rtol=2e-2, atol=2e-3)
    np.testing.assert_allclose(curved, (df(x + h * v) - df(x - h * v)) / (2 * h), rtol=5e-2, atol=5e-3)


WRONG_WAYS = {
    "jvp": lambda f, x: jax.jvp(f, (x,), (x,)),
    "linearize": lambda f, x: jax.linearize(f, x)[1](x),
    "hessian": lambda f, x: jax.jvp(jax.grad(f), (x,), (x,)),
}


@pytest.mark.parametrize("way", WRONG_WAYS.values(), ids=WRONG_WAYS)
@pytest.mark.parametrize("wrap", [lambda f: f, jax.jit, jax.checkpoint], ids=["eager", "jit", "remat"])
def test_forward_mode_of_what_goes_backward_names_what_can(params, rng, wrap, way):
    x = jnp.asarray(rng.normal(size=(1, 3, D)), jnp.float32)
    f = wrap(lambda x: jnp.sin(layer("grouped").apply({"params": params}, x)).sum())
    with pytest.raises(
        ConfigError, match=r"backend='grouped' has derivatives that go backward.* take 'capacity', 'gather', 'einsum' or"
    ):
        way(f, x)


def test_forward_mode_in_the_parameters_alone_names_what_can(params, rng):
    x = jnp.asarray(rng.normal(size=(1, 3, D)), jnp.float32)
    f = jax.jit(lambda p: layer("grouped").apply({"params": p}, x).sum())
    with pytest.raises(ConfigError, match="take 'capacity'"):
        jax.jvp(f, (params,), (params,))


@pytest.mark.parametrize("wrap", [jax.vmap, lambda f: jax.checkpoint(jax.vmap(f))], ids=["vmap", "remat"])
def test_what_goes_backward_only_still_does(params, rng, wrap):
    """Under vmap, inside a scan, as layers are; against the reference."""
    x = jnp.asarray(rng.normal(size=(2, 1, 3, D)), jnp.float32)

    def gradients(backend):
        def f(p, x):
            apply = wrap(lambda x: layer(backend).apply({"params": p}, x))
            y, _ = jax.lax.scan(lambda x, _: (x + apply(x), None), x, None, length=2)
            return jnp.sin(y).sum()

        return jax.jit(jax.grad(f, argnums=(0, 1)))(params, x)

    found, expected = gradients("grouped"), gradients("reference")
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), found, expected)


@pytest.mark.parametrize(
    ("backend", "select"), [("auto", {}), ("auto", {"capacity_factor": 1.0}), ("gather", {}), ("einsum", {})]
)
def test_export_with_a_symbolic_batch(params, rng, backend, select):
    model = layer(backend, **select)
    (b,) = jax.export.symbolic_shape("b")
    apply = jax.jit(lambda x: model.apply({"params": params}, x))
    exported = jax.export.export(apply)(jax.ShapeDtypeStruct((b, 3, D), jnp.float32))
    for size in (1, 5):
        x = jnp.asarray(rng.normal(size=(size, 3, D)), jnp.float32)
        np.testing.assert_allclose(exported.call(x), apply(x), atol=1e-5)


def test_what_cannot_be_exported_names_what_can(params):
    (b,) = jax.export.symbolic_shape("b")
    with pytest.raises(ConfigError, match=r"backend='grouped' needs sizes that are numbers.*take 'capacity'"):
        jax.eval_shape(lambda x: layer("grouped").apply({"params": params}, x), jax.ShapeDtypeStruct((b, 3, D), jnp.float32))
