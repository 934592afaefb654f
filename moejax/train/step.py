"""One step of training, one step of evaluation: pure functions of a state and a batch.

Randomness is folded from the state's key and its step, so what a step draws depends on the seed and the step's number only.
"""

from collections.abc import Callable, Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax
from flax import struct
from jaxtyping import Array, Float, Int

from moejax.core.control import record_controllers
from moejax.core.errors import ConfigError
from moejax.optim.base import Optimizer
from moejax.parallel import constrain
from moejax.tasks.base import Batch, Sums, Task
from moejax.train.controllers import apply_controllers
from moejax.train.metrics import flatten

# Streams that layers may draw from while training.
STREAMS = ("router", "dropout")
# Collections that are kept from step to step. Whatever else a model makes lives for one call.
STATE = ("router_state",)

Tree = Any
Metrics = dict[str, Any]
TrainStep = Callable[["TrainState", Batch], tuple["TrainState", Metrics]]
EvalStep = Callable[["TrainState", Batch], tuple[Sums, dict[str, Array]]]
Place = Callable[[Tree], Tree]


@struct.dataclass
class TrainState:
    """Everything that training changes.

    Attributes:
      step: int32 scalar, updates done.
      params: tree of parameters.
      opt_state: the optimizer's state.
      collections: name -> tree of state that is updated without gradients (`router_state`).
      key: the run's random key; never changes, see the module.
      first_bad_step: int32 scalar, number (from 1) of the first update with a loss, gradient or parameter that is not
        finite; -1 as long as there is none. Kept on the device so that noticing costs no synchronisation.
    """

    step: Any
    params: Tree
    opt_state: Tree
    collections: dict[str, Tree]
    key: Any
    first_bad_step: Any


def init_state(model: nn.Module, task: Task, optimizer: Optimizer, batch: Batch, key: Array) -> TrainState:
    """A fresh state. `batch` gives shapes only.

    Initialises in evaluation mode, so that no state is updated by a batch that is not data.
    """
    # Behind a barrier, or XLA folds the whole forward pass of these constants at compile time, for half a minute.
    zeros = jax.lax.optimization_barrier(jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), batch))
    inputs, ctx = task.inputs(zeros, jnp.int32(0), train=False)
    init_key, run_key = jax.random.split(key)
    variables = model.init({"params": init_key, **_streams(init_key)}, inputs, ctx, mutable=["params", *STATE])
    params = variables["params"]
    return TrainState(
        step=jnp.int32(0),
        params=params,
        opt_state=optimizer.transform().init(params),
        collections={name: tree for name, tree in variables.items() if name != "params"},
        key=run_key,
        first_bad_step=jnp.int32(-1),
    )


def make_train_step(
    model: nn.Module,
    task: Task,
    optimizer: Optimizer,
    accumulation: int = 1,
    jit: bool = True,
    place: Place = lambda params: params,
) -> TrainStep:
    """The function `(state, batch) -> (state, metrics)`, jitted with its state donated unless `jit=False`.

    The objective is the task's loss plus everything in the collection 'losses'. With `accumulation`, microbatches run one
    after the other and are weighted by their number of valid targets: the update equals that of the whole batch wherever a
    loss is a mean over targets or over equally weighted sequences. What looks at a batch as one (capacity of a group that
    spans the batch, a balance loss over the batch) sees a microbatch instead. Of n microbatches, the first has rows 0, n, 2n, ... of the batch: wherever a device holds a multiple of n neighbouring rows,
    each microbatch has its share of every device's rows and none has to move.

    `place` says where a tree like the parameters lies, for gradients: their identity, with a sharding.

    State without gradients is read while the layers run. After the update, controllers that layers have declared change it, and
    parameters, by what was measured over the whole batch; see `moejax.core.control`.

    Metrics: 'train/loss' (the task's, nats), 'train/objective', 'train/grad_norm' (before clipping), 'train/param_norm',
    'train/learning_rate', 'losses/<name>' (summed over layers), 'stats/<module>/<name>' (see `metrics.flatten`), and
    'sums': the task's sums, for `task.metrics`.

    Raises:
      ConfigError: (when traced) the batch does not divide into `accumulation` microbatches.
    """
    transform = optimizer.transform()

    def objective(params: Tree, state: TrainState, batch: Batch, key: Array) -> tuple[Array, tuple[Any, ...]]:
        inputs, ctx = task.inputs(batch, state.step, train=True)
        outputs, changed = model.apply(
            {"params": params, **state.collections},
            inputs,
            ctx,
            rngs=_streams(key),
            mutable=["losses", "stats", "measured"],
        )
        sums = task.sums(outputs, batch)
        loss = sums["nll"] / jnp.maximum(sums["count"], 1)
        losses = flatten(changed.get("losses", {}), "losses", total=True)
        total = loss + sum(losses.values())
        means = {"train/loss": loss, "train/objective": total, **losses, **flatten(changed.get("stats", {}), "stats")}
        return total, (sums, means, changed.get("measured", {}))

    def gradients(state: TrainState, batch: Batch, key: Array) -> tuple[Tree, tuple[Any, ...]]:
        grads, aux = jax.grad(objective, has_aux=True)(state.params, state, batch, key)
        return place(grads), aux

    def train_step(state: TrainState, batch: Batch) -> tuple[TrainState, Metrics]:
        key = jax.random.fold_in(state.key, state.step)
        with record_controllers() as controllers:
            if accumulation == 1:
                grads, (sums, means, measured) = gradients(state, batch, jax.random.fold_in(key, 0))
            else:
                zeros = place(jax.tree.map(jnp.zeros_like, state.params))
                grads, (sums, means, measured) = _accumulate(gradients, zeros, task, state, batch, key, accumulation)
        updates, opt_state = transform.update(grads, state.opt_state, state.params)
        params, collections = optax.apply_updates(state.params, updates), state.collections
        if controllers:
            params, opt_state, router_state = apply_controllers(
                controllers.values(), measured, params, opt_state, collections["router_state"], state.step + 1, transform
            )
            collections = {**collections, "router_state": router_state}
        grad_norm, param_norm = optax.global_norm(grads), optax.global_norm(params)
        finite = jnp.isfinite(means["train/objective"]) & jnp.isfinite(grad_norm) & jnp.isfinite(param_norm)
        fresh = (state.first_bad_step < 0) & ~finite
        state = state.replace(
            step=state.step + 1,
            params=params,
            opt_state=opt_state,
            collections=collections,
            first_bad_step=jnp.where(fresh, state.step + 1, state.first_bad_step),
        )
        metrics = {
            **means,
            "train/grad_norm": grad_norm,
            "train/param_norm": param_norm,
            "train/learning_rate": optimizer.rate(state.step - 1),
            "sums": sums,
        }
        return state, metrics

    return jax.jit(train_step, donate_argnums=0) if jit else train_step


