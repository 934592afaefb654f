"""One step of training, one step of evaluation: pure functions of a state and a batch.

Randomness is folded from the state's key and its step, so what a step draws depends on the seed and the step's number only.
"""

from collections.abc import Callable, Mapping
from typing import Any

import flax.linen as nn
import flax.traverse_util
import jax
import jax.numpy as jnp
import optax
from flax import struct
from jax.interpreters.partial_eval import dce_jaxpr
from jaxtyping import Array, Float, Int

from moejax.core.control import record_controllers
from moejax.core.errors import ConfigError
from moejax.core.sowing import PARTS
from moejax.optim.base import Optimizer, global_norm
from moejax.parallel import constrain
from moejax.tasks.base import Batch, Sums, Task
from moejax.tasks.models import FrozenModel, LearningModel, streams
from moejax.train.controllers import apply_controllers
from moejax.train.metrics import flatten
from moejax.train.trainable import Learning

# Collections that are kept from step to step. Whatever else a model makes lives for one call.
STATE = ("router_state",)

Tree = Any
Metrics = dict[str, Any]
TrainStep = Callable[["TrainState", Batch], tuple["TrainState", Metrics]]
EvalStep = Callable[["TrainState", Batch], tuple[Sums, dict[str, Array]]]
Place = Callable[[Tree], Tree]
Models = Mapping[str, nn.Module]


@struct.dataclass
class TrainState:
    """Everything that training changes, and what it keeps beside that.

    Attributes:
      step: int32 scalar, updates done.
      params: tree of parameters, of those that do not learn too.
      opt_state: the optimizer's state, of the parameters that learn.
      collections: name -> tree of state that is updated without gradients (`router_state`).
      key: the run's random key; never changes, see the module.
      first_bad_step: int32 scalar, number (from 1) of the first update with a loss, gradient or parameter that is not
        finite; -1 as long as there is none. Kept on the device so that noticing costs no synchronisation.
      frozen: name -> variables of a model that the task runs and nobody trains. Never changes, and is in no checkpoint.
    """

    step: Any
    params: Tree
    opt_state: Tree
    collections: dict[str, Tree]
    key: Any
    first_bad_step: Any
    frozen: dict[str, Tree] = struct.field(default_factory=dict)

    @property
    def variables(self) -> dict[str, Tree]:
        """What the model is applied with."""
        return {"params": self.params, **self.collections}


def init_state(
    model: nn.Module, task: Task, optimizer: Optimizer, batch: Batch, key: Array, learning: Learning | None = None
) -> TrainState:
    """A fresh state. `batch` gives shapes only."""
    return begin_state(init_variables(model, task.inputs, batch, key), optimizer, key, learning)


def init_variables(
    model: nn.Module, inputs: Callable[..., Any], batch: Batch, key: Array, given: Mapping[str, Tree] | None = None
) -> dict[str, Tree]:
    """The variables of an untrained model: parameters and `STATE`. `batch` gives shapes only; what is `given` stays.

    Initialises in evaluation mode, so that no state is updated by a batch that is not data.
    """
    # Behind a barrier, or XLA folds the whole forward pass of these constants at compile time, for half a minute.
    zeros = jax.lax.optimization_barrier(jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), batch))
    arguments, ctx = inputs(zeros, jnp.int32(0), train=False)
    key, _ = jax.random.split(key)
    rngs, made = {"params": key, **streams(key)}, ["params", *STATE]
    if given is None:
        variables = model.init(rngs, arguments, ctx, mutable=made)
    else:
        _, variables = model.apply(given, arguments, ctx, rngs=rngs, mutable=made)
    return {"params": {}, **variables}


def begin_state(
    variables: Mapping[str, Tree], optimizer: Optimizer, key: Array, learning: Learning | None = None
) -> TrainState:
    """The state before the first step of a training that begins with `variables`."""
    learning = learning or Learning()
    _, key = jax.random.split(key)
    params = variables["params"]
    return TrainState(
        step=jnp.int32(0),
        params=params,
        opt_state=learning.transform(optimizer).init(learning.split(params)[0]),
        collections={name: tree for name, tree in variables.items() if name != "params"},
        key=key,
        first_bad_step=jnp.int32(-1),
    )


