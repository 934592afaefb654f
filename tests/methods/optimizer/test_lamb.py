"""LAMB and LARS (You et al. 2020) step by step in NumPy, one layer and one expert after the other, and optax's on tensors unstacked."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax.traverse_util import flatten_dict, unflatten_dict

from moejax.core.errors import ConfigError
from moejax.core.roles import Parameter
from moejax.optim.base import optimizers

STEPS, RATE, WD = 5, 0.05, 0.3
PLAIN = {"learning_rate": RATE, "schedule": "constant", "clip_norm": None, "weight_decay": WD}
# Path -> shape, axes.
TENSORS = {
    ("stack", "bank", "w_in"): ((2, 3, 4, 5), ("layers", "expert", "embed", "mlp")),
    ("stack", "bank", "b_in"): ((2, 3, 5), ("layers", "expert", "mlp")),
    ("stack", "router", "w"): ((2, 4, 3), ("layers", "embed", None)),
    ("stack", "norm", "scale"): ((2, 4), ("layers", None)),
    ("head",): ((4, 7), ("embed", "vocab")),
}
DESCRIBED = {path: Parameter(path, shape, axes) for path, (shape, axes) in TENSORS.items()}
ADAPTS = {path: path[-1] in ("w_in", "w", "head") for path in TENSORS}


def build(kind: str = "lamb", **fields):
    return optimizers.build({"kind": kind, **PLAIN, **fields}, "optimizer", steps=100)


def draw(rng: np.random.Generator) -> tuple[dict, list[dict]]:
    """Parameters, of layers and experts of very different lengths, and gradients of each step."""
    params = {path: rng.normal(size=shape) * np.exp(2 * rng.normal(size=shape[:1] + (1,) * (len(shape) - 1)))
              for path, (shape, _) in TENSORS.items()}  # fmt: skip
    return params, [{path: rng.normal(size=shape) * 10.0**-n for path, (shape, _) in TENSORS.items()} for n in range(STEPS)]


def slices(path: tuple[str, ...]) -> list[tuple[int, ...]]:
    """Indices of one tensor each: of a layer, of a layer's expert, or of all there is."""
    shape, axes = TENSORS[path]
    stacked = [n for n, axis in zip(shape, axes, strict=True) if axis in ("layers", "expert")]
    return list(itertools.product(*map(range, stacked)))


def tree(flat: dict, dtype=jnp.float32) -> dict:
    return unflatten_dict({path: x if isinstance(x, Parameter) else jnp.asarray(x, dtype) for path, x in flat.items()})


def train(optimizer, params: dict, grads: list[dict], described: dict | None = DESCRIBED) -> dict:
    transform, weights = optimizer.transform(described and tree(described)), tree(params)
    state = transform.init(weights)
    for g in grads:
        updates, state = transform.update(tree(g), state, weights)
        weights = optax.apply_updates(weights, updates)
    return flatten_dict(weights)


LENGTHS = {
    "l1": lambda x: np.abs(x).sum(),
    "l2": lambda x: np.sqrt((x * x).sum()),
    "max": lambda x: np.abs(x).max(),
}


def numpy_step(w, g, m, v, n, adapts, kind="lamb", b1=0.9, b2=0.999, eps=1e-6, norm="l2", corrected=True, **bounds):
    """One tensor's update; m and v are changed in place."""
    began_as_zeros = bounds.pop("zero", False)
    wd = WD if adapts else 0.0
    if kind == "lars":
        m[...] = b1 * m + (1 - b1) * (g + wd * w)
        u = m.copy()
    else:
        m[...] = b1 * m + (1 - b1) * g
        v[...] = b2 * v + (1 - b2) * g * g
        age = (1 - b1**n, 1 - b2**n) if corrected else (1.0, 1.0)
        u = (m / age[0]) / (np.sqrt(v / age[1]) + eps) + wd * w
    length, step = LENGTHS[norm](w), LENGTHS[norm](u)
    trust = 1.0
    if adapts and not began_as_zeros and length and step:
        trust = min(max(length, bounds.get("lowest", 0.0)), bounds.get("highest") or np.inf) / step
        trust = min(trust, bounds.get("largest") or np.inf)
    return w - RATE * trust * u


def numpy_trained(params: dict, grads: list[dict], **fields) -> dict:
    out = {path: w.copy() for path, w in params.items()}
    for path, index in [(name, index) for name in TENSORS for index in slices(name)]:
        m, v = np.zeros_like(params[path][index]), np.zeros_like(params[path][index])
        zero = not params[path][index].any() and fields.get("from_zero", True)
        kept = {k: x for k, x in fields.items() if k != "from_zero"}
        for n, g in enumerate(grads, 1):
            out[path][index] = numpy_step(out[path][index], g[path][index], m, v, n, ADAPTS[path], zero=zero, **kept)
    return out


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"corrected": False, "b1": 0.7, "b2": 0.95},
        {"norm": "l1"},
        {"norm": "max"},
        {"lowest": 2.0, "highest": 10.0},
        {"largest": 0.5},
        {"kind": "lars"},
    ],
    ids=str,
)
def test_each_layer_and_each_expert_moves_as_in_numpy(rng: np.random.Generator, fields: dict) -> None:
    params, grads = draw(rng)
    found, expected = train(build(**fields), params, grads), numpy_trained(params, grads, **fields)
    for path in TENSORS:
        np.testing.assert_allclose(found[path], expected[path], rtol=2e-4, atol=2e-5)


