"""Mixture-of-head attention (MoH, Jin et al. 2024): the heads of an attention layer are experts, and tokens choose among them."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from moejax.core.context import Context
from moejax.core.errors import ConfigError
from moejax.core.fields import Whole
from moejax.core.registry import Many
from moejax.layers.mixers.attention import INITS, Attention
from moejax.layers.registry import mixers
from moejax.layers.routed import plan_tokens, sow_routing
from moejax.routing.losses.base import Loss, Routing, losses
from moejax.routing.routers.base import AnyRouter, ask, routers, told
from moejax.routing.routers.linear import Linear
from moejax.routing.select import Select, TopK, selects


class RoutedHeads(Attention):
    """Attention whose head outputs are multiplied by gates: `y_t = sum_i g_ti H_ti W_i`. The first heads are shared, never routed.

    All heads are computed: what could be saved, the queries of heads that are off, no dense kernel saves. With grouped
    key-value heads the query heads are routed, and a group's keys and values serve whoever is on.

    Attributes:
      shared_heads: h_s, heads that are always on: the first ones.
      select: which of the other heads a token takes, and with which weight.
      losses: on the routing of these heads.

    Subclasses give `_gates`.
    """

    shared_heads: Whole = 0
    select: Select = TopK(k=1)
    losses: tuple[Loss, ...] = ()

    def __post_init__(self) -> None:
        if self.shared_heads >= self.num_heads:
            raise ConfigError(f"shared_heads={self.shared_heads} must be less than num_heads={self.num_heads}")
        self.select.check_num_experts(self.num_heads - self.shared_heads)
        super().__post_init__()

    def _weigh(
        self, y: Float[Array, "b s h c"], x: Float[Array, "b s d"], q: Float[Array, "b s h c"], ctx: Context
    ) -> Float[Array, "b s h c"]:
        gates = self._gates(x, q, ctx)
        return y * gates[..., None].astype(y.dtype)

    def _route(self, logits: Float[Array, "b s e"], ctx: Context) -> tuple[Float[Array, "b s e"], Routing]:
        """The combine matrix of the routed heads; sows its losses and statistics."""
        routing = plan_tokens(self, logits, self.select, self.num_heads - self.shared_heads, ctx)
        sow_routing(self, routing, self.losses)
        return routing.plan.dense(), routing

    def check_causal(self, where: str) -> None:
        """Raises ConfigError if the attention, or the choice of heads, looks at later tokens."""
        super().check_causal(where)
        if not self.select.causal:
            raise ConfigError(
                f"{where}.select ({type(self.select).__name__}) selects over later tokens and leaks the future in a decoder; "
                "take a dropless rule"
            )

    def decodable(self) -> str | None:
        """None if decoding one token at a time gives the plan of a whole forward pass; else the reason why not."""
        return (
            super().decodable()
            if self.select.per_token
            else f"{type(self.select).__name__} plans several tokens together at inference"
        )


@mixers.register("mixture_of_heads", slots={**INITS, "router": routers, "select": selects, "losses": Many(losses)})
class MixtureOfHeads(RoutedHeads):
    """Gates from the attention's input: `g = concat(a_1 s, a_2 r)`.

    r is the plan of `select` over the router's logits, s = h_s softmax(W_s x) weighs the shared heads against each other and
    (a_1, a_2) = 2 softmax(W_h x) the two groups. With `TopK(k, normalise=True, scale=k)` the mean of every factor is 1 at the
    start, as in the paper's code, and the layer starts close to plain attention; the paper's equations lack these factors.

    Its balance loss, `E^2 mean_i(P_i f_i)`, is `Balance(coef, share='tokens', over='batch')`.

    Attributes:
      router: gives one logit for each routed head; a bias-free linear one by default.
      two_stage: False leaves a_1 and a_2 out, the paper's ablation.
    """

    router: AnyRouter | None = None
    two_stage: bool = True

    def __post_init__(self) -> None:
        routed = self.num_heads - self.shared_heads
        given = getattr(self.router, "num_experts", routed)
        if given != routed:
            raise ConfigError(
                f"router.num_experts={given}, but num_heads={self.num_heads} - shared_heads={self.shared_heads} leaves {routed} "
                "heads to route; set it to that"
            )
        object.__setattr__(self, "router", told(self.router, self.select.outputs))
        super().__post_init__()

    def _gates(self, x: Float[Array, "b s d"], q: Float[Array, "b s h c"], ctx: Context) -> Float[Array, "b s h"]:
        x, routed = ctx.clean(x), self.num_heads - self.shared_heads
        router = Linear(routed, outputs=self.select.outputs, name="router") if self.router is None else self.router
        r, _ = self._route(ask(router, x, ctx), ctx)
        if not self.shared_heads:
            return r
        s = self.shared_heads * jax.nn.softmax(Linear(self.shared_heads, name="shared_router")(x, ctx), axis=-1)
        if self.two_stage:
            a = 2 * jax.nn.softmax(Linear(2, name="stage_router")(x, ctx), axis=-1)
            s, r = a[..., :1] * s, a[..., 1:] * r
        return jnp.concatenate([s, r], axis=-1)


@mixers.register("query_norm_heads", slots={**INITS, "select": selects, "losses": Many(losses)})
class QueryNormHeads(RoutedHeads):
    """Gates without parameters, for continued training of a model that has none: a token takes the heads with the longest queries.

    The logits are the norms of the routed heads' queries before rotary positions, divided by their standard deviation over these
    heads (the unbiased one, as in the release). Gates are binary, shared heads 1, so that outputs keep the scale that the model was
    trained with; the gradient passes as if each gate were its weight in the plan (straight-through).
    """

    def _gates(self, x: Float[Array, "b s d"], q: Float[Array, "b s h c"], ctx: Context) -> Float[Array, "b s h"]:
        squared = jnp.square(q[:, :, self.shared_heads :].astype(jnp.float32)).sum(-1)
        norms = jnp.sqrt(squared + 1e-12)  # whose derivative is finite at 0
        variance = norms.var(-1, ddof=min(1, norms.shape[-1] - 1), keepdims=True)
        weight, routing = self._route(norms / jnp.sqrt(variance + 1e-12), ctx)
        taken = jax.lax.stop_gradient(routing.plan.assigned() - weight) + weight
        return jnp.concatenate([jnp.ones((*taken.shape[:2], self.shared_heads)), taken], axis=-1)
