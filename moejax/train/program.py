"""A config's compiled programs: compiled once ahead of time, and shared by all runs of that config in a process."""

import dataclasses
import functools
import json
from typing import Any

import flax.linen as nn
import jax
from jaxtyping import Array

from moejax import models
from moejax.train.flops import matmul_flops
from moejax.train.optim import Optimizer, optimizers
from moejax.train.settings import TrainSettings
from moejax.train.step import TrainState, abstract, init_state, make_eval_step, make_train_step
from moejax.train.tasks import Batch, Task, tasks

# Programs kept per process. One holds executables, not arrays; a study seldom has more arms than this in flight.
KEPT = 8

BatchShapes = tuple[tuple[str, tuple[int, ...], str], ...]


@dataclasses.dataclass(eq=False)
class Program:
    """The model, task and optimizer of a config, and its programs for one shape of batch. No seed is part of it."""

    model: nn.Module
    task: Task
    optimizer: Optimizer
    accumulation: int
    batch: dict[str, jax.ShapeDtypeStruct]

    def init(self, key: Array) -> TrainState:
        """A fresh state."""
        return self._init(key)

    @functools.cached_property
    def state(self) -> TrainState:
        """Shapes of the state."""
        return abstract(jax.eval_shape(self._init, jax.random.key(0)))

    @functools.cached_property
    def train(self) -> Any:
        """The compiled train step; compiles on first use."""
        return self._traced_train.lower().compile()

    @functools.cached_property
    def evaluate(self) -> Any:
        """The compiled evaluation step; compiles on first use."""
        return make_eval_step(self.model, self.task).lower(self.state, self.batch).compile()

    @functools.cached_property
    def flops(self) -> float:
        """Matrix-product FLOPs of one train step, see `matmul_flops`."""
        return matmul_flops(self._traced_train.jaxpr)

    @functools.cached_property
    def params(self) -> int:
        """Number of parameters."""
        return sum(leaf.size for leaf in jax.tree.leaves(self.state.params))

    @functools.cached_property
    def active_params(self) -> int:
        """Parameters that one token uses; all of them for a model that is not made of a pattern of blocks."""
        if not hasattr(self.model, "pattern"):
            return self.params
        return models.active_params(self.model, self.state.params)

    @functools.cached_property
    def _traced_train(self) -> Any:
        step = make_train_step(self.model, self.task, self.optimizer, self.accumulation)
        return step.trace(self.state, self.batch)

    @functools.cached_property
    def _init(self) -> Any:
        return jax.jit(lambda key: init_state(self.model, self.task, self.optimizer, self.batch, key))


def get_program(
    config: dict[str, Any], settings: TrainSettings, batch: Batch, context: dict[str, Any], model: nn.Module | None = None
) -> Program:
    """The program of a config, from the cache if another run of this process has made it.

    Args:
      config: plain config; its model, task and optimizer matter here.
      settings: `config.train`.
      batch: a batch that will be trained on, for its shapes.
      context: what the data knows that the task asks for (`domains`, `bytes_per_token`).
      model: takes the place of `config.model`; must be hashable, as Flax modules are.
    """
    spec = json.dumps(
        {
            "model": None if model is not None else config["model"],
            "task": config["task"],
            "optimizer": config["optimizer"],
            "steps": settings.steps,
            "accumulation": settings.accumulation,
            "context": context,
        },
        sort_keys=True,
    )
    shapes = tuple(sorted((name, x.shape, str(x.dtype)) for name, x in batch.items()))
    return _program(spec, shapes, model)


@functools.lru_cache(maxsize=KEPT)
def _program(spec: str, shapes: BatchShapes, model: nn.Module | None) -> Program:
    config = json.loads(spec)
    return Program(
        model=models.build(config["model"]) if model is None else model,
        task=tasks.build(config["task"], "task", **_tuples(config["context"])),
        optimizer=optimizers.build(config["optimizer"], "optimizer", steps=config["steps"]),
        accumulation=config["accumulation"],
        batch={name: jax.ShapeDtypeStruct(shape, dtype) for name, shape, dtype in shapes},
    )


def _tuples(context: dict[str, Any]) -> dict[str, Any]:
    return {key: tuple(value) if isinstance(value, list) else value for key, value in context.items()}