@pytest.mark.parametrize("kind", ["lamb", "lars"])
def test_unstacked_tensors_move_as_optax_says(rng: np.random.Generator, kind: str) -> None:
    params, grads = draw(rng)
    found = train(build(kind), params, grads)
    for path in TENSORS:
        wd = WD if ADAPTS[path] else 0.0
        adapted = optax.scale_by_trust_ratio() if ADAPTS[path] else optax.identity()
        if kind == "lamb" and ADAPTS[path]:
            theirs = optax.lamb(RATE, weight_decay=WD)
        elif kind == "lamb":
            theirs = optax.chain(optax.scale_by_adam(eps=1e-6), optax.scale(-RATE))
        else:
            theirs = optax.chain(optax.add_decayed_weights(wd), optax.ema(0.9, debias=False), adapted, optax.scale(-RATE))
        for index in slices(path):
            w = jnp.asarray(params[path][index], jnp.float32)
            state = theirs.init(w)
            for g in grads:
                updates, state = theirs.update(jnp.asarray(g[path][index], jnp.float32), state, w)
                w = optax.apply_updates(w, updates)
            np.testing.assert_allclose(found[path][index], w, rtol=1e-4, atol=1e-6)


def test_an_update_is_as_long_as_the_layer_whatever_the_gradient(rng: np.random.Generator) -> None:
    params, grads = draw(rng)
    for scale in (1e-3, 1e3):
        after = train(build(weight_decay=0.0), params, [{path: scale * g for path, g in grads[0].items()}])
        path = ("stack", "bank", "w_in")
        moved = np.sqrt(((after[path] - params[path]) ** 2).sum((2, 3)))
        np.testing.assert_allclose(moved, RATE * np.sqrt((params[path] ** 2).sum((2, 3))), rtol=1e-3)


def test_what_begins_as_zeros_is_exempt_for_good_slice_by_slice(rng: np.random.Generator) -> None:
    params, grads = draw(rng)
    path = ("stack", "bank", "w_in")
    params[path][1, 2], params["stack", "router", "w"][:] = 0.0, 0.0
    for exempt in (True, False):
        found = train(build(from_zero=exempt), params, grads)
        expected = numpy_trained(params, grads, from_zero=exempt)
        for path in TENSORS:
            np.testing.assert_allclose(found[path], expected[path], rtol=2e-4, atol=2e-5)
    stuck, free = (np.abs(train(build(from_zero=e), params, grads)["stack", "router", "w"]).mean() for e in (False, True))
    assert free > 2 * stuck


def test_a_tensor_that_nobody_knows_is_one_and_gradients_of_zero_move_nothing(rng: np.random.Generator) -> None:
    w, g = rng.normal(size=(3, 4, 5)), rng.normal(size=(3, 4, 5))
    found = train(build(), {("w",): w}, [{("w",): g}], described=None)[("w",)]
    expected = numpy_step(w, g, np.zeros_like(w), np.zeros_like(w), 1, True)
    np.testing.assert_allclose(found, expected, rtol=1e-5)
    same = train(build(weight_decay=0.0), {("w",): w}, [{("w",): 0 * g}], described=None)[("w",)]
    np.testing.assert_array_equal(same, np.float32(w))


def test_clipping_is_before_the_moments_and_the_schedule_after_the_ratio(rng: np.random.Generator) -> None:
    params, grads = draw(rng)
    fields = {"clip_norm": 0.5, "schedule": "linear", "warmup_steps": 3, "kind": "lars", "weight_decay": 0.0}
    found = train(build(**fields), params, grads[:1])
    # The direction of the first momentum is the gradient's, and a ratio hides how long it is: what is left is the rate.
    path = ("head",)
    expected = params[path] - RATE / 3 * np.linalg.norm(params[path]) / np.linalg.norm(grads[0][path]) * grads[0][path]
    np.testing.assert_allclose(found[path], expected, rtol=1e-4)
    bias = ("stack", "norm", "scale")
    total = np.sqrt(sum((g**2).sum() for g in grads[0].values()))
    np.testing.assert_allclose(found[bias], params[bias] - RATE / 3 * 0.1 * 0.5 / total * grads[0][bias], rtol=1e-4)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"norm": "l3"}, "norm"),
        ({"lowest": 2.0, "highest": 1.0}, "lowest=2.0 and highest=1.0 .*must bound"),
        ({"largest": 0.0}, "optimizer.largest=0.0 must be a number above 0"),
        ({"kind": "lars", "b2": 0.9}, "unknown key 'b2'"),
    ],
)
def test_what_does_not_fit_is_named(fields: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        build(**fields)


def test_a_compiled_step_keeps_one_flag_for_each_slice(rng: np.random.Generator) -> None:
    params, grads = draw(rng)
    transform, weights = build().transform(tree(DESCRIBED)), tree(params)
    updates, state = jax.jit(transform.update)(tree(grads[0]), jax.jit(transform.init)(weights), weights)
    after = flatten_dict(optax.apply_updates(weights, updates))
    for path, w in train(build(), params, grads[:1]).items():
        np.testing.assert_allclose(after[path], w, rtol=1e-5)
    assert sum(x.size for x in jax.tree.leaves(state) if x.dtype == bool) == 6 + 6 + 2 + 2 + 1
