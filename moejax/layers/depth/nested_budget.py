"""Which tokens are worth a wide network: budgets, capacities and the assignment of mixtures of nested experts (Jain et al. 2024).

Expert m of E works on the first `D / 2^(E - m)` features. Here it has index m - 1, and capacities go from the narrowest expert to
the widest.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from moejax.core.errors import ConfigError


def widths(num_experts: int) -> tuple[float, ...]:
    """Each expert's share of the features, the narrowest first."""
    return tuple(2.0 ** (m - num_experts) for m in range(1, num_experts + 1))


@functools.cache
def budget_capacities(budget: float, num_experts: int, delta: float = 2.0, beta: float = 10.0) -> tuple[float, ...]:
    """The share of tokens that each expert takes: the c that maximises

        sum_m c_m delta^(m-1) - beta sum_m c_m log c_m   with   sum_m c_m = 1,   sum_m c_m 2^(m-E) = budget,   0 <= c_m <= 1.

    The optimum is `c_m = exp((delta^(m-1) - l 2^(m-E)) / beta) / Z` with the one l that meets the budget.

    Args:
      budget: e_c, mean width of a token, as a share of the whole.
      delta: what a wider expert is worth; beta: how evenly tokens are to be spread (near 0: extremes).

    Raises:
      ConfigError: no capacities meet the budget, or beta is not positive.
    """
    width = np.array(widths(num_experts))
    if not width[0] <= budget <= 1:
        raise ConfigError(
            f"budget={budget} must lie between {width[0]:g}, all tokens in the narrowest of num_experts={num_experts}, and 1"
        )
    if beta <= 0:
        raise ConfigError(f"beta={beta} must be positive; near 0, capacities go to extremes")
    if budget in (width[0], 1.0):
        return tuple(float(share == budget) for share in width)
    worth = delta ** np.arange(num_experts)

    from scipy.optimize import brentq  # slow to import

    def shares(price: float) -> np.ndarray:
        logits = (worth - price * width) / beta
        exp = np.exp(logits - logits.max())
        return exp / exp.sum()

    def excess(price: float) -> float:
        return float(shares(price) @ width) - budget

    bound = beta
    while excess(-bound) < 0 or excess(bound) > 0:
        bound *= 2
    return tuple(shares(brentq(excess, -bound, bound, xtol=1e-12)).tolist())


def token_counts(shares: tuple[float, ...], tokens: int) -> tuple[int, ...]:
    """How many of a sequence's tokens each expert takes: `floor(c_m tokens)`, what is left over goes to the narrowest."""
    wide = [int(share * tokens + 1e-6) for share in shares[1:]]
    return tokens - sum(wide), *wide


def expert_preferred(
    probs: Float[Array, "b s e"], counts: tuple[int, ...], valid: Bool[Array, "b s"] | None = None
) -> Int[Array, "b s"]:
    """Expert Preferred Routing: the widest expert first, each takes its count of the remaining tokens that like it best.

    Padding is taken last, when an expert finds no other token. Looks at all tokens of a sequence: never causal.
    """
    b, s, _ = probs.shape
    row = jnp.arange(b)[:, None]
    rank = probs if valid is None else jnp.where(valid[..., None], probs, -1.0)
    expert = jnp.zeros((b, s), jnp.int32)
    for m in range(len(counts) - 1, 0, -1):
        _, chosen = jax.lax.top_k(jnp.where(expert > 0, -2.0, rank[..., m]), counts[m])
        expert = expert.at[row, chosen].set(m)
    return expert