def make_train_step(
    model: nn.Module,
    task: Task,
    optimizer: Optimizer,
    accumulation: int = 1,
    jit: bool = True,
    place: Place = lambda params: params,
    learning: Learning | None = None,
    frozen: Models | None = None,
) -> TrainStep:
    """The function `(state, batch) -> (state, metrics)`, jitted with its state donated unless `jit=False`.

    What is descended is the task's objective plus everything in the collection 'losses'. With `accumulation`, microbatches run one
    after the other, and the update equals that of the whole batch: the objective is weighted by valid targets, losses on routing by
    routed tokens, and what one of these looks at over the batch is of the whole batch, for which a forward pass comes first (see
    `moejax.core.sowing`). A loss that a module sows by itself, without `sow_loss`, is weighted by targets, and so are statistics.
    Only groups that span the batch ('batch', 'position') compete for the capacity of a microbatch instead. Of n microbatches, the first has rows 0, n, 2n, ... of the batch: wherever a device holds a multiple of n neighbouring rows,
    each microbatch has its share of every device's rows and none has to move.

    `place` says where a tree like the parameters that learn lies, for gradients: their identity, with a sharding. `learning` says
    which these are; the others are arguments of the step that nothing is differentiated by. `frozen` are the models of the
    task's sources.

    State without gradients is read while the layers run. After the update, controllers that layers have declared change it, and
    parameters, by what was measured over the whole batch; see `moejax.core.control`.

    Metrics: 'train/loss' (the task's, nats), 'train/objective', 'train/grad_norm' (before clipping), 'train/param_norm',
    'train/learning_rate', 'losses/<name>' (summed over layers), 'stats/<module>/<name>' (see `metrics.flatten`), and
    'sums': the task's sums, for `task.metrics`.

    Raises:
      ConfigError: (when traced) the batch does not divide into `accumulation` microbatches.
    """
    learning = learning or Learning()
    transform = learning.transform(optimizer)

    def objective(
        learned: Tree, kept: Tree, state: TrainState, batch: Batch, key: Array, part: Part | None
    ) -> tuple[Array, tuple[Any, ...]]:
        whole = None if part is None else part.whole
        run = LearningModel(model, learning.join(learned, kept), state.collections, key, _frozen(frozen, state), whole)
        loss, sums = task.objective(run, batch, state.step)
        if part is not None:
            loss = part.weight * loss
            run.sown = [{**sown, "losses": part.share(sown.get("losses", {}), i)} for i, sown in enumerate(run.sown)]
        losses = run.summed(lambda changed: flatten(changed.get("losses", {}), "losses", total=True))
        stats = run.summed(lambda changed: flatten(changed.get("stats", {}), "stats"))
        stats = stats if len(run.sown) == 1 else {name: value / len(run.sown) for name, value in stats.items()}
        total = loss + sum(losses.values())
        losses = {"train/loss": loss, "train/objective": total, **losses}
        return total, (sums, losses, stats, run.summed(lambda changed: changed.get("measured", {})))

    def gradients(state: TrainState, batch: Batch, key: Array, part: Part | None = None) -> tuple[Tree, tuple[Any, ...]]:
        grads, aux = jax.grad(objective, has_aux=True)(*learning.split(state.params), state, batch, key, part)
        return place(grads), aux

    def parts(state: TrainState, batch: Batch, key: Array) -> list[Tree]:
        """What losses sum over the batch, of a microbatch: for each call of the model."""
        run = LearningModel(model, state.params, state.collections, key, _frozen(frozen, state), gather=True)
        task.objective(run, batch, state.step)
        return [sown.get(PARTS, {}) for sown in run.sown]

    def train_step(state: TrainState, batch: Batch) -> tuple[TrainState, Metrics]:
        key = jax.random.fold_in(state.key, state.step)
        learned, kept = learning.split(state.params)
        with record_controllers() as controllers:
            if accumulation == 1:
                grads, (sums, losses, stats, measured) = gradients(state, batch, jax.random.fold_in(key, 0))
            else:
                zeros = place(jax.tree.map(jnp.zeros_like, learned))
                grads, (sums, losses, stats, measured) = _accumulate(
                    gradients, parts, zeros, task, state, batch, key, accumulation
                )
        grads = learning.now(grads, state.step)
        updates, opt_state = transform.update(grads, state.opt_state, learned, step=state.step)
        params, collections = learning.join(optax.apply_updates(learned, updates), kept), state.collections
        if controllers:
            params, opt_state, router_state = apply_controllers(
                controllers.values(),
                measured,
                params,
                opt_state,
                collections["router_state"],
                state.step + 1,
                lambda params: transform.init(learning.split(params)[0]),
            )
            params = learning.join(learning.split(params)[0], kept)
            collections = {**collections, "router_state": router_state}
        grad_norm, param_norm = global_norm(grads), global_norm(params)
        finite = jnp.isfinite(losses["train/objective"]) & jnp.isfinite(grad_norm) & jnp.isfinite(param_norm)
        fresh = (state.first_bad_step < 0) & ~finite
        state = state.replace(
            step=state.step + 1,
            params=params,
            opt_state=opt_state,
            collections=collections,
            first_bad_step=jnp.where(fresh, state.step + 1, state.first_bad_step),
        )
        metrics = {
            **losses,
            **stats,
            "train/grad_norm": grad_norm,
            "train/param_norm": param_norm,
            "train/learning_rate": optimizer.rate(state.step - 1),
            "sums": sums,
        }
        return state, metrics

    return jax.jit(train_step, donate_argnums=0) if jit else train_step


