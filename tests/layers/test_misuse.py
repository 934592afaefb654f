"""What a new user gets wrong is told in one line with the fix; shape checks of the test suite would tell it otherwise, so in a process without."""

import re
import subprocess
import sys
import warnings

import jax
import jax.numpy as jnp
import pytest
from numpy_layers import compiled

import moejax as mj

SETUP = """
import jax, jax.numpy as jnp, numpy as np, flax.linen as nn, moejax as mj
def run(layer, x=jnp.ones((2, 4, 8)), **said):
    return jax.eval_shape(lambda: layer.init_with_output(jax.random.key(0), x, mj.Context(**said)))
def moe(router=mj.Linear(4), select=mj.TopK(k=2), bank=mj.GLU(hidden=3, num_experts=4), **fields):
    return mj.MoE(router, select, bank, **fields)
"""
MISUSES = {
    "run(moe(), jnp.ones((4, 8)))": "x of shape (4, 8) must be tokens [b, s, d]: add a batch axis, x[None]",
    "run(moe(), jnp.ones((2, 3, 4, 8)))": "x of shape (2, 3, 4, 8) must be tokens [b, s, d]: flatten the axes",
    "run(mj.Attention(num_heads=2), jnp.ones((4, 8)))": "x of shape (4, 8) must be tokens [b, s, d]",
    "run(mj.ProductKeys(num_keys=4), jnp.ones((4, 8)))": "x of shape (4, 8) must be tokens [b, s, d]",
    "run(mj.SMEAR(mj.GLU(hidden=3, num_experts=4), 4), jnp.ones((4, 8)))": "x of shape (4, 8) must be tokens [b, s, d]",
    "run(mj.MultiHash(4, 6), jnp.ones((4, 8)), token_ids=jnp.ones((4,), int))": "x of shape (4, 8) must be tokens [b, s, d]",
    "run(mj.Nested(2, 8, mj.RMSNorm()), jnp.ones((4, 8)))": "x of shape (4, 8) must be tokens [b, s, d]",
    "run(mj.ProductKeys(num_keys=4, k=2, implementation='tpu'))": "implementation='tpu' in ProductKeys is a kernel for TPUs, and this is a CPU; take 'auto', or 'interpret_tpu'",
    "mj.ProductKeys(num_keys=4, k=2, implementation='tpus')": "implementation='tpus' is unknown; valid names: auto, reference, xla, tpu",
    "run(moe(), valid=jnp.ones((2, 3), bool))": "ctx.valid of shape (2, 3) must be (2, 4), one for each token",
    "run(moe(), valid=jnp.ones((2, 4)))": "ctx.valid is float32 and must be bool",
    "moe(losses=mj.Balance(.01))": "must be a tuple of items, each a Loss; write (Balance(",
    "moe(mj.TopK(k=2), mj.Linear(4))": "router=TopK is registered as a kind of select, and what goes here is a kind of router",
    "moe(bank=nn.Dense(3))": "must be an AnyBank",
    "moe(bank=mj.Linear(4))": "bank=Linear is registered as a kind of router",
    "moe(bank=3)": "bank=3 must be an AnyBank",
    "moe(loses=())": "unknown key 'loses' in MoE; did you mean 'losses'",
    "mj.TopK(kk=2)": "unknown key 'kk' in TopK; did you mean 'k'",
    "run(mj.DecoderLM(vocab_size=3, d_model=4, num_layers=1, pattern=('a',), blocks={}))": "blocks={} must be a tuple of items",
}


def test_misuse_is_told_in_one_line_with_the_fix() -> None:
    code = f"""{SETUP}
for misuse in {list(MISUSES)!r}:
    try:
        eval(misuse)
    except mj.ConfigError as error:
        print(str(error).replace(chr(10), ' '))
    else:
        print('taken')
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=100, check=False)
    assert done.returncode == 0, done.stderr
    told = dict(zip(MISUSES, done.stdout.splitlines(), strict=True))
    assert {misuse: text for misuse, text in told.items() if MISUSES[misuse] not in text} == {}


# They look at each row alone, whatever the axes before it.
ROWS = ["block feed_forward", "ffn ffn", "ffn glu"]


def test_every_layer_wants_tokens_of_three_axes() -> None:
    code = f"""{SETUP}
