"""Optimizers against formulas written out in NumPy."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from moejax.core.errors import ConfigError
from moejax.core.roles import Parameter
from moejax.optim.base import Optimizer, clip, decay_mask, global_norm, optimizers, slice_norm
from moejax.train.trainable import learning


def build(kind="adamw", **fields):
    return optimizers.build({"kind": kind, **fields}, "optimizer", steps=fields.pop("steps", 100))


def test_adamw_equals_the_paper_written_in_numpy(rng):
    """Loshchilov and Hutter 2019, algorithm 2, with clipping, warm-up and cosine, over 7 updates."""
    peak, warmup, steps, wd, b1, b2, eps, clip, final = 0.05, 3, 7, 0.2, 0.8, 0.9, 1e-6, 1.5, 0.25
    optimizer = optimizers.build(
        {"kind": "adamw", "learning_rate": peak, "warmup_steps": warmup, "schedule": "cosine", "final_fraction": final}
        | {"weight_decay": wd, "b1": b1, "b2": b2, "eps": eps, "clip_norm": clip},
        "optimizer",
        steps=steps,
    )
    x = {"w_in": rng.normal(size=(2, 3, 4)), "bias": rng.normal(size=(2, 4))}
    params = {k: jnp.asarray(v, jnp.float32) for k, v in x.items()}
    transform = optimizer.transform()
    state = transform.init(params)
    m = {k: np.zeros_like(v) for k, v in x.items()}
    v = {k: np.zeros_like(a) for k, a in x.items()}
    for n in range(1, steps + 1):
        # Some gradients are below the clipping norm and some above.
        grads = {k: rng.normal(size=a.shape) * n / 4 for k, a in x.items()}
        updates, state = transform.update({k: jnp.asarray(g, jnp.float32) for k, g in grads.items()}, state, params)
        params = optax.apply_updates(params, updates)
        norm = np.sqrt(sum((g**2).sum() for g in grads.values()))
        shape = final + (1 - final) * 0.5 * (1 + np.cos(np.pi * (n - warmup) / (steps - warmup)))
        rate = peak * (n / warmup if n <= warmup else shape)
        for k in x:
            g = grads[k] * min(1.0, clip / norm)
            m[k], v[k] = b1 * m[k] + (1 - b1) * g, b2 * v[k] + (1 - b2) * g**2
            direction = (m[k] / (1 - b1**n)) / (np.sqrt(v[k] / (1 - b2**n)) + eps)
            x[k] = x[k] - rate * (direction + (wd * x[k] if k == "w_in" else 0))
            np.testing.assert_allclose(params[k], x[k], rtol=2e-5, atol=1e-6)


def test_lion_and_sgd_equal_their_formulas(rng):
    x = np.asarray(rng.normal(size=(3, 2)), np.float32)
    grads = [np.asarray(rng.normal(size=(3, 2)), np.float32) for _ in range(3)]
    common = {"learning_rate": 0.1, "schedule": "constant", "clip_norm": None}

    def trained(optimizer):
        transform, params = optimizer.transform(), {"kernel": jnp.asarray(x)}
        state = transform.init(params)
        for g in grads:
            updates, state = transform.update({"kernel": jnp.asarray(g)}, state, params)
            params = optax.apply_updates(params, updates)
        return params["kernel"]

    lion, momentum = x.copy(), np.zeros_like(x)
    sgd, velocity = x.copy(), np.zeros_like(x)
    for g in grads:
        lion -= 0.1 * (np.sign(0.7 * momentum + 0.3 * g) + 0.5 * lion)
        momentum = 0.6 * momentum + 0.4 * g
        velocity = 0.9 * velocity + g
        sgd -= 0.1 * velocity
    np.testing.assert_allclose(trained(build("lion", b1=0.7, b2=0.6, weight_decay=0.5, **common)), lion, rtol=1e-5)
    np.testing.assert_allclose(trained(build("sgd", momentum=0.9, **common)), sgd, rtol=1e-5)
    np.testing.assert_allclose(trained(build("sgd", **common)), x - 0.1 * sum(grads), rtol=1e-5)


@pytest.mark.parametrize(
    ("schedule", "expected"),
    [
        # Update 1 moves; update 10 is the peak; halfway; the last one; past the end.
        ("cosine", {1: 0.1, 10: 1.0, 60: 0.6, 110: 0.2, 500: 0.2}),
        ("linear", {1: 0.1, 10: 1.0, 35: 0.8, 60: 0.6, 110: 0.2, 500: 0.2}),
        ("constant", {1: 0.1, 5: 0.5, 10: 1.0, 11: 1.0, 110: 1.0}),
        ("rsqrt", {1: 0.1, 10: 1.0, 40: 0.5, 90: 1 / 3, 1000: 0.1}),
    ],
)
def test_schedules_at_key_updates(schedule, expected):
    optimizer = build(learning_rate=3.0, warmup_steps=10, schedule=schedule, final_fraction=0.2, steps=110)
    for n, share in expected.items():
        np.testing.assert_allclose(optimizer.rate(n - 1), 3.0 * share, rtol=1e-5)


@pytest.mark.parametrize("schedule", ["cosine", "linear", "constant", "rsqrt"])
def test_without_warmup_the_first_update_is_near_the_peak(schedule):
    optimizer = build(learning_rate=1.0, schedule=schedule, steps=1000)
    assert 0.99 < float(optimizer.rate(0)) <= 1.0


def test_only_matrices_decay_however_they_are_stacked():
    params = {
        "embedding": jnp.zeros((7, 4)),
        "repeats": {
            "norm": {"scale": jnp.zeros((6, 4))},  # [layers, d]
            "moe": {
                "router": {"w": jnp.zeros((6, 4, 3)), "b": jnp.zeros((6, 3))},
                "bank": {"w_in": jnp.zeros((6, 3, 4, 5)), "b_in": jnp.zeros((6, 3, 5)), "temperature": jnp.zeros((6, 3))},
            },
            "dense": {"kernel": jnp.zeros((6, 4, 5)), "bias": jnp.zeros((6, 5))},
        },
        "w": jnp.zeros(3),
    }
    mask = decay_mask(params)
    decaying = {jax.tree_util.keystr(p, simple=True, separator="/") for p, v in jax.tree.leaves_with_path(mask) if v}
    assert decaying == {"embedding", "repeats/moe/router/w", "repeats/moe/bank/w_in", "repeats/dense/kernel"}
    assert decay_mask(params, ("temp*",))["repeats"]["moe"]["bank"]["temperature"]


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"schedule": "cosin"}, "did you mean 'cosine'"),
        ({"warmup_steps": 200}, "warmup_steps=200"),
        ({"learning_rat": 1.0}, "learning_rat"),
        ({"kind": "adamv"}, "did you mean 'adamw'"),
    ],
)
def test_wrong_fields_are_named(fields, message):
    with pytest.raises(ConfigError, match=message):
        optimizers.build({"kind": "adamw", "learning_rate": 1.0, **fields}, "optimizer", steps=100)


def test_a_norm_is_of_one_layer_and_one_expert(rng):
    x = rng.normal(size=(3, 2, 4, 5)).astype(np.float32)
    stacked = slice_norm(jnp.asarray(x), Parameter((), x.shape, ("layers", "expert", "embed", "mlp")))
    np.testing.assert_allclose(stacked, np.sqrt((x**2).sum((2, 3), keepdims=True)), rtol=1e-6)
    whole = slice_norm(jnp.asarray(x, jnp.bfloat16), Parameter((), x.shape, (None, None, "embed", None)))
    assert whole.dtype == jnp.float32
    np.testing.assert_allclose(whole, [[[[np.sqrt((x**2).sum())]]]], rtol=1e-2)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Unit(Optimizer):
    """A user's: each layer's and expert's gradient of length 1, before a momentum of its own shape; clipped afterwards."""

    def transform(self, params=None):
        def unit(updates, _):
            return jax.tree.map(lambda g, p: g / slice_norm(g, p), updates, params)

        return optax.chain(optax.stateless(unit), optax.trace(0.5), clip(self.clip_norm), self.scheduled())