def make_eval_step(model: nn.Module, task: Task, jit: bool = True, frozen: Models | None = None) -> EvalStep:
    """The function `(state, batch) -> (sums, stats)` in evaluation mode: no noise, no update of any state.

    Stats are multiplied by the batch's number of valid targets, so that they add up like sums.
    """

    def eval_step(state: TrainState, batch: Batch) -> tuple[Sums, dict[str, Array]]:
        run = LearningModel(model, state.params, state.collections, None, _frozen(frozen, state))
        sums = task.scores(run, batch, state.step)
        stats = run.summed(lambda changed: flatten(changed.get("stats", {}), "stats"))
        weight = sums["count"] if len(run.sown) == 1 else sums["count"] / max(len(run.sown), 1)
        return sums, {name: value * weight for name, value in stats.items()}

    return jax.jit(eval_step) if jit else eval_step


@struct.dataclass
class Part:
    """What a microbatch knows of the batch.

    Attributes:
      weight: its share of the batch's targets.
      whole: for each call of the model, the sums over the batch, see `moejax.core.sowing`.
    """

    weight: Float[Array, ""]
    whole: list[Tree]

    def share(self, losses: Tree, call: int) -> Tree:
        """The losses that layers have sown in a call, each as its share of that of the batch."""
        shared = flax.traverse_util.flatten_dict(self.whole[call])
        found = flax.traverse_util.flatten_dict(losses)
        scaled = {p: x if p in shared else jax.tree.map(lambda x: self.weight * x, x) for p, x in found.items()}
        return flax.traverse_util.unflatten_dict(scaled)


def _accumulate(
    gradients: Callable[..., Any],
    parts: Callable[..., Any],
    zeros: Tree,
    task: Task,
    state: TrainState,
    batch: Batch,
    key: Array,
    number: int,
) -> tuple[Tree, tuple[Any, ...]]:
    """`gradients` of the whole batch, from one microbatch after the other."""
    size = jax.tree.leaves(batch)[0].shape[0]
    if size % number:
        raise ConfigError(f"data.batch_size={size} is not divisible by train.accumulation={number}")

    def split(x: Array) -> Array:
        x = x.reshape(size // number, number, *x.shape[1:]).swapaxes(0, 1)
        return constrain(x, None, "batch", *(None,) * (x.ndim - 2))

    micro = jax.tree.map(split, batch)
    counts = jax.vmap(task.count)(micro)
    weights = counts / jnp.maximum(counts.sum(), 1)

    numbers = jnp.arange(number)
    needed = _only_needed(lambda part, index: parts(state, part, jax.random.fold_in(key, index)), micro, numbers)
    _, gathered = jax.lax.scan(lambda _, item: (None, needed(*item)), None, (micro, numbers))
    whole = jax.tree.map(lambda x: x.sum(0), gathered)

    def body(total: Tree, item: tuple[Batch, Float[Array, ""], Int[Array, ""]]) -> tuple[Tree, Any]:
        part, weight, index = item
        grads, aux = gradients(state, part, jax.random.fold_in(key, index), Part(weight, whole))
        return jax.tree.map(jnp.add, total, grads), aux

    grads, (sums, losses, stats, measured) = jax.lax.scan(body, zeros, (micro, weights, numbers))

    def mean(stacked: Array) -> Array:
        if not jnp.issubdtype(stacked.dtype, jnp.floating):
            return stacked[-1]
        return jnp.tensordot(weights, stacked, axes=1).astype(stacked.dtype)

    return grads, (
        jax.tree.map(lambda x: x.sum(0), sums),
        jax.tree.map(lambda x: x.sum(0), losses),
        jax.tree.map(mean, stats),
        jax.tree.map(lambda x: x.sum(0), measured),
    )


def _only_needed(f: Callable[..., Tree], *stacked: Any) -> Callable[..., Tree]:
    """`f` without the work that its results do not depend on, as of any one entry of its stacked arguments.

    XLA leaves that work out by itself; here it is left out of the program, whose arithmetic is counted.
    """
    one = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape[1:], x.dtype), stacked)
    closed, shapes = jax.make_jaxpr(f, return_shape=True)(*one)
    jaxpr, used = dce_jaxpr(closed.jaxpr, [True] * len(closed.jaxpr.outvars))

    def run(*args: Any) -> Tree:
        given = [x for x, take in zip(jax.tree.leaves(args), used, strict=True) if take]
        return jax.tree.unflatten(jax.tree.structure(shapes), jax.core.eval_jaxpr(jaxpr, closed.consts, *given))

    return run


def _frozen(models: Models | None, state: TrainState) -> dict[str, FrozenModel]:
    return {name: FrozenModel(model, state.frozen[name]) for name, model in (models or {}).items()}


def abstract(tree: Mapping[str, Any] | TrainState) -> Any:
    """Shapes and dtypes of a tree of arrays."""
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), tree)
