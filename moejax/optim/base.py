"""Optimizers: a kind owns its whole transformation, and takes clipping, decay and schedule from here as it needs them.

    @optimizers.register("signum")
    @dataclasses.dataclass(frozen=True, kw_only=True)
    class Signum(Optimizer):
        momentum: float = 0.9

        def transform(self, params=None):
            sign = optax.stateless(lambda updates, _: jax.tree.map(jnp.sign, updates))
            return optax.chain(clip(self.clip_norm), optax.trace(self.momentum), sign, self.decayed(), self.scheduled())

Norms of a layer are norms of *one* layer: parameters are stacked over scanned layers and over experts, and `slice_norm` takes the
norm of each slice.
"""

import dataclasses
import fnmatch
from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Int

from moejax.core.errors import ConfigError
from moejax.core.fields import Fraction, NonNegative, Positive, Whole, check
from moejax.core.registry import Registry
from moejax.core.roles import Parameter
from moejax.parallel import current

optimizers = Registry("optimizer", "moejax.optim")

# Parameters that decay, by name. Shape cannot tell: a bias stacked over experts `[e, f]` and a norm's scale stacked over
# scanned layers `[layers, d]` look like matrices but are none, and a bank `[e, d, f]` is one matrix per expert. So a tensor
# decays if its own name is that of a matrix, and any other name (bias, b, scale, position, gates, temperatures) does not.
MATRICES = (
    *("kernel", "embedding", "head", "projection", "projector", "predictor_*", "router", "w", "w_*", "*_w", "*_w_*"),
    *("q", "k", "v", "o", "u", "query", "keys"),
)
# Elements of an array that is not worth a sum of its own.
SMALL = 2**17
# Axes along which separate layers are stacked.
STACKED = ("layers", "expert")

Params = Any


@dataclasses.dataclass(frozen=True, kw_only=True)
class Optimizer:
    """What all kinds are asked for: a schedule, a clipping norm, a decay. Where in its update a kind uses them is its own affair.

    Attributes:
      steps: updates in all, the end of the schedule (from `train.steps` unless given).
      learning_rate: the schedule's peak.
      warmup_steps: updates of linear warm-up; the first one already moves.
      schedule: what follows the warm-up: 'cosine', 'linear', 'constant' or 'rsqrt'.
      final_fraction: the last update's learning rate, as a share of the peak ('cosine' and 'linear').
      clip_norm: largest global norm of the gradient; None turns clipping off.
      weight_decay: decoupled (Loshchilov and Hutter 2019), multiplied by the learning rate.
      decay: patterns of the names of parameters that decay, see `MATRICES`.

    Raises:
      ConfigError: a warm-up longer than the run.
    """

    steps: Whole
    learning_rate: NonNegative
    warmup_steps: Whole = 0
    schedule: Literal["cosine", "linear", "constant", "rsqrt"] = "cosine"
    final_fraction: Fraction = 0.1
    clip_norm: Positive | None = 1.0
    weight_decay: NonNegative = 0.0
    decay: tuple[str, ...] = MATRICES

    def __post_init__(self):
        check(type(self), vars(self))  # of one's own optimizer too, which no registry knows
        # A run of no steps only evaluates: its schedule is never asked.
        if self.warmup_steps > self.steps and self.steps:
            raise ConfigError(
                f"optimizer.warmup_steps={self.warmup_steps} must lie between 0 and the {self.steps} steps of the run"
            )

    def transform(self, params: Params | None = None) -> optax.GradientTransformation:
        """The whole way from gradients to what is added to the parameters.

        Args:
          params: a tree like the parameters that learn, of `moejax.core.roles.Parameter`: axes, roles and shapes; None where
            nobody knows them.
        """
        raise NotImplementedError

    def rate(self, count: Int[Array, ""] | int) -> Float[Array, ""]:
        """Learning rate of the update after `count` updates."""
        n = jnp.asarray(count, jnp.float32) + 1.0  # number of the update, from 1
        warmup, steps = float(self.warmup_steps), float(self.steps)
        after = SCHEDULES[self.schedule](n, warmup, steps, self.final_fraction)
        return self.learning_rate * jnp.where(n <= warmup, n / max(warmup, 1.0), after)

    def decayed(self) -> optax.GradientTransformation:
        """Adds `weight_decay` times the parameters that decay."""
        return optax.add_decayed_weights(self.weight_decay, mask=lambda params: decay_mask(params, self.decay))

    def scheduled(self) -> optax.GradientTransformationExtraArgs:
        """Multiplies by minus the learning rate: of the run's update, where parameters learn in phases, and not of their own."""
        own = optax.scale_by_learning_rate(self.rate)

        def update(updates: Any, state: Any, params: Any = None, *, step: Any = None, **_: Any) -> tuple[Any, Any]:
            return own.update(updates, state if step is None else state._replace(count=step), params)

        return optax.GradientTransformationExtraArgs(own.init, update)


