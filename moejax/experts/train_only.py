"""A bank that falls silent outside training: what is the rest of the layer worth without it?"""

import flax.linen as nn
import jax.numpy as jnp

from moejax.core.context import Context
from moejax.dispatch.experts import AnyExperts
from moejax.experts.base import AnyBank, Bank
from moejax.experts.registry import banks


@banks.register("train_only", slots={"bank": banks})
class TrainOnly(Bank):
    """The outputs of `bank` in training, zeros outside it.

    As `shared`, it measures whether routed experts can stand in for the shared one (DeepSeekMoE, Dai et al. 2024, section 4.5).
    """

    bank: AnyBank

    @property
    def num_experts(self) -> int:
        return self.bank.num_experts

    @nn.compact
    def __call__(self, width: int, ctx: Context | None = None) -> AnyExperts:
        experts = self.bank(width, ctx)
        return experts if ctx is not None and ctx.train else experts.wrap(after=jnp.zeros_like)
