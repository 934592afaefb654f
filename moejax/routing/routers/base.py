"""Routers: tokens -> logits, always in float32.

Router precision changes who is chosen: with 64 experts, bfloat16 logits change the chosen set of 2 % of the tokens. So inputs,
weights and products are float32 at the highest matmul precision whatever the model computes in.
"""

import dataclasses
from typing import Any, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from moejax.core.context import Context
from moejax.core.errors import ConfigError
from moejax.core.fields import Count, Whole
from moejax.core.layer import Layer
from moejax.core.registry import Registry

routers = Registry("router", "moejax.routing.routers", role="routers")


class Router(Layer):
    """`router(x[g, n, d], ctx) -> logits[g, n, o]` with `o = self.num_outputs`; ctx is regrouped like x.

    How many logits a token gets is the select rule's business: one for each expert, or several, and some more for null experts. The
    layer tells the router, and a router that gives as many serves every rule. One that looks at each token alone also derives
    from `RowWise`; any other one answers for itself whether it is causal and decodable (see `moejax.core.layer`).

        class Tempered(Router, RowWise):
            temperature: float = 2.0

            @nn.compact
            def __call__(self, x, ctx):
                return nn.Dense(self.num_outputs)(x.astype(jnp.float32)) / self.temperature

    Attributes:
      num_experts: e.
      outputs: logits of each expert, and those of null experts after them; the layer fills in what its select rule asks for.
    """

    num_experts: Count
    outputs: tuple[Count, Whole] = dataclasses.field(default=(1, 0), kw_only=True)

    @property
    def num_outputs(self) -> int:
        """o: logits of a token, those of one expert side by side, those of null experts last."""
        each, null = self.outputs
        return self.num_experts * each + null


@runtime_checkable
class AnyRouter(Protocol):
    """What a layer needs of a router: logits of tokens."""

    def __call__(self, x: Array, ctx: Context) -> Array: ...


def told(router: Any, outputs: tuple[int, int]) -> Any:
    """The router that gives what a select rule's `outputs` say. What is no `Router` stays as it is."""
    if not isinstance(router, Router) or router.outputs == outputs:
        return router
    return router.clone(outputs=outputs)


def ask(router: Any, x: Float[Array, "g n d"], ctx: Context) -> Float[Array, "g n o"]:
    """The router's logits in float32. Padding is zeros to it, whatever lies there."""
    return router(ctx.clean(x), ctx).astype(jnp.float32)


def check_num_experts(router: Any, bank: Any) -> None:
    """A router and a bank must agree on the number of experts."""
    ours, theirs = getattr(router, "num_experts", None), getattr(bank, "num_experts", None)
    if ours is not None and theirs is not None and ours != theirs:
        raise ConfigError(f"router.num_experts={ours} but bank.num_experts={theirs}; give both the same number")


def float32_dot(x: Float[Array, "g n d"], w: Float[Array, "d o"]) -> Float[Array, "g n o"]:
    return jnp.einsum("gnd,do->gno", x, w.astype(jnp.float32), precision=jax.lax.Precision.HIGHEST)
