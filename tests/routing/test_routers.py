"""Routers: float32 whatever the model computes in, noise in training only, formulas against NumPy."""

import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from numpy_routing import best

from moejax.core.context import Context
from moejax.core.errors import ConfigError
from moejax.core.initializers import FanIn
from moejax.core.layer import RowWise
from moejax.experts import FFN
from moejax.layers import MoE
from moejax.models import build
from moejax.models.inspection import why_not_decodable
from moejax.routing import Cosine, ExpertPool, Hash, Linear, Random, TopAny, TopK
from moejax.routing.routers.base import Router, check_num_experts, routers
from moejax.routing.select.base import Select, selects

G, N, D, E = 2, 256, 16, 64


def test_bfloat16_models_choose_as_float32_does(rng: np.random.Generator) -> None:
    """Rounding only the input, never weights, products or logits: the sets are those of a float64 product of the same input."""
    x = jnp.asarray(rng.normal(size=(G, N, D)), jnp.bfloat16)
    w = rng.normal(size=(D, E)).astype(np.float32)
    logits = Linear(E).apply({"params": {"w": jnp.asarray(w)}}, x, Context())
    assert logits.dtype == jnp.float32
    exact = np.asarray(x, np.float64) @ w.astype(np.float64)
    np.testing.assert_allclose(logits, exact, rtol=1e-4, atol=1e-5)
    chosen = np.asarray(TopK(k=8)(logits).expert)
    expected = np.array([[best(row, 8) for row in group] for group in exact])
    np.testing.assert_array_equal(np.sort(chosen), np.sort(expected))
    # The same product rounded to bfloat16 chooses other experts for some tokens, or this test would show nothing.
    rounded = np.asarray(TopK(k=8)(logits.astype(jnp.bfloat16).astype(jnp.float32)).expert)
    assert (np.sort(rounded) != np.sort(expected)).any(-1).mean() > 0.01


@pytest.mark.parametrize("router", [Linear(4), Cosine(4, outputs=(2, 0)), Cosine(4, projection=3), Random(4, outputs=(1, 2))])
def test_every_router_gives_float32_of_the_right_width(router, key: jax.Array) -> None:
    logits, variables = router.init_with_output(key, jnp.ones((G, 3, D), jnp.bfloat16), Context())
    assert logits.shape == (G, 3, router.num_outputs)
    assert logits.dtype == jnp.float32
    assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(variables))


def test_linear_noise_jitter_and_bias(rng: np.random.Generator) -> None:
    x = jnp.asarray(rng.normal(size=(G, N, D)), jnp.float32)
    w, b = rng.normal(size=(D, 4)).astype(np.float32), np.arange(4, dtype=np.float32)
    params = {"params": {"w": jnp.asarray(w), "b": jnp.asarray(b)}}
    clean = np.asarray(x) @ w + b

    def run(router: Linear, seed: int = 0, train: bool = True) -> np.ndarray:
        return np.asarray(router.apply(params, x, Context(train=train), rngs={"router": jax.random.key(seed)}))

    noisy = Linear(4, use_bias=True, noise_std=0.5)
    np.testing.assert_allclose(run(noisy, train=False), clean, rtol=1e-4, atol=1e-5)
    noise = run(noisy) - clean
    np.testing.assert_allclose([noise.mean(), noise.std()], [0, 0.5], atol=0.05)
    np.testing.assert_array_equal(run(noisy), run(noisy))
    assert (run(noisy, 1) != run(noisy)).all()

    # Jitter multiplies the input: the logits' error is (x * u) w with u uniform on [-0.1, 0.1], of variance 0.01 / 3.
    error = run(Linear(4, use_bias=True, jitter=0.1)) - clean
    expected = np.sqrt(0.01 / 3 * (np.square(np.asarray(x))[..., None] * np.square(w)).sum(2))
    np.testing.assert_allclose((error / expected).std(), 1, atol=0.1)
    np.testing.assert_allclose(run(Linear(4, use_bias=True, jitter=0.1), train=False), clean, rtol=1e-4, atol=1e-5)


