"""LoRA (Hu et al. 2021), rsLoRA (Kalajdzievski 2023) and DoRA (Liu et al. 2024): outputs, gradients, starts and merging, by hand."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from numpy_layers import compiled

import moejax as mj
from moejax.core.errors import ConfigError

D, O, R, SCALE = 5, 4, 3, 0.7


class Model(nn.Module):
    @nn.compact
    def __call__(self, x):
        return jnp.sin(nn.Dense(O, name="out")(x))


KINDS = {
    "lora": mj.LoRA(rank=R, scale=SCALE, targets=("out",)),
    "rs_lora": mj.RSLoRA(rank=R, scale=SCALE, targets=("out",)),
    "dora": mj.DoRA(rank=R, scale=SCALE, targets=("out",)),
    "dora_norm": mj.DoRA(rank=R, scale=SCALE, train_norm=True, targets=("out",)),
}


def example(kind: str) -> tuple:
    """The adapted model, its variables with every adapter's number drawn, the base's variables, and tokens."""
    x = jax.random.normal(jax.random.key(0), (6, D))
    base = jax.jit(Model().init)(jax.random.key(1), x)
    base["params"]["out"]["bias"] = jnp.arange(O) / 3
    model = mj.Adapted(Model(), {"main": KINDS[kind]})
    return model, mj.init_adapters(model, base, jax.random.key(2), x), base, x


def adapter_of(variables: dict) -> dict:
    return variables["params"]["out"]["adapter_main"]


def drawn(variables: dict) -> dict:
    """Every number of the adapter away from where it starts."""
    leaves, tree = jax.tree.flatten(adapter_of(variables))
    moved = [leaf + 0.5 * jax.random.normal(jax.random.key(9 + i), leaf.shape) for i, leaf in enumerate(leaves)]
    out = {**variables["params"]["out"], "adapter_main": jax.tree.unflatten(tree, moved)}
    return {"params": {**variables["params"], "out": out}}


def numpy_matrix(kind: str, w: np.ndarray, p: dict) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The adapted matrix, V and its norms."""
    scale = SCALE / np.sqrt(R) if kind == "rs_lora" else SCALE
    v = w + scale * p["a"] @ p["b"]
    norm = np.sqrt((v**2).sum(0))
    return (v * p["m"] / norm if kind.startswith("dora") else v), v, norm


@pytest.mark.parametrize("kind", KINDS)
def test_nothing_changes_at_the_start(kind: str) -> None:
    model, variables, base, x = example(kind)
    np.testing.assert_array_equal(compiled(model)(variables, x), compiled(Model())(base, x))
    np.testing.assert_array_equal(adapter_of(variables)["b"], 0)
    bound = 1 / np.sqrt(D)
    assert (np.abs(adapter_of(variables)["a"]) <= bound).all()
    if kind.startswith("dora"):
        np.testing.assert_allclose(
            adapter_of(variables)["m"], np.linalg.norm(base["params"]["out"]["kernel"], axis=0), rtol=1e-6
        )


