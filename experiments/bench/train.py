"""Training steps, end to end: a mixture against the dense model of equal active FLOPs, and where the time goes.

Steps are those that runs take, by the same compiler's options. The parts are timed by themselves, at the sizes they have in the step:
forward and backward of the feed-forward layers and of the attention layers, and the optimizer. What they leave is embeddings, loss,
norms, and statistics.
"""

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array
from ml_collections import ConfigDict

from configs import base_lm, base_vit, small_lm
from experiments import study as studies
from experiments.bench import torch_twin
from experiments.bench.table import Bar, Outcome
from experiments.bench.timing import Foreign, race
from moejax import data
from moejax.aot.ahead import program_of
from moejax.core.context import Context
from moejax.layers.registry import ffns, mixers
from moejax.optim.base import optimizers
from moejax.train.settings import plain

PEERS = ("torch",)
# Mixture -> the dense model of equal active FLOPs, arms of the study `first_mixture`.
PAIRS = {"switch8": "dense", "top2": "wide"}
# Configs, whose pattern is a mixture; it is dense with another one.
CONFIGS = {"small_lm": small_lm, "base_lm": base_lm, "base_vit": base_vit}
SHAPES = {**PAIRS, **CONFIGS, "parts": None}
STEP = "train step"
DENSE, MIXTURE, TORCH = "dense", "mixture", "torch, dense"
# 0.7 of the dense model's tokens per second; 1.2 times PyTorch's.
SLOWEST, SLOWEST_OF_TORCH = 1 / 0.7, 1 / 1.2


def run(names: list[str], repeats: int, against: tuple[str, ...] = ()) -> Iterator[Outcome]:
    """The outcome of each named pair or config, and of the parts of the first mixture's step."""
    for name in names:
        if name == "parts":
            yield _parts("switch8", repeats)
            continue
        dense, mixture = _pair(name)
        labels = (PAIRS[name], name) if name in PAIRS else (DENSE, MIXTURE)
        contestants = {label: _step(config) for label, config in zip(labels, (dense, mixture), strict=True)}
        if against:
            contestants = {TORCH: Foreign(torch_twin.step(plain(dense), _batch(plain(dense)))), **contestants}
        timings = race(contestants, repeats)
        tokens = timings[labels[0]].median / timings[labels[1]].median
        notes = (f"tokens per second: {tokens:.2f} of the dense model's",)
        notes += tuple(f"{label}: {t.median * 1e3:.1f} ms a step" for label, t in timings.items())
        bars = tuple(Bar(STEP, label, SLOWEST_OF_TORCH) for label in labels) if against else (Bar(STEP, labels[1], SLOWEST),)
        title = f"one step of `{labels[1]}` and of `{labels[0]}`" + (", against the same in plain PyTorch" if against else "")
        yield Outcome(name, title, TORCH if against else labels[0], {STEP: timings}, bars=bars, notes=notes)


def _pair(name: str) -> tuple[ConfigDict, ConfigDict]:
    """The configs of the dense model and of the mixture."""
    if name in PAIRS:
        return _arm(PAIRS[name]), _arm(name)
    dense, mixture = CONFIGS[name].get_config(), CONFIGS[name].get_config()
    dense.model.pattern = (DENSE, DENSE)
    return dense, mixture


def _arm(name: str) -> ConfigDict:
    return studies.resolve(studies.load("first_mixture"), "cpu", name)


def _batch(config: Mapping[str, Any]) -> dict[str, np.ndarray]:
    found = dict(next(data.make_iterator(config["data"], split="train", seed=0)))
    return {name: value for name, value in found.items() if name != "example_id"}


def _step(config: ConfigDict) -> Foreign:
    """The train step that a run of the config takes, on one batch again and again."""
    program = program_of(config)
    batch = jax.tree.map(jnp.asarray, _batch(plain(config)))
    state = [program.init(jax.random.key(0))]

    def call() -> None:
        state[0], metrics = program.train(state[0], batch)
        jax.block_until_ready((state[0].params, metrics))

    memory = program.train.memory_analysis()
    sizes = memory.argument_size_in_bytes + memory.output_size_in_bytes
    return Foreign(call, {"temp_bytes": int(memory.temp_size_in_bytes), "bytes": int(sizes), "flops": program.flops})


def _parts(arm: str, repeats: int) -> Outcome:
    config = plain(_arm(arm))
    spec = config["model"]
    rows, length = config["data"]["batch_size"], config["data"]["seq_len"]
    x = jax.random.normal(jax.random.key(1), (rows, length, spec["d_model"]))
    repeats_of_pattern = spec["num_layers"] // len(spec["pattern"])
    contestants: dict[str, Any] = {STEP: _step(_arm(arm))}
    for name in dict.fromkeys(spec["pattern"]):
        count = repeats_of_pattern * list(spec["pattern"]).count(name)
        block = spec["blocks"][name]
        for slot, registry in (("mixer", mixers), ("ffn", ffns)):
            layer = registry.build(block[slot], f"model.blocks.{name}.{slot}")
            label = f"{count} x {block[slot]['kind']} ({name})"
            contestants[label] = _gradient(layer, x, count)
    params = jax.tree.map(lambda x: jnp.full(x.shape, 0.01, x.dtype), program_of(_arm(arm)).state.params)
    optimizer = optimizers.build(config["optimizer"], "optimizer", steps=config["train"]["steps"]).transform()

    def update(params: Any, opt_state: Any) -> Any:
        updates, opt_state = optimizer.update(params, opt_state, params)
        return optax.apply_updates(params, updates), opt_state

    contestants["optimizer"] = (update, (params, optimizer.init(params)))
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