def test_linear_starts_at_a_tenth_of_the_usual_scale(key: jax.Array) -> None:
    """Variance s / fan_in with s = 0.1 (Switch); no draw beyond two standard deviations of the untruncated normal."""
    for scale in (0.1, 1.0):
        w = Linear(512, init_w=FanIn(scale)).init(key, jnp.ones((1, 1, 64)), Context())["params"]["w"]
        np.testing.assert_allclose(w.std(), np.sqrt(scale / 64), rtol=0.02)
        assert np.abs(w).max() <= 2.3 * np.sqrt(scale / 64)


@pytest.mark.parametrize("normalise", [True, False])
def test_cosine_is_numpys(rng: np.random.Generator, normalise: bool) -> None:
    x, w = rng.normal(size=(G, 3, D)), rng.normal(size=(D, 8))
    params = {"w": jnp.asarray(w, jnp.float32), "scale": jnp.float32(2.5)}
    logits = Cosine(4, outputs=(2, 0), normalise=normalise).apply({"params": params}, jnp.asarray(x, jnp.float32), Context())
    for g, t, o in np.ndindex(G, 3, 8):
        length = np.linalg.norm(x[g, t]) * np.linalg.norm(w[:, o]) if normalise else 1
        np.testing.assert_allclose(logits[g, t, o], 2.5 * x[g, t] @ w[:, o] / length, rtol=1e-4)


def test_cosine_ignores_the_length_of_tokens_and_compares_projections(rng: np.random.Generator) -> None:
    x, w, into = rng.normal(size=(G, 3, D)), rng.normal(size=(5, 4)), rng.normal(size=(D, 5))
    router = Cosine(4, projection=5, scale_init=10.0)
    params = {"w": jnp.asarray(w, jnp.float32), "scale": jnp.float32(10), "projection": jnp.asarray(into, jnp.float32)}
    logits = router.apply({"params": params}, jnp.asarray(x, jnp.float32), Context())
    np.testing.assert_allclose(router.apply({"params": params}, jnp.asarray(9 * x, jnp.float32), Context()), logits, rtol=1e-4)
    y = x @ into
    cosine = np.einsum("gnd,do->gno", y / np.linalg.norm(y, axis=-1, keepdims=True), w / np.linalg.norm(w, axis=0))
    np.testing.assert_allclose(logits, 10 * cosine, rtol=1e-4, atol=1e-5)
    start = jax.eval_shape(router.init, jax.random.key(0), jnp.ones((G, 3, D)), Context())["params"]
    assert {name: leaf.shape for name, leaf in start.items()} == {"projection": (D, 5), "w": (5, 4), "scale": ()}


def test_random_does_not_look_and_repeats_outside_training(rng: np.random.Generator) -> None:
    x, y = (jnp.asarray(rng.normal(size=(G, N, D)), jnp.float32) for _ in range(2))
    router = Random(4, std=2.0)
    np.testing.assert_array_equal(router.apply({}, x, Context()), router.apply({}, y, Context()))
    assert (Random(4, eval_seed=1).apply({}, x, Context()) != router.apply({}, x, Context()) / 2).all()
    draws = [router.apply({}, x, Context(train=True), rngs={"router": jax.random.key(i)}) for i in range(2)]
    assert (draws[0] != draws[1]).all()
    np.testing.assert_allclose([draws[0].mean(), draws[0].std()], [0, 2], atol=0.15)


def test_random_differs_from_layer_to_layer_and_is_decoded_as_in_a_whole_pass() -> None:
    router, x = Random(4), jnp.zeros((1, 6, D))
    whole = [router.apply({}, x, Context(layer=jnp.int32(i))) for i in range(2)]
    assert (whole[0] != whole[1]).all()
    assert len(np.unique(whole[0][0, :, 0])) == 6
    for t in range(6):
        ctx = Context(positions=jnp.full((1, 1), t), layer=jnp.int32(1), decode=True)
        np.testing.assert_array_equal(router.apply({}, x[:, :1], ctx)[:, 0], whole[1][:, t])


class Own(Router, RowWise):
    """A user's router, as small as it can be."""

    @nn.compact
    def __call__(self, x: jax.Array, ctx: Context) -> jax.Array:
        return nn.Dense(self.num_outputs)(x)


class Mean(Router):
    """One that looks at its whole sequence and says nothing about it."""

    @nn.compact
    def __call__(self, x: jax.Array, ctx: Context) -> jax.Array:
        return jnp.broadcast_to(nn.Dense(self.num_outputs)(x.mean(1, keepdims=True)), (*x.shape[:2], self.num_outputs))


