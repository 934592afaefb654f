"""Token choice on a mesh: every device sends its own tokens to their experts, computes what it was sent, and gets its tokens back."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float

from moejax.dispatch.expert_parallel.exchanges import TOKEN_EXCHANGES, Sizes
from moejax.dispatch.expert_parallel.hops import AXIS, Hop, collect, send
from moejax.dispatch.expert_parallel.parameters import Entering
from moejax.dispatch.experts import Experts
from moejax.dispatch.layout import Grouped, PerToken
from moejax.parallel.mesh import BATCH_AXES, MESH_AXES, shard_map
from moejax.parallel.scope import Parallel
from moejax.routing.plan import TokenPlan, sort_by_expert
from pallas_kernels.permute import permute, unpermute


@dataclasses.dataclass(frozen=True)
class Split:
    """How `tokens` tokens are split over a mesh: one part to each device of the batch axes, chunks of each to devices along `tensor`.

    Parts are equal; what the numbers do not divide is padded with tokens that choose nobody.
    """

    tokens: int
    parts: int
    tensor: int
    chunks: int

    @classmethod
    def of(cls, tokens: int, parallel: Parallel) -> "Split":
        sizes = parallel.mesh.shape
        parts = sizes["data"] * sizes["fsdp"] * sizes["expert"]
        return cls(tokens, parts, sizes["tensor"], parallel.exchange.chunks)

    @property
    def chunk(self) -> int:
        """Tokens of one chunk of one device."""
        return -(-self.tokens // (self.parts * self.tensor * self.chunks))

    @property
    def each(self) -> int:
        """Tokens of one part, padding within parts not counted."""
        return -(-self.tokens // self.parts)

    def apart(self, values: Array) -> Array:
        """`[tokens, ...]` as `[parts, tensor * chunks * chunk, ...]`; parts that are equal as they are stay where they are."""
        values = pad_axis(values, 0, self.parts * self.each).reshape(self.parts, self.each, *values.shape[1:])
        return pad_axis(values, 1, self.tensor * self.chunks * self.chunk)

    def together(self, values: Array) -> Array:
        """The inverse of `apart`."""
        return values[:, : self.each].reshape(-1, *values.shape[2:])[: self.tokens]


def run_tokens(
    plan: TokenPlan, x: Float[Array, "g n d"], experts: Experts, kind: str, sizes: Sizes, parallel: Parallel
) -> Float[Array, "g n f"]:
    """Executes a plan by an exchange of tokens.

    Devices along `tensor` share a part of the batch: each exchanges tokens of its own (none twice), and those that compute
    pieces of the same experts show each other what they received.
    """
    g, n, d = x.shape
    mesh, split = parallel.mesh, Split.of(g * n, parallel)
    entering = Entering(mesh, experts.axes, experts.summed)
    specs, pieces = entering.specs(experts.params), entering.split(experts.params)
    steps = TOKEN_EXCHANGES[kind].steps(sizes) if sizes.shards > 1 else ()

    def device(x: Array, choice: Array, weight: Array, params: Any, key: Array | None) -> Array:
        params = entering.gather(params, specs, pieces, x.dtype)
        if key is not None:
            key = jax.random.fold_in(key, jax.lax.axis_index(MESH_AXES))
        chunks = [a[0].reshape(split.chunks, split.chunk, -1) for a in (x, choice, weight)]
        ys = []
        for i in range(split.chunks):
            chunk_key = None if key is None else jax.random.fold_in(key, i)
            own = experts.replace(params=params, key=chunk_key, num_experts=sizes.experts_per_shard)
            compute = _compute(own, sizes, pieces)
            ys.append(_exchanged(*(a[i] for a in chunks), steps, sizes, compute))
        return jnp.concatenate(ys)[None]

    # A choice is its expert's number plus one; zero is nobody, which is also what padding is.
    choice = jnp.where(plan.used, plan.expert + 1, 0)
    weight = jnp.where(plan.used, plan.weight, 0).astype(jnp.float32)
    flat = [split.apart(a.reshape(g * n, -1)) for a in (x, choice, weight)]
    rows = PartitionSpec(BATCH_AXES, "tensor")
    spread = shard_map(device, mesh, in_specs=(rows, rows, rows, specs, PartitionSpec()), out_specs=rows)
    return split.together(spread(*flat, experts.params, experts.key)).reshape(g, n, -1)


def _exchanged(
    x: Float[Array, "n d"],
    choice: Array,
    weight: Array,
    steps: tuple[Callable[[Array], Hop], ...],
    sizes: Sizes,
    compute: Callable,
) -> Float[Array, "n f"]:
    """There, computed, and back."""
    hops = []
    # Numbers of experts are exact in float32, so that choices and weights travel as one.
    beside = jnp.concatenate([weight, choice.astype(jnp.float32)], axis=1)
    for step in steps:
        # Nobody, -1 here, is in shard -1.
        hop = step((_choice(beside) - 1) // sizes.experts_per_shard)
        x, beside = checkpoint_name(send(hop, x), "exchanged"), checkpoint_name(send(hop, beside), "exchanged")
        hops.append(hop)
    y = compute(x, beside)
    for hop in reversed(hops):
        y = checkpoint_name(collect(hop, y), "exchanged")
    return y


def _choice(beside: Float[Array, "n k2"]) -> Array:
    """What travelled beside the rows, without the weights."""
    return jax.lax.stop_gradient(beside[:, beside.shape[1] // 2 :]).astype(jnp.int32)


def _compute(own: Experts, sizes: Sizes, pieces: bool) -> Callable[[Array, Array], Array]:
    """This device's `own` experts on the tokens that came here: `y[r] = sum of weight * expert(x[r])` over those that it chose."""

    def compute(x: Array, beside: Array) -> Array:
        arrived = x.shape[0]
        if pieces:
            x, beside = (jax.lax.all_gather(a, "tensor", tiled=True) for a in (x, beside))
        choice, weight, experts = _choice(beside), beside[:, : sizes.k], sizes.experts_per_shard
        local = choice - 1 - experts * _shard(sizes)
        mine = (choice > 0) & (local >= 0) & (local < experts)
        if experts < sizes.k:
            # Fewer experts than choices: one row for each expert, with the sum of the weights of the choices that name it.
            named = mine[..., None] & (local[..., None] == jnp.arange(experts))
            weight, mine = jnp.where(named, weight[..., None], 0).sum(1), named.any(1)
            local = jnp.broadcast_to(jnp.arange(experts), mine.shape)
        key, weight = jnp.where(mine, local, experts), jnp.where(mine, weight, 0)
        if 4 * key.size <= experts:
            # A handful of rows, as in decoding: nobody to share the reading of an expert with.
            each = own.run(jnp.repeat(x, key.shape[1], 0), PerToken(jnp.minimum(key, experts - 1).reshape(-1)))
            y = jnp.einsum("rj,rjf->rf", weight.astype(each.dtype), each.reshape(*key.shape, -1))
        else:
            most = sizes.shards * sizes.most_rows * (x.shape[0] // arrived)
            y = _grouped(own, x, key, weight, experts, most)
        return jax.lax.psum_scatter(y, "tensor", tiled=True) if pieces else y

    return compute


def _grouped(own: Experts, x: Float[Array, "n d"], key: Array, weight: Array, experts: int, most: int) -> Float[Array, "n f"]:
    """Rows sorted by expert, of which at most `most` are anybody's."""
    order, inverse, group_sizes = sort_by_expert(key.reshape(-1), experts)
    if most < order.shape[0]:
        # One row more than there can be, nobody's, stands for all of nobody's.
        order, inverse = order[: most + 1], jnp.minimum(inverse, most)
    rows = permute(x, order, inverse, key.shape[1])
    return unpermute(own.run(rows, Grouped(group_sizes, num_rows=order.shape[0])), weight, order, inverse)


def _shard(sizes: Sizes) -> Array | int:
    return jax.lax.axis_index(AXIS) if sizes.shards > 1 else 0


def pad_axis(values: Array, axis: int, size: int) -> Array:
    """Zeros at the end of an axis, up to a size."""
    padding = [(0, 0)] * values.ndim
    padding[axis] = (0, size - values.shape[axis])
    return jnp.pad(values, padding) if size > values.shape[axis] else values
