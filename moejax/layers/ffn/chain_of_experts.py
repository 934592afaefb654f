"""Chain of experts (Wang et al. 2025): a token goes through one bank several times, and is routed anew each time."""

import dataclasses
from typing import Any, Literal

import flax.linen as nn
from jaxtyping import Array, Float

from moejax.core.context import Context
from moejax.core.fields import Few
from moejax.layers.ffn.moe import SLOTS, MoE
from moejax.layers.registry import ffns, norms


@ffns.register("chain_of_experts", slots={**SLOTS, "norm": norms})
class ChainOfExperts(MoE):
    """`x_t = MoE_t(x_(t-1)) + x_(t-1)` for t = 1..iterations, with one bank, one set of shared experts and a router for each t.

    Everything of `MoE` holds for each iteration: its losses are summed over them, its statistics and its balancer's state are
    kept apart under 'iteration_0', 'iteration_1', ... So `select.k` experts run in each iteration, and a layer that is to cost
    what a mixture with k experts costs takes `k / iterations` of them; shared experts run `iterations` times.

    Attributes:
      iterations: C.
      gating: each iteration has its 'own' router, or all use the logits of the first one ('shared', the paper's ablation).
      residual: what is added: each iteration's input ('inner'), the layer's input once at the end ('outer', the paper's
        ablation), or nothing ('none'). The block's own residual comes on top of it.
      norm: normalises the input of every iteration but the first, whose input the block has normalised; None, as in the paper,
        lets the scale grow.
    """

    iterations: Few = 2
    gating: Literal["own", "shared"] = "own"
    residual: Literal["inner", "outer", "none"] = "inner"
    norm: nn.Module | None = None

    @nn.compact
    def __call__(self, x: Float[Array, "b s d"], ctx: Context | None = None) -> Float[Array, "b s d"]:
        """See the class; padding gets nothing from the routed experts."""
        once = _Once(self.router) if self.gating == "shared" else None
        state = x
        for t in range(self.iterations):
            h = state if self.norm is None or t == 0 else self.norm.copy(name=f"norm_{t}")(state)
            y = self._iteration(t, once)(h, ctx)
            state = y + state if self.residual == "inner" else y
        return state + x if self.residual == "outer" else state

    def _iteration(self, t: int, once: "_Once | None") -> MoE:
        """A mixture of the layer's own parts: what is not a router has one set of parameters however often it is used."""
        fields = {f.name: getattr(self, f.name) for f in dataclasses.fields(MoE) if f.init and f.name not in ("parent", "name")}
        router = once or self.router.copy(name=f"router_{t}")
        return MoE(**{**fields, "router": router}, name=f"iteration_{t}")

    def active_fraction(self) -> float:
        """Share of the routed experts' parameters that a token uses if no iteration repeats an expert of another."""
        return min(1.0, self.iterations * super().active_fraction())


class _Once:
    """A router that is asked once and gives the same logits ever after."""

    def __init__(self, router: nn.Module):
        self.router = router
        self.logits: Any = None

    def __call__(self, x: Float[Array, "g n d"], ctx: Context) -> Float[Array, "g n o"]:
        if self.logits is None:
            self.logits = self.router(x, ctx)
        return self.logits
