"""Product-key layers against NumPy with all n * n keys and experts written out: values, gradients, statistics, padding, meshes."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from controlled import train_call
from numpy_layers import close, draw
from numpy_routing import best, sigmoid, softmax

from moejax import models
from moejax.core.context import Context
from moejax.core.errors import ConfigError
from moejax.layers import ProductKeys
from moejax.models import active_params, count_params
from moejax.parallel import Parallel, make_mesh, use

B, S, D, N, H, K, Q = 3, 4, 6, 4, 2, 3, 8
VALID = np.arange(S)[None] < np.array([4, 2, 3])[:, None]
SCORES = {"softmax": softmax, "sigmoid": sigmoid, "relu": lambda x: np.maximum(x, 0)}


def layer(**fields) -> ProductKeys:
    return ProductKeys(**{"num_keys": N, "heads": H, "k": K, "query_dim": Q, **fields})


@functools.cache
def example(peer: ProductKeys) -> tuple:
    x = jax.random.normal(jax.random.key(0), (B, S, D))
    params = draw(peer, x)["params"]
    rng = np.random.default_rng(1)
    state: dict = {"usage": {"weight": jnp.asarray(rng.random(N * N), jnp.float32)}}
    if peer.query_norm == "batch":
        state["query"] = {"mean": jnp.asarray(rng.normal(size=H * Q)), "var": jnp.asarray(rng.random(H * Q) + 0.5)}
    return {"params": params, "router_state": jax.tree.map(jnp.float32, state)}, x


@functools.cache
def apply(peer: ProductKeys, train: bool):
    """Output, and what was sown with the variables after the step (unchanged in evaluation)."""
    ctx = Context(valid=jnp.asarray(VALID), train=train)

    @jax.jit
    def call(variables: dict, x: jax.Array) -> tuple:
        y, sown, after = train_call(peer, variables, x, ctx, mutable=("stats",))
        return y, {**sown, "after": after}

    return call


def numpy_layer(peer: ProductKeys, variables: dict, x: np.ndarray, train: bool) -> tuple[np.ndarray, np.ndarray]:
    """Outputs, and each expert's summed weight: one token and head at a time, over all N * N experts."""
    p = jax.tree.map(lambda a: np.asarray(a, np.float64), variables["params"])
    rows, valid = np.asarray(x, np.float64).reshape(-1, D), VALID.reshape(-1)
    query = rows @ p["query"]
    if peer.query_norm == "batch":
        state = variables["router_state"]["query"]
        mean, var = (query[valid].mean(0), query[valid].var(0)) if train else (state["mean"], state["var"])
        query = (query - np.asarray(mean)) / np.sqrt(np.asarray(var) + 1e-5) * p["scale"] + p["shift"]
    query = query.reshape(-1, H, Q)
    if peer.query_norm == "layer":
        query = (query - query.mean(-1, keepdims=True)) / np.sqrt(query.var(-1, keepdims=True) + 1e-6)
        query = query * p["query_norm"]["scale"] + p["query_norm"]["bias"]
    y, spent = np.zeros_like(rows), np.zeros(N * N)
    for t, h in np.ndindex(len(rows), H):
        keys = p["keys"][0 if peer.shared_keys else h]
        score = np.array(
            [query[t, h, : Q // 2] @ keys[0, i // N] + query[t, h, Q // 2 :] @ keys[1, i % N] for i in range(N * N)]
        )
        chosen = best(score, K)
        for i, g in zip(chosen, SCORES[peer.score](score[chosen]), strict=True):
            hidden = 1.0 if peer.values_only else gelu(rows[t] @ p["bank"]["u"][i])
            if valid[t]:
                y[t] += g * hidden * p["bank"]["v"][i]
                spent[i] += g
    return y.reshape(B, S, D), spent


def gelu(x: float) -> float:
    return 0.5 * x * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3)))


@pytest.mark.parametrize(
    ("fields", "train"),
    [
        ({}, False),
        ({}, True),
        ({"query_norm": "layer", "score": "sigmoid"}, True),
        ({"values_only": True, "score": "relu", "query_norm": "none", "shared_keys": False}, False),
    ],
    ids=["evaluation", "training", "sigmoid", "values"],
)
def test_it_is_numpys_over_all_experts(fields: dict, train: bool) -> None:
    peer = layer(**fields)
    variables, x = example(peer)
    expected, spent = numpy_layer(peer, variables, x, train)
    y, changed = apply(peer, train)(variables, x)
    np.testing.assert_allclose(y, expected, rtol=1e-4, atol=1e-5)
    assert (np.asarray(y)[~VALID] == 0).all()
    before, after = (np.asarray(v["router_state"]["usage"]["weight"]) for v in (variables, changed["after"]))
    usage = 0.9 * before + 0.1 * spent / spent.sum() if train else before
    np.testing.assert_allclose(after, usage, rtol=1e-4)
    share = before / before.sum()
    np.testing.assert_allclose(changed["stats"]["unevenness"], (share * np.log(share * N * N)).sum(), rtol=1e-4)
    assert changed["stats"]["usage"] == 1