def test_a_users_optimizer_knows_the_axes_of_what_learns(rng):
    optimizer = Unit(steps=10, learning_rate=0.1, schedule="constant", clip_norm=0.01)
    shapes = {"stack": {"w": (2, 3, 4), "kept": (2,)}, "head": (4,)}
    described = {
        "stack": {
            "w": Parameter(("stack", "w"), (2, 3, 4), ("layers", None, None)),
            "kept": Parameter(("stack", "kept"), (2,), (None,)),
        },
        "head": Parameter(("head",), (4,), (None,)),
    }
    params = jax.tree.map(lambda s: jnp.zeros(s), shapes, is_leaf=lambda s: isinstance(s, tuple))
    found = learning({"all": {"what": "*", "but": "*/kept"}}, described, 10)
    transform = found.transform(optimizer)
    learned, kept = found.split(params)
    assert kept == {"stack": {"kept": params["stack"]["kept"]}}
    state = transform.init(learned)
    assert sum(x.size for x in jax.tree.leaves(state) if x.ndim) == 24 + 4
    g = {"stack": {"w": rng.normal(size=(2, 3, 4))}, "head": rng.normal(size=4)}
    updates, _ = transform.update(jax.tree.map(jnp.float32, g), state, learned, step=0)
    w = g["stack"]["w"] / np.sqrt((g["stack"]["w"] ** 2).sum((1, 2), keepdims=True))
    head = g["head"] / np.sqrt((g["head"] ** 2).sum())
    # Three slices of length 1, clipped together to a length of 0.01.
    np.testing.assert_allclose(updates["stack"]["w"], -0.1 * 0.01 / np.sqrt(3) * w, rtol=1e-5)
    np.testing.assert_allclose(updates["head"], -0.1 * 0.01 / np.sqrt(3) * head, rtol=1e-5)


def test_clipping_equals_that_of_optax_to_the_bit(rng):
    for scale in (0.01, 10.0):
        g = {"a": jnp.float32(scale * rng.normal(size=(3, 4))), "b": jnp.float32(scale * rng.normal(size=5))}
        ours, _ = clip(1.5).update(g, clip(1.5).init(g))
        theirs, _ = optax.clip_by_global_norm(1.5).update(g, optax.EmptyState())
        jax.tree.map(np.testing.assert_array_equal, ours, theirs)


def test_global_norm_is_that_of_all_elements_small_arrays_and_large():
    rng = np.random.default_rng(0)
    shapes = {"b": (3,), "w": (7, 5), "large": (513, 257), "step": (), "half": (4,)}
    tree = {
        name: jnp.asarray(rng.normal(size=shape), jnp.bfloat16 if name == "half" else jnp.float32)
        for name, shape in shapes.items()
    }
    flat = np.concatenate([np.asarray(x, np.float64).ravel() for x in tree.values()])
    assert float(jax.jit(global_norm)(tree)) == pytest.approx(np.linalg.norm(flat), rel=1e-6)
    slope = jax.grad(global_norm)(tree)
    for name, x in tree.items():
        np.testing.assert_allclose(
            np.asarray(slope[name], np.float64),
            np.asarray(x, np.float64) / np.linalg.norm(flat),
            rtol=1e-2 if name == "half" else 1e-5,
        )
