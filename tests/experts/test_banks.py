"""Banks: how experts start, and what is special to one kind. Their arithmetic in every layout is in the agreement test."""

import functools
import math

import flax.traverse_util
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from numpy_layers import compiled

from moejax.core.context import Context
from moejax.core.errors import ConfigError
from moejax.dispatch import Batched, Experts, PerToken
from moejax.experts import (
    ACTIVATIONS,
    FFN,
    GLU,
    Bottleneck,
    Constant,
    LowRank,
    Residual,
    SigmoidGate,
    TrainOnly,
    banks,
    experts_of,
)
from moejax.layers import MoE
from moejax.routing import Linear, TopK

D, F = 6, 5
BANKS = {
    "ffn": lambda e: FFN(F, num_experts=e, use_bias=True),
    "glu": lambda e: GLU(F, num_experts=e),
    "low_rank": lambda e: LowRank(rank=3, features=4, num_experts=e),
    "bottleneck": lambda e: Bottleneck(F, num_experts=e),
    "residual": lambda e: Residual(F, num_experts=e, sublayers=2),
    "constant": lambda e: Constant(num_experts=e),
    "sigmoid_gate": lambda e: SigmoidGate(FFN(F, num_experts=e)),
}
WITHOUT = {"train_only", "mixed", "null", "copy"}  # which draw nothing themselves


@functools.cache
def start(name: str, e: int) -> dict[str, jax.Array]:
    params = jax.jit(lambda key: BANKS[name](e).init(key, D))(jax.random.key(3))["params"]
    return flax.traverse_util.flatten_dict(params, sep="/")


def test_every_registered_bank_is_tested_here() -> None:
    assert set(BANKS) == set(banks.kinds()) - WITHOUT


@pytest.mark.parametrize("name", BANKS)
def test_expert_i_starts_the_same_however_many_there_are_and_no_two_alike(name: str) -> None:
    few, many = start(name, 4), start(name, 8)
    random = [key for key, value in many.items() if np.std(value) > 0]
    assert random
    for key, value in many.items():
        assert value.shape[0] == 8
        np.testing.assert_array_equal(few[key], value[:4])
    for key in random:
        for i in range(8):
            for j in range(i):
                assert (many[key][i] != many[key][j]).mean() > 0.99


def test_parameters_are_the_same_on_one_device_and_on_eight() -> None:
    mesh = Mesh(np.array(jax.devices()), ("expert",))
    assert mesh.size == 8
    bank = BANKS["glu"](8)
    sharded = jax.jit(lambda key: bank.init(key, D), out_shardings=NamedSharding(mesh, PartitionSpec("expert")))
    params = sharded(jax.random.key(3))["params"]
    for key, value in start("glu", 8).items():
        assert len({shard.device for shard in params[key].addressable_shards}) == 8
        assert params[key].addressable_shards[0].data.shape[0] == 1
        np.testing.assert_array_equal(params[key], value)


def test_fan_in_is_that_of_one_expert() -> None:
    """LeCun: variance 1 / fan_in with the fan-in of one matrix [d, f], neither e * d nor anything else of the stack."""
    d, f, e = 64, 24, 40
    params = jax.jit(lambda key: FFN(f, num_experts=e).init(key, d))(jax.random.key(0))["params"]
    np.testing.assert_allclose(params["w_in"].std(), 1 / np.sqrt(d), rtol=0.02)
    np.testing.assert_allclose(params["w_out"].std(), 1 / np.sqrt(f), rtol=0.02)
    np.testing.assert_allclose(params["w_in"].std((1, 2)), 1 / np.sqrt(d), rtol=0.15)


def test_low_rank_experts_start_at_zero_with_uniform_a() -> None:
    d, r, e = 64, 16, 32
    bank = LowRank(rank=r, features=9, num_experts=e, scale=3.0)
    variables = jax.jit(lambda key: bank.init(key, d))(jax.random.key(0))
    np.testing.assert_array_equal(bank.apply(variables, d).run(jnp.ones((e, 2, d)), Batched()), np.zeros((e, 2, 9)))
    a, b = variables["params"]["a"], variables["params"]["b"]
    assert (a.shape, b.shape) == ((e, d, r), (e, r, 9))
    assert np.abs(a).max() <= 1 / np.sqrt(d)
    np.testing.assert_allclose(a.std(), 1 / np.sqrt(3 * d), rtol=0.02)
    assert not b.any()
    # At the start only B learns: were both zero, nothing would ever learn.
    grads = jax.jit(jax.grad(lambda p: bank.apply({"params": p}, d).run(jnp.ones((e, 2, d)), Batched()).sum()))(
        variables["params"]
    )
    assert not grads["a"].any()
    assert grads["b"].any()


