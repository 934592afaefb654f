"""Top-k with a k that changes in the course of training (SMoE-Dropout, Chen et al. 2023)."""

import dataclasses
from typing import ClassVar, Literal

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from moejax.core.context import Context
from moejax.core.errors import ConfigError
from moejax.core.fields import Count
from moejax.routing.select.base import selects
from moejax.routing.select.top_k import TopK


@selects.register("scheduled_k")
@dataclasses.dataclass(frozen=True)
class ScheduledK(TopK):
    """`k(t) = round(first + (last - first) t / steps)` experts per token in update t of training, `k` of them outside of it.

    The other fields are those of `TopK`. Weights are made of the experts that are in use: with `score='softmax_selected'` they sum to
    1 for every k(t). Nothing is compiled anew when k(t) changes, and buffers have room for k.

        rule = ScheduledK(k=16, first=8, steps=400_000, score='softmax_selected')      # SMoE-Dropout in Transformer-XL

    Attributes:
      k: the most that k(t) may be, and what is used outside training.
      first: k(0).
      last: k(steps) and from then on; None for `k`.
      steps: T, the updates of the way from `first` to `last`.
      shape: of that way: 'linear'; 'cosine', slow at both ends; 'exponential', by equal factors; 'doubling', in stages of equal
        length of which each has twice (or half) the experts of the one before.

    Raises:
      ConfigError: `first` or `last` lies outside of 1 .. k, or `steps` is less than 1.
    """

    k: Count = 2
    first: Count = 1
    last: Count | None = None
    steps: Count = 1
    shape: Literal["linear", "cosine", "exponential", "doubling"] = "linear"
    needs: ClassVar[tuple[str, ...]] = ("step",)

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("first", "last"):
            value = getattr(self, name)
            if value is not None and value > self.k:
                raise ConfigError(f"{name}={value} exceeds k={self.k}, the most experts of a token")

    def choose(
        self, logits: Float[Array, "g n e"], ctx: Context, bias: Float[Array, "e"] | None
    ) -> tuple[Int[Array, "g n k"], Bool[Array, "g n k"]]:
        expert, wanted = super().choose(logits, ctx, bias)
        return (expert, wanted & (jnp.arange(self.k) < self.now(ctx.step))) if ctx.train else (expert, wanted)

    def now(self, step: Int[Array, ""]) -> Int[Array, ""]:
        """k(t) after `step` updates."""
        first, last = float(self.first), float(self.k if self.last is None else self.last)
        way = jnp.clip(step / self.steps, 0.0, 1.0)
        match self.shape:
            case "linear":
                k = first + (last - first) * way
            case "cosine":
                k = first + (last - first) * 0.5 * (1.0 - jnp.cos(jnp.pi * way))
            case "exponential":
                k = first * (last / first) ** way
            case _:
                k = first * 2.0 ** (jnp.sign(last - first) * jnp.floor(way * self._stages(first, last)))
        return jnp.clip(jnp.round(k), min(first, last), max(first, last)).astype(jnp.int32)

    def widest(self, num_experts: int) -> TopK:
        """The rule without its schedule: a k that is forced holds in training too."""
        fields = {field.name: getattr(self, field.name) for field in dataclasses.fields(TopK)}
        return TopK(**fields).widest(num_experts)

    @staticmethod
    def _stages(first: float, last: float) -> int:
        """How many stages of doubling there are, the first and the last included."""
        ratio, stages = max(first, last) / min(first, last), 1
        while 2 ** (stages - 1) < ratio:
            stages += 1
        return stages
