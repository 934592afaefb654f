"""Mixture-of-head attention against a NumPy loop over heads in summation form, its gates, losses and decoding."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from numpy_layers import close, compiled, draw
from numpy_routing import best, softmax

from moejax import Balance, ConfigError, Context, ExpertChoice, Linear, TopK
from moejax.layers.mixers.attention import Attention
from moejax.layers.mixers.mixture_of_heads import MixtureOfHeads, QueryNormHeads
from moejax.models import build
from moejax.serve import generate

B, S, D, H, KV, SHARED, K = 2, 5, 12, 6, 3, 2, 2
ROUTED = H - SHARED
VALID = np.array([[True] * S, [True, True, True, True, False]])
RULE = TopK(k=K, normalise=True, scale=K)
LOSS = Balance(0.5, share="tokens", over="batch")


def layer(cls=MixtureOfHeads, **fields):
    fields = dict(num_heads=H, num_kv_heads=KV, rope_base=None, shared_heads=SHARED, select=RULE, losses=(LOSS,)) | fields
    return cls(**fields)


def numpy_heads(params, x: np.ndarray, valid: np.ndarray) -> np.ndarray:
    """Every head's output `[s, h, c]` of one sequence, causal, each query head with the keys of its group."""
    size = D // H
    q, k, v = (np.asarray(x, np.float64) @ np.asarray(params[n]["kernel"], np.float64) for n in "qkv")
    out = np.zeros((S, H, size))
    for t in range(S):
        seen = [u for u in range(t + 1) if valid[u]]
        for h in range(H):
            group = h // (H // KV)
            keys, values = (a.reshape(S, KV, size)[seen, group] for a in (k, v))
            out[t, h] = softmax(keys @ q[t].reshape(H, size)[h] / np.sqrt(size)) @ values
    return out


def numpy_gates(params, x: np.ndarray, shared: int, two_stage: bool) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Gates of all heads for one token; the routed heads' probabilities, and which of them are on."""
    w = {name: np.asarray(params[name]["w"], np.float64) for name in params if "router" in name}
    p = softmax(x @ w["router"])
    on = np.zeros(H - shared, bool)
    on[best(x @ w["router"], K)] = True
    r = np.where(on, K * p / p[on].sum(), 0)
    if not shared:
        return r, p, on
    s = shared * softmax(x @ w["shared_router"])
    if two_stage:
        a = 2 * softmax(x @ w["stage_router"])
        s, r = a[0] * s, a[1] * r
    return np.concatenate([s, r]), p, on