def test_training_updates_running_statistics_of_valid_tokens_and_evaluation_does_not() -> None:
    variables, x = example(layer())
    changed = apply(layer(), True)(variables, x)[1]["after"]["router_state"]["query"]
    query = (np.asarray(x, np.float64).reshape(-1, D) @ np.asarray(variables["params"]["query"]))[VALID.reshape(-1)]
    before = variables["router_state"]["query"]
    np.testing.assert_allclose(changed["mean"], 0.9 * before["mean"] + 0.1 * query.mean(0), rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(changed["var"], 0.9 * before["var"] + 0.1 * query.var(0), rtol=1e-4)
    _, same = apply(layer(), False)(variables, x)
    close(same["after"], variables, 0, 0)


def test_what_padding_holds_changes_nothing() -> None:
    variables, x = example(layer())
    noisy = jnp.where(VALID[..., None], x, 100.0)
    run = apply(layer(), True)
    close(run(variables, noisy), run(variables, x))


def test_usage_counts_experts_that_nobody_ever_picked() -> None:
    peer = layer()
    variables, x = example(peer)
    fresh = {**variables, "router_state": {**variables["router_state"], "usage": {"weight": jnp.zeros(N * N)}}}
    _, before = apply(peer, False)(fresh, x)
    _, after = apply(peer, False)(apply(peer, True)(fresh, x)[1]["after"], x)
    spent = numpy_layer(peer, variables, x, True)[1]
    assert before["stats"]["usage"] == before["stats"]["unevenness"] == 0
    np.testing.assert_allclose(after["stats"]["usage"], (spent > 0).mean())


def dense(params: dict, x: jax.Array) -> jax.Array:
    """The layer without a query norm as plain formulas over all experts."""
    query = (x @ params["query"]).reshape(B, S, H, 2, Q // 2)
    halves = jnp.einsum("bshwq,wnq->bshwn", query, params["keys"][0])
    scores = (halves[..., 0, :, None] + halves[..., 1, None, :]).reshape(B, S, H, N * N)
    least = jax.lax.top_k(scores, K)[0][..., -1:]
    gates = jax.nn.softmax(jnp.where(scores >= least, scores, -jnp.inf)).sum(2)
    hidden = jax.nn.gelu(jnp.einsum("bsd,ed->bse", x, params["bank"]["u"]))
    return jnp.einsum("bse,ed->bsd", gates * hidden, params["bank"]["v"]) * VALID[..., None]


def test_gradients_are_those_of_the_dense_formula() -> None:
    peer = layer(query_norm="none")
    variables, x = example(peer)

    def loss(params: dict, x: jax.Array) -> jax.Array:
        ctx = Context(valid=jnp.asarray(VALID))
        return jnp.sin(peer.apply({**variables, "params": params}, x, ctx)).sum()

    actual = jax.jit(jax.grad(loss, argnums=(0, 1)))(variables["params"], x)
    expected = jax.jit(jax.grad(lambda p, x: jnp.sin(dense(p, x)).sum(), argnums=(0, 1)))(variables["params"], x)
    close(actual, expected)


def test_a_mesh_that_splits_the_experts_computes_the_same() -> None:
    """In training. 9 valid tokens in 3 sequences on 8 devices: shares are padded."""
    peer = layer()
    variables, x = example(peer)

    def loss(params: dict, x: jax.Array) -> tuple[jax.Array, tuple]:
        ctx = Context(valid=jnp.asarray(VALID), train=True)
        y, changed = peer.apply({**variables, "params": params}, x, ctx, mutable=["router_state"])
        return jnp.sin(y).sum(), (y, changed)

    step = jax.value_and_grad(loss, argnums=(0, 1), has_aux=True)
    expected = jax.jit(step)(variables["params"], x)
    with use(Parallel(make_mesh("fsdp=2,expert=2,tensor=2"))):
        close(jax.jit(lambda *args: step(*args))(variables["params"], x), expected)


def test_it_is_a_layer_of_a_decoder_whose_active_parameters_are_few() -> None:
    """By config alone, scanned and rematerialised; statistics of each layer, and no balance loss."""
    ffn = dict(kind="product_keys", num_keys=N, heads=H, k=2, query_dim=Q)
    block = dict(kind="transformer", mixer=dict(kind="attention", num_heads=1), norm=dict(kind="rms_norm"), ffn=ffn)
    spec = dict(kind="decoder_lm", vocab_size=9, d_model=D, num_layers=2, pattern=("a",), blocks={"a": block}, remat="full")
    model, tokens = models.build(spec), jnp.zeros((2, 4), jnp.int32)
    variables = jax.eval_shape(model.init, jax.random.key(0), tokens)
    assert variables["router_state"]["stack"]["repeats"]["0_a"]["ffn"]["usage"]["weight"].shape == (2, N * N)
    total = count_params(variables["params"])
    assert total - active_params(model, variables["params"]) == 2 * 2 * D * (N * N - 2 * H)
    ctx = Context(train=True)
    _, sown = jax.eval_shape(lambda v: model.apply(v, tokens, ctx, mutable=["losses", "stats", "router_state"]), variables)
    assert "losses" not in sown
    assert sown["stats"]["stack"]["repeats"]["0_a"]["ffn"]["unevenness"].shape == (2,)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"k": 17}, "k=17 exceeds the num_keys=4"),
        ({"query_dim": 7}, "query_dim=7 must be even"),
        ({"score": "tanh"}, "score='tanh'"),
    ],
)
def test_bad_settings_raise(fields: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        layer(**fields)
