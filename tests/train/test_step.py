"""The train step: accumulation, randomness, collections, and what it reports."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from training_harness import Info, TinyLM, TinyText, device

from moejax.core.errors import ConfigError
from moejax.optim.base import optimizers
from moejax.tasks.base import tasks
from moejax.train.step import init_state, make_eval_step, make_train_step

TASK = tasks.build({"kind": "next_token"}, "task", domains=Info.domains)
# Plain descent with rate 1 and no clipping: the change of a parameter is its gradient.
DESCENT = optimizers.build(
    {"kind": "sgd", "learning_rate": 1.0, "schedule": "constant", "clip_norm": None}, "optimizer", steps=10
)
BATCH = device(next(TinyText({"batch_size": 8}, "train")))


NOISY, QUIET = TinyLM(), TinyLM(noise=0.0)


@functools.cache
def train_step(accumulation=1, model=NOISY):
    return jax.jit(make_train_step(model, TASK, DESCENT, accumulation, jit=False))


@functools.cache
def start(seed=0):
    return jax.jit(lambda key: init_state(NOISY, TASK, DESCENT, BATCH, key))(jax.random.key(seed))


def assert_equal(a, b):
    jax.tree.map(np.testing.assert_array_equal, jax.device_get(a), jax.device_get(b))


def difference(a, b):
    return max(jax.tree.leaves(jax.tree.map(lambda x, y: float(jnp.abs(x - y).max()), a, b)))


def test_update_and_metrics_equal_a_direct_computation():
    state = start()
    new, metrics = train_step(1, QUIET)(state, BATCH)

    def objective(params):
        inputs, ctx = TASK.inputs(BATCH, jnp.int32(0), train=False)
        logits, sown = QUIET.apply({"params": params, **state.collections}, inputs, ctx, mutable=["losses"])
        picked = jnp.take_along_axis(jax.nn.log_softmax(logits), BATCH["targets"][..., None], -1)[..., 0]
        task = -(picked * BATCH["valid"]).sum() / BATCH["valid"].sum()
        balance = sown["losses"]["layer_0"]["balance"][0]
        return task + balance, (task, balance)

    (total, (task, balance)), grads = jax.jit(jax.value_and_grad(objective, has_aux=True))(state.params)
    assert float(balance) > 0.05
    np.testing.assert_allclose(metrics["train/loss"], task, rtol=1e-6)
    np.testing.assert_allclose(metrics["losses/balance"], balance, rtol=1e-6)
    np.testing.assert_allclose(metrics["train/objective"], total, rtol=1e-6)
    norm = lambda tree: np.sqrt(sum((np.asarray(x, np.float64) ** 2).sum() for x in jax.tree.leaves(tree)))  # noqa: E731
    np.testing.assert_allclose(metrics["train/grad_norm"], norm(grads), rtol=1e-5)
    np.testing.assert_allclose(metrics["train/param_norm"], norm(new.params), rtol=1e-5)
    assert difference(new.params, jax.tree.map(lambda p, g: p - g, state.params, grads)) < 1e-6
    assert metrics["train/learning_rate"] == 1.0
    assert metrics["stats/layer_0/load"].shape == (3,)
    assert int(new.step) == 1
    assert int(new.first_bad_step) == -1
    np.testing.assert_allclose(TASK.metrics(jax.device_get(metrics["sums"]))["loss"], task, rtol=1e-6)


@pytest.mark.parametrize("losses", ["the task's", "the task's and a mean over sequences"])
def test_accumulation_equals_the_whole_batch(losses):
    if losses == "the task's":
        # Microbatches hold different numbers of targets, so an unweighted mean of their losses would differ.
        model, batch = TinyLM(noise=0.0, balance=0.0), BATCH
        assert len(set(np.asarray(batch["valid"]).reshape(4, -1).sum(1))) > 1
    else:
        full = jnp.ones_like(BATCH["valid"])
        model, batch = QUIET, {**BATCH, "valid": full, "segments": full.astype(jnp.int32)}
    whole, whole_metrics = train_step(1, model)(start(), batch)
    split, split_metrics = train_step(4, model)(start(), batch)
    assert difference(whole.params, start().params) > 1e-2
    assert difference(whole.params, split.params) < 2e-6
    for key in ("train/loss", "train/objective", "train/grad_norm", "losses/balance"):
        np.testing.assert_allclose(split_metrics[key], whole_metrics[key], rtol=2e-5)
    for key, value in whole_metrics["sums"].items():
        np.testing.assert_allclose(split_metrics["sums"][key], value, rtol=1e-5)


def test_a_batch_that_does_not_divide_is_refused():
    with pytest.raises(ConfigError, match=r"data.batch_size=8 is not divisible by train.accumulation=3"):
        train_step(3)(start(), BATCH)


def test_noise_depends_on_seed_and_step_only():
    step = train_step()
    once, again = step(start(), BATCH), step(start(), BATCH)
    assert_equal(once[0].params, again[0].params)
    assert_equal(once[1], again[1])
    losses = {float(step(start().replace(step=jnp.int32(t)), BATCH)[1]["train/loss"]) for t in range(3)}
    assert len(losses) == 3
    other = start().replace(key=start(1).key)
    assert float(step(other, BATCH)[1]["train/loss"]) not in losses
    assert difference(start(0).params, start(1).params) > 0.01


def test_router_state_is_updated_once_a_step_and_is_exact_for_running_means():
    assert not np.asarray(start().collections["router_state"]["layer_0"]["load"]).any(), "initialised without an update"
    assert set(start().collections) == {"router_state"}, "what a model shows of one call is not state"
    new, metrics = train_step()(start(), BATCH)
    load = new.collections["router_state"]["layer_0"]["load"]
    np.testing.assert_allclose(load, 0.1 * np.asarray(metrics["stats/layer_0/load"]), rtol=1e-6)
    whole, parts = (train_step(n, QUIET)(start(), BATCH)[0].collections["router_state"]["layer_0"]["load"] for n in (1, 4))
    np.testing.assert_allclose(parts, whole, rtol=1e-6)


def test_evaluation_has_no_noise_and_weighs_stats_by_targets():
    evaluate = make_eval_step(NOISY, TASK)
    sums, stats = evaluate(start(), BATCH)
    again, _ = evaluate(start().replace(step=jnp.int32(3), key=jax.random.key(9)), BATCH)
    assert_equal(sums, again)
    padded = 1.0 - np.asarray(BATCH["segments"] > 0).mean()
    np.testing.assert_allclose(stats["stats/layer_0/drop_rate"] / sums["count"], padded, rtol=1e-5)


def test_the_first_bad_step_is_remembered():
    step, state = train_step(), start()
    poisoned = state.replace(params=jax.tree.map(lambda x: x * jnp.nan, state.params), step=jnp.int32(4))
    bad, _ = step(poisoned, BATCH)
    assert int(bad.first_bad_step) == 5
    assert int(step(bad, BATCH)[0].first_bad_step) == 5
