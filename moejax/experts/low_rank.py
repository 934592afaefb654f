"""Low-rank experts: each expert is a product of two thin matrices (Hu et al. 2021, one per expert)."""

import flax.linen as nn
from jaxtyping import Array

from moejax.core.context import Context
from moejax.core.fields import Count, Rate
from moejax.core.initializers.registry import initializers
from moejax.core.initializers.usual import FanIn, Zeros
from moejax.core.params import Initializer, per_expert
from moejax.dispatch.experts import Experts, Matrices
from moejax.dispatch.layout import Layout
from moejax.experts.base import Bank
from moejax.experts.registry import banks, declare, dropout, dropout_key


@banks.register("low_rank", slots={"init_a": initializers, "init_b": initializers})
class LowRank(Bank):
    """`scale * (x A_e) B_e` with `A[e, d, r]` and `B[e, r, features]`; B starts at zero, so the bank starts as zero.

    Attributes:
      rank: r, of each expert.
      features: output width; the input's by default.
      num_experts: e.
      dropout: rate of dropout on x in training, drawn anew for each expert.
      scale: explicit, since repositories divide alpha by total, active, per-expert or initial rank.
      init_a, init_b: how A and B start. A: Kaiming-uniform with a = sqrt(5), as in the reference implementation, which is
        U(-1/sqrt(d), 1/sqrt(d)).
    """

    rank: Count
    features: Count | None = None
    num_experts: Count = 1
    scale: float = 1.0
    dropout: Rate = 0.0
    init_a: Initializer = FanIn(1 / 3, "uniform")
    init_b: Initializer = Zeros()

    @nn.compact
    def __call__(self, width: int, ctx: Context | None = None) -> Experts:
        e, r, scale, rate = self.num_experts, self.rank, self.scale, self.dropout
        params, axes = declare(
            self,
            {
                "a": (per_expert(self.init_a), (e, width, r), ("expert", "embed", "rank")),
                "b": (per_expert(self.init_b), (e, r, self.features or width), ("expert", "rank", "mlp")),
            },
        )

        def expert(p: Matrices, x: Array, layout: Layout, key: Array | None = None) -> Array:
            return scale * layout.low_rank(x if key is None else dropout(x, rate, key), p["a"], p["b"])

        return Experts(expert, params, axes, key=dropout_key(self, rate, ctx))