@pytest.mark.parametrize("kind", ["ffn", "glu"])
def test_dropout_acts_in_training_only_and_keeps_the_mean(kind: str) -> None:
    """Identity matrices make the hidden layer visible: every unit is dropped or divided by the share that is kept."""
    n = 400
    eye = jnp.eye(D)[None]
    if kind == "ffn":
        bank, params = FFN(D, activation="identity", dropout=0.25), {"w_in": eye, "w_out": eye}
    else:
        bank, params = GLU(D, activation="identity", dropout=0.25), {"w_gate": eye, "w_up": eye, "w_out": eye}
    x = jnp.ones((1, n, D))
    variables = {"params": params}
    for ctx in (None, Context(), Context(train=False)):
        np.testing.assert_array_equal(bank.apply(variables, D, ctx).run(x, Batched()), x)
    y, other = (
        bank.apply(variables, D, Context(train=True), rngs={"dropout": jax.random.key(i)}).run(x, Batched()) for i in range(2)
    )
    np.testing.assert_allclose(np.unique(y), [0, 1 / 0.75], rtol=1e-6)
    np.testing.assert_allclose(y.mean(), 1, atol=0.05)
    assert (other != y).any()


def test_biases_belong_to_their_expert() -> None:
    bank = FFN(F, num_experts=3, activation="relu", use_bias=True, features=2)
    params = {
        "w_in": jnp.zeros((3, D, F)),
        "b_in": jnp.array([[1.0] * F, [2.0] * F, [-1.0] * F]),
        "w_out": jnp.ones((3, F, 2)),
        "b_out": jnp.array([[0.1, 0.2], [0.3, 0.4], [0.5, 0.6]]),
    }
    y = bank.apply({"params": params}, D).run(jnp.ones((4, D)), PerToken(jnp.array([2, 0, 1, 0])))
    np.testing.assert_allclose(y, [[0.5, 0.6], [F + 0.1, F + 0.2], [2 * F + 0.3, 2 * F + 0.4], [F + 0.1, F + 0.2]], rtol=1e-6)
    assert not any(start("ffn", 4)[name].any() for name in ("b_in", "b_out"))


NUMPY = {
    "relu": lambda x: np.maximum(x, 0),
    "gelu": lambda x: 0.5 * x * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3))),
    "gelu_exact": lambda x: x * np.array([0.5 * (1 + math.erf(v / math.sqrt(2))) for v in x]),
    "silu": lambda x: x / (1 + np.exp(-x)),
    "squared_relu": lambda x: np.maximum(x, 0) ** 2,
    "tanh": np.tanh,
    "identity": lambda x: x,
}


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_activations(name: str) -> None:
    x = np.linspace(-3, 3, 13)
    # The two forms of gelu are 1e-3 apart.
    np.testing.assert_allclose(ACTIVATIONS[name](jnp.asarray(x, jnp.float32)), NUMPY[name](x), rtol=1e-4, atol=1e-6)


def test_unknown_activation_names_the_nearest() -> None:
    with pytest.raises(ConfigError, match="activation='gellu' is unknown; did you mean 'gelu'"):
        FFN(F, activation="gellu").init(jax.random.key(0), D)


def test_a_bank_for_training_is_silent_outside_it() -> None:
    bank = TrainOnly(FFN(F, num_experts=2))
    variables, x = jax.jit(lambda key: bank.init(key, D))(jax.random.key(0)), jnp.ones((2, 3, D))
    plain = bank.bank.apply({"params": variables["params"]["bank"]}, D).run(x, Batched())
    np.testing.assert_array_equal(bank.apply(variables, D, Context(train=True)).run(x, Batched()), plain)
    for ctx in (None, Context()):
        np.testing.assert_array_equal(bank.apply(variables, D, ctx).run(x, Batched()), np.zeros((2, 3, D)))


class Users:
    """Neither a module nor derived from anything: the contract is a call and a number."""

    num_experts = 3

    def __init__(self, result: object = None) -> None:
        self.result = result

    def __call__(self, width: int, ctx: Context | None = None) -> object:
        return self.result or Experts(lambda p, x, layout: x * layout.take(p), jnp.arange(3.0)[:, None])


def test_a_users_bank_is_any_object_of_the_contract() -> None:
    layer = MoE(Linear(3), TopK(k=1, normalise=True, constant_gate=True), Users())
    x = jax.random.normal(jax.random.key(0), (1, 8, D))
    variables = jax.jit(layer.init)(jax.random.key(1), x)
    chosen = np.argmax(x @ variables["params"]["router"]["w"], -1)
    np.testing.assert_allclose(compiled(layer)(variables, x), chosen[..., None] * x, rtol=1e-5)


def test_what_is_no_bank_is_refused_with_the_fix() -> None:
    with pytest.raises(ConfigError, match=r"bank=int is no bank: it needs num_experts and a __call__\(width, ctx\)"):
        experts_of(3, D)
    with pytest.raises(ConfigError, match="the bank Users returned a float; a bank is called as"):
        experts_of(Users(1.5), D)
    with pytest.raises(ConfigError, match="the bank Users says num_experts=3 and returned 2 experts; make them as many"):
        experts_of(Users(Experts(lambda p, x, layout: x, {}, num_experts=2)), D)
