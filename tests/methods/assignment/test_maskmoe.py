"""MaskMoE (Su et al. 2024): learned routing among the few experts that a vocabulary item may use; one token after another."""

import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from ml_collections import ConfigDict
from numpy_layers import compiled, draw, glu

import moejax as mj
from moejax.core.errors import ConfigError
from moejax.data import token_frequencies, with_computed
from moejax.models import build
from moejax.routing.routers.token_mask import is_frequent

E, D, F, V, HEAD = 5, 6, 4, 12, 3
# Ids 2, 0 and 7 are 80 of 100 occurrences.
FREQUENCIES = (25.0, 3.0, 40.0, 2.0, 0.0, 4.0, 1.0, 15.0, 5.0, 2.0, 2.0, 1.0)
FREQUENT = {0, 2, 7}


def router(**fields) -> mj.TokenMask:
    return mj.TokenMask(
        **{"num_experts": E, "router": mj.Linear(E), "frequencies": FREQUENCIES, "head_experts": HEAD, **fields}
    )


def layer(**fields) -> mj.MoE:
    losses = (mj.Balance(1.0, over="batch"),)
    return mj.MoE(router(**fields), mj.TopK(k=1), mj.GLU(hidden=F, num_experts=E), losses=losses)


def seen(ids: object, layer: int | None = None, **fields) -> np.ndarray:
    """Who may be used by each id."""
    ctx = mj.Context(token_ids=jnp.asarray(ids)[None], layer=None if layer is None else jnp.int32(layer))
    return np.asarray(router(**fields).visible(ctx))[0]


@pytest.fixture(scope="module")
def example() -> tuple[dict, jax.Array, mj.Context]:
    x = jax.random.normal(jax.random.key(1), (2, 14, D))
    ids = jax.random.randint(jax.random.key(2), (2, 14), 0, V).at[0, :4].set(jnp.array([0, 2, 7, 2]))
    ctx = mj.Context(token_ids=ids, valid=jnp.arange(14) < jnp.array([[14], [11]]))
    return draw(layer(), x, ctx)["params"], x, ctx


def test_frequent_ids_have_several_experts_and_rare_ones_one() -> None:
    assert set(np.flatnonzero(is_frequent(FREQUENCIES, 0.8))) == FREQUENT
    assert set(np.flatnonzero(is_frequent(FREQUENCIES, 0.81))) == FREQUENT | {8}
    assert not is_frequent(FREQUENCIES, 0.0).any()
    many = seen(range(V)).sum(-1)
    np.testing.assert_array_equal(many, [HEAD if v in FREQUENT else 1 for v in range(V)])
    reversed_ = seen(range(V), head_experts=1, tail_experts=E).sum(-1)
    np.testing.assert_array_equal(reversed_, [1 if v in FREQUENT else E for v in range(V)])


def test_the_draw_is_uniform_fixed_and_another_one_in_each_layer() -> None:
    ids = np.arange(4000)
    tail = tuple(np.ones(4000))
    masks = {(seed, at): seen(ids, at, seed=seed, frequencies=tail, head=1.0) for seed, at in itertools.product((0, 1), (0, 1))}
    for mask in masks.values():
        np.testing.assert_allclose(mask.mean(0), HEAD / E, atol=0.04)
    for one, other in itertools.combinations(masks.values(), 2):
        # Two independent draws share h^2 / e experts on average.
        np.testing.assert_allclose((one & other).sum(-1).mean(), HEAD**2 / E, atol=0.06)
    np.testing.assert_array_equal(seen(ids, frequencies=tail, head=1.0), masks[0, 0])
    np.testing.assert_array_equal(seen(ids[::-1], 1, frequencies=tail, head=1.0)[::-1], masks[0, 1])


def numpy_layer(params: dict, x: np.ndarray, ids: np.ndarray, valid: np.ndarray) -> tuple[np.ndarray, float]:
    """Outputs, and e sum_i f_i P_i over the batch."""
    w, y = np.asarray(params["router"]["router"]["w"], np.float64), np.zeros_like(x)
    mask = seen(range(V))
    chosen, mean = np.zeros(E), np.zeros(E)
    for place in zip(*np.nonzero(valid), strict=True):
        logits = x[place] @ w
        among = [i for i in range(E) if mask[ids[place], i]]
        total = sum(math.exp(logits[i]) for i in among)
        probs = np.array([math.exp(logits[i]) / total if i in among else 0.0 for i in range(E)])
        best = max(among, key=lambda i, logits=logits: logits[i])
        y[place] = probs[best] * glu(params["bank"], best, x[place])
        chosen[best] += 1 / valid.sum()
        mean += probs / valid.sum()
    return y, E * (chosen * mean).sum()


