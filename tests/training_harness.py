"""A tiny routed model and a tiny text iterator that follow the contracts, and a command that trains with them.

`python tests/training_harness.py WORKDIR '{"train.steps": 40}' ...` is what the tests kill, interrupt and start again.
"""

import contextlib
import dataclasses
import json
import os
import signal
import sys
import time
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from moejax.core.context import Context
from moejax.core.control import Site, control
from moejax.train import fit

VOCAB, LENGTH, EXPERTS = 11, 6, 3
# Uniform and not normal draws everywhere: the compiler takes seconds for each normal one.
INIT = nn.initializers.uniform(0.6)


@dataclasses.dataclass(frozen=True)
class Follow:
    """A running mean of the load over sequences."""

    def after_step(self, site: Site) -> Site:
        load = site.measured["sum"] / site.measured["sequences"]
        return site.replace(state={**site.state, "load": 0.9 * site.state["load"] + 0.1 * load})


class TinyMoE(nn.Module):
    """Softly mixed experts with a balance loss, stats, noise while training, and a running mean of its load."""

    width: int
    noise: float
    balance: float

    @nn.compact
    def __call__(self, x: jax.Array, ctx: Context) -> jax.Array:
        valid = jnp.ones(x.shape[:2], bool) if ctx.valid is None else ctx.valid
        logits = nn.Dense(EXPERTS, kernel_init=INIT, name="router")(x)
        if ctx.train and self.noise:
            logits += self.noise * jax.random.uniform(self.make_rng("router"), logits.shape)
        probs = jax.nn.softmax(logits) * valid[..., None]
        w = self.param("w_in", INIT, (EXPERTS, self.width, self.width))
        b = self.param("b_in", nn.initializers.zeros, (EXPERTS, self.width))
        y = jnp.einsum("bse,bsef->bsf", probs, jnp.tanh(jnp.einsum("bsd,edf->bsef", x, w) + b))
        # A mean over sequences, so that microbatches can reproduce it.
        per_sequence = probs.sum(1) / jnp.maximum(valid.sum(1, keepdims=True), 1)
        load = per_sequence.mean(0)
        self.sow("losses", "balance", self.balance * jnp.square(per_sequence).sum(-1).mean())
        self.sow("stats", "load", load)
        self.sow("stats", "drop_rate", 1.0 - valid.mean())
        self.sow("routing", "probs", probs)
        self.variable("router_state", "load", jnp.zeros, (EXPERTS,))
        if ctx.train:
            control(self, "load", Follow(), {"sum": per_sequence.sum(0), "sequences": jnp.float32(len(x))})
        return x + y


class TinyLM(nn.Module):
    """Embedding, `layers` routed layers, head."""

    width: int = 8
    layers: int = 1
    scan: bool = False
    noise: float = 1.0
    balance: float = 0.5

    @nn.compact
    def __call__(self, tokens: jax.Array, ctx: Context) -> jax.Array:
        x = nn.Embed(VOCAB, self.width, embedding_init=INIT, name="embed")(tokens)
        if self.scan:
            body = nn.scan(
                _Body,
                variable_axes={True: 0},
                split_rngs={True: True},
                in_axes=(nn.broadcast,),
                length=self.layers,
            )
            x, _ = body(self.width, self.noise, self.balance, name="repeats")(x, ctx)
        else:
            for i in range(self.layers):
                x = TinyMoE(self.width, self.noise, self.balance, name=f"layer_{i}")(x, ctx)
        x = nn.LayerNorm(name="norm")(x)
        return nn.Dense(VOCAB, kernel_init=INIT, name="head")(x)


class _Body(nn.Module):
    width: int
    noise: float
    balance: float

    @nn.compact
    def __call__(self, x: jax.Array, ctx: Context) -> tuple[jax.Array, None]:
        return TinyMoE(self.width, self.noise, self.balance, name="ffn")(x, ctx), None


