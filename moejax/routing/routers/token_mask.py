"""A router under which a token sees only some of the experts, by its id (MaskMoE, Su et al. 2024)."""

from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax.core import FrozenDict
from jaxtyping import Array, Bool, Float, Int

from moejax.core.context import Context
from moejax.core.errors import ConfigError
from moejax.core.fields import Count, Fraction, NonNegative, Seed
from moejax.core.layer import RowWise
from moejax.routing.routers.base import AnyRouter, Router, routers, told

# Nobody's choice: a probability of exactly 0, and finite, so that no loss or statistic meets an infinity.
_NEVER = -1e9


@routers.register("token_mask", slots={"router": routers})
class TokenMask(Router, RowWise):
    """`logits = router(x) + m_v`, where `m_v` is 0 for the experts that vocabulary item v may use and -1e9 for all others.

    An item's experts are drawn before training, uniformly and without replacement, in every layer anew, and never change: one for
    a rare item, which is then hashed and trains one expert, and several for a frequent one, among which the router chooses by
    context. Where an item has one, `top_k` with k=1 gives it the weight 1, and its tokens send no gradient to the router, neither
    through the output nor through a balance loss, which sees the masked probabilities.

    Null experts are never masked. A rule that makes more choices than an item has experts wastes the others: their weight is 0.

    Attributes:
      num_experts: e.
      router: the router whose logits are masked.
      frequencies: how often each id occurs in the training data; may be a recipe, `{'from_data': 'token_frequencies'}` (see
        `moejax.data.computed`). Until it is counted, as in a model that is only traced, all ids are frequent.
      head: share of all occurrences that the frequent ids cover: by descending frequency, ids are frequent until they do.
      head_experts: experts of a frequent id; with e, the router alone decides.
      tail_experts: experts of any other id.
      seed: of the draw.

    Raises:
      ConfigError: a number of experts outside of 1 .. num_experts, a share outside of 0 .. 1, or no token ids in the context.
    """

    router: AnyRouter
    frequencies: tuple[NonNegative, ...] | Mapping[str, Any]
    head: Fraction = 0.8
    head_experts: Count = 8
    tail_experts: Count = 1
    seed: Seed = 0

    def __post_init__(self) -> None:
        for name in ("head_experts", "tail_experts"):
            if getattr(self, name) > self.num_experts:
                raise ConfigError(f"{name}={getattr(self, name)} exceeds num_experts={self.num_experts}")
        if isinstance(self.frequencies, dict):
            object.__setattr__(self, "frequencies", FrozenDict(self.frequencies))  # modules are hashed
        object.__setattr__(self, "router", told(self.router, self.outputs))
        super().__post_init__()

    @nn.compact
    def __call__(self, x: Float[Array, "g n d"], ctx: Context) -> Float[Array, "g n o"]:
        each, null = self.outputs
        visible = jnp.pad(jnp.repeat(self.visible(ctx), each, axis=-1), ((0, 0), (0, 0), (0, null)), constant_values=True)
        return jnp.where(visible, self.router(x, ctx), _NEVER)

    def visible(self, ctx: Context) -> Bool[Array, "g n e"]:
        """The experts that each token may use."""
        if ctx.token_ids is None:
            raise ConfigError("the router 'token_mask' needs the context's token ids; models of tokens give them")
        if isinstance(self.frequencies, tuple):
            frequent = is_frequent(self.frequencies, self.head)
            many = jnp.asarray(np.where(frequent, self.head_experts, self.tail_experts))[ctx.token_ids]
        else:
            many = jnp.full(ctx.token_ids.shape, self.head_experts)
        layer = jax.random.fold_in(jax.random.key(self.seed), 0 if ctx.layer is None else ctx.layer)

        def places(token: Int[Array, ""]) -> Int[Array, "e"]:
            return jax.random.permutation(jax.random.fold_in(layer, token), self.num_experts)

        return jax.vmap(jax.vmap(places))(ctx.token_ids) < many[..., None]


def is_frequent(frequencies: tuple[float, ...], head: float) -> Bool[np.ndarray, "v"]:
    """The fewest ids that cover the share `head` of all occurrences; of equally frequent ones, the lower."""
    counts = np.asarray(frequencies, float)
    order = np.argsort(-counts, kind="stable")
    before = np.cumsum(counts[order]) - counts[order]
    frequent = np.zeros(len(counts), bool)
    frequent[order] = before < head * counts.sum()
    return frequent
