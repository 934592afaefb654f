"""Routers: tokens -> logits, always in float32.

Router precision changes who is chosen: with 64 experts, bfloat16 logits change the chosen set of 2 % of the tokens. So inputs,
weights and products are float32 at the highest matmul precision whatever the model computes in.
"""

from typing import Any, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from moejax.core.context import Context
from moejax.core.errors import ConfigError
from moejax.core.registry import Registry

routers = Registry("router", "moejax.routing.routers", role="routers")


@runtime_checkable
class Router(Protocol):
    """`router(x[g, n, d], ctx) -> logits[g, n, o]` with o = num_experts * outputs_per_expert; ctx is regrouped like x.

    A router with a field `null_outputs` gives that many logits more, after those of the experts.
    """

    num_experts: int
    outputs_per_expert: int

    def __call__(self, x: Float[Array, "g n d"], ctx: Context) -> Float[Array, "g n o"]: ...


def check_num_experts(router: Any, bank: Any) -> None:
    """A router and a bank must agree on the number of experts."""
    ours, theirs = getattr(router, "num_experts", None), getattr(bank, "num_experts", None)
    if ours is not None and theirs is not None and ours != theirs:
        raise ConfigError(f"router.num_experts={ours} but bank.num_experts={theirs}; give both the same number")


def with_null_outputs(router: Any, num_null: int) -> Any:
    """The router with a logit for each null expert of a select rule; as it is where it has no such field, or enough."""
    if not num_null or getattr(router, "null_outputs", None) != 0:
        return router
    return router.clone(null_outputs=num_null)


def float32_dot(x: Float[Array, "g n d"], w: Float[Array, "d o"]) -> Float[Array, "g n o"]:
    return jnp.einsum("gnd,do->gno", x, w.astype(jnp.float32), precision=jax.lax.Precision.HIGHEST)