class TinyText:
    """Batches of a fixed random corpus of 24 rows in which some targets are not valid and some rows are padded."""

    rows = 24

    def __init__(self, config: Any, split: str, seed: int = 0, num_epochs: int | None = None, as_bytes: bool = False):
        draw = np.random.default_rng({"train": 1, "validation": 2}[split])
        tokens = draw.integers(1, VOCAB, (self.rows, LENGTH + 1)).astype(np.int32)
        lengths = draw.integers(2, LENGTH + 1, self.rows)
        segments = (np.arange(LENGTH) < lengths[:, None]).astype(np.int32)
        self.corpus = {
            "tokens": tokens[:, :-1],
            "targets": tokens[:, 1:],
            "valid": (segments > 0) & (draw.random((self.rows, LENGTH)) < 0.8),
            "segments": segments,
            "positions": np.tile(np.arange(LENGTH, dtype=np.int32), (self.rows, 1)),
            "domain": np.repeat(draw.integers(0, 2, (self.rows, 1)), LENGTH, 1).astype(np.int32),
            "example_id": np.arange(self.rows, dtype=np.int64),
        }
        self.size = config["batch_size"]
        self.seed, self.shuffle = seed, split == "train"
        self.epochs, self.done, self.as_bytes = num_epochs, 0, as_bytes

    def __iter__(self):
        return self

    def __next__(self) -> dict[str, np.ndarray]:
        start = self.done * self.size
        if self.epochs is not None and start >= self.epochs * self.rows:
            raise StopIteration
        index = np.arange(start, start + self.size)
        ids = np.array([self._row(i) for i in index])
        batch = {name: values[ids] for name, values in self.corpus.items()}
        if self.epochs is not None:
            past = index >= self.epochs * self.rows
            batch["valid"] = batch["valid"] & ~past[:, None]
            batch["example_id"] = np.where(past, -1, ids)
        self.done += 1
        return batch

    def _row(self, i: int) -> int:
        epoch, place = divmod(int(i), self.rows)
        order = np.random.default_rng((self.seed, epoch)).permutation(self.rows) if self.shuffle else np.arange(self.rows)
        return int(order[place])

    def get_state(self) -> Any:
        return str(self.done).encode() if self.as_bytes else {"done": np.int64(self.done)}

    def set_state(self, state: Any) -> None:
        self.done = int(state) if self.as_bytes else state["done"]


def device(batch: dict[str, Any]) -> dict[str, jax.Array]:
    """The batch as a step is given it."""
    return {name: jnp.asarray(value) for name, value in batch.items() if name != "example_id"}


class Info:
    """What `moejax.data.info` would say."""

    domains = ("code", "prose")


def tiny_config(**changes: Any) -> ConfigDict:
    """A config of 8 steps; `changes` are dotted names with dots written as double underscores."""
    config = ConfigDict(
        {
            "model": {"kind": "tiny"},
            "data": {"name": "tiny", "batch_size": 4},
            "task": {"kind": "next_token"},
            "optimizer": {"kind": "adamw", "learning_rate": 1e-2, "warmup_steps": 2, "weight_decay": 0.1},
            "train": {"steps": 8, "log_every": 2},
            "eval": {"every": 4, "batches": 3},
            "checkpoint": {"every": 3, "keep": 3, "asynchronous": True},
        }
    )
    with config.unlocked():
        config.update_from_flattened_dict({name.replace("__", "."): value for name, value in changes.items()})
    return config


@contextlib.contextmanager
def registered(registry: Any, kind: str, cls: type, slots: Any = None):
    """A class of a test is a kind of a registry inside the `with` block, and no longer."""
    registry.register(kind, slots)(cls)
    try:
        yield cls
    finally:
        del registry._classes[kind], registry._slots[kind]


def run_tiny(
    workdir: Any, seed: int = 0, model: Any = None, make_iterator: Any = TinyText, progress=None, resolve=None, **changes: Any
):
    """`fit` on the tiny model."""
    return fit(
        tiny_config(**changes),
        seed,
        workdir,
        progress,
        "tiny",
        model=TinyLM() if model is None else model,
        make_iterator=make_iterator,
        info=Info(),
        resolve=resolve,
    )


def main(workdir: str, changes: str = "{}", kill_at: str = "0", delay: str = "0") -> None:
    """Trains; at step `kill_at` the process kills itself with SIGKILL; `delay` is slept before every batch."""

    class Deadly(TinyText):
        def __next__(self):
            time.sleep(float(delay))
            if self.shuffle and int(kill_at) and self.done == int(kill_at):
                os.kill(os.getpid(), signal.SIGKILL)
            return super().__next__()

    reported = Path(workdir, "started")
    changes = json.loads(changes)

    def progress(report):
        if report.phase == "train" and report.step > 0:
            reported.touch()

    run_tiny(workdir, make_iterator=Deadly, progress=progress, **changes)


if __name__ == "__main__":
    main(*sys.argv[1:])
