"""A config's compiled programs: compiled once ahead of time, and shared by all runs of that config in a process."""

import dataclasses
import functools
import json
import os
import threading
from collections.abc import Callable, Collection, Mapping
from concurrent.futures import Future
from typing import Any, NamedTuple

import flax.linen as nn
import flax.traverse_util
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, PartitionSpec
from jaxtyping import Array

from moejax import models
from moejax.core.params import Path
from moejax.core.roles import Notes, record
from moejax.dispatch.expert_parallel import overlap_options
from moejax.layers.adapters.places import record_adapted
from moejax.layers.adapters.table import AdaptedLayer, layers_of
from moejax.optim.base import Optimizer, optimizers
from moejax.parallel import Parallel, rules, use
from moejax.tasks.base import Batch, Task, check_batch, tasks
from moejax.train.flops import matmul_flops
from moejax.train.readers import frozen_specs
from moejax.train.settings import TrainSettings
from moejax.train.step import TrainState, abstract, begin_state, init_variables, make_eval_step, make_train_step
from moejax.train.trainable import Learning, learning
from pallas_kernels.implementations import current_chip

# Programs kept per process. One holds executables, not arrays; a study seldom has more arms than this in flight.
KEPT = 8

BatchShapes = tuple[tuple[str, tuple[int, ...], str], ...]


class _Traced(NamedTuple):
    """An untrained model: the jitted function from a key to its variables, their shapes, what it says of its parameters, and what its
    adapters sit around."""

    variables: Callable[[Array], Any]
    shapes: Any
    notes: Notes
    adapted: tuple[Any, ...]