def test_outputs_and_balance_loss_are_numpys(example: tuple) -> None:
    params, x, ctx = example
    y, sown = compiled(layer(), "losses", "stats")({"params": params}, x, ctx)
    expected, loss = numpy_layer(params, np.asarray(x, np.float64), np.asarray(ctx.token_ids), np.asarray(ctx.valid))
    np.testing.assert_allclose(y, expected, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(sown["losses"]["balance_loss"], loss, rtol=1e-5)


def test_gradients_are_numpys(example: tuple) -> None:
    params, x, ctx = example

    def total(params: dict) -> jax.Array:
        y, sown = layer().apply({"params": params}, x, ctx, mutable=["losses"])
        return jnp.sin(y).sum() + sown["losses"]["balance_loss"]

    gradient = jax.jit(jax.grad(total))(params)
    for path, place in (
        (("router", "router", "w"), (1, 2)),
        (("router", "router", "w"), (4, 0)),
        (("bank", "w_out"), (3, 1, 2)),
    ):
        ends = []
        for step in (1e-5, -1e-5):
            moved = jax.tree.map(lambda a: np.array(a, np.float64), params)
            leaf = moved
            for name in path:
                leaf = leaf[name]
            leaf[place] += step
            y, loss = numpy_layer(moved, np.asarray(x, np.float64), np.asarray(ctx.token_ids), np.asarray(ctx.valid))
            ends.append(np.sin(y).sum() + loss)
        found = gradient
        for name in path:
            found = found[name]
        np.testing.assert_allclose(found[place], (ends[0] - ends[1]) / 2e-5, rtol=2e-3, atol=1e-5)


def test_an_item_with_one_expert_has_weight_one_and_teaches_the_router_nothing(example: tuple) -> None:
    params, x, ctx = example
    rare = ctx.replace(token_ids=jnp.full((2, 14), 3), valid=None)
    y = compiled(layer())({"params": params}, x, rare)
    only = int(seen([3])[0].argmax())
    np.testing.assert_allclose(y, glu(params["bank"], only, np.asarray(x, np.float64)), rtol=1e-4, atol=1e-5)

    def total(params: dict) -> jax.Array:
        y, sown = layer().apply({"params": params}, x, rare, mutable=["losses"])
        return jnp.sin(y).sum() + sown["losses"]["balance_loss"]

    gradient = jax.jit(jax.grad(total))(params)
    np.testing.assert_array_equal(gradient["router"]["router"]["w"], 0)
    assert (np.abs(gradient["bank"]["w_out"]).max((1, 2)) > 0).nonzero()[0].tolist() == [only]


def test_with_all_experts_it_is_the_router_alone(example: tuple) -> None:
    params, x, ctx = example
    plain = mj.MoE(mj.Linear(E), mj.TopK(k=1), mj.GLU(hidden=F, num_experts=E))
    alone = {"router": params["router"]["router"], "bank": params["bank"]}
    np.testing.assert_array_equal(
        compiled(layer(head_experts=E, tail_experts=E))({"params": params}, x, ctx), compiled(plain)({"params": alone}, x, ctx)
    )


def test_null_experts_are_never_masked(example: tuple) -> None:
    _, x, ctx = example
    moe = mj.MoE(router(head_experts=1), mj.NullExperts(k=2, num_null=3), mj.GLU(hidden=F, num_experts=E))
    _, sown = compiled(moe, "routing")(draw(moe, x, ctx), x, ctx)
    logits = np.asarray(sown["routing"]["logits"])[np.asarray(ctx.valid)]
    assert logits.shape[-1] == E + 3
    assert ((logits[:, :E] > -1e8).sum(-1) == 1).all()
    assert (logits[:, E:] > -1e8).all()


def batches(config: object, **_: object) -> itertools.chain:
    rng = np.random.default_rng(0)
    for _ in range(5):
        yield {"tokens": rng.choice(8, p=[0.5, 0.3, 0.1, 0.05, 0.05, 0, 0, 0], size=(2, 50)), "valid": np.ones((2, 50), bool)}


def test_a_config_counts_the_training_data() -> None:
    masked = {
        "kind": "token_mask",
        "router": {"kind": "linear"},
        "head_experts": 2,
        "frequencies": {"from_data": "token_frequencies", "batches": 3},
    }
    moe = {"kind": "moe", "num_experts": E, "router": masked, "select": {"kind": "top_k", "k": 1}}
    mixer, norm, bank = {"kind": "attention", "num_heads": 1}, {"kind": "rms_norm"}, {"kind": "ffn", "hidden": 4}
    block = {"kind": "transformer", "mixer": mixer, "norm": norm, "ffn": {**moe, "bank": bank}}
    lm = {"kind": "decoder_lm", "vocab_size": 8, "d_model": 4, "num_layers": 2, "pattern": ("b",), "blocks": {"b": block}}
    config = ConfigDict({"model": lm, "data": {}})
    filled = with_computed(config, batches)
    counted = token_frequencies({}, 8, batches=3, make_iterator=batches)
    assert filled.model.blocks.b.ffn.router.frequencies == counted

    tokens = jnp.arange(8)[None]
    model = build(filled.model)
    _, sown = jax.jit(lambda: model.init_with_output(jax.random.key(0), tokens, mutable=["params", "routing"]))()
    routing = sown["routing"]["stack"]["repeats"]["0_b"]["ffn"]["logits"]
    masks = np.asarray(routing)[:, 0] > -1e8
    np.testing.assert_array_equal(masks.sum(-1), np.broadcast_to(np.where(is_frequent(counted, 0.8), 2, 1), (2, 8)))
    assert (masks[0] != masks[1]).any()
    # Before anything is counted all ids are frequent, and the module can be hashed.
    asked = build(config.model).blocks[0].module.ffn.router
    assert isinstance(hash(asked), int)
    assert (asked.visible(mj.Context(token_ids=tokens)).sum(-1) == 2).all()


def test_what_does_not_fit_is_named() -> None:
    with pytest.raises(ConfigError, match="head_experts=8 exceeds num_experts=5"):
        router(head_experts=8)
    with pytest.raises(ConfigError, match="tail_experts=0 must be a whole number of at least 1"):
        router(tail_experts=0)
    with pytest.raises(ConfigError, match=r"head=1\.5 must be a number between 0 and 1"):
        router(head=1.5)
    with pytest.raises(ConfigError, match="'token_mask' needs the context's token ids"):
        layer().init(jax.random.key(0), jnp.zeros((1, 2, D)))
