"""Low-rank experts: each expert is a product of two thin matrices (Hu et al. 2021, one per expert)."""

import flax.linen as nn
from jaxtyping import Array, Float

from moejax.core.context import Context
from moejax.core.params import per_expert
from moejax.dispatch.layout import Layout
from moejax.experts.registry import banks, declare


@banks.register("lora")
class LoRA(nn.Module):
    """`scale * (x A_e) B_e` with `A[e, d, r]` and `B[e, r, features]`; B starts at zero, so the bank starts as zero.

    Attributes:
      rank: r, of each expert.
      features: output width.
      num_experts: e.
      scale: explicit, since repositories divide alpha by total, active, per-expert or initial rank.
    """

    rank: int
    features: int
    num_experts: int = 1
    scale: float = 1.0

    @nn.compact
    def __call__(self, x: Float[Array, "*m d"], layout: Layout, ctx: Context | None = None) -> Float[Array, "*m o"]:
        e, d, r = self.num_experts, x.shape[-1], self.rank
        # Kaiming-uniform with a = sqrt(5), as in the reference implementation: U(-1/sqrt(d), 1/sqrt(d)).
        init = per_expert(nn.initializers.variance_scaling(1 / 3, "fan_in", "uniform"))
        params, axes = declare(
            self,
            {
                "a": (init, (e, d, r), ("expert", "embed", "rank")),
                "b": (nn.initializers.zeros, (e, r, self.features), ("expert", "rank", "mlp")),
            },
        )

        def expert(p: dict[str, Array], x: Array, layout: Layout) -> Array:
            return self.scale * layout.low_rank(x, p["a"], p["b"])

        return layout.map(expert, params, x, axes)