@dataclasses.dataclass(eq=False)
class Program:
    """The model, task and optimizer of a config, and its programs for one shape of batch. No seed is part of it, and no start.

    With a mesh all programs are for that mesh: the state is split by `moejax.parallel.rules`, the batch by rows, and metrics
    are the same on every device. The mesh's devices need not be there unless something is run.

    Attributes:
      batch: shapes of a batch; of the whole batch, with shardings, if there is a mesh.
      parallel: the mesh; None for one device.
      spec: `config.model`, for errors that name a key of it.
      trainable: rules of what learns, `config.trainable`.
      steps: of the run, for rules about a part of it.
      frozen: name -> model and adapters of the models that the task runs and nobody trains.
    """

    model: nn.Module
    task: Task
    optimizer: Optimizer
    accumulation: int
    batch: dict[str, jax.ShapeDtypeStruct]
    parallel: Parallel | None = None
    spec: dict[str, Any] | None = None
    trainable: dict[str, Any] | None = None
    steps: int = 0
    frozen: dict[str, dict[str, Any]] = dataclasses.field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.parallel is not None:
            sharding = rules.batch_sharding(self.parallel.mesh)
            rules.check_batch(next(iter(self.batch.values())).shape[0], self.accumulation, self.parallel.mesh)
            self.batch = {name: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding) for name, x in self.batch.items()}

    def init(self, key: Array) -> TrainState:
        """A fresh state: the same numbers on every mesh."""
        # As NumPy, so that every process of a run may give it to a program that spans them all.
        return self._initial.result()(np.asarray(jax.random.key_data(key)))

    def begin(self, variables: Mapping[str, Any], key: Array) -> TrainState:
        """The state before the first step of a run that starts from variables of the model, given as NumPy arrays."""
        arrays = jax.tree.map(_put, dict(variables), self.state.variables)
        return self._begin(arrays, np.asarray(jax.random.key_data(key)))

    def fresh(self, paths: Collection[Path], key: Array, given: Mapping[Path, Any] | None = None) -> dict[Path, Any]:
        """Some of the variables of an untrained model, by path with the collection first, as NumPy arrays.

        Args:
          paths: which.
          key: of the run.
          given: those that are there already, likewise. What starts beside them, an adapter, may look at them.
        """

        def some(key_data: Array, given: Mapping[str, Any] | None) -> dict[Path, Any]:
            key = jax.random.wrap_key_data(key_data)
            made = self._variables(key_data) if given is None else self._init_variables(key, given)
            flat = flax.traverse_util.flatten_dict(made)
            return {path: flat[path] for path in paths}

        there = None if given is None else flax.traverse_util.unflatten_dict(dict(given))
        # Of what is there, only what something looks at goes to a device.
        made = jax.jit(some)(np.asarray(jax.random.key_data(key)), there)
        return {path: np.asarray(x) for path, x in made.items()}

    def is_adapter(self, path: Path) -> bool:
        """Whether a variable, by path with the collection first, belongs to an adapter."""
        return "adapters" in self._traced.notes.roles(path[1:])

    @functools.cached_property
    def parameters(self) -> Any:
        """A tree of `moejax.core.roles.Parameter`: axes and roles of each parameter."""
        return self._traced.notes.describe(self._traced.shapes["params"])

    @functools.cached_property
    def learning(self) -> Learning:
        """What learns, and when.

        Raises:
          ConfigError: a rule of `trainable` that does not fit the model.
        """
        return learning(self.trainable, self.parameters, self.steps)

    @functools.cached_property
    def state(self) -> TrainState:
        """Shapes of the state; with a mesh, also shardings.

        Raises:
          ConfigError: the mesh does not divide a size, or a rule of `trainable` does not fit the model.
        """
        return self._own.replace(frozen={name: shapes for name, (_, shapes) in self._frozen.items()})

    @functools.cached_property
    def _own(self) -> TrainState:
        """Shapes of the state without the frozen models."""
        notes = self._traced.notes
        state = jax.eval_shape(self._fresh, _key_data())
        if self.parallel is None:
            return abstract(state)
        mesh = self.parallel.mesh
        params = rules.param_specs(state.params, notes.axes, mesh, self.spec)
        specs = jax.tree.map(lambda _: PartitionSpec(), state).replace(
            params=params, opt_state=rules.follow_params(state.opt_state, state.params, params)
        )
        return _with_shardings(state, specs, mesh)

    @functools.cached_property
    def _frozen(self) -> dict[str, tuple[nn.Module, Any]]:
        """Name -> frozen model and the shapes of its variables."""
        return {name: self._frozen_model(name, spec) for name, spec in self.frozen.items()}

    def shapes_of(self, network: Mapping[str, Any]) -> Any:
        """Shapes of the variables that the network of another config (`network_of`) has in the place of this program's."""
        model = models.network(network)
        return abstract(jax.eval_shape(lambda: init_variables(model, self.task.inputs, self.batch, jax.random.key(0))))

    def _frozen_model(self, name: str, spec: dict[str, Any]) -> tuple[nn.Module, Any]:
        model = models.network(spec, f"task.{name}")
        inputs = functools.partial(_frozen_inputs, self.task, name)
        with record() as notes:
            shapes = jax.eval_shape(lambda: init_variables(model, inputs, self.batch, jax.random.key(0)))
        if self.parallel is None:
            return model, abstract(shapes)
        specs = jax.tree.map(lambda _: PartitionSpec(), shapes)
        specs = {**specs, "params": rules.param_specs(shapes["params"], notes.axes, self.parallel.mesh, spec["model"])}
        return model, _with_shardings(shapes, specs, self.parallel.mesh)

    @functools.cached_property
    def frozen_models(self) -> dict[str, nn.Module]:
        """Name -> frozen model."""
        return {name: model for name, (model, _) in self._frozen.items()}

    def place_frozen(self, variables: Mapping[str, Any]) -> dict[str, Any]:
        """NumPy variables of the frozen models, by name, as the step takes them."""
        return jax.tree.map(_put, dict(variables), self.state.frozen)

    def compile_beside(self, fresh: bool) -> None:
        """Begins to compile what a run needs, each program in a thread of its own, and returns once they are traced.

        `fresh`: whether it draws its parameters.
        """
        _ = self._initial if fresh else None, self._trained, self._evaluated

    @property
    def train(self) -> Any:
        """The compiled train step; compiles on first use."""
        return self._trained.result()

    @functools.cached_property
    def _trained(self) -> Future[Any]:
        return _compiled(self.lower_train(), self.compiler_options())

    def compiler_options(self) -> dict[str, str]:
        """What the compiler is told of the train step."""
        return {**overlap_options(self.parallel), **_options_of_cpus()}

    def lower_train(self) -> Any:
        """The lowered train step. Its `compile()` needs the mesh's compiler but not its devices."""
        with use(self.parallel):
            return self._traced_train.lower()

    @property
    def evaluate(self) -> Any:
        """The compiled evaluation step; compiles on first use."""
        return self._evaluated.result()

    @functools.cached_property
    def _evaluated(self) -> Future[Any]:
        with use(self.parallel):
            step = make_eval_step(self.model, self.task, jit=False, frozen=self.frozen_models)
            return _compiled(jax.jit(step, **self._placed(None)).lower(self.state, self.batch), _options_of_cpus())

    @functools.cached_property
    def flops(self) -> float:
        """Matrix-product FLOPs of one train step on all devices together, see `matmul_flops`."""
        return matmul_flops(self._traced_train.jaxpr)

    @functools.cached_property
    def params(self) -> int:
        """Number of parameters."""
        return sum(leaf.size for leaf in jax.tree.leaves(self.state.params))

    @functools.cached_property
    def trainable_params(self) -> int:
        """Number of parameters that learn, in some steps at least."""
        return sum(leaf.size for leaf in jax.tree.leaves(self.learning.split(self.state.params)[0]))

    @functools.cached_property
    def state_bytes(self) -> int:
        """Bytes of the state, on all devices together: parameters, optimizer state, and models that nobody trains."""
        return sum(leaf.size * getattr(leaf.dtype, "itemsize", 16) for leaf in jax.tree.leaves(self.state))

    @functools.cached_property
    def active_params(self) -> int:
        """Parameters that one token uses; all of them for a model that is not made of a pattern of blocks."""
        if not hasattr(self.model, "pattern"):
            return self.params
        return models.active_params(self.model, self.state.params)

    @functools.cached_property
    def adapted_layers(self) -> tuple[AdaptedLayer, ...]:
        """What the model's adapters sit around; nothing if it has none."""
        return layers_of(self._traced.adapted, self._traced.shapes["params"])

    @functools.cached_property
    def _traced_train(self) -> Any:
        with use(self.parallel):
            step = make_train_step(
                self.model,
                self.task,
                self.optimizer,
                self.accumulation,
                jit=False,
                place=self._like_learned,
                learning=self.learning,
                frozen=self.frozen_models,
            )
            return jax.jit(step, donate_argnums=0, **self._placed(self.state)).trace(self.state, self.batch)

    @functools.cached_property
    def _initial(self) -> Future[Any]:
        # Traced without the mesh: of the forward pass only the parameters are kept, and each device draws its own part of them.
        return _compiled(jax.jit(self._fresh, **self._out(self._own)).lower(_key_data()), _options_of_drawing())

    @functools.cached_property
    def _begin(self) -> Any:
        return jax.jit(self._begun, donate_argnums=0, **self._out(self._own))

    def _fresh(self, key_data: Array) -> TrainState:
        return self._begun(self._variables(key_data), key_data)

    def _variables(self, key_data: Array) -> Any:
        return self._traced.variables(key_data)

    @functools.cached_property
    def _traced(self) -> _Traced:
        """What is known of the untrained model. It is traced here and nowhere else, however many programs this is a part of."""

        def variables(key_data: Array) -> Any:
            return self._init_variables(jax.random.wrap_key_data(key_data))

        jitted = jax.jit(variables)
        with record() as notes, record_adapted() as adapted:
            shapes = jax.eval_shape(jitted, _key_data())
        return _Traced(jitted, shapes, notes, tuple(adapted))

    def _init_variables(self, key: Array, given: Mapping[str, Any] | None = None) -> Any:
        return init_variables(self.model, self.task.inputs, self.batch, key, given)

    def _begun(self, variables: Any, key_data: Array) -> TrainState:
        return begin_state(variables, self.optimizer, jax.random.wrap_key_data(key_data), self.learning)

    def _like_learned(self, tree: Any) -> Any:
        """A tree like the parameters that learn, split as they are."""
        if self.parallel is None:
            return tree
        return jax.lax.with_sharding_constraint(tree, _shardings(self.learning.split(self.state.params)[0]))

    def _out(self, state: TrainState) -> dict[str, Any]:
        return {} if self.parallel is None else {"out_shardings": _shardings(state)}

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
      config: plain config; its model, adapters, task, optimizer and trainable matter here.
      settings: `config.train`.
      batch: a whole batch of training, over all hosts; shapes and dtypes are enough.
      context: what the data knows that the task asks for (`domains`, `bytes_per_token`).
      model: takes the place of `config.model` and `config.adapters`; must be hashable, as Flax modules are.
      parallel: the mesh that the program is for; None for one device.

    Raises:
      ConfigError: the mesh does not divide the batch; or, when `Program.state` is asked for, a parameter.
    """
    task = build_task(config["task"], context)
    check_batch(task, tuple(batch))
    spec = json.dumps(
        {
            "model": None if model is not None else config["model"],
            "adapters": None if model is not None else config.get("adapters"),
            "task": config["task"],
            "optimizer": config["optimizer"],
            "trainable": config.get("trainable"),
            "steps": settings.steps,
            "accumulation": settings.accumulation,
            "context": context,
            "frozen": frozen_specs(task),
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
        task=build_task(config["task"], config["context"]),
        optimizer=optimizers.build(config["optimizer"], "optimizer", steps=config["steps"]),
        accumulation=config["accumulation"],
        batch={name: jax.ShapeDtypeStruct(shape, dtype) for name, shape, dtype in shapes},
        parallel=parallel,
        spec=config["model"],
        trainable=config["trainable"],
        steps=config["steps"],
        frozen=config["frozen"],
    )


def build_task(spec: dict[str, Any], context: dict[str, Any]) -> Task:
    """The task of a config, with what the data know that it asks for."""
    return tasks.build(spec, "task", **_tuples(context))


def _options_of_cpus() -> dict[str, str]:
    """Of a CPU: matrix products by Eigen. With XLA's other library (YNNPACK, the default) the step of a small dense model takes about a
    third longer; that of a mixture is the same."""
    return _known("xla_cpu_experimental_ynn_fusion_type", "") if current_chip().platform == "cpu" else {}


def _options_of_drawing() -> dict[str, Any]:
    """Of a CPU: what is run once is not optimised for long, unless a flag says how far. Drawing parameters takes the same time."""
    told = "xla_backend_optimization_level" in os.environ.get("XLA_FLAGS", "")
    return {} if told or current_chip().platform != "cpu" else {"xla_backend_optimization_level": 1}


def _compiled(lowered: Any, options: dict[str, Any]) -> Future[Any]:
    """A lowered program, while a thread of its own compiles it: the compiler leaves Python alone, so tracing goes on beside it."""
    future: Future[Any] = Future()

    def work() -> None:
        try:
            future.set_result(lowered.compile(compiler_options=options or None))
        except BaseException as error:  # whoever asks for the program is told
            future.set_exception(error)

    threading.Thread(target=work, daemon=True).start()  # a process that is told to stop does not wait for it
    return future


@functools.cache
def _known(option: str, value: str) -> dict[str, str]:
    """The option, if this version of XLA has it: they come and go."""
    try:
        jax.jit(lambda: 0).lower().compile(compiler_options={option: value})
    except jax.errors.JaxRuntimeError:
        return {}
    return {option: value}


def _key_data() -> np.ndarray:
    with jax.ensure_compile_time_eval():  # may be asked for while something else is traced
        return np.zeros_like(jax.random.key_data(jax.random.key(0)))


def _frozen_inputs(task: Task, name: str, batch: Batch, step: Any, train: bool) -> tuple[Any, Any]:
    return task.frozen_inputs(name, batch, step)


def _put(x: Any, like: jax.ShapeDtypeStruct) -> Array:
    """A NumPy array, of which every process has the whole, as an array that is split like `like`."""
    if like.sharding is None:
        return jnp.array(x)
    return jax.make_array_from_callback(like.shape, like.sharding, lambda index: x[index])


def _shardings(shapes: Any) -> Any:
    return jax.tree.map(lambda x: x.sharding, shapes)


def _with_shardings(shapes: Any, specs: Any, mesh: Mesh) -> Any:
    return jax.tree.map(
        lambda x, sharding: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), shapes, rules.shardings(specs, mesh)
    )


def _tuples(context: dict[str, Any]) -> dict[str, Any]:
    return {key: tuple(value) if isinstance(value, list) else value for key, value in context.items()}
