"""Soft slots: every slot averages all tokens, every token averages all slots (Soft MoE, Puigcerver et al. 2023)."""

import dataclasses
from typing import Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from moejax.core.context import Context
from moejax.core.fields import Count
from moejax.routing.plan import SlotPlan
from moejax.routing.select.base import Select, selects


@selects.register("soft_slots")
@dataclasses.dataclass(frozen=True)
class SoftSlots(Select):
    """Dispatch is a softmax over the tokens of a group, combine a softmax over all slots of all experts.

    The router gives `slots` logits per expert: `logits[g, n, e * slots]`, expert-major. Fully differentiable, nothing is
    selected or dropped, and nothing is causal. Invalid tokens enter no slot and get a zero output.

    Attributes:
      slots: slots per expert.
      dispatch: 'soft', or 'uniform' to average all tokens in every slot (the paper's ablation).
      combine: 'soft', or 'uniform' to average all slots in every token.
    """

    slots: Count = 1
    dispatch: Literal["soft", "uniform"] = "soft"
    combine: Literal["soft", "uniform"] = "soft"

    @property
    def outputs_per_expert(self) -> int:
        return self.slots

    def plan(self, logits: Float[Array, "g n es"], ctx: Context, bias: Float[Array, "es"] | None) -> SlotPlan:
        g, n, _ = logits.shape
        real = ctx.real(logits)[..., None]
        if bias is not None:
            logits = logits + bias
        into = logits if self.dispatch == "soft" else jnp.zeros_like(logits)
        out = logits if self.combine == "soft" else jnp.zeros_like(logits)
        # A finite floor rather than -inf: a group without any valid token must not give NaN.
        dispatch = jnp.where(real, jax.nn.softmax(jnp.where(real, into, -1e30), axis=1), 0)
        combine = jnp.where(real, jax.nn.softmax(out, axis=2), 0)
        return SlotPlan(dispatch.reshape(g, n, -1, self.slots), combine.reshape(g, n, -1, self.slots))

    def probabilities(self, logits: Float[Array, "g n es"]) -> Float[Array, "g n e"]:
        g, n, _ = logits.shape
        return jax.nn.softmax(logits, axis=-1).reshape(g, n, -1, self.slots).sum(-1)
