"""Plans: which token goes to which expert with which weight.

The letters of the whole library:

    b s   batch and sequence            g n   groups and tokens of a group (tokens compete for capacity inside a group)
    e     experts                       k     choices of a token
    c     slots of an expert (capacity) d f   model width and hidden width
    v     vocabulary                    m     rows: token-expert pairs in one flat list

A select rule makes a plan from logits, dispatch executes it on experts, and losses and statistics read it. Shapes are static;
which entries count is data (`used`). A used entry may have any weight, zero and negative included, so `used` is never inferred
from a weight.
"""

from typing import TypeAlias

import jax
import jax.numpy as jnp
from flax import struct
from jaxtyping import Array, Bool, Float, Int

from moejax.core.errors import ConfigError


@struct.dataclass
class TokenPlan:
    """Each token names its experts.

    Attributes:
      expert: the chosen experts, 0 <= expert < num_experts, also where unused.
      weight: what multiplies the expert's output in the sum.
      used: the choices that are executed; at most k per token. Padding, thresholds, null experts and drops clear it.
      dropped: choices that were wanted but refused for lack of capacity. Never both used and dropped.
      num_experts: e.
      capacity: upper bound of used choices per group and expert, or None for dropless plans.
      limit: each group's own capacity, at most `capacity`; less where padding leaves fewer tokens. None for dropless plans.
    """

    expert: Int[Array, "g n k"]
    weight: Float[Array, "g n k"]
    used: Bool[Array, "g n k"]
    dropped: Bool[Array, "g n k"]
    num_experts: int = struct.field(pytree_node=False)
    capacity: int | None = struct.field(pytree_node=False, default=None)
    limit: Int[Array, "g"] | None = None

    def dense(self) -> Float[Array, "g n e"]:
        """The combine matrix: `y[g, n] = sum_e dense[g, n, e] * expert_e(x[g, n])`. What the oracle executes."""
        one_hot = jax.nn.one_hot(self.expert, self.num_experts, dtype=self.weight.dtype)
        return jnp.einsum("gnk,gnke->gne", jnp.where(self.used, self.weight, 0), one_hot)

    def assigned(self) -> Float[Array, "g n e"]:
        """How often (0 or 1, seldom more) each token uses each expert."""
        return _count(self.expert, self.used, self.num_experts)

    def wanted(self) -> Float[Array, "g n e"]:
        """Like `assigned`, before capacity: dropped choices count."""
        return _count(self.expert, self.used | self.dropped, self.num_experts)

    def entries(self) -> "Entries":
        """The plan as one flat list of `m = g * n * k` rows, token-major."""
        g, n, k = self.expert.shape
        token = jnp.broadcast_to(jnp.arange(g * n, dtype=jnp.int32)[:, None], (g * n, k))
        return Entries(token.reshape(-1), self.expert.reshape(-1), self.weight.reshape(-1), self.used.reshape(-1))

    def to_slots(self, capacity: int | None = None) -> "ExpertPlan":
        """The same plan seen from the experts. Exact as long as no expert has more than `capacity` used rows in a group.

        Args:
          capacity: slots per expert and group; by default the plan's own, or n * k, which always suffices.
        """
        g, n, k = self.expert.shape
        c = capacity or self.capacity or n * k
        m = n * k
        expert, used = self.expert.reshape(g, m), self.used.reshape(g, m)
        rank = rank_in_expert(expert, used, self.num_experts)
        slot = jnp.where(used & (rank < c), expert * c + rank, self.num_experts * c)  # the last slot swallows the rest
        empty = jnp.full((g, self.num_experts * c + 1), -1, jnp.int32)
        rows = empty.at[jnp.arange(g)[:, None], slot].set(jnp.arange(m, dtype=jnp.int32))[:, :-1]
        filled, rows = rows >= 0, jnp.maximum(rows, 0)
        weight = jnp.take_along_axis(self.weight.reshape(g, m), rows, axis=1)
        shape = (g, self.num_experts, c)
        return ExpertPlan((rows // k).reshape(shape), weight.reshape(shape), filled.reshape(shape), num_tokens=n)


@struct.dataclass
class ExpertPlan:
    """Each expert (or block, for depth) names its tokens.

    Attributes:
      token: the chosen tokens, 0 <= token < num_tokens, also where unused.
      weight: what multiplies the expert's output in the sum.
      used: the slots that are executed.
      num_tokens: n.
    """

    token: Int[Array, "g e c"]
    weight: Float[Array, "g e c"]
    used: Bool[Array, "g e c"]
    num_tokens: int = struct.field(pytree_node=False)

    @property
    def num_experts(self) -> int:
        return self.token.shape[1]

    def dense(self) -> Float[Array, "g n e"]:
        """The combine matrix `[g, n, e]`; see `TokenPlan.dense`."""
        return self._scatter(jnp.where(self.used, self.weight, 0))

    def assigned(self) -> Float[Array, "g n e"]:
        """How often each token is used by each expert."""
        return self._scatter(self.used.astype(jnp.float32))

    def wanted(self) -> Float[Array, "g n e"]:
        """The same as `assigned`: experts never choose more than they hold."""
        return self.assigned()

    def entries(self) -> "Entries":
        """The plan as one flat list of `m = g * e * c` rows, expert-major inside a group."""
        g, e, c = self.token.shape
        token = self.token + self.num_tokens * jnp.arange(g, dtype=jnp.int32)[:, None, None]
        expert = jnp.broadcast_to(jnp.arange(e, dtype=jnp.int32)[:, None], (g, e, c))
        return Entries(token.reshape(-1), expert.reshape(-1), self.weight.reshape(-1), self.used.reshape(-1))

    def to_soft(self) -> "SlotPlan":
        """The one-hot form that one-hot einsum dispatch executes: every slot holds one whole token or nothing."""
        one_hot = jax.nn.one_hot(self.token, self.num_tokens, dtype=self.weight.dtype)  # g e c n
        dispatch = jnp.einsum("gecn,gec->gnec", one_hot, self.used.astype(self.weight.dtype))
        return SlotPlan(dispatch=dispatch, combine=dispatch * jnp.where(self.used, self.weight, 0)[:, None])

    def _scatter(self, values: Float[Array, "g e c"]) -> Float[Array, "g n e"]:
        one_hot = jax.nn.one_hot(self.token, self.num_tokens, dtype=values.dtype)
        return jnp.einsum("gec,gecn->gne", values, one_hot)


@struct.dataclass
class SlotPlan:
    """Every slot holds a mixture of tokens, every token a mixture of slot outputs (Puigcerver et al. 2023).

    Attributes:
      dispatch: slot input is `sum_n dispatch[g, n, e, s] * x[g, n]`.
      combine: token output is `sum_es combine[g, n, e, s] * output[g, e, s]`.
    """

    dispatch: Float[Array, "g n e s"]
    combine: Float[Array, "g n e s"]

    @property
    def num_experts(self) -> int:
        return self.dispatch.shape[2]

    def assigned(self) -> Float[Array, "g n e"]:
        """Each token's share of each expert: its combine weights summed over slots."""
        return self.combine.sum(-1)

    def wanted(self) -> Float[Array, "g n e"]:
        return self.assigned()


def dropless(
    expert: Int[Array, "g n k"], weight: Float[Array, "g n k"], used: Bool[Array, "g n k"], num_experts: int
) -> TokenPlan:
    """Token choice without capacity: every choice that is wanted is used."""
    return TokenPlan(expert.astype(jnp.int32), weight, used, jnp.zeros_like(used), num_experts=num_experts)


@struct.dataclass
class MergePlan:
    """One merged expert per group: its parameters are `sum_e weight[g, e] * parameters_e` (SMEAR and its kin)."""

    weight: Float[Array, "g e"]

    @property
    def num_experts(self) -> int:
        return self.weight.shape[1]

    def assigned(self) -> Float[Array, "g 1 e"]:
        """Each group's share of each expert: what is routed is a group, as if it were one token."""
        return self.weight[:, None]

    def wanted(self) -> Float[Array, "g 1 e"]:
        return self.assigned()


@struct.dataclass
class Entries:
    """A plan flattened to token-expert rows; `token` indexes the flattened `[g * n]` tokens."""

    token: Int[Array, "m"]
    expert: Int[Array, "m"]
    weight: Float[Array, "m"]
    used: Bool[Array, "m"]


Plan: TypeAlias = TokenPlan | ExpertPlan | SlotPlan | MergePlan


def sort_by_expert(key: Int[Array, "m"], num_experts: int) -> tuple[Int[Array, "m"], Int[Array, "m"], Int[Array, "e"]]:
    """Rows in the order of their experts, rows of one expert in their own order.

    Args:
      key: expert of each row; num_experts for rows of none, which go last.

    Returns:
      order: which row comes at each place; inverse: at which place each row comes; sizes: rows of each expert.
    """
    m = key.shape[0]
    if m >= 2**31:
        raise ConfigError(f"{m} rows to route (tokens times choices of each) are more than int32 counts; lower the batch, or k")
    row = jnp.arange(m, dtype=jnp.int32)
    if isinstance(m, int) and (num_experts + 1) * m < 2**31:  # with a symbolic batch (`jax.export`) nobody can tell
        # Key and row in one number: one sort without a payload, several times faster than argsort on a CPU.
        packed = jnp.sort(key.astype(jnp.int32) * m + row)
        order, expert = packed % m, packed // m
    else:
        order = jnp.argsort(key, stable=True).astype(jnp.int32)
        expert = key[order]
    inverse = jnp.zeros(m, jnp.int32).at[order].set(row, unique_indices=True)
    ends = jnp.searchsorted(expert, jnp.arange(num_experts), side="right").astype(jnp.int32)
    return order, inverse, jnp.diff(ends, prepend=0)


def rank_in_expert(expert: Int[Array, "g m"], used: Bool[Array, "g m"], num_experts: int) -> Int[Array, "g m"]:
    """How many used rows before this one, in row order, chose the same expert. Unused rows get meaningless ranks."""

    def rank(key: Array) -> Array:
        _, inverse, sizes = sort_by_expert(key, num_experts)
        starts = jnp.append(jnp.cumsum(sizes) - sizes, 0)
        return inverse - starts[key]

    return jax.vmap(rank)(jnp.where(used, expert, num_experts))


def _count(expert: Int[Array, "g n k"], flag: Bool[Array, "g n k"], num_experts: int) -> Float[Array, "g n e"]:
    one_hot = jax.nn.one_hot(expert, num_experts, dtype=jnp.float32)
    return jnp.einsum("gnk,gnke->gne", flag.astype(jnp.float32), one_hot)