def make_eval_step(model: nn.Module, task: Task, jit: bool = True) -> EvalStep:
    """The function `(state, batch) -> (sums, stats)` in evaluation mode: no noise, no update of any state.

    Stats are multiplied by the batch's number of valid targets, so that they add up like sums.
    """

    def eval_step(state: TrainState, batch: Batch) -> tuple[Sums, dict[str, Array]]:
        inputs, ctx = task.inputs(batch, state.step, train=False)
        variables = {"params": state.params, **state.collections}
        outputs, changed = model.apply(variables, inputs, ctx, mutable=["losses", "stats"])
        sums = task.sums(outputs, batch)
        stats = flatten(changed.get("stats", {}), "stats")
        return sums, {name: value * sums["count"] for name, value in stats.items()}

    return jax.jit(eval_step) if jit else eval_step


def _accumulate(
    gradients: Callable[..., Any], zeros: Tree, task: Task, state: TrainState, batch: Batch, key: Array, parts: int
) -> tuple[Tree, tuple[Any, ...]]:
    """`gradients` of the whole batch, from one microbatch after the other."""
    size = jax.tree.leaves(batch)[0].shape[0]
    if size % parts:
        raise ConfigError(f"data.batch_size={size} is not divisible by train.accumulation={parts}")

    def split(x: Array) -> Array:
        x = x.reshape(size // parts, parts, *x.shape[1:]).swapaxes(0, 1)
        return constrain(x, None, "batch", *(None,) * (x.ndim - 2))

    micro = jax.tree.map(split, batch)
    counts = jax.vmap(task.count)(micro)
    weights = counts / jnp.maximum(counts.sum(), 1)

    def body(total: Tree, item: tuple[Batch, Float[Array, ""], Int[Array, ""]]) -> tuple[Tree, Any]:
        part, weight, index = item
        grads, aux = gradients(state, part, jax.random.fold_in(key, index))
        return jax.tree.map(lambda t, g: t + weight * g, total, grads), aux

    grads, (sums, means, measured) = jax.lax.scan(body, zeros, (micro, weights, jnp.arange(parts)))

    def mean(stacked: Array) -> Array:
        if not jnp.issubdtype(stacked.dtype, jnp.floating):
            return stacked[-1]
        return jnp.tensordot(weights, stacked, axes=1).astype(stacked.dtype)

    return grads, (
        jax.tree.map(lambda x: x.sum(0), sums),
        jax.tree.map(mean, means),
        jax.tree.map(lambda x: x.sum(0), measured),
    )


def _streams(key: Array) -> dict[str, Array]:
    return {name: jax.random.fold_in(key, i) for i, name in enumerate(STREAMS)}


def abstract(tree: Mapping[str, Any] | TrainState) -> Any:
    """Shapes and dtypes of a tree of arrays."""
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), tree)
