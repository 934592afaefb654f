"""MultiHash layers (Roller et al. 2021, section 3.3): several hashes, each of which picks a piece of the feed-forward network."""

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from moejax.core.context import Context
from moejax.core.errors import ConfigError
from moejax.core.fields import Count, Few
from moejax.core.layer import RowWise
from moejax.core.params import param, per_expert
from moejax.dispatch import Backend
from moejax.dispatch.experts import Experts
from moejax.dispatch.layout import Layout
from moejax.experts.registry import Activation, activation
from moejax.layers.registry import ffns
from moejax.layers.routed import run_plan, sow_routing
from moejax.routing.losses.base import Routing
from moejax.routing.plan import TokenPlan, dropless
from moejax.routing.routers.hash import Hash, as_logits

_INIT = per_expert(nn.initializers.lecun_normal())
_AXES = ("expert", "embed", "mlp"), ("expert", "mlp", "embed")


@ffns.register("multi_hash")
class MultiHash(RowWise):
    """`v = act([A_1 h, ..., A_N h])`, `y = [B_1 v, ..., B_N v]`, in which hash i of the token picks `A_i[d, f/N]` and `B_i[f, d/N]`
    among `num_experts`: the parameters and the compute of a hash layer, and `num_experts ** N` different networks.

    Attributes:
      num_experts: e, pieces that each hash picks from.
      hidden: f; a multiple of `hashes`, as the width is.
      hashes: N random hashes of the token's id.
      seed: of the first hash; the others follow.
      activation: a name of `moejax.experts.ACTIVATIONS`.
      backend: of dispatch; 'auto' or a name.
    """

    num_experts: Count
    hidden: Count
    hashes: Few = 2
    seed: int = 0
    activation: Activation = "relu"
    backend: Backend = "auto"

    @nn.compact
    def __call__(self, x: Float[Array, "b s d"], ctx: Context | None = None) -> Float[Array, "b s d"]:
        ctx = ctx or Context()
        ctx.fit(x)
        for name, size in (("hidden", self.hidden), ("width", x.shape[-1])):
            if size % self.hashes:
                raise ConfigError(
                    f"hashes={self.hashes} does not divide the {name} {size} of {'/'.join(self.path) or 'multi_hash'}"
                )
        expert = jnp.stack(
            [Hash(self.num_experts, seed=self.seed + i, parent=None).expert(ctx) for i in range(self.hashes)], -1
        )
        x, valid = ctx.clean(x), ctx.real(x)
        used = jnp.broadcast_to(valid[..., None], expert.shape)
        plan = dropless(expert, jnp.ones(expert.shape), used, self.num_experts)
        pieces = Pieces(x.shape[-1], self.hidden, self.num_experts, self.hashes, name="bank")
        v, executed, backend = self._run(plan, pieces.into(), x)
        y, _, _ = self._run(plan, pieces.out_of(), activation(self.activation)(v))
        logits = as_logits(expert, self.num_experts)
        sow_routing(self, Routing(logits, jax.nn.softmax(logits), executed, valid), (), backend=backend)
        return y.astype(x.dtype)

    def _run(self, plan: TokenPlan, pieces: list[Experts], x: Float[Array, "b s d"]) -> tuple[Array, TokenPlan, Array]:
        """The hashes' pieces side by side, the plan that was executed, and the backend."""
        outputs, used, dropped = [], [], []
        for i in range(self.hashes):
            own = plan.replace(
                **{leaf: getattr(plan, leaf)[..., i : i + 1] for leaf in ("expert", "weight", "used", "dropped")}
            )
            y, ran, backend = run_plan(own, pieces[i], x, self.backend)
            outputs.append(y)
            used.append(ran.used)
            dropped.append(ran.dropped)
        ran = plan.replace(used=jnp.concatenate(used, -1), dropped=jnp.concatenate(dropped, -1))
        return jnp.concatenate(outputs, -1), ran, backend

    def active_fraction(self) -> float:
        """Share of the pieces that a token uses."""
        return 1 / self.num_experts


class Pieces(nn.Module):
    """`A_i` and `B_i` of all hashes; each is a bank of linear maps."""

    width: int
    hidden: Count
    num_experts: Count
    hashes: Few

    def setup(self) -> None:
        shapes = (self.width, self.hidden // self.hashes), (self.hidden, self.width // self.hashes)
        self.a, self.b = (
            [param(self, f"{name}_{i}", _INIT, (self.num_experts, *shape), axes) for i in range(self.hashes)]
            for name, shape, axes in zip(("w_in", "w_out"), shapes, _AXES, strict=True)
        )

    def into(self) -> list[Experts]:
        return [Experts(_linear, w, _AXES[0]) for w in self.a]

    def out_of(self) -> list[Experts]:
        return [Experts(_linear, w, _AXES[1]) for w in self.b]


def _linear(w: Array, x: Array, layout: Layout) -> Array:
    return layout.dot(x, w)
