"""SMoE-Dropout (Chen et al. 2023): a random router that never learns, and more and more experts; one token after another."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from numpy_layers import compiled, glu

import moejax as mj
from moejax.core.errors import ConfigError
from moejax.core.roles import record
from moejax.train.trainable import learning

E, D, F, K_MIN, T = 6, 5, 4, 2, 10


def rule(**fields) -> mj.ScheduledK:
    return mj.ScheduledK(**{"k": E, "first": K_MIN, "steps": T, "score": "softmax_selected", **fields})


def layer(select: mj.TopK | None = None) -> mj.MoE:
    router = mj.Linear(E, init_w=mj.FanIn(1 / 3, distribution="uniform"))
    return mj.MoE(router, select or rule(), mj.GLU(hidden=F, num_experts=E))


def at(step: int, train: bool = True) -> mj.Context:
    return mj.Context(step=jnp.int32(step), train=train)


def numpy_layer(params: dict, x: np.ndarray, k: int) -> np.ndarray:
    """The k largest of W x, their softmax, and the sum of their experts."""
    w, y = np.asarray(params["router"]["w"], np.float64), np.zeros_like(x)
    for place in np.ndindex(x.shape[:2]):
        logits = x[place] @ w
        chosen = sorted(range(E), key=lambda i, logits=logits: (-logits[i], i))[:k]
        total = sum(math.exp(logits[i]) for i in chosen)
        y[place] = sum(math.exp(logits[i]) / total * glu(params["bank"], i, x[place]) for i in chosen)
    return y


@pytest.fixture(scope="module")
def example() -> tuple[dict, jax.Array]:
    x = jax.random.normal(jax.random.key(1), (2, 7, D))
    return jax.jit(layer().init)(jax.random.key(0), x, at(0))["params"], x


@pytest.mark.parametrize("shape", ["linear", "cosine", "exponential", "doubling"])
@pytest.mark.parametrize(("first", "last"), [(1, 16), (8, 16), (16, 2), (4, 4)])
def test_k_follows_its_schedule(shape: str, first: int, last: int) -> None:
    steps = 40

    def expected(t: int) -> int:
        way = min(t / steps, 1)
        match shape:
            case "linear":
                k = (last - first) * way + first
            case "cosine":
                k = last + (first - last) * (1 + math.cos(math.pi * way)) / 2
            case "exponential":
                k = math.exp(math.log(first) + way * (math.log(last) - math.log(first)))
            case _:
                stages = [first]
                while stages[-1] != last:
                    stages.append(stages[-1] * 2 if last > first else stages[-1] // 2)
                return stages[min(int(way * len(stages)), len(stages) - 1)]
        return max(min(round(k), max(first, last)), min(first, last))

    made = mj.ScheduledK(k=16, first=first, last=last, steps=steps, shape=shape)
    steps_seen = (0, 3, 9, 11, 19, 27, 33, 39, 40, 100)
    now = jax.vmap(made.now)(jnp.array(steps_seen))
    np.testing.assert_array_equal(now, [expected(t) for t in steps_seen])
    assert now[0] == first
    assert now[-1] == last


def test_outputs_are_numpys_with_the_k_of_the_step(example: tuple) -> None:
    params, x = example
    run = jax.jit(lambda ctx: layer().apply({"params": params}, x, ctx, mutable=["stats"]))
    for step in (0, 4, T, 3 * T):
        y, sown = run(at(step))
        k = min(round((E - K_MIN) * step / T) + K_MIN, E)
        np.testing.assert_allclose(y, numpy_layer(params, np.asarray(x, np.float64), k), rtol=1e-4, atol=1e-5)
        np.testing.assert_allclose(sown["stats"]["experts_per_token"], k)
    assert run._cache_size() == 1  # nothing is compiled anew


def test_it_slims_to_any_k_outside_training(example: tuple) -> None:
    params, x = example
    whole = compiled(layer())({"params": params}, x)  # no step is needed
    np.testing.assert_allclose(whole, numpy_layer(params, np.asarray(x, np.float64), E), rtol=1e-4, atol=1e-5)
    for k in (1, 3):
        expected = numpy_layer(params, np.asarray(x, np.float64), k)
        slim = compiled(layer(mj.TopK(k=k, score="softmax_selected", constant_gate=True)))({"params": params}, x)
        np.testing.assert_allclose(slim, expected, rtol=1e-4, atol=1e-5)
        # A forced k holds against the schedule too.
        forced = compiled(layer())({"params": params, "interventions": {"k": jnp.int32(k)}}, x, at(0))
        np.testing.assert_allclose(forced, expected, rtol=1e-4, atol=1e-5)


def test_gradients_are_numpys(example: tuple) -> None:
    params, x = example
    gradient = jax.jit(jax.grad(lambda p: jnp.sin(layer().apply({"params": p}, x, at(4))).sum()))(params)
    k = round((E - K_MIN) * 4 / T) + K_MIN
    for path, place in ((("bank", "w_out"), (1, 2, 3)), (("bank", "w_gate"), (4, 0, 1)), (("router", "w"), (2, 3))):
        ends = []
        for step in (1e-5, -1e-5):
            moved = jax.tree.map(lambda a: np.array(a, np.float64), params)
            moved[path[0]][path[1]][place] += step
            ends.append(np.sin(numpy_layer(moved, np.asarray(x, np.float64), k)).sum())
        found = gradient[path[0]][path[1]][place]
        np.testing.assert_allclose(found, (ends[0] - ends[1]) / 2e-5, rtol=2e-3, atol=1e-5)


def test_the_router_starts_as_the_release_s_and_stays_as_it_is(example: tuple) -> None:
    """Uniform between -1 / sqrt(d) and 1 / sqrt(d); out of the optimizer and out of weight decay."""
    params, x = example
    w = mj.FanIn(1 / 3, distribution="uniform")(jax.random.key(0), (D, 4000))
    bound = 1 / math.sqrt(D)
    assert bound * 0.99 < np.abs(w).max() <= bound
    np.testing.assert_allclose(w.std(), bound / math.sqrt(3), rtol=0.02)

    with record() as notes:
        jax.eval_shape(lambda: layer().init(jax.random.key(0), x, at(0)))
    rules = learning({"rest": {"what": ("*",), "but": ("routers",)}}, notes.describe(params), steps=10)
    learned, kept = rules.split(params)
    assert list(kept) == ["router"]
    transform = rules.transform(mj.AdamW(learning_rate=0.1, weight_decay=0.5, steps=10))
    grads = rules.split(jax.jit(jax.grad(lambda p: layer().apply({"params": p}, x, at(4)).sum()))(params))[0]
    updates, _ = transform.update(grads, transform.init(learned), learned, step=jnp.int32(0))
    after = rules.join(optax.apply_updates(learned, updates), kept)
    np.testing.assert_array_equal(after["router"]["w"], params["router"]["w"])
    assert (after["bank"]["w_out"] != params["bank"]["w_out"]).all()


def test_what_does_not_fit_is_named() -> None:
    with pytest.raises(ConfigError, match="first=7 exceeds k=6"):
        rule(first=7)
    with pytest.raises(ConfigError, match="last=0 must be a whole number of at least 1"):
        rule(last=0)
    with pytest.raises(ConfigError, match="steps=0 must be a whole number of at least 1"):
        rule(steps=0)
    with pytest.raises(ConfigError, match="shape='lineer'"):
        rule(shape="lineer")
    with pytest.raises(ConfigError, match=r"ScheduledK lacks Context\.step: it follows the training step"):
        rule()(jnp.zeros((1, 2, E)), mj.Context(train=True))
