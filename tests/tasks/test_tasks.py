"""Tasks: scores against NumPy, and independence of the batch size."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from training_harness import VOCAB, TinyText, device

from moejax.core.errors import ConfigError
from moejax.models import network
from moejax.tasks.base import tasks


def numpy_nll(logits, targets):
    logits = logits.astype(np.float64)
    return np.log(np.exp(logits).sum(-1)) - np.take_along_axis(logits, targets[..., None], -1)[..., 0]


def summed(parts):
    return {name: sum(np.asarray(part[name], np.float64) for part in parts) for name in parts[0]}


def test_next_token_scores_equal_numpy_and_do_not_depend_on_the_batch_size(rng):
    task = tasks.build({"kind": "next_token"}, "task", domains=("code", "prose"))
    everything = TinyText({"batch_size": 24}, "validation").corpus
    logits = rng.normal(size=(*everything["tokens"].shape, VOCAB)).astype(np.float32) * 3
    valid, domain = everything["valid"], everything["domain"]
    nll = numpy_nll(logits, everything["targets"])
    expected = {
        "loss": nll[valid].mean(),
        "bits_per_byte": nll[valid].mean() / np.log(2),
        "accuracy": (logits.argmax(-1) == everything["targets"])[valid].mean(),
        "code/bits_per_byte": nll[valid & (domain == 0)].mean() / np.log(2),
        "prose/bits_per_byte": nll[valid & (domain == 1)].mean() / np.log(2),
    }
    for size in (24, 5, 1):
        parts = []
        for start in range(0, 24, size):
            batch = device({k: v[start : start + size] for k, v in everything.items()})
            parts.append(task.sums(jnp.asarray(logits[start : start + size]), batch))
        assert summed(parts)["count"] == valid.sum()
        metrics = task.metrics(summed(parts))
        assert metrics.keys() == expected.keys()
        for name, value in expected.items():
            np.testing.assert_allclose(metrics[name], value, rtol=1e-6)


def test_a_domain_without_targets_has_no_metric():
    task = tasks.build({"kind": "next_token"}, "task", domains=("code", "prose"))
    sums = {"nll": 2.0, "count": 4, "correct": 1, "domain_nll": np.array([2.0, 0.0]), "domain_count": np.array([4, 0])}
    assert set(task.metrics(sums)) == {"loss", "bits_per_byte", "accuracy", "code/bits_per_byte"}


def test_bytes_per_token_turns_nats_a_token_into_bits_a_byte():
    task = tasks.build({"kind": "next_token", "bytes_per_token": 4.0}, "task")
    sums = {"nll": np.log(2) * 24, "count": 2, "correct": 0}
    np.testing.assert_allclose(task.metrics(sums)["bits_per_byte"], 3.0)


def test_bits_per_byte_are_of_the_bytes_behind_the_targets(rng):
    """A uniform model over 600 words that stand for 1 to 9 bytes; two domains of different words."""
    task = tasks.build({"kind": "next_token"}, "task", domains=("short", "long"))
    size = rng.integers(1, 4, (4, 6)) + np.array([[0], [0], [6], [6]])
    valid = rng.random((4, 6)) < 0.7
    domain = np.repeat([0, 0, 1, 1], 6).reshape(4, 6)
    targets = rng.integers(0, 600, (4, 6))
    batch = device({"targets": targets, "valid": valid, "domain": domain, "bytes": size})
    metrics = task.metrics(jax.device_get(task.sums(jnp.zeros((4, 6, 600)), batch)))
    for name, chosen in {"": valid, "short/": valid & (domain == 0), "long/": valid & (domain == 1)}.items():
        np.testing.assert_allclose(metrics[f"{name}bits_per_byte"], np.log2(600) * chosen.sum() / size[chosen].sum(), rtol=1e-6)


def test_next_token_context_carries_what_routers_may_know():
    task = tasks.build({"kind": "next_token"}, "task")
    batch = device(next(TinyText({"batch_size": 3}, "train")))
    tokens, ctx = task.inputs(batch, jnp.int32(5), train=True)
    assert tokens is batch["tokens"]
    assert ctx.train
    assert int(ctx.step) == 5
    np.testing.assert_array_equal(ctx.valid, batch["segments"] > 0)
    assert not np.array_equal(ctx.valid, batch["valid"])
    for name, key in {"positions": "positions", "segments": "segments", "token_ids": "tokens", "domain": "domain"}.items():
        np.testing.assert_array_equal(getattr(ctx, name), batch[key])


def test_padding_with_nan_logits_changes_neither_value_nor_gradient(rng):
    task = tasks.build({"kind": "classify"}, "task")
    label = np.array([1, 0, 2], np.int32)
    logits = rng.normal(size=(3, 4)).astype(np.float32)

    def loss(logits, label, valid):
        sums = task.sums(logits, device({"label": label, "valid": valid}))
        return sums["nll"] / sums["count"]

    compact = jax.value_and_grad(loss)(jnp.asarray(logits[:2]), label[:2], np.array([True, True]))
    logits[2] = np.nan
    padded = jax.value_and_grad(loss)(jnp.asarray(logits), label, np.array([True, True, False]))
    assert float(compact[0]) > 0
    np.testing.assert_array_equal(padded[0], compact[0])
    np.testing.assert_array_equal(padded[1][:2], compact[1])
    np.testing.assert_array_equal(padded[1][2], 0)


def test_classify_scores_equal_numpy(rng):
    task = tasks.build({"kind": "classify"}, "task", domains=())
    logits, label = rng.normal(size=(6, 4)).astype(np.float32), rng.integers(0, 4, 6).astype(np.int32)
    valid = np.array([1, 1, 0, 1, 1, 0], bool)
    batch = device({"image": np.zeros((6, 2, 2, 1), np.float32), "label": label, "valid": valid})
    metrics = task.metrics(jax.device_get(task.sums(jnp.asarray(logits), batch)))
    np.testing.assert_allclose(metrics["loss"], numpy_nll(logits, label)[valid].mean(), rtol=1e-6)
    np.testing.assert_allclose(metrics["accuracy"], (logits.argmax(-1) == label)[valid].mean())
    assert task.size(batch) == 6
    np.testing.assert_array_equal(task.inputs(batch, jnp.int32(0), train=False)[1].valid[:, 0], valid)


def test_unknown_task_names_the_nearest():
    with pytest.raises(ConfigError, match="did you mean 'classify'"):
        tasks.build({"kind": "clasify"}, "task")


def test_images_that_fill_up_a_batch_are_neither_routed_nor_counted(rng):
    """All images compete in one group; of 3 and 5 blanks, the 3 fare as if they were alone, whatever the blanks hold."""
    task = tasks.build({"kind": "classify"}, "task")
    moe = {
        "kind": "moe",
        "num_experts": 4,
        "router": {"kind": "linear"},
        "select": {"kind": "top_k", "k": 1, "capacity_factor": 0.5},
        "bank": {"kind": "ffn", "hidden": 8},
        "group_by": "batch",
    }
    shape = {"kind": "vit", "image_size": 4, "patch_size": 2, "channels": 1, "d_model": 8, "num_classes": 3, "num_layers": 1}
    model = network({"model": {**shape, "pattern": ("moe",), "blocks": {"moe": {"kind": "feed_forward", "ffn": moe}}}})
    image = rng.normal(size=(8, 4, 4, 1)).astype(np.float32)
    image[3:] = np.nan
    batch = {"image": image, "label": np.array([0, 1, 2, 0, 0, 0, 0, 0], np.int32), "valid": np.arange(8) < 3}
    inputs, ctx = task.inputs(device(batch), jnp.int32(0), train=False)
    params = jax.jit(model.init)(jax.random.key(0), jnp.zeros_like(inputs), ctx)["params"]
    params["head"]["kernel"] = jnp.asarray(rng.normal(size=(8, 3)), jnp.float32)  # starts as zeros

    def loss(params, batch):
        inputs, ctx = task.inputs(batch, jnp.int32(0), train=False)
        sums = task.sums(model.apply({"params": params}, inputs, ctx), batch)
        return sums["nll"] / sums["count"]

    alone = device({name: value[:3] for name, value in batch.items()})
    (found, grads), (wanted, right) = (jax.jit(jax.value_and_grad(loss))(params, b) for b in (device(batch), alone))
    np.testing.assert_allclose(found, wanted, rtol=1e-6)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), grads, right)