@pytest.mark.parametrize(("shared", "two_stage"), [(SHARED, True), (SHARED, False), (1, True), (0, True)])
def test_it_is_numpys_sum_over_gated_heads(rng: np.random.Generator, shared: int, two_stage: bool) -> None:
    moh, x = layer(shared_heads=shared, two_stage=two_stage), jnp.asarray(rng.normal(size=(B, S, D)), jnp.float32)
    variables = draw(moh, x, Context())
    y, sown = compiled(moh, "losses", "stats")(variables, x, Context(valid=jnp.asarray(VALID)))
    params = variables["params"]
    out = np.asarray(params["o"]["kernel"], np.float64).reshape(H, D // H, D)
    probs, on = [], []
    for row, t in np.argwhere(VALID):
        gates, p, chosen = numpy_gates(params, np.asarray(x[row, t], np.float64), shared, two_stage)
        heads = numpy_heads(params, np.asarray(x[row]), VALID[row])[t]
        np.testing.assert_allclose(y[row, t], sum(gates[h] * heads[h] @ out[h] for h in range(H)), rtol=1e-4, atol=1e-4)
        probs, on = [*probs, p], [*on, chosen]
    e = H - shared
    expected = 0.5 * e**2 * (np.mean(probs, 0) * np.mean(on, 0)).mean()
    np.testing.assert_allclose(sown["losses"]["balance_loss"], expected, rtol=1e-4)
    np.testing.assert_allclose(sown["stats"]["experts_per_token"], K, rtol=1e-5)


def test_gates_start_around_one() -> None:
    """Without the factors k, h_s and 2 the layer's output would start at a fraction of attention's."""
    moh = layer()
    x = jax.random.normal(jax.random.key(1), (B, S, D))
    params = jax.jit(moh.init)(jax.random.key(0), x, Context())["params"]
    all_on = layer(select=TopK(k=ROUTED, normalise=True, scale=ROUTED))
    zeros = jax.tree.map(jnp.zeros_like, {name: params[name] for name in params if "router" in name})
    plain = {name: params[name] for name in "qkvo"}
    attention = Attention(H, KV, rope_base=None)
    close(compiled(all_on)({"params": {**plain, **zeros}}, x, Context()), compiled(attention)({"params": plain}, x, Context()))
    gates = [numpy_gates(params, np.asarray(token, np.float64), SHARED, True)[0] for token in x.reshape(-1, D)]
    np.testing.assert_allclose(np.mean(gates), (SHARED + K) / H, rtol=0.1)


def test_query_norms_choose_heads_with_binary_gates(rng: np.random.Generator) -> None:
    moh, x = layer(QueryNormHeads), jnp.asarray(rng.normal(size=(B, S, D)), jnp.float32)
    variables = draw(moh, x, Context())
    params = variables["params"]
    assert sorted(params) == ["k", "o", "q", "v"]
    y, sown = compiled(moh, "routing", "losses")(variables, x, Context(valid=jnp.asarray(VALID)))
    out = np.asarray(params["o"]["kernel"], np.float64).reshape(H, D // H, D)
    for row, t in np.argwhere(VALID):
        q = (np.asarray(x[row, t], np.float64) @ np.asarray(params["q"]["kernel"], np.float64)).reshape(H, -1)
        norms = np.sqrt((q[SHARED:] ** 2).sum(-1))
        np.testing.assert_allclose(sown["routing"]["logits"][row, t], norms / norms.std(ddof=1), rtol=1e-4)
        on = [*range(SHARED), *(SHARED + best(norms, K))]
        heads = numpy_heads(params, np.asarray(x[row]), VALID[row])[t]
        np.testing.assert_allclose(y[row, t], sum(heads[h] @ out[h] for h in on), rtol=1e-4, atol=1e-4)


def test_binary_gates_pass_the_gradient_of_their_weights(rng: np.random.Generator) -> None:
    """Straight-through: dL/dlogit is that of the plan's weights, with the forward pass of the mask."""
    moh = layer(QueryNormHeads, losses=())
    x, c = jnp.asarray(rng.normal(size=(1, 3, D)), jnp.float32), jnp.asarray(rng.normal(size=(1, 3, H)), jnp.float32)
    q = jnp.asarray(rng.normal(size=(1, 3, H, 2)), jnp.float32)

    def weights(q):
        norms = jnp.sqrt(jnp.square(q[:, :, SHARED:]).sum(-1))
        logits = norms / norms.std(-1, ddof=1, keepdims=True)
        kept = logits >= jnp.sort(logits, axis=-1)[..., -K, None]
        p = jnp.where(kept, jax.nn.softmax(logits), 0)
        return (c[..., SHARED:] * K * p / p.sum(-1, keepdims=True)).sum()

    def gates(q):
        return (c * moh.apply({}, x, q, Context(), method="_gates", mutable=["stats"])[0]).sum()

    close(jax.jit(jax.grad(gates))(q), jax.jit(jax.grad(weights))(q), 1e-3)
    value = moh.apply({}, x, q, Context(), method="_gates", mutable=["stats"])[0]
    np.testing.assert_allclose(value, np.round(value), atol=1e-6)
    assert (value.sum(-1) == SHARED + K).all()


def test_decoding_equals_the_whole_sequence() -> None:
    mixer = {"kind": "mixture_of_heads", "num_heads": 4, "num_kv_heads": 2, "shared_heads": 1}
    mixer |= {"select": {"kind": "top_k", "k": 2, "normalise": True, "scale": 2.0}}
    block = {"kind": "transformer", "mixer": mixer, "norm": {"kind": "rms_norm"}, "ffn": {"kind": "glu", "hidden": 8}}
    sizes = {"vocab_size": 19, "d_model": 8, "num_layers": 2, "pattern": ("a",), "max_length": 12}
    model = build({"kind": "decoder_lm", **sizes, "blocks": {"a": block}})
    tokens = jnp.asarray(np.random.default_rng(0).integers(0, 19, (2, 5)))
    params = draw(model, tokens)["params"]
    out = generate(model, params, tokens, max_new_tokens=3, keep_logits=True)
    whole = jax.jit(model.apply)({"params": params}, jnp.concatenate([tokens, out.tokens], axis=1))
    close(out.logits, whole[:, 4:7], 1e-3, 1e-4)


def test_bad_settings_raise() -> None:
    for fields, message in (
        ({"shared_heads": H}, f"shared_heads={H}"),
        ({"select": TopK(k=5)}, "k=5 exceeds num_experts=4"),
        ({"router": Linear(H)}, f"router.num_experts={H}, but num_heads={H} - shared_heads={SHARED} leaves {ROUTED}"),
    ):
        with pytest.raises(ConfigError, match=message):
            layer(**fields)
    with pytest.raises(ConfigError, match=r"mixer\.select \(ExpertChoice\) selects over later tokens"):
        layer(select=ExpertChoice(1.0)).check_causal("mixer")
    assert "plans several tokens" in layer(select=ExpertChoice(1.0)).decodable()