@pytest.mark.parametrize("kind", KINDS)
def test_outputs_and_gradients_are_those_of_the_formula(kind: str) -> None:
    """By the chain rule in NumPy; of the norm that passes no gradient, and of the one that does."""
    model, variables, _, x = example(kind)
    variables = drawn(variables)
    p = {k: np.asarray(v, np.float64) for k, v in adapter_of(variables).items()}
    w, bias = (np.asarray(variables["params"]["out"][k], np.float64) for k in ("kernel", "bias"))
    rows, scale = np.asarray(x, np.float64), SCALE / np.sqrt(R) if kind == "rs_lora" else SCALE
    adapted, v, norm = numpy_matrix(kind, w, p)
    z = rows @ adapted + bias
    np.testing.assert_allclose(compiled(model)(variables, x), np.sin(z), rtol=1e-4, atol=1e-5)
    to_adapted = rows.T @ np.cos(z)
    to_v, expected = to_adapted, {}
    if kind.startswith("dora"):
        expected["m"] = (to_adapted * v / norm).sum(0)
        to_v = to_adapted * p["m"] / norm
        if kind == "dora_norm":
            to_v = to_v - v / norm**2 * (to_adapted * v).sum(0) * p["m"] / norm
    expected |= {"a": scale * to_v @ p["b"].T, "b": scale * p["a"].T @ to_v}
    gradient = jax.jit(jax.grad(lambda variables: model.apply(variables, x).sum()))(variables)
    for name, value in expected.items():
        np.testing.assert_allclose(adapter_of(gradient)[name], value, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("kind", KINDS)
def test_merged_it_is_the_base_model_with_other_numbers(kind: str) -> None:
    model, variables, _, x = example(kind)
    variables = drawn(variables)
    merged = mj.merge_adapters(model, variables["params"], x)
    assert "adapter_main" not in merged["out"]
    np.testing.assert_allclose(compiled(Model())({"params": merged}, x), compiled(model)(variables, x), rtol=1e-4, atol=1e-6)


def test_under_rs_lora_a_rank_changes_the_size_of_the_first_step_less() -> None:
    """The gradient of B times its scale, which is the first step's change: it falls as 1 / r under alpha / r, not under alpha / sqrt(r)."""

    def first_change(adapter: mj.LowRankAdapter) -> float:
        x = jax.random.normal(jax.random.key(0), (64, D))
        model = mj.Adapted(Model(), {"main": adapter})
        base = jax.jit(Model().init)(jax.random.key(1), x)
        variables = mj.init_adapters(model, base, jax.random.key(2), x)
        gradient = adapter_of(jax.jit(jax.grad(lambda v: model.apply(v, x).sum()))(variables))["b"]
        stepped = jax.tree.map(lambda v: v, variables)
        stepped["params"]["out"]["adapter_main"]["b"] = -gradient
        return float(jnp.abs(compiled(model)(stepped, x) - compiled(model)(variables, x)).mean())

    few, many = 2, 128
    lora = [first_change(mj.LoRA(rank=r, scale=1e-3 / r, targets=("out",))) for r in (few, many)]
    stabilised = [first_change(mj.RSLoRA(rank=r, scale=1e-3, targets=("out",))) for r in (few, many)]
    assert lora[1] < 0.1 * lora[0]
    assert 0.3 < stabilised[1] / stabilised[0] < 3


def test_a_bank_gets_a_magnitude_for_every_expert() -> None:
    class Routed(nn.Module):
        @nn.compact
        def __call__(self, x):
            return mj.MoE(mj.Linear(3), mj.TopK(k=1), mj.FFN(hidden=4, num_experts=3), name="moe")(x)

    x = jax.random.normal(jax.random.key(0), (2, 5, 6))
    base = jax.jit(Routed().init)(jax.random.key(1), x)
    model = mj.Adapted(Routed(), {"main": mj.DoRA(rank=2, scale=1.0, targets=("*/w_in",))})
    variables = mj.init_adapters(model, {"params": base["params"]}, jax.random.key(2), x)
    np.testing.assert_allclose(
        compiled(model)(variables, x), compiled(Routed())({"params": base["params"]}, x), rtol=1e-5, atol=1e-6
    )
    shapes = {leaf.shape for leaf in jax.tree.leaves(mj.split_adapters(variables["params"])[1])}
    assert shapes == {(3, 6, 2), (3, 2, 4), (3, 4)}


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: mj.DoRA(rank=4, targets=("out",)), "DoRA needs a rank and a scale"),
        (lambda: mj.DoRA(rank=0, scale=1.0, targets=("out",)), "rank=0 must be a whole number of at least 1"),
        (lambda: mj.RSLoRA(scale=1.0, targets=("out",)), "RSLoRA needs a rank and a scale"),
    ],
)
def test_what_is_missing_is_named(make, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        make()