def clip(largest: float | None) -> optax.GradientTransformationExtraArgs:
    """Scales all gradients down together where their global norm exceeds `largest`; None clips nothing.

    The norm is over everything that learns at the time, see `moejax.train.trainable`.
    """
    if largest is None:
        return optax.with_extra_args_support(optax.identity())

    def update(updates: Any, state: Any, params: Any = None, *, norm: Any = None, **_: Any) -> tuple[Any, Any]:
        norm = global_norm(updates) if norm is None else norm
        # As `optax.clip_by_global_norm`.
        trigger = jnp.squeeze(norm < largest)
        return jax.tree.map(lambda t: jax.lax.select(trigger, t, (t / norm.astype(t.dtype)) * largest), updates), state

    return optax.GradientTransformationExtraArgs(lambda params: optax.EmptyState(), update)


def global_norm(tree: Any) -> Float[Array, ""]:
    """The L2 norm, in float32, of all arrays of a tree together.

    On one device the small ones are laid end to end first: a sum of its own for each of a hundred biases and scales costs a small model
    a twentieth of its step, and a sixth of its compiling. On a mesh they lie on different devices, and stay there.
    """
    leaves = [x.astype(jnp.float32) for x in jax.tree.leaves(tree)]
    small = [x.ravel() for x in leaves if x.size <= SMALL] if current() is None else []
    rest = [x for x in leaves if x.size > SMALL] if small else leaves
    return jnp.sqrt(sum(jnp.sum(jnp.square(x)) for x in [*([jnp.concatenate(small)] if small else []), *rest]))


def slice_norm(x: Array, param: Parameter) -> Array:
    """The L2 norm, in float32, of each slice of `x` along the axes on which layers and experts are stacked; its shape broadcasts.

    Args:
      x: the parameter, its gradient or its update.
      param: what is known of it, from the tree that `Optimizer.transform` is given.
    """
    inside = tuple(i for i, axis in enumerate(param.axes) if axis not in STACKED)
    return jnp.sqrt(jnp.sum(jnp.square(x.astype(jnp.float32)), axis=inside, keepdims=True))


def decay_mask(params: Params, patterns: tuple[str, ...] = MATRICES) -> Params:
    """True for the parameters that decay: at least two axes, and a name that fits one of `patterns`."""

    def decays(path: tuple[Any, ...], leaf: Any) -> bool:
        name = str(getattr(path[-1], "key", path[-1]))
        return jnp.ndim(leaf) >= 2 and any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)

    return jax.tree_util.tree_map_with_path(decays, params)


def _cosine(n: Array, warmup: float, steps: float, final: float) -> Array:
    return final + (1.0 - final) * 0.5 * (1.0 + jnp.cos(jnp.pi * _progress(n, warmup, steps)))


def _linear(n: Array, warmup: float, steps: float, final: float) -> Array:
    return 1.0 - (1.0 - final) * _progress(n, warmup, steps)


def _constant(n: Array, warmup: float, steps: float, final: float) -> Array:
    return jnp.ones_like(n)


def _rsqrt(n: Array, warmup: float, steps: float, final: float) -> Array:
    # Equal to the peak where the warm-up ends, then falling as 1/sqrt(n) (Shazeer and Stern 2018).
    return jnp.sqrt(max(warmup, 1.0) / n)


def _progress(n: Array, warmup: float, steps: float) -> Array:
    return jnp.clip((n - warmup) / max(steps - warmup, 1.0), 0.0, 1.0)


# name -> share of the peak at update n (from 1), once the warm-up is over.
SCHEDULES: dict[str, Callable[[Array, float, float, float], Array]] = {
    "cosine": _cosine,
    "linear": _linear,
    "constant": _constant,
    "rsqrt": _rsqrt,
}
