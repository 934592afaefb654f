"""Experts of one hidden unit, very many of them: each token adds up the few that it picked (PEER, He 2024), or plain values (PKM)."""

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from moejax.core.errors import ConfigError, check_choice
from moejax.dispatch.expert_parallel.rows import Rows, sum_rows
from moejax.experts.registry import activation, declare
from pallas_kernels.implementations import current_chip
from pallas_kernels.rank_one import IMPLEMENTATIONS, rank_one_experts


class RankOne(nn.Module):
    """`y[t] = sum_j weight[t, j] act(<x[t], u_i>) v_i` with `i = index[t, j]`; with `values_only`, `sum_j weight[t, j] v_i`.

    Not a bank of the registry: a plan of a million experts would be larger than the experts. Split over mesh axis `expert`.

    Attributes:
      num_experts: e, the rows.
      activation: a name of `ACTIVATIONS`; 'gelu' is the tanh form, 'gelu_exact' PyTorch's default.
      values_only: rows are memory values that do not look at the token (Lample et al. 2019).
      out_std: standard deviation of v at the start; that of u is 1 / sqrt(d), as in a linear layer.
      implementation: of the kernel; 'auto' or a name.
    """

    num_experts: int
    activation: str = "gelu"
    values_only: bool = False
    out_std: float = 0.02
    implementation: str = "auto"

    def __post_init__(self) -> None:
        check_choice("implementation", self.implementation, ("auto", *IMPLEMENTATIONS))
        super().__post_init__()

    @nn.compact
    def __call__(self, x: Float[Array, "n d"], index: Int[Array, "n p"], weight: Float[Array, "n p"]) -> Float[Array, "n d"]:
        check_platform(self.implementation, self)
        shape, names = (self.num_experts, x.shape[-1]), ("expert", "embed")
        declared = {"v": (nn.initializers.normal(self.out_std), shape, names)}
        if not self.values_only:
            declared["u"] = (nn.initializers.normal(x.shape[-1] ** -0.5), shape, names)
        rows, axes = declare(self, declared)
        act = jnp.ones_like if self.values_only else activation(self.activation)

        def experts(rows: Rows, x: Array, index: Array, weight: Array) -> Array:
            # Values alone are experts that answer 1 to everything: what they are multiplied by does not matter.
            return rank_one_experts(x, index, weight, rows.get("u", rows["v"]), rows["v"], act, self.implementation)

        return sum_rows(experts, rows, axes, x, index, weight)


def check_platform(implementation: str, module: nn.Module) -> None:
    """Refuses the kernel of another platform than the one that is computed on, before its compiler does in its own words.

    Raises:
      ConfigError: naming the `module`'s place.
    """
    platform = current_chip().platform
    if implementation in ("tpu", "gpu") and implementation != platform:
        raise ConfigError(
            f"implementation='{implementation}' in {'/'.join(module.path) or type(module).__name__} is a kernel for {implementation.upper()}s, "
            f"and this is a {platform.upper()}; take 'auto', or 'interpret_{implementation}' to try it here"
        )
