"""A config's compiled programs: compiled once ahead of time, and shared by all runs of that config in a process."""

import dataclasses
import functools
import json
from typing import Any

import flax.linen as nn
import jax
import numpy as np
from jax.sharding import PartitionSpec
from jaxtyping import Array

from moejax import models
from moejax.core.params import record_axes
from moejax.dispatch.expert_parallel import overlap_options
from moejax.layers.adapters.around import record_adapted
from moejax.layers.adapters.table import AdaptedLayer, layers_of
from moejax.optim.base import Optimizer, optimizers
from moejax.parallel import Parallel, rules, use
from moejax.tasks.base import Batch, Task, tasks
from moejax.train.flops import matmul_flops
from moejax.train.settings import TrainSettings
from moejax.train.step import TrainState, abstract, init_state, make_eval_step, make_train_step

# Programs kept per process. One holds executables, not arrays; a study seldom has more arms than this in flight.
KEPT = 8

BatchShapes = tuple[tuple[str, tuple[int, ...], str], ...]


@dataclasses.dataclass(eq=False)
class Program:
    """The model, task and optimizer of a config, and its programs for one shape of batch. No seed is part of it.

    With a mesh all programs are for that mesh: the state is split by `moejax.parallel.rules`, the batch by rows, and metrics
    are the same on every device. The mesh's devices need not be there unless something is run.

    Attributes:
      batch: shapes of a batch; of the whole batch, with shardings, if there is a mesh.
      parallel: the mesh; None for one device.
      spec: `config.model`, for errors that name a key of it.
    """

    model: nn.Module
    task: Task
    optimizer: Optimizer
    accumulation: int
    batch: dict[str, jax.ShapeDtypeStruct]
    parallel: Parallel | None = None
    spec: dict[str, Any] | None = None

    def __post_init__(self) -> None:
        if self.parallel is not None:
            sharding = rules.batch_sharding(self.parallel.mesh)
            rules.check_batch(next(iter(self.batch.values())).shape[0], self.accumulation, self.parallel.mesh)
            self.batch = {name: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding) for name, x in self.batch.items()}

    def init(self, key: Array) -> TrainState:
        """A fresh state: the same numbers on every mesh."""
        # As NumPy, so that every process of a run may give it to a program that spans them all.
        return self._init(np.asarray(jax.random.key_data(key)))

    @functools.cached_property
    def state(self) -> TrainState:
        """Shapes of the state; with a mesh, also shardings.

        Raises:
          ConfigError: the mesh does not divide a size.
        """
        if self.parallel is None:
            return abstract(jax.eval_shape(self._init, _key_data()))
        with record_axes() as axes:
            state = jax.eval_shape(self._fresh, _key_data())
        mesh = self.parallel.mesh
        params = rules.param_specs(state.params, axes, mesh, self.spec)
        specs = jax.tree.map(lambda _: PartitionSpec(), state).replace(
            params=params, opt_state=rules.follow_params(state.opt_state, state.params, params)
        )
        return jax.tree.map(
            lambda x, sharding: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding),
            state,
            rules.shardings(specs, mesh),
        )

    @functools.cached_property
    def train(self) -> Any:
        """The compiled train step; compiles on first use."""
        return self.lower_train().compile(compiler_options=self.compiler_options() or None)

    def compiler_options(self) -> dict[str, str]:
        """What the mesh's compiler is told of the train step."""
        return overlap_options(self.parallel)

    def lower_train(self) -> Any:
        """The lowered train step. Its `compile()` needs the mesh's compiler but not its devices."""
        with use(self.parallel):
            return self._traced_train.lower()

    @functools.cached_property
    def evaluate(self) -> Any:
        """The compiled evaluation step; compiles on first use."""
        with use(self.parallel):
            step = make_eval_step(self.model, self.task, jit=False)
            return jax.jit(step, **self._placed(None)).lower(self.state, self.batch).compile()

    @functools.cached_property
    def flops(self) -> float:
        """Matrix-product FLOPs of one train step on all devices together, see `matmul_flops`."""
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
    def adapted_layers(self) -> tuple[AdaptedLayer, ...]:
        """What the model's adapters sit around; nothing if it has none."""
        with record_adapted() as found:
            state = jax.eval_shape(self._fresh, _key_data())
        return layers_of(found, state.params)

    @functools.cached_property
    def _traced_train(self) -> Any:
        with use(self.parallel):
            step = make_train_step(self.model, self.task, self.optimizer, self.accumulation, jit=False, place=self._like_params)
            return jax.jit(step, donate_argnums=0, **self._placed(self.state)).trace(self.state, self.batch)

    @functools.cached_property
    def _init(self) -> Any:
        # Traced without the mesh: of the forward pass only the parameters are kept, and each device draws its own part of them.
        return jax.jit(self._fresh, **({} if self.parallel is None else {"out_shardings": _shardings(self.state)}))

    def _fresh(self, key_data: Array) -> TrainState:
        return init_state(self.model, self.task, self.optimizer, self.batch, jax.random.wrap_key_data(key_data))

    def _like_params(self, tree: Any) -> Any:
        """A tree of the parameters' shape, split as they are."""
        return tree if self.parallel is None else jax.lax.with_sharding_constraint(tree, _shardings(self.state.params))

    def _placed(self, state: TrainState | None) -> dict[str, Any]:
        """Arguments of `jax.jit` for a step that gives a state (or none) and something to be read by the host."""
        if self.parallel is None:
            return {}
        read = rules.replicated(self.parallel.mesh)
        return {
            "in_shardings": (_shardings(self.state), _shardings(self.batch)),
            "out_shardings": read if state is None else (_shardings(state), read),
        }