def built(kind: str) -> Router:
    """The registered router with no more said than it needs."""
    needed = {f.name for f in dataclasses.fields(routers[kind])}
    inner = {"router": {"kind": "linear", "num_experts": 4}} if "router" in needed else {}
    counted = (
        {"frequencies": (5.0, 4.0, 3.0, 2.0, 1.0, 1.0), "head_experts": 3, "tail_experts": 2} if kind == "token_mask" else {}
    )
    return routers.build({"kind": kind, "num_experts": 4, **inner, **counted}, "router")


def defaults(kind: str) -> Select:
    inner = {"select": {"kind": "top_k", "k": 2}} if kind == "expert_dropout" else {}
    return selects.build({"kind": kind, **inner}, "select")


@pytest.mark.parametrize("kind", [*routers.kinds(), "own"])
def test_every_router_serves_every_rule(kind: str) -> None:
    router, x = Own(4) if kind == "own" else built(kind), jax.ShapeDtypeStruct((G, 6, D), jnp.float32)
    for name in selects.kinds():
        layer = MoE(router, defaults(name), FFN(3, num_experts=4), backend="reference")

        def run(x: jax.Array, layer: MoE = layer) -> jax.Array:
            ids = jnp.broadcast_to(jnp.arange(6), (G, 6))
            rngs = {name: jax.random.key(0) for name in ("params", "router")}
            ctx = Context(train=True, token_ids=ids, positions=ids, step=jnp.int32(0))
            y, variables = layer.init_with_output(rngs, x, ctx, mutable=["params", "router_state", "routing"])
            return y, variables["routing"]["logits"]

        y, logits = jax.eval_shape(run, x)
        assert y.shape == x.shape, name
        assert logits.shape == (G, 6, layer.select.num_outputs(4)), name


def test_hash_and_pool_give_what_other_rules_read(rng: np.random.Generator) -> None:
    ids = jnp.asarray(rng.integers(0, 50, (1, 9)))
    chosen = np.asarray(Hash(4).expert(Context(token_ids=ids)))[0]
    logits = np.asarray(Hash(4, outputs=(2, 3)).apply({}, jnp.zeros((1, 9, D)), Context(token_ids=ids)))[0]
    np.testing.assert_array_equal(logits == 0, np.pad(np.repeat(np.eye(4, dtype=bool)[chosen], 2, 1), ((0, 0), (0, 3))))

    x = jnp.asarray(rng.normal(size=(1, 64, D)), jnp.float32)
    params = {"w": rng.normal(size=(D, 4)), "threshold": 0.1 * rng.normal(size=4), "temperature": np.float32(1)}
    variables = {
        "params": jax.tree.map(lambda a: jnp.asarray(a, jnp.float32), params),
        "router_state": {"active": jnp.array([True, True, False, True])},
    }
    scores = ExpertPool(4).apply(variables, x, Context())
    logits = ExpertPool(4, outputs=(1, 2)).apply(variables, x, Context())
    taken = TopAny()(scores, Context(train=True)).assigned()
    np.testing.assert_array_equal(logits[..., :4] > 0, taken > 0)
    np.testing.assert_array_equal(logits[..., 4:], 0)
    assert 0.2 < np.asarray(taken)[..., [0, 1, 3]].mean() < 0.8


def test_a_router_that_says_nothing_is_refused_in_a_decoder() -> None:
    def lm(router: Router) -> nn.Module:
        moe = {
            "kind": "moe",
            "num_experts": 2,
            "router": router,
            "select": {"kind": "top_k"},
            "bank": {"kind": "ffn", "hidden": 3},
        }
        blocks = {"a": {"kind": "feed_forward", "ffn": moe}}
        return build(
            {"kind": "decoder_lm", "vocab_size": 8, "d_model": 4, "num_layers": 1, "pattern": ("a",), "blocks": blocks}
        )

    with pytest.raises(ConfigError, match=r"ffn\.router \(Mean\) does not say whether its tokens see later ones"):
        lm(Mean(2))
    assert why_not_decodable(lm(Own(2))) is None
    assert "does not say whether it can be decoded" in Mean(2).decodable()


def test_router_and_bank_must_agree() -> None:
    with pytest.raises(ConfigError, match=r"router.num_experts=4 but bank.num_experts=8; give both the same number"):
        check_num_experts(Linear(4), Linear(8))
