"""Losses on routing: pure functions of a layer's `Routing`, weighted by their own `coef` and sown once by the layer.

    @dataclasses.dataclass(frozen=True)
    class LogitSize(Loss):                                  # sown as 'logit_size_loss', registered or not
        def cost(self, routing):
            return masked_mean(jnp.abs(routing.logits).mean(-1), routing.valid, (0, 1))

    layer = MoE(..., losses=(LogitSize(1e-3),))

A batch may be cut into microbatches. A loss that is a mean over tokens is that of the whole batch by itself; one that looks at the
batch as a whole (a product of means, say) takes them by `batch_mean`, or sums by `moejax.core.batch_sum`.

Published balance losses differ by a factor of k and in what they average over. Here both are explicit, and the scale is fixed:
the balance loss is `coef` times 1 under uniform routing and `coef` times e when one expert takes everything, for every k.
"""

import dataclasses
import re

import jax
import jax.numpy as jnp
from flax import struct
from jaxtyping import Array, Bool, Float

from moejax.core.errors import ConfigError
from moejax.core.fields import check
from moejax.core.registry import Registry
from moejax.core.sowing import batch_sum
from moejax.routing.plan import Plan

losses = Registry("loss", "moejax.routing.losses")


@struct.dataclass
class Routing:
    """What a layer decided, for losses and statistics.

    Attributes:
      logits: the router's output, float32.
      probs: each token's distribution over experts, rows summing to 1.
      plan: the plan that was executed.
      valid: False for padding.
      earlier: of losses over all layers, what the routed layers below saw of each token, summed: how often it wanted each expert, its
        probabilities, and how many layers there were. None where nothing carries it from layer to layer.
    """

    logits: Float[Array, "g n o"]
    probs: Float[Array, "g n e"]
    plan: Plan
    valid: Bool[Array, "g n"]
    earlier: tuple[Float[Array, "g n e"], Float[Array, "g n e"], Float[Array, "g n 1"]] | None = None

    def clean(self) -> "Routing":
        """The same with zeros for the logits and probabilities of padding."""
        logits, probs = (jnp.where(self.valid[..., None], values, 0) for values in (self.logits, self.probs))
        return self.replace(logits=logits, probs=probs)

    def so_far(self) -> tuple[Float[Array, "g n e"], Float[Array, "g n e"], Float[Array, "g n 1"]]:
        """What this layer saw of each valid token, added to what those below it did: `earlier` of the next one."""
        wanted, one = jax.lax.stop_gradient(self.plan.wanted()), self.valid[..., None]
        own = tuple(jnp.where(one, values, 0) for values in (wanted, self.probs, one.astype(jnp.float32)))
        return own if self.earlier is None else tuple(map(jnp.add, self.earlier, own))


@dataclasses.dataclass(frozen=True)
class Loss:
    """What a layer adds to the objective about its routing. A loss writes `cost`; here it is weighted.

    Attributes:
      coef: weight; may be negative.
    """

    coef: float = 1.0

    @property
    def over_layers(self) -> bool:
        """Whether it looks at `Routing.earlier`."""
        return False

    def __post_init__(self) -> None:
        check(type(self), vars(self))  # of one's own loss too, which no registry knows

    def __call__(self, routing: Routing) -> Float[Array, ""]:
        """The weighted scalar. What lies in padding, NaN included, touches neither it nor its gradient."""
        return self.coef * self.cost(routing.clean())

    def cost(self, routing: Routing) -> Float[Array, ""]:
        """The scalar before it is weighted. Logits and probabilities of padding are zeros; means are over valid tokens."""
        raise NotImplementedError(f"{type(self).__name__}.cost")

    @property
    def kind(self) -> str:
        """The name under which its class is registered, or else the class's own in snake case."""
        try:
            return losses.kind_of(self)
        except ConfigError:
            return re.sub(r"(?<=[a-z0-9])(?=[A-Z])|(?<=[A-Z])(?=[A-Z][a-z])", "_", type(self).__name__).lower()

    @property
    def name(self) -> str:
        """What it is called where it is sown: '<kind>_loss'. NNX keeps losses and statistics in one namespace, and there 'z' is one."""
        return self.kind if self.kind.endswith("_loss") else f"{self.kind}_loss"


def masked_mean(values: Float[Array, "g n *e"], valid: Bool[Array, "g n"], axes: tuple[int, ...]) -> Array:
    """Mean over the valid tokens along `axes` (group and token axes only); 0 where there are none."""
    mask = valid.reshape(*valid.shape, *(1,) * (values.ndim - 2))
    return jnp.where(mask, values, 0).sum(axes) / jnp.maximum(mask.sum(axes), 1)


def batch_mean(values: Float[Array, "g n *e"], valid: Bool[Array, "g n"]) -> Array:
    """Mean over the valid tokens of the whole batch, whatever microbatches it was cut into; 0 where there are none.

    For what is not averaged afterwards: a product or a power of means. A loss that is itself a mean over tokens takes `masked_mean`.
    """
    mask = valid.reshape(*valid.shape, *(1,) * (values.ndim - 2))
    return batch_sum(jnp.where(mask, values, 0).sum((0, 1))) / jnp.maximum(batch_sum(valid.sum()), 1)


def mean_of_groups(values: Float[Array, "g"], valid: Bool[Array, "g n"]) -> Float[Array, ""]:
    """Mean over groups, which count by their number of valid tokens: an empty group counts nothing."""
    tokens = valid.sum(1)
    return (jnp.where(tokens > 0, values, 0) * tokens).sum() / jnp.maximum(tokens.sum(), 1)
