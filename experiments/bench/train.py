"""Training steps of the demo's models, end to end: a mixture against the dense model of equal active FLOPs, and where the time goes.

The parts are timed by themselves, at the sizes they have in the step: forward and backward of the feed-forward layers and of the
attention layers, and the optimizer. What they leave is embeddings, loss, norms, and statistics.
"""

from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array

from experiments import study as studies
from experiments.bench.table import Bar, Outcome
from experiments.bench.timing import race
from moejax import data, models
from moejax.core.context import Context
from moejax.layers.registry import ffns, mixers
from moejax.optim.base import optimizers
from moejax.tasks.base import tasks
from moejax.train.settings import plain
from moejax.train.step import init_state, make_train_step

# Mixture -> the dense model of equal active FLOPs, arms of the study `first_mixture`.
PAIRS = {"switch8": "dense", "top2": "wide"}
SHAPES = {**PAIRS, "parts": None}
STEP = "train step"
# 0.7 of the dense model's tokens per second.
SLOWEST = 1 / 0.7


def run(names: list[str], repeats: int) -> Iterator[Outcome]:
    """The outcome of each named pair, and of the parts of the first mixture's step."""
    for name in names:
        if name == "parts":
            yield _parts("switch8", repeats)
            continue
        rival = PAIRS[name]
        timings = race({rival: _step(rival)[:2], name: _step(name)[:2]}, repeats)
        tokens = timings[rival].median / timings[name].median
        notes = (f"tokens per second: {tokens:.2f} of the dense model's",)
        bars = (Bar(STEP, name, SLOWEST),)
        yield Outcome(name, f"one step of `{name}` and of `{rival}`", rival, {STEP: timings}, bars=bars, notes=notes)


def _step(arm: str) -> tuple[Callable[..., Any], tuple[Any, ...], dict[str, Any]]:
    """An arm's train step with its arguments, and its plain config."""
    config = plain(studies.resolve(studies.load("first_mixture"), "cpu", arm))
    batch = jax.tree.map(jnp.asarray, dict(next(data.make_iterator(config["data"], split="train", seed=0))))
    batch = {name: value for name, value in batch.items() if hasattr(value, "dtype")}
    model = models.build(config["model"])
    task = tasks.build(config["task"], "task", domains=(), bytes_per_token=1.0)
    optimizer = optimizers.build(config["optimizer"], "optimizer", steps=config["train"]["steps"])
    state = jax.jit(lambda key: init_state(model, task, optimizer, batch, key))(jax.random.key(0))
    return make_train_step(model, task, optimizer, jit=False), (state, batch), config


def _parts(arm: str, repeats: int) -> Outcome:
    step, (state, batch), config = _step(arm)
    spec = config["model"]
    rows, length = jax.tree.leaves(batch)[0].shape[:2]
    x = jax.random.normal(jax.random.key(1), (rows, length, spec["d_model"]))
    repeats_of_pattern = spec["num_layers"] // len(spec["pattern"])
    contestants: dict[str, Any] = {STEP: (step, (state, batch))}
    for name in dict.fromkeys(spec["pattern"]):
        count = repeats_of_pattern * list(spec["pattern"]).count(name)
        block = spec["blocks"][name]
        for slot, registry in (("mixer", mixers), ("ffn", ffns)):
            layer = registry.build(block[slot], f"model.blocks.{name}.{slot}")
            label = f"{count} x {block[slot]['kind']} ({name})"
            contestants[label] = _gradient(layer, x, count)
    optimizer = optimizers.build(config["optimizer"], "optimizer", steps=config["train"]["steps"]).transform()

    def update(params: Any, opt_state: Any) -> Any:
        updates, opt_state = optimizer.update(params, opt_state, params)
        return optax.apply_updates(params, updates), opt_state

    contestants["optimizer"] = (update, (state.params, state.opt_state))
    timings = race(contestants, repeats)
    rest = 1 - sum(t.median for name, t in timings.items() if name != STEP) / timings[STEP].median
    notes = (f"the rest, embeddings, loss, norms and statistics: {rest:.2f} of the step",)
    return Outcome("parts", f"where a step of `{arm}` spends its time", STEP, {STEP: timings}, notes=notes)


def _gradient(layer: Any, x: Array, count: int) -> tuple[Callable[..., Any], tuple[Any, ...]]:
    """Forward and backward of `count` such layers, one after the other."""
    ctx = Context(train=True)
    rngs = {"router": jax.random.key(2), "dropout": jax.random.key(3)}
    params = jax.jit(lambda x: layer.init({"params": jax.random.key(0), **rngs}, x, Context())["params"])(x)

    def loss(params: Any, x: Array) -> Array:
        for _ in range(count):
            y, sown = layer.apply({"params": params}, x, ctx, rngs=rngs, mutable=["losses", "stats"])
            x = x + y
        return jnp.square(x).mean() + sum(jax.tree.leaves(sown.get("losses", {})))

    return jax.grad(loss, argnums=(0, 1)), (params, x)