def get_program(
    config: dict[str, Any],
    settings: TrainSettings,
    batch: Batch,
    context: dict[str, Any],
    model: nn.Module | None = None,
    parallel: Parallel | None = None,
) -> Program:
    """The program of a config, from the cache if another run of this process has made it.

    Args:
      config: plain config; its model, adapters, task and optimizer matter here.
      settings: `config.train`.
      batch: a whole batch of training, over all hosts; shapes and dtypes are enough.
      context: what the data knows that the task asks for (`domains`, `bytes_per_token`).
      model: takes the place of `config.model` and `config.adapters`; must be hashable, as Flax modules are.
      parallel: the mesh that the program is for; None for one device.

    Raises:
      ConfigError: the mesh does not divide the batch; or, when `Program.state` is asked for, a parameter.
    """
    spec = json.dumps(
        {
            "model": None if model is not None else config["model"],
            "adapters": None if model is not None else config.get("adapters"),
            "task": config["task"],
            "optimizer": config["optimizer"],
            "steps": settings.steps,
            "accumulation": settings.accumulation,
            "context": context,
        },
        sort_keys=True,
    )
    shapes = tuple(sorted((name, x.shape, str(x.dtype)) for name, x in batch.items()))
    return _program(spec, shapes, model, parallel)


@functools.lru_cache(maxsize=KEPT)
def _program(spec: str, shapes: BatchShapes, model: nn.Module | None, parallel: Parallel | None) -> Program:
    config = json.loads(spec)
    return Program(
        model=models.network(config) if model is None else model,
        task=tasks.build(config["task"], "task", **_tuples(config["context"])),
        optimizer=optimizers.build(config["optimizer"], "optimizer", steps=config["steps"]),
        accumulation=config["accumulation"],
        batch={name: jax.ShapeDtypeStruct(shape, dtype) for name, shape, dtype in shapes},
        parallel=parallel,
        spec=config["model"],
    )


def _key_data() -> np.ndarray:
    return np.zeros_like(jax.random.key_data(jax.random.key(0)))


def _shardings(shapes: Any) -> Any:
    return jax.tree.map(lambda x: x.sharding, shapes)


def _tuples(context: dict[str, Any]) -> dict[str, Any]:
    return {key: tuple(value) if isinstance(value, list) else value for key, value in context.items()}
