"""The balance loss over all layers at once: each layer adds what it changes, and their sum is the loss of the pooled numbers."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import moejax as mj
from moejax.core.errors import ConfigError

E, K, B, S = 4, 2, 2, 6


def model(scan: bool = True, **loss: Any) -> Any:
    moe = {
        "kind": "moe",
        "num_experts": E,
        "router": {"kind": "linear", "init_w": {"kind": "fan_in", "scale": 30.0}},
        "select": {"kind": "top_k", "k": K},
        "bank": {"kind": "ffn", "hidden": 8},
        "losses": {"balance": {"coef": 0.7, "over": "layers", **loss}},
    }
    norm = {"kind": "rms_norm"}
    return mj.models.build(
        {
            "kind": "decoder_lm",
            "vocab_size": 11,
            "d_model": 8,
            "num_layers": 4,
            "pattern": ("dense", "moe"),
            "scan": scan,
            "blocks": {
                "dense": {"kind": "feed_forward", "norm": norm, "ffn": {"kind": "ffn", "hidden": 8}},
                "moe": {"kind": "feed_forward", "norm": norm, "ffn": moe},
            },
        }
    )


@pytest.mark.parametrize("scan", [True, False])
def test_the_sum_over_layers_is_the_pooled_loss(rng: np.random.Generator, scan: bool) -> None:
    net = model(scan)
    ids = jnp.asarray(rng.integers(0, 11, (B, S)))
    valid = jnp.arange(S) < jnp.array([[6], [4]])
    variables = net.init(jax.random.key(0), ids)
    ctx = mj.Context(valid=valid, train=True)
    _, sown = jax.jit(lambda v: net.apply(v, ids, ctx, mutable=["losses", "routing"]))(variables)
    found = float(sum(x.sum() for x in jax.tree.leaves(sown["losses"])))
    probs, plans = [], []
    for path, leaf in jax.tree_util.tree_leaves_with_path(sown["routing"]):
        name = jax.tree_util.keystr(path)
        if "probs" in name:
            probs.append(np.asarray(leaf).reshape(-1, B, S, E))
        if name.endswith(".expert"):
            plans.append(np.asarray(leaf).reshape(-1, B, S, K))
    probs, plans = np.concatenate(probs), np.concatenate(plans)
    assert len(probs) == len(plans) == 2
    counts, mean = np.zeros(E), np.zeros(E)
    for layer in range(2):
        for b, s in np.argwhere(np.asarray(valid)):
            mean += probs[layer, b, s]
            for expert in plans[layer, b, s]:
                counts[expert] += 1
    assert counts.sum() == 2 * 10 * K
    expected = 0.7 * E * (counts / counts.sum() * mean / 20).sum()
    assert found == pytest.approx(expected, rel=1e-5)
    apart = sum(0.7 * E * _share(plans[i], valid) @ probs[i][np.asarray(valid)].mean(0) for i in range(2))
    assert abs(apart / 2 - expected) > 1e-4


def _share(plan: np.ndarray, valid: Any) -> np.ndarray:
    return np.bincount(plan[np.asarray(valid)].ravel(), minlength=E) / plan[np.asarray(valid)].size


def test_refusals() -> None:
    with pytest.raises(ConfigError, match="count='first' does not go with over='layers'"):
        mj.Balance(over="layers", count="first")
