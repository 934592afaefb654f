"""Attention against loops in NumPy, written from the definitions of Llama and of grouped-query attention."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moejax.core.context import Context
from moejax.core.errors import ConfigError
from moejax.layers.mixers.attention import CHUNK, Attention, attend, rope, visible
from pallas_kernels.implementations import target

B, S, D = 2, 7, 24


def rotate_half(x):
    half = len(x) // 2
    return np.concatenate([-x[half:], x[:half]])


def llama_rope(x, position, base):
    """x * cos + rotate_half(x) * sin, with the frequencies written twice."""
    inverse = 1.0 / base ** (np.arange(0, len(x), 2) / len(x))
    angle = np.concatenate([position * inverse, position * inverse])
    return x * np.cos(angle) + rotate_half(x) * np.sin(angle)


def rms(x, scale):
    return x / np.sqrt((x**2).mean() + 1e-6) * scale


def numpy_attention(layer, params, x, positions, valid, segments):
    params, x = jax.tree.map(np.asarray, (params, x))
    heads, kv = layer.num_heads, layer.num_kv_heads or layer.num_heads
    size = layer.head_dim or D // heads

    def project(name, row, token):
        y = x[row, token] @ params[name]["kernel"] + (params[name]["bias"] if layer.use_bias else 0)
        if name in "qk" and layer.qk_norm == "projection":
            y = rms(y, params[f"{name}_norm"])
        y = y.reshape(-1, size)
        for h in range(len(y)):
            if name in "qk" and layer.qk_norm == "head":
                y[h] = rms(y[h], params[f"{name}_norm"])
            if name in "qk" and layer.rope_base is not None:
                y[h] = llama_rope(y[h], positions[row, token], layer.rope_base)
        return y

    out = np.zeros((B, S, heads * size))
    for row in range(B):
        q, k, v = ([project(name, row, t) for t in range(S)] for name in "qkv")
        for i in range(S):
            for h in range(heads):
                group = h // (heads // kv)
                scores, values = [], []
                for j in range(S):
                    distance = positions[row, i] - positions[row, j]
                    if layer.causal and distance < 0:
                        continue
                    if layer.window is not None and abs(distance) >= layer.window:
                        continue
                    if not valid[row, j] or segments[row, i] != segments[row, j]:
                        continue
                    scores.append(q[i][h] @ k[j][group] / np.sqrt(size))
                    values.append(v[j][group])
                if scores:
                    weight = np.exp(np.array(scores) - max(scores))
                    out[row, i, h * size : (h + 1) * size] = weight / weight.sum() @ np.array(values)
    return out @ params["o"]["kernel"] + (params["o"]["bias"] if layer.use_bias else 0)


def inputs():
    return jnp.asarray(np.random.default_rng(0).normal(size=(B, S, D)), jnp.float32)


def random_params(layer, x):
    """Parameters with nothing at zero or one, so that biases and norm scales matter."""
    params = jax.jit(layer.init)(jax.random.key(0), x, Context())["params"]
    rng = np.random.default_rng(1)
    return jax.tree.map(lambda leaf: leaf + jnp.asarray(0.3 * rng.normal(size=leaf.shape), jnp.float32), params)


POSITIONS = np.array([[0, 1, 2, 0, 1, 2, 3], [5, 2, 9, 0, 1, 12, 3]])  # packed documents; gathered, unordered tokens
SEGMENTS = np.array([[1, 1, 1, 2, 2, 2, 2], [0] * 7])
VALID = np.array([[True] * 6 + [False], [True, False, True, True, True, True, False]])


@pytest.mark.parametrize(
    ("fields", "context"),
    [
        (dict(num_heads=4), {}),
        (dict(num_heads=6, num_kv_heads=2, use_bias=True, rope_base=500.0), {"positions"}),
        (dict(num_heads=2, num_kv_heads=1, head_dim=8, window=3, qk_norm="head"), {"positions", "segments"}),
        (dict(num_heads=4, num_kv_heads=2, head_dim=10, qk_norm="projection"), {"positions", "segments", "valid"}),
        (dict(num_heads=3, causal=False, rope_base=None, use_bias=True), {"valid"}),
        (dict(num_heads=2, causal=False, window=2), {"segments"}),
    ],
)
def test_equals_loops_in_numpy(fields, context):
    layer, x = Attention(**fields), inputs()
    params = random_params(layer, x)
    positions = POSITIONS if "positions" in context else np.broadcast_to(np.arange(S), (B, S))
    given = {"positions": POSITIONS, "segments": SEGMENTS, "valid": VALID}
    ctx = Context(**{name: jnp.asarray(given[name]) for name in context})
    valid = VALID if "valid" in context else np.ones((B, S), bool)
    segments = SEGMENTS if "segments" in context else np.zeros((B, S), int)
    expected = numpy_attention(layer, params, x, positions, valid, segments)
    actual = jax.jit(layer.apply)({"params": params}, x, ctx)
    np.testing.assert_allclose(actual[valid], expected[valid], atol=2e-5)


def test_rope_is_llamas_and_depends_on_distances_only():
    rng = np.random.default_rng(0)
    x = rng.normal(size=(B, S, 2, 8)).astype(np.float32)
    turned = np.asarray(rope(jnp.asarray(x), jnp.asarray(POSITIONS), base=100.0))
    for row, token, head in np.ndindex(B, S, 2):
        expected = llama_rope(x[row, token, head], POSITIONS[row, token], 100.0)
        np.testing.assert_allclose(turned[row, token, head], expected, atol=1e-5)
    shifted = np.asarray(rope(jnp.asarray(x), jnp.asarray(POSITIONS + 37), base=100.0))
    scores = np.einsum("bshc,bthc->bhst", turned, turned)
    np.testing.assert_allclose(scores, np.einsum("bshc,bthc->bhst", shifted, shifted), atol=1e-4)


def test_rope_keeps_far_positions_apart_in_bfloat16():
    x = jnp.ones((1, 2, 1, 8), jnp.bfloat16)
    near, far = rope(x, jnp.array([[4096, 4097]]))[0, :, 0, 0]
    assert near != far


def test_grouped_heads_equal_full_heads_with_repeated_keys_and_values():
    x = inputs()
    grouped, full = Attention(num_heads=4, num_kv_heads=2), Attention(num_heads=4)
    params = random_params(grouped, x)
    repeated = dict(params)
    for name in "kv":
        kernel = params[name]["kernel"].reshape(D, 2, 6)
        repeated[name] = {"kernel": jnp.repeat(kernel, 2, axis=1).reshape(D, 24)}
    expected = jax.jit(grouped.apply)({"params": params}, x, Context())
    actual = jax.jit(full.apply)({"params": repeated}, x, Context())
    np.testing.assert_allclose(actual, expected, rtol=1e-5, atol=1e-5)


def test_softmax_is_float32_in_bfloat16_layers():
    layer, x = Attention(num_heads=2, dtype="bfloat16"), inputs().astype(jnp.bfloat16)
    params = jax.jit(layer.init)(jax.random.key(0), x, Context())
    assert layer.apply(params, x, Context()).dtype == jnp.bfloat16
    assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(params))
    exponentials = [line for line in str(jax.make_jaxpr(layer.apply)(params, x, Context())).splitlines() if "= exp" in line]
    assert exponentials
    assert all("f32" in line for line in exponentials)


def test_gradients_are_finite_where_a_query_sees_nothing():
    layer, x = Attention(num_heads=2), inputs()
    params = jax.jit(layer.init)(jax.random.key(0), x, Context())
    ctx = Context(valid=jnp.zeros((B, S), bool))
    grads = jax.jit(jax.grad(lambda p: layer.apply(p, x, ctx).sum()))(params)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(grads))


@pytest.mark.parametrize("window", [None, 3])
@pytest.mark.slow
def test_cache_in_uneven_chunks_equals_one_pass(window):
    """Chunks of 3, 1 and 3 tokens, some of them invalid in the middle, each row with its own."""
    layer = Attention(num_heads=4, num_kv_heads=2, max_length=9, window=window)
    x = jnp.where(VALID[..., None], inputs(), 1e3)  # an invalid token would be seen at once
    params = jax.jit(layer.init)(jax.random.key(0), x, Context())
    positions = np.broadcast_to(np.arange(S), (B, S)) + np.array([[0], [4]])
    expected = jax.jit(layer.apply)(params, x, Context(positions=jnp.asarray(positions), valid=jnp.asarray(VALID)))
    cache, outputs = {}, []
    extend = jax.jit(partial(layer.apply, mutable=["cache"]))
    for chunk in (slice(0, 3), slice(3, 4), slice(4, 7)):
        ctx = Context(positions=jnp.asarray(positions[:, chunk]), valid=jnp.asarray(VALID[:, chunk]), decode=True)
        y, cache = extend({**params, **cache}, x[:, chunk], ctx)
        outputs.append(y)
    np.testing.assert_allclose(np.concatenate(outputs, axis=1)[VALID], expected[VALID], atol=1e-5)
    stored = cache["cache"]
    assert stored["used"].tolist() == [6, 5]
    assert stored["position"][1, :5].tolist() == [4, 6, 7, 8, 9]
    assert not stored["key"][0, 6:].any()
    assert not stored["value"][1, 5:].any()


def test_long_sequences_in_chunks_equal_all_queries_at_once(monkeypatch, rng):
    q, k, v = (jnp.asarray(rng.normal(size=(2, 12, heads, 6)), jnp.float32) for heads in (4, 2, 2))
    mask = jnp.asarray(np.tril(rng.random((2, 12, 12)) < 0.8) | np.eye(12, dtype=bool))

    def run(q, k, v):
        return jnp.sin(attend(q, k, v, mask)).sum(), attend(q, k, v, mask)

    whole = jax.value_and_grad(run, argnums=(0, 1, 2), has_aux=True)(q, k, v)
    monkeypatch.setattr("moejax.layers.mixers.attention.CHUNK", 4)
    assert "scan" in str(jax.make_jaxpr(run)(q, k, v))
    chunked = jax.value_and_grad(run, argnums=(0, 1, 2), has_aux=True)(q, k, v)
    for a, b in zip(jax.tree.leaves(whole), jax.tree.leaves(chunked), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)


def test_long_sequences_never_hold_all_scores_in_memory():
    s = 8 * CHUNK
    q = jax.ShapeDtypeStruct((1, s, 2, 16), jnp.float32)

    def temporaries(attention):
        def loss(q, k, v):
            return attention(q, k, v, visible(jnp.arange(s)[None], jnp.arange(s)[None], causal=True)).sum()

        compiled = jax.jit(jax.grad(loss, argnums=(0, 1, 2))).lower(q, q, q).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    def dense(q, k, v, mask):
        return jax.nn.dot_product_attention(q, k, v, mask=mask[:, None])

    assert temporaries(attend) < temporaries(dense) / 3


def test_visible_by_hand():
    mask = visible(jnp.array([[0, 1, 2]]), jnp.array([[2, 0, 1]]), causal=True, window=2)
    assert mask[0].tolist() == [[False, True, False], [False, True, True], [True, False, True]]


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (dict(num_heads=4, num_kv_heads=3), "num_kv_heads=3 does not divide num_heads=4"),
        (dict(num_heads=4, head_dim=5), "head_dim=5 is odd"),
        (dict(num_heads=4, window=0), "window=0"),
        (dict(num_heads=4, qk_norm="heads"), "did you mean 'head'"),
    ],
)
def test_bad_fields_are_refused(fields, message):
    with pytest.raises(ConfigError, match=message):
        Attention(**fields)


def test_bad_calls_are_refused():
    x, key = inputs(), jax.random.key(0)
    positions = jnp.zeros((B, S), jnp.int32)
    ctx = Context(positions=positions, decode=True)
    with pytest.raises(ConfigError, match="num_heads=5 does not divide d_model=24"):
        Attention(num_heads=5).init(key, x, Context())
    with pytest.raises(ConfigError, match="exceed max_length=4"):
        Attention(num_heads=4, max_length=4).init(key, x, ctx)
    with pytest.raises(ConfigError, match=r"needs ctx\.positions"):
        Attention(num_heads=4).init(key, x, Context(decode=True))
    with pytest.raises(ConfigError, match="bidirectional"):
        Attention(num_heads=4, causal=False).init(key, x, ctx)
    with pytest.raises(ConfigError, match="one document a row"):
        Attention(num_heads=4).init(key, x, ctx.replace(segments=positions))


def test_float16_on_a_cpu_is_refused_in_words():
    q = jnp.ones((1, 4, 2, 8), jnp.float16)
    with pytest.raises(ConfigError, match=r"dtype='float16' cannot be computed on a CPU.*take 'bfloat16'"):
        attend(q, q, q, jnp.ones((1, 4, 4), bool))
    with target("v5e"):  # compiling ahead for another machine
        jax.eval_shape(lambda q: attend(q, q, q, jnp.ones((1, 4, 4), bool)), q)
