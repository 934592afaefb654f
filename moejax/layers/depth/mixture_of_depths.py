"""Mixture-of-depths (Raposo et al. 2024): a block processes a fixed share of the tokens, the rest pass by the residual."""

from typing import Annotated, Literal

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Shaped

from moejax.core.context import Context
from moejax.core.errors import ConfigError
from moejax.core.fields import Count, In
from moejax.core.initializers.usual import FanIn
from moejax.core.layer import Layer
from moejax.core.params import param
from moejax.core.registry import Given
from moejax.core.sowing import sow, sow_loss
from moejax.dispatch.backends import gather_tokens, scatter_tokens
from moejax.layers.registry import blocks
from moejax.layers.routed import sow_routing
from moejax.routing.losses.base import Routing, masked_mean
from moejax.routing.plan import ExpertPlan
from moejax.routing.routers.base import AnyRouter, ask, routers
from moejax.routing.routers.linear import Linear
from moejax.routing.select import ExpertChoice

GATES = {"raw": lambda r: r, "sigmoid": jax.nn.sigmoid, "one": jnp.ones_like}


@blocks.register("mixture_of_depths", slots={"block": blocks, "router": Given(routers, {"num_experts": 1})})
class MixtureOfDepths(Layer):
    """`y_t = x_t + gate(r_t) f(x_R)_t` for the tokens R with the largest router weights r, `y_t = x_t` for the others.

    f is the residual branch of `block`, which sees only the chosen tokens, in order, at their original positions. Choosing over the
    sequence looks ahead, so a decoder needs one of the paper's remedies: at inference a token goes through the block when a
    causal rule says so.

    Attributes:
      block: any block `x[b, s, d] -> [b, s, d]` with its residual inside.
      capacity_factor: share of a sequence's tokens that the block processes, as in `ExpertChoice` with one expert (the paper's best:
        0.125, every other block).
      remedy: 'predictor' trains a small network on the token alone to predict whether it is chosen; 'router' trains the router's
        own sigmoid to say so (and so touches the language loss); None has no causal rule and is refused in a decoder.
      remedy_coef: weight of the remedy's binary cross-entropy.
      gate: 'raw' multiplies by r, as the paper does; 'sigmoid' by its sigmoid (many ports); 'one' by nothing.
      router: one logit a token; linear if left out. `random` is the paper's control.
      eval_select: outside training, in a model that is causal, 'causal' decides by the remedy; 'top_k' as in training, which leaks and is
        only for measuring the leak. An encoder has no future to leak, and always decides as in training.
      causal: whether the model is. Filled in by the model.
      predictor_hidden: width of the predictor's hidden layer.
    """

    block: nn.Module
    capacity_factor: Annotated[float, In(above=0, most=1)] = 0.125
    remedy: Literal["predictor", "router"] | None = "predictor"
    remedy_coef: float = 0.01
    gate: Literal["raw", "sigmoid", "one"] = "raw"
    router: AnyRouter | None = None
    eval_select: Literal["causal", "top_k"] = "causal"
    predictor_hidden: Count = 64
    causal: bool = True

    @nn.compact
    def __call__(self, x: Float[Array, "b s d"], ctx: Context | None = None) -> Float[Array, "b s d"]:
        ctx = ctx or Context()
        b, s, _ = ctx.fit(x)
        if ctx.positions is None:
            ctx = ctx.replace(positions=jnp.broadcast_to(jnp.arange(s), (b, s)))
        valid = ctx.real(x)
        router = Linear(1, init_w=FanIn(), name="router") if self.router is None else self.router
        r = ask(router, x, ctx)
        causal = self.causal and self.eval_select == "causal" and self.remedy is not None and not ctx.train
        top_k = ExpertChoice(self.capacity_factor, score="logit", in_order=True)(r, ctx)
        chosen = top_k.assigned()[..., 0] > 0
        predicted = self._predict(ctx.clean(x), r) if self.remedy is not None else None
        if predicted is not None:
            self._sow_remedy(predicted, chosen, valid)
        if causal or ctx.decode:
            if predicted is None:
                raise ConfigError(f"{'/'.join(self.path)} decodes without a causal rule; set remedy='predictor'")
            y, plan = self._masked(x, r, (predicted > 0) & valid, ctx)
        else:
            y, plan = self._chosen(x, top_k, ctx), top_k
        sow_routing(self, Routing(r, jnp.ones_like(r), plan, valid), ())
        return y

    def _chosen(self, x: Float[Array, "b s d"], plan: ExpertPlan, ctx: Context) -> Float[Array, "b s d"]:
        """The block on the plan's tokens alone: costs `capacity_factor` of the block (less in attention)."""
        rows = gather_tokens(plan, x)[:, 0]
        inner = ctx.map_tokens(lambda a: gather_tokens(plan, a)[:, 0], lambda new, old: _put_back(plan, new, old))
        inner = inner.replace(valid=plan.used[:, 0])
        branch = self.block(rows, inner) - rows
        plan = plan.replace(weight=GATES[self.gate](plan.weight))
        return x + scatter_tokens(plan, branch[:, None])

    def _masked(
        self, x: Float[Array, "b s d"], r: Float[Array, "b s 1"], used: Bool[Array, "b s"], ctx: Context
    ) -> tuple[Float[Array, "b s d"], ExpertPlan]:
        """The block on all tokens, with those not used invisible to the others: any number may be used."""
        inner = ctx.map_tokens(lambda a: a, lambda new, old: _where(used, new, old)).replace(valid=used)
        branch = self.block(x, inner) - x
        weight = jnp.where(used[..., None], GATES[self.gate](r), 0).astype(x.dtype)
        everyone = jnp.broadcast_to(jnp.arange(x.shape[1], dtype=jnp.int32), used.shape)[:, None]
        plan = ExpertPlan(everyone, r.swapaxes(1, 2), used[:, None], num_tokens=x.shape[1])
        return x + jnp.where(used[..., None], branch, 0) * weight, plan

    def _predict(self, x: Float[Array, "b s d"], r: Float[Array, "b s 1"]) -> Float[Array, "b s"]:
        """Logit of a token being chosen, from the token alone."""
        if self.remedy == "router":
            return r[..., 0]
        x = jax.lax.stop_gradient(x).astype(jnp.float32)
        init = nn.initializers.lecun_normal()
        hidden = x @ param(self, "predictor_in", init, (x.shape[-1], self.predictor_hidden), ("embed", None))
        return (jax.nn.relu(hidden) @ param(self, "predictor_out", init, (self.predictor_hidden, 1), (None, None)))[..., 0]

    def _sow_remedy(self, predicted: Float[Array, "b s"], chosen: Bool[Array, "b s"], valid: Bool[Array, "b s"]) -> None:
        """Binary cross-entropy of predicting the top-k choice, and how often the prediction is right."""
        target = chosen.astype(jnp.float32)
        cross_entropy = jax.nn.softplus(predicted) - target * predicted
        cost = self.remedy_coef * masked_mean(cross_entropy, valid, (0, 1))
        sow_loss(self, "remedy_loss", lambda: cost, valid.sum())
        right = ((predicted > 0) == chosen).astype(jnp.float32)
        sow(self, "stats", "predictor_accuracy", masked_mean(right, valid, (0, 1)))

    def check_causal(self, where: str) -> None:
        """Raises ConfigError without a remedy."""
        if self.remedy is None:
            raise ConfigError(
                f"{where}.remedy=None: mixture-of-depths selects over later tokens; set remedy='predictor' or 'router'"
            )

    def decodable(self) -> str | None:
        """None if decoding one token at a time gives the plan of a whole forward pass; else the reason why not."""
        if self.eval_select == "top_k":
            return "eval_select='top_k' selects over the whole sequence; set eval_select='causal'"
        return None


def _put_back(plan: ExpertPlan, new: Shaped[Array, "b c *d"], old: Shaped[Array, "b s *d"]) -> Shaped[Array, "b s *d"]:
    """`old` with the rows of the chosen tokens replaced."""
    token = jnp.where(plan.used[:, 0], plan.token[:, 0], old.shape[1])  # out of bounds: not written
    return old.at[jnp.arange(old.shape[0])[:, None], token].set(new, mode="drop")


def _where(used: Bool[Array, "b s"], new: Shaped[Array, "b s *d"], old: Shaped[Array, "b s *d"]) -> Shaped[Array, "b s *d"]:
    return jnp.where(used.reshape(*used.shape, *(1,) * (old.ndim - 2)), new, old)
