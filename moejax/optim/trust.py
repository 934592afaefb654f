"""Trust ratios: each layer moves by a share of its own length (You et al. 2017 and 2020)."""

import dataclasses
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array

from moejax.core.errors import ConfigError
from moejax.core.fields import NonNegative, Positive
from moejax.core.roles import Parameter
from moejax.optim.base import MATRICES, STACKED, Optimizer, Params, decay_mask, slice_norm


class TrustState(NamedTuple):
    """Attributes:
    from_zero: a tree like the parameters: for each slice, whether it began as zeros.
    """

    from_zero: Any


@dataclasses.dataclass(frozen=True, kw_only=True)
class Trusting(Optimizer):
    """What LAMB and LARS share: an update u of a tensor w becomes `phi(|w|) / |u| * u`.

    A tensor is *one* layer's and *one* expert's: of a stack over layers or experts each slice has its own ratio. It is 1 where w or u
    is zero. It is also 1, for good, where w began as zeros (a router, the second factor of LoRA): after one step |w| is tiny, and a
    ratio would keep it so.

    Attributes:
      adapted: patterns of the names of tensors that have a ratio; others (biases, norms) move by u. As `decay`.
      lowest, highest: phi(z) lies between these; None for no bound.
      largest: bound of the ratio itself, for experts whose gradient is noise; None for none.
      norm: what |.| is: 'l1', 'l2' or the 'max' of the absolute values.
      from_zero: whether tensors that begin as zeros have a ratio of 1 for good. If not, only in the first update.

    Raises:
      ConfigError: an unknown norm, or bounds that leave nothing.
    """

    adapted: tuple[str, ...] = MATRICES
    lowest: NonNegative = 0.0
    highest: Positive | None = None
    largest: Positive | None = None
    norm: Literal["l1", "l2", "max"] = "l2"
    from_zero: bool = True

    def __post_init__(self):
        super().__post_init__()
        if self.highest is not None and self.highest <= self.lowest:
            raise ConfigError(f"lowest={self.lowest} and highest={self.highest} of optimizer must bound the length of a tensor")

    def trusted(self, params: Params | None = None) -> optax.GradientTransformation:
        """Multiplies each slice of the updates by its ratio; `params` as for `transform`. Comes after what |u| is to hold."""

        def described(weights: Params) -> Params:
            return params or jax.tree.map(lambda w: Parameter((), w.shape, (None,) * w.ndim), weights)

        def init(weights: Params) -> TrustState:
            zero = jax.tree.map(lambda w, p: slice_norm(w, p) == 0, weights, described(weights))
            return TrustState(zero)

        def update(updates: Params, state: TrustState, weights: Params | None = None) -> tuple[Params, TrustState]:
            def scaled(u: Array, w: Array, adapts: bool, zero: Array, p: Parameter) -> Array:
                return (self._ratio(w, u, zero, p) * u.astype(jnp.float32)).astype(u.dtype) if adapts else u

            adapts = decay_mask(weights, self.adapted)
            return jax.tree.map(scaled, updates, weights, adapts, state.from_zero, described(weights)), state

        return optax.GradientTransformation(init, update)

    def _ratio(self, w: Array, u: Array, zero: Array, param: Parameter) -> Array:
        length, step = self._length(w, param), self._length(u, param)
        none = (length == 0) | (step == 0) | (zero if self.from_zero else False)
        ratio = jnp.clip(length, self.lowest, self.highest) / jnp.where(step == 0, 1.0, step)
        return jnp.where(none, 1.0, ratio if self.largest is None else jnp.minimum(ratio, self.largest))

    def _length(self, x: Array, param: Parameter) -> Array:
        if self.norm == "l2":
            return slice_norm(x, param)
        inside = tuple(i for i, axis in enumerate(param.axes) if axis not in STACKED)
        reduce = jnp.sum if self.norm == "l1" else jnp.max
        return reduce(jnp.abs(x.astype(jnp.float32)), axis=inside, keepdims=True)
