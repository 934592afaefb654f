"""What `observe` counts, against one loop over tokens, for every kind of plan and under a scan."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from numpy_layers import compiled

from moejax import models
from moejax.analysis import changed, observe, with_noise
from moejax.core.errors import ConfigError
from moejax.tasks.classify import Classify
from moejax.tasks.next_token import NextToken

B, S, D, E, V = 4, 6, 8, 4, 16
NORM = {"kind": "rms_norm"}
MIXER = {"kind": "attention", "num_heads": 2}
TOP = {
    "kind": "moe",
    "num_experts": E,
    "router": {"kind": "linear"},
    "select": {"kind": "top_k", "k": 2},
    "bank": {"kind": "ffn", "hidden": 4},
}


def language_model(*ffns: dict[str, Any], repeats: int = 1, scan: bool = True) -> Any:
    blocks = {f"f{i}": {"kind": "transformer", "norm": NORM, "mixer": MIXER, "ffn": f} for i, f in enumerate(ffns)}
    size = {"vocab_size": V, "d_model": D, "num_layers": repeats * len(ffns), "scan": scan}
    return models.build({"kind": "decoder_lm", **size, "pattern": tuple(blocks), "blocks": blocks})


def batch(rng: np.random.Generator) -> dict[str, np.ndarray]:
    tokens = rng.integers(0, V, (B, S)).astype(np.int32)
    valid = rng.random((B, S)) < 0.8
    positions = np.broadcast_to(np.arange(S, dtype=np.int32), (B, S))
    domain = rng.integers(0, 3, (B, S)).astype(np.int32)
    return {
        "tokens": tokens,
        "targets": tokens,
        "valid": valid,
        "segments": valid.astype(np.int32),
        "positions": positions,
        "domain": domain,
    }


def start(model: Any, data: dict[str, np.ndarray], task: Any) -> Any:
    x, ctx = task.inputs(jax.tree.map(jnp.asarray, data), jnp.zeros((), jnp.int32), False)
    return jax.jit(model.init)({"params": jax.random.key(0)}, x, ctx)


@pytest.mark.parametrize("by", ["sequence", "batch", "position"])
def test_counts_are_those_of_a_loop_over_tokens(rng: np.random.Generator, by: str) -> None:
    model, task = language_model({**TOP, "group_by": by, "backend": "einsum"}, repeats=2), NextToken()
    batches = [batch(rng), batch(rng)]
    variables = start(model, batches[0], task)
    layers = observe(model, variables, batches, task, labels=3, vocabulary=V)
    assert set(layers) == {"stack.repeats.0_f0.ffn.0", "stack.repeats.0_f0.ffn.1"}
    assert {layer.backend for layer in layers.values()} == {"einsum"}
    for i, layer in enumerate(layers.values()):
        counts, words, tokens, bits = np.zeros((3, E)), np.zeros((V, E)), np.zeros(3), np.zeros(3)
        for each in batches:
            x, ctx = task.inputs(jax.tree.map(jnp.asarray, each), jnp.zeros((), jnp.int32), False)
            node = compiled(model, "routing")(variables, x, ctx)[1]["routing"]["stack"]["repeats"]["0_f0"]["ffn"]
            expert, logits = np.asarray(node["plan"].expert)[i], np.asarray(node["logits"])[i]
            if by == "position":
                expert, logits = expert.swapaxes(0, 1), logits.swapaxes(0, 1)
            expert, logits = expert.reshape(B, S, 2), logits.reshape(B, S, E)
            probs = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
            for b, s in zip(*np.nonzero(each["segments"]), strict=True):
                label = each["domain"][b, s]
                tokens[label] += 1
                bits[label] -= (probs[b, s] * np.log2(probs[b, s])).sum()
                for e in expert[b, s]:
                    counts[label, e] += 1
                    words[each["tokens"][b, s], e] += 1
        np.testing.assert_allclose(layer.counts, counts)
        np.testing.assert_allclose(layer.words, words)
        np.testing.assert_allclose(layer.tokens, tokens)
        np.testing.assert_allclose(layer.uncertainty, bits / tokens, rtol=1e-4)
        np.testing.assert_allclose(layer.experts_per_token, 2)


def test_experts_are_compared_by_their_answers(rng: np.random.Generator) -> None:
    """Two experts made equal answer alike; one turned round answers the opposite."""
    model, task, data = language_model(TOP, scan=False), NextToken(), batch(rng)
    variables = jax.tree.map(np.array, start(model, data, task))
    bank = variables["params"]["stack"]["repeat_0"]["0_f0"]["ffn"]["bank"]
    for w in jax.tree.leaves(bank):
        w[1] = w[0]
        w[2] = w[0]
    bank["w_out"][2] *= -1
    (layer,) = observe(model, variables, [data, data], task).values()
    np.testing.assert_allclose(np.diag(layer.similarity), 1, rtol=1e-4)
    np.testing.assert_allclose(layer.similarity[0, 1], 1, rtol=1e-4)
    np.testing.assert_allclose(layer.similarity[0, 2], -1, rtol=1e-4)
    assert abs(layer.similarity[0, 3]) < 0.9
    off = [layer.similarity[i, j] for i in range(E) for j in range(E) if i != j]
    np.testing.assert_allclose(layer.alikeness, np.mean(off), rtol=1e-5)


def test_a_router_that_tells_domains_apart_specialises_and_a_changed_one_is_seen(rng: np.random.Generator) -> None:
    hashed = {**TOP, "router": {"kind": "hash", "hash": "random"}, "select": {"kind": "top_k", "k": 1}}
    model, task, data = language_model(hashed, TOP, scan=False), NextToken(), batch(rng)
    variables = start(model, data, task)
    layers = observe(model, variables, [data], task, labels=3, responses=False)
    by_hash, learned = layers.values()
    assert by_hash.similarity is None
    assert by_hash.counts.sum() == data["segments"].sum()
    other = jax.tree.map(lambda w: w, variables)
    router = other["params"]["stack"]["repeat_0"]["1_f1"]["ffn"]["router"]
    router["w"] = -router["w"]
    moved = changed(model, variables, other, [data], task)
    assert moved == {"stack.repeat_0.0_f0.ffn": 0, "stack.repeat_0.1_f1.ffn": 1}, (
        "of four experts the two worst are never the two best"
    )
    same = {**data, "domain": (data["tokens"] % 3).astype(np.int32)}
    told = observe(model, variables, [same], task, labels=3, responses=False)["stack.repeat_0.0_f0.ffn"]
    assert told.specialisation > by_hash.specialisation, "the token's id tells this domain, and the hash tells the id"
    del learned


def test_noise_moves_what_looks_at_neighbours_and_not_what_looks_at_the_token(rng: np.random.Generator) -> None:
    """Tokens that were replaced are not counted: a hash of the token's own id never changes, a learnt router's choices do."""
    hashed = {**TOP, "router": {"kind": "hash", "hash": "random"}, "select": {"kind": "top_k", "k": 1}}
    model, task, data = language_model(hashed, TOP, scan=False), NextToken(), batch(rng)
    variables = start(model, data, task)
    noisy = with_noise(data, 0.3, rng)
    np.testing.assert_array_equal(noisy["targets"], data["targets"])
    assert 0 < (noisy["tokens"] != data["tokens"]).mean() < 0.6
    by_hash, learned = changed(model, variables, variables, [data], task, lambda _: noisy).values()
    assert by_hash == 0
    assert 0 < learned < 1
    counts = []
    for each in (data, noisy):
        x, ctx = task.inputs(jax.tree.map(jnp.asarray, each), jnp.zeros((), jnp.int32), False)
        counts.append(compiled(model, "routing")(variables, x, ctx)[1]["routing"]["stack"]["repeat_0"]["1_f1"]["ffn"])
    same = (noisy["tokens"] == data["tokens"]) & (data["segments"] != 0)
    old, new = (np.asarray(c["plan"].expert)[same] for c in counts)
    lost = [len(set(a) - set(b)) for a, b in zip(old.tolist(), new.tolist(), strict=True)]
    assert learned == pytest.approx(np.sum(lost) / (2 * same.sum()))
    assert changed(model, variables, variables, [data], task)["stack.repeat_0.1_f1.ffn"] == 0
    image = {"image": rng.random((B, 8, 8, 1), np.float32)}
    assert np.std(with_noise(image, 0.1, rng)["image"] - image["image"]) == pytest.approx(0.1 * image["image"].std(), rel=0.2)


def test_images_soft_slots_and_expert_choice(rng: np.random.Generator) -> None:
    soft = {"kind": "soft_moe", "num_experts": E, "slots": 2, "bank": {"kind": "ffn", "hidden": 4}}
    choice = {**TOP, "select": {"kind": "expert_choice", "capacity_factor": 1.0}}
    blocks = {
        n: {"kind": "transformer", "norm": NORM, "mixer": MIXER, "ffn": f} for n, f in (("soft", soft), ("choice", choice))
    }
    size = {"image_size": 8, "channels": 1, "patch_size": 4, "num_classes": 10, "d_model": D, "num_layers": 2}
    model, task = models.build({"kind": "vit", **size, "pattern": ("soft", "choice"), "blocks": blocks}), Classify()
    data = {"image": rng.random((B, 8, 8, 1), np.float32), "label": np.array([0, 1, 1, 9], np.int32), "valid": np.ones(B, bool)}
    layers = observe(model, start(model, data, task), [data], task, labels=10)
    for layer in layers.values():
        np.testing.assert_allclose(layer.tokens[[0, 1, 9]], [4, 8, 4])
        np.testing.assert_allclose(layer.load.sum(), 1, rtol=1e-5)
        assert layer.similarity.shape == (E, E)
    _, chosen = layers.values()
    np.testing.assert_allclose(chosen.load, 1 / E, err_msg="each expert takes as many tokens")


def test_what_cannot_be_observed_is_told(rng: np.random.Generator) -> None:
    dense, task, data = language_model({"kind": "ffn", "hidden": 4}), NextToken(), batch(rng)
    variables = start(dense, data, task)
    with pytest.raises(ConfigError, match="no layer of this DecoderLM routes anything; choose an arm with experts"):
        observe(dense, variables, [data], task)
    with pytest.raises(ConfigError, match="no batches to observe"):
        observe(dense, variables, [], task)
    with pytest.raises(ConfigError, match="vocabulary=100000 is too large"):
        observe(dense, variables, [data], task, vocabulary=100_000)
