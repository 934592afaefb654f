"""SMEAR against NumPy, its rivals, its gradients, and that a decoder cannot look ahead through a mean."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from numpy_layers import close, draw, silu
from numpy_routing import softmax

from moejax import models
from moejax.core.context import Context
from moejax.core.errors import ConfigError
from moejax.core.initializers import Normal, Same
from moejax.experts import Bottleneck
from moejax.layers import SMEAR, DenseGLU
from moejax.layers.ffn.smear import drop_experts
from moejax.parallel import Parallel, make_mesh, use

B, S, D, E, F, SEGMENT = 3, 7, 6, 4, 3, 3
VALID = np.arange(S)[None] < np.array([7, 4, 2])[:, None]
DOMAIN = jnp.broadcast_to(jnp.array([1, 0, 5])[:, None], (B, S))


def layer(**fields) -> SMEAR:
    fields = {"bank": Bottleneck(F, num_experts=E), "num_experts": E, "layer": DenseGLU(5), "segment": SEGMENT, **fields}
    return SMEAR(**fields)


@functools.cache
def example() -> tuple:
    x = jax.random.normal(jax.random.key(0), (B, S, D))
    return draw(layer(), x), x


@functools.cache
def apply(smear: SMEAR, train: bool = False):
    ctx = Context(valid=jnp.asarray(VALID), domain=DOMAIN, train=train)
    rngs = {"router": jax.random.key(1)}
    return jax.jit(lambda variables, x: smear.apply(variables, x, ctx, rngs=rngs, mutable=["stats"]))


def norm(x: np.ndarray, p: dict) -> np.ndarray:
    return (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-6) * p["scale"] + p.get("bias", 0)


def run_expert(p: dict, weight: np.ndarray, u: np.ndarray) -> np.ndarray:
    """The expert whose parameters are averaged by `weight` [e]."""
    theta = {name: np.tensordot(weight, value, 1) for name, value in p.items()}
    return silu(u @ theta["w_in"] + theta["b_in"]) @ theta["w_out"] + theta["b_out"]


def numpy_layer(smear: SMEAR, variables: dict, x: np.ndarray) -> tuple[np.ndarray, list[np.ndarray]]:
    """Outside training. Outputs, and p of every group that has a token, one group at a time."""
    p = jax.tree.map(lambda a: np.asarray(a, np.float64), variables["params"])
    dense = {name: value[0] for name, value in p["layer"]["expert"].items()}
    x = np.asarray(x, np.float64)
    u = (silu(x @ dense["w_gate"]) * (x @ dense["w_up"])) @ dense["w_out"]
    y, probs = np.zeros_like(u), []
    length = S if smear.route_by == "sequence" else SEGMENT
    for i in range(B):
        for start in range(0, S, length):
            here = np.arange(start, min(start + length, S))
            see = {
                "sequence": here,
                "previous": range(start - length, start),
                "prefix": range(length) if start else (),
            }
            seen = np.array([t for t in see[smear.route_by] if t >= 0 and VALID[i, t]], int)
            mean = u[i, seen].mean(0) if len(seen) else np.zeros(D)
            weight = softmax(norm(mean, p["summary_norm"]) @ norm(p["router"], p["router_norm"]).T)
            here = here[VALID[i, here]]
            if len(here):
                probs.append(weight)
            best = np.eye(E)[np.argmax(weight)]
            if smear.combine == "ensemble":
                y[i, here] = sum(weight[e] * run_expert(p["bank"], np.eye(E)[e], u[i, here]) for e in range(E))
            else:
                chosen = {"merge": weight, "tag": np.eye(E)[int(DOMAIN[i, 0]) % E]}.get(smear.combine, best)
                y[i, here] = run_expert(p["bank"], chosen, u[i, here]) * (weight.max() if smear.combine == "top1" else 1)
    return u + norm(y, p["post_norm"]), probs


@pytest.mark.parametrize(
    ("combine", "route_by"),
    [
        ("merge", "sequence"), ("merge", "previous"), ("merge", "prefix"), ("ensemble", "sequence"), ("st_gumbel", "previous"),
        ("top1", "sequence"), ("tag", "sequence"),
    ],
)  # fmt: skip
def test_it_is_numpys(combine: str, route_by: str) -> None:
    smear = layer(combine=combine, route_by=route_by)
    variables, x = example()
    y, sown = apply(smear)(variables, x)
    expected, probs = numpy_layer(smear, variables, x)
    np.testing.assert_allclose(np.asarray(y)[VALID], expected[VALID], rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(sown["stats"]["importance"], np.mean(probs, 0), rtol=1e-4)
    if combine == "merge":
        np.testing.assert_allclose(sown["stats"]["load"], np.mean(probs, 0), rtol=1e-4)
        np.testing.assert_allclose(sown["stats"]["experts_per_token"], 1, rtol=1e-5)


def test_padding_is_not_in_the_mean() -> None:
    variables, x = example()
    noisy = jnp.where(VALID[..., None], x, 50.0)
    y, other = (np.asarray(apply(layer())(variables, a)[0])[VALID] for a in (x, noisy))
    np.testing.assert_allclose(y, other, rtol=1e-5, atol=1e-6)


def test_gradients_are_those_of_the_average() -> None:
    """Through p as well: the plain formula of one expert per sequence, differentiated by JAX."""
    smear = SMEAR(Bottleneck(F, num_experts=E), E)
    x = jax.random.normal(jax.random.key(2), (B, S, D))
    params = draw(smear, x)["params"]

    def plain(p: dict, x: jax.Array) -> jax.Array:
        def layer_norm(v: jax.Array, p: dict) -> jax.Array:
            v = (v - v.mean(-1, keepdims=True)) / jnp.sqrt(v.var(-1, keepdims=True) + 1e-6)
            return v * p["scale"] + p.get("bias", 0)

        weight = jax.nn.softmax(layer_norm(x.mean(1), p["summary_norm"]) @ layer_norm(p["router"], p["router_norm"]).T)
        theta = {name: jnp.einsum("be,e...->b...", weight, value) for name, value in p["bank"].items()}
        h = jnp.einsum("bsd,bdf->bsf", x, theta["w_in"]) + theta["b_in"][:, None]
        return jnp.einsum("bsf,bfd->bsd", jax.nn.silu(h), theta["w_out"]) + theta["b_out"][:, None]

    def grads(function):
        return jax.jit(jax.value_and_grad(lambda p, x: jnp.sin(function(p, x)).sum(), argnums=(0, 1)))(params, x)

    actual = grads(lambda p, x: smear.apply({"params": p}, x))
    close(actual, grads(plain))
    with use(Parallel(make_mesh("data=2,expert=4"))):
        close(grads(lambda p, x: smear.apply({"params": p}, x)), actual)


@pytest.mark.parametrize("route_by", ["previous", "prefix"])
def test_segments_see_what_came_before_and_nothing_else(route_by: str) -> None:
    run = apply(layer(route_by=route_by))
    variables, x = example()
    before = np.asarray(run(variables, x)[0])[0]
    for changed, seen_by in (
        (5, range(6, 7) if route_by == "previous" else []),
        (0, range(3, 6) if route_by == "previous" else range(3, 7)),
    ):
        after = np.asarray(run(variables, x.at[0, changed].add(1.0))[0])[0]
        moved = np.abs(after - before).max(-1) > 1e-6
        assert moved.tolist() == [t == changed or t in seen_by for t in range(S)]


def test_a_decoder_refuses_means_that_hold_the_future() -> None:
    adapters = dict(kind="smear", num_experts=2, bank=dict(kind="bottleneck", hidden=2))

    def build(kind: str, **fields) -> None:
        ffn = {**adapters, "layer": dict(kind="ffn", hidden=8), **fields}
        mixer = {**adapters, "layer": dict(kind="attention", num_heads=1), **fields}
        block = dict(kind="transformer", norm=dict(kind="rms_norm"), mixer=mixer, ffn=ffn)
        sizes = dict(vocab_size=9) if kind == "decoder_lm" else dict(image_size=4, channels=1, patch_size=2, num_classes=2)
        return models.build(dict(kind=kind, d_model=4, num_layers=2, pattern=("a",), blocks={"a": block}, **sizes))

    with pytest.raises(ConfigError, match=r"mixer\.route_by='sequence' routes by the mean"):
        build("decoder_lm")
    assert build("vit")
    model = build("decoder_lm", route_by="previous", segment=2)
    params = jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((2, 5), jnp.int32))["params"]
    a = params["stack"]["repeats"]["0_a"]
    assert a["mixer"]["bank"]["w_in"].shape == a["ffn"]["bank"]["w_in"].shape == (2, 2, 4, 2)
    assert "no cache" in model.blocks[0].module.ffn.decodable()


def test_expert_dropout(key: jax.Array, rng: np.random.Generator) -> None:
    probs = softmax(rng.normal(size=(50, E)))
    kept = np.asarray(jax.random.bernoulli(key, 0.7, probs.shape))
    probs[:10] **= 20  # what is left may be tiny
    dropped = np.where(kept.any(-1, keepdims=True), probs * kept, 1)
    expected = dropped / dropped.sum(-1, keepdims=True)
    np.testing.assert_allclose(drop_experts(jnp.asarray(probs, jnp.float32), 0.3, key), expected, rtol=1e-4, atol=1e-7)
    np.testing.assert_allclose(drop_experts(jnp.asarray(probs, jnp.float32), 1.0, key), 1 / E, rtol=1e-5)
    variables, x = example()
    plain, dropping = (np.asarray(apply(layer(expert_dropout=rate), True)(variables, x)[0]) for rate in (0.0, 0.5))
    assert np.abs(plain - dropping)[VALID].max() > 1e-3
    np.testing.assert_allclose(plain, apply(layer())(variables, x)[0], rtol=1e-5, atol=1e-6)


def test_straight_through_samples_one_expert_and_still_teaches_the_router() -> None:
    smear = layer(combine="st_gumbel")
    variables, x = example()

    def run(params: dict, key: jax.Array) -> jax.Array:
        return smear.apply({"params": params}, x, Context(train=True), rngs={"router": key})

    def loss(params: dict, key: jax.Array) -> tuple[jax.Array, jax.Array]:
        y = run(params, key)
        return jnp.sin(y).sum(), y

    step = jax.jit(jax.grad(loss, has_aux=True))
    results = [step(variables["params"], jax.random.key(i)) for i in range(6)]
    assert all(np.abs(np.asarray(grads["router"])).max() > 0 for grads, _ in results)
    # Each sequence got one of at most E outputs, and not always the same.
    outputs = {tuple(np.asarray(y)[0, 0].round(2).tolist()) for _, y in results}
    assert 1 < len(outputs) <= E


def test_it_starts_near_uniform_and_experts_may_start_equal() -> None:
    smear = layer(bank=Bottleneck(F, num_experts=E, init_in=Same(Normal(0.01))), layer=None)
    x = example()[1]
    variables = jax.jit(smear.init)(jax.random.key(0), x)
    np.testing.assert_allclose(apply(smear)(variables, x)[1]["stats"]["importance"], 1 / E, atol=0.02)
    bank = variables["params"]["bank"]
    assert (bank["w_in"] == bank["w_in"][:1]).all()
    np.testing.assert_allclose(np.asarray(variables["params"]["router_norm"]["scale"]), 1e-2)


def test_bad_settings_raise() -> None:
    with pytest.raises(ConfigError, match="combine='merg'"):
        layer(combine="merg")
    with pytest.raises(ConfigError, match="segment=0"):
        layer(segment=0)
    variables, x = example()
    with pytest.raises(ConfigError, match="combine='tag' in  needs the batch's domains"):
        jax.eval_shape(layer(combine="tag").apply, variables, x)
    assert layer().active_fraction() == 1 / E
    assert layer(combine="ensemble").active_fraction() == 1