from experiments.battery.subjects import kinds, registries, spec_of
for kind in kinds():
    if kind.slot in ('ffn', 'block', 'mixer'):
        try:
            part = registries()[kind.slot].build(spec_of(kind), kind.slot, num_experts=4, num_layers=1, layer=0)
            run(part, jnp.ones((4, 8)), token_ids=jnp.ones((4,), int))
        except Exception as error:
            print(kind.slot, kind.name, '|' + type(error).__name__, str(error).replace(chr(10), ' '))
        else:
            print(kind.slot, kind.name, '|taken')
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=200, check=False)
    assert done.returncode == 0, done.stderr
    told = dict(line.split(" |", 1) for line in done.stdout.splitlines())
    assert len(told) > 15
    assert {
        name: text for name, text in told.items() if not re.match(r"ConfigError .*must be tokens \[b, s, d\]", text)
    } == dict.fromkeys(ROWS, "taken")


def layer(**fields: object) -> mj.MoE:
    return mj.MoE(mj.Linear(4), mj.TopK(k=2), mj.GLU(hidden=3, num_experts=4), **fields)


def test_init_gives_parameters_and_state_alone() -> None:
    x = jnp.ones((2, 4, 8))
    made = jax.eval_shape(layer(balancer=mj.LossFree()).init, jax.random.key(0), x)
    assert set(made) == {"params", "router_state"}


def test_a_balancer_that_never_moves_says_so() -> None:
    x, balanced = jnp.ones((2, 4, 8)), layer(balancer=mj.LossFree())
    variables = jax.jit(balanced.init)(jax.random.key(0), x)
    with pytest.warns(UserWarning, match=r"LossFree of the layer balances nothing in this call: name 'measured' in mutable"):
        jax.eval_shape(lambda: balanced.apply(variables, x, mj.Context(train=True), mutable=["losses"]))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        jax.eval_shape(lambda: balanced.apply(variables, x, mj.Context(train=True), mutable=["losses", "measured"]))
        jax.eval_shape(lambda: balanced.apply(variables, x, mj.Context()))


def test_product_keys_give_their_plan() -> None:
    """The experts' weighted sum by the plan is what the layer computes."""
    keys, x = mj.ProductKeys(num_keys=3, heads=2, k=2, query_dim=4), jax.random.normal(jax.random.key(1), (2, 5, 8))
    valid = jnp.arange(5) < jnp.array([[5], [3]])
    variables = jax.jit(keys.init)(jax.random.key(0), x)
    y, sown = compiled(keys, "routing")(variables, x, mj.Context(valid=valid))
    plan, bank = sown["routing"]["plan"], variables["params"]["bank"]
    assert plan.expert.shape == (2, 5, 4)
    assert plan.num_experts == 9
    assert (plan.used == valid[..., None]).all()
    u, v = bank["u"][plan.expert], bank["v"][plan.expert]
    weight = jnp.where(plan.used, plan.weight, 0) * jax.nn.gelu(jnp.einsum("bsd,bskd->bsk", x, u))
    assert jnp.allclose(jnp.einsum("bsk,bskd->bsd", weight, v), y, atol=1e-5)


@pytest.mark.parametrize("causal", [True, False])
def test_mixture_of_depths_evaluates_by_the_model_that_it_is_in(causal: bool) -> None:
    """In an encoder a sequence's best tokens go through the block, in training and outside alike."""
    spec = {
        "kind": "mixture_of_depths",
        "capacity_factor": 0.25,
        "block": {"kind": "feed_forward", "ffn": {"kind": "glu", "hidden": 8}},
    }
    from moejax.layers.registry import blocks

    block, x = blocks.build(spec, "block", causal=causal), jax.random.normal(jax.random.key(0), (2, 8, 4))
    variables = jax.jit(block.init)(jax.random.key(1), x)
    outside, inside = (compiled(block)(variables, x, mj.Context(train=train)) for train in (False, True))
    assert ((outside != x).any(-1).sum(1) == 2).all() == (not causal)
    assert jnp.array_equal(outside, inside) == (not causal)
