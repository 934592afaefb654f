"""Each group's rows through a function of that group's own parameters, as loops that XLA compiles well on a CPU.

One turn of the outer loop takes one group that has rows, and copies its parameters once; inner loops take its rows in tiles: whole
large ones, then the smallest that covers what is left. Trip counts follow the group sizes, so empty groups cost nothing and
ragged ones little. Where groups are of a few rows each, the first tiles of all groups go together, ahead of the loop.

What a tile computes between its input and its output stays in cache. If a derivative is to follow, the results of matrix products
are kept, and what lies between them is computed again; without products kept, an FFN takes 1.17 times the FLOPs, a gated one 1.22.

What was tried and is slower on a CPU (two cores, 32 groups of about 256 rows, an FFN of 256 x 1024; forward, 1.0 is the dense FFN):
one pair of loops per matmul, with the hidden layer in memory between them: 1.6; tiles of one size: 1.2; a ragged tile chosen
by `lax.switch`, which copies the output at every turn: 1.6 to 4.4; loops whose body does not use their counter, which XLA hoists
out of the loop and always runs: 1.6 to 2.8; sums of gradients kept per group and copied out: 1.8 instead of 1.3 with the backward
pass; a group's first tile writing its sums instead of adding them: no faster. This form: 0.85.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

# Rows per group up to which all groups are run at once. Measured on two cores, FFN of 256 x 1024, forward, against one group at a time:
# 0.7 of the time with 4 rows a group, 1 with 16, 1.4 with 64; with sums of gradients 1.25 with 16.
FEW_ROWS = 8

Step = Callable[[Any, tuple[Array, ...], Array], tuple[tuple[Array, ...], Any]]


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def grouped_map(
    function: Callable[[Any, Array], Array],
    params: Any,
    x: Float[Array, "m d"],
    group_sizes: Int[Array, "e"],
) -> Float[Array, "m f"]:
    """`y[rows of group i] = function(params of group i, x[rows of group i])`; rows past the last group give zero.

    For its derivative, the results of `function`'s matrix products on rows are kept, [m, .] each, as a dense layer keeps them;
    what is between them is computed again, tile by tile. Gradients of a group's parameters are summed in float32, in place.

    Args:
      function: of one group's parameters (a leading axis of size 1) and rows [t, d]; each row's result depends on that row only.
        Static: it must not close over traced values.
      params: pytree of arrays with a leading axis of groups.
      x: rows sorted by group.
      group_sizes: rows of each group.
    """
    f = jax.eval_shape(function, _slice(params, 0), jax.ShapeDtypeStruct((1, x.shape[1]), x.dtype))

    def step(mine: Any, tiles: tuple[Array, ...], inside: Array) -> tuple[tuple[Array, ...], None]:
        return (function(mine, tiles[0]),), None

    (y,), _, _ = over_groups(step, params, (x,), group_sizes, outputs=((f.shape[1], f.dtype),))
    return y


def _fwd(function: Any, params: Any, x: Array, group_sizes: Array) -> tuple[Array, tuple[Any, ...]]:
    function = _keeping_products(function)
    example = _slice(params, 0), jax.ShapeDtypeStruct((1, x.shape[1]), x.dtype)
    f = jax.eval_shape(function, *example)

    def step(mine: Any, tiles: tuple[Array, ...], inside: Array) -> tuple[tuple[Array, ...], None]:
        y, pull = jax.vjp(function, mine, tiles[0])
        return (y, *residuals.split(pull)), None

    residuals = Residuals.of(function, *example)
    (y,), kept, _ = over_groups(step, params, (x,), group_sizes, outputs=((f.shape[1], f.dtype),), kept=residuals.kept)
    return y, (params, x, group_sizes, kept)


def _bwd(function: Any, saved: tuple[Any, ...], dy: Array) -> tuple[Any, Array, None]:
    params, x, group_sizes, kept = saved
    function = _keeping_products(function)
    residuals = Residuals.of(function, _slice(params, 0), jax.ShapeDtypeStruct((1, x.shape[1]), x.dtype))

    def step(mine: Any, tiles: tuple[Array, ...], inside: Array) -> tuple[tuple[Array, ...], Any]:
        rows, grads, *products = (jnp.where(inside, a, 0) for a in tiles)
        dmine, drows = residuals.join(function, mine, rows, products)(grads)
        return (drows,), jax.tree.map(lambda a: a[0], dmine)

    sums = jax.tree.map(lambda p: jax.ShapeDtypeStruct(p.shape[1:], jnp.float32), params)
    (dx,), _, totals = over_groups(
        step, params, (x, dy), group_sizes, outputs=((x.shape[1], x.dtype),), sums=sums, kept_rows=kept
    )
    return jax.tree.map(lambda t, p: t.astype(p.dtype), totals, params), dx, None


grouped_map.defvjp(_fwd, _bwd)


def _keeping_products(function: Callable[..., Array]) -> Callable[..., Array]:
    """The function, whose derivative keeps the results of matrix products and computes again what lies between them."""
    return jax.checkpoint(function, policy=jax.checkpoint_policies.dots_saveable)


@dataclass(frozen=True)
class Residuals:
    """What a derivative needs of the forward pass, as JAX's own `vjp` has it: the parameters, the rows, and what was computed.

    Attributes:
      rows: which residuals are computed row by row, and the axis of the rows.
      kept: width and dtype of each of these.
    """

    rows: dict[int, int]
    kept: tuple[tuple[int, Any], ...]

    @classmethod
    def of(cls, function: Callable[..., Array], params: Any, row: jax.ShapeDtypeStruct) -> "Residuals":
        """Finds them by tracing with two numbers of rows."""
        two, three = (_traced_vjp(function, params, jax.ShapeDtypeStruct((n, *row.shape[1:]), row.dtype)) for n in (2, 3))
        rows = {
            i: [p != q for p, q in zip(a.shape, b.shape, strict=True)].index(True)
            for i, (a, b, given) in enumerate(zip(two.leaves, three.leaves, two.inputs, strict=True))
            if a.shape != b.shape and given is None
        }
        return cls(rows, tuple((two.leaves[i].size // 2, two.leaves[i].dtype) for i in rows))

    def split(self, pull: Any) -> tuple[Array, ...]:
        """The residuals to keep, as [t, width]."""
        leaves = jax.tree.leaves(pull)
        moved = (jnp.moveaxis(leaves[i], axis, 0) for i, axis in self.rows.items())
        return tuple(leaf.reshape(leaf.shape[0], -1) for leaf in moved)

    def join(self, function: Callable[..., Array], params: Any, rows: Array, kept: Sequence[Array]) -> Callable[[Array], Any]:
        """The derivative at these rows, from what was kept of the forward pass, which is not computed again."""
        traced = _traced_vjp(function, params, rows)
        inputs = [*jax.tree.leaves(params), rows]
        leaves = [None if i is None else inputs[i] for i in traced.inputs]
        for (i, axis), tile in zip(self.rows.items(), kept, strict=True):
            shape = list(traced.leaves[i].shape)
            shape.insert(0, shape.pop(axis))
            leaves[i] = jnp.moveaxis(tile.reshape(shape), 0, axis)
        if any(leaf is None for leaf in leaves):  # computed from parameters alone, such as a product of two of them
            computed = jax.tree.leaves(jax.vjp(function, params, rows)[1])
            leaves = [there if leaf is None else leaf for leaf, there in zip(leaves, computed, strict=True)]
        return jax.tree.unflatten(traced.tree, leaves)


class _Vjp(NamedTuple):
    """A derivative that was traced: its residuals' shapes, their tree, and which of them are inputs (params, then rows)."""

    leaves: list[jax.ShapeDtypeStruct]
    tree: Any
    inputs: list[int | None]


def _traced_vjp(function: Callable[..., Array], params: Any, rows: Any) -> _Vjp:
    found: list[Any] = []

    def residuals(params: Any, rows: Array) -> list[Array]:
        leaves, tree = jax.tree.flatten(jax.vjp(function, params, rows)[1])
        inputs = [*jax.tree.leaves(params), rows]
        found[:] = [tree, [next((i for i, a in enumerate(inputs) if a is leaf), None) for leaf in leaves]]
        return leaves

    return _Vjp(jax.eval_shape(residuals, params, rows), *found)


def over_groups(
    step: Step,
    params: Any,
    rows: tuple[Array, ...],
    group_sizes: Int[Array, "e"],
    first: Array | int = 0,
    outputs: tuple[tuple[int, Any], ...] = (),
    sums: Any = None,
    kept: tuple[tuple[int, Any], ...] = (),
    kept_rows: tuple[Array, ...] = (),
) -> tuple[tuple[Array, ...], tuple[Array, ...], Any]:
    """The loops. `step(params of the group, tiles of rows, inside)` gives tiles of each output, and terms of each group's sums.

    `inside` [t, 1] says which rows of the tile are the group's. Outputs may be anything in rows that are not:
    the next group's turn overwrites them, and rows past the last group are zeroed.

    Args:
      params: pytree with a leading axis of groups; may be empty.
      rows: arrays [m, .], sorted by group; group 0 starts at row `first`.
      outputs: width and dtype of each output [m, .].
      sums: pytree of shapes and dtypes; None for no sums.

    Returns:
      The outputs, zero in rows of no group, and the sums with a leading axis of groups, zero for empty ones.
    """
    m, e = rows[0].shape[0], group_sizes.shape[0]
    tiles = tile_sizes(m, e)
    padding = tiles[0]
    together = sums is None and 2 * e <= m <= FEW_ROWS * e
    run = partial(_run, step, tiles, together, (*outputs, *kept), sums)
    run.__name__ = f"grouped_rows_{m}_{tiles[0]}"  # for moejax.train.flops: no jaxpr tells how often such loops turn
    ends = first + jnp.cumsum(group_sizes)
    padded = (*(jnp.pad(a, ((0, padding), (0, 0))) for a in rows), *kept_rows)
    written, totals = jax.jit(run)(params, padded, ends - group_sizes, group_sizes)
    row = jnp.arange(m)
    mine = ((row >= first) & (row < ends[-1]))[:, None]
    results = tuple(jnp.where(mine, y[:m], 0) for y in written[: len(outputs)])
    return results, written[len(outputs) :], totals


def tile_sizes(m: int, e: int) -> tuple[int, ...]:
    """Rows of the tiles, largest first: one that holds nearly every group of balanced routing, and three from the mean size down.

    A group's gradient is read and written once a tile, so a group of the usual size should be one tile. Few sizes, since a loop is
    compiled for each; none above 512, from where on the hidden rows leave the cache.
    """
    mean = max(m // max(e, 1), 1)
    unit = max(_power_of_two(mean) // 8, 4)
    # Two standard deviations of a balanced multinomial above the mean.
    usual = -(-round(mean + 2 * mean**0.5) // unit) * unit
    base = min(256, max(8, _power_of_two(mean)))
    sizes = {min(size, 512, _power_of_two(m)) for size in (max(usual, base), base, base // 2, base // 4)}
    return tuple(sorted(sizes, reverse=True))


def _power_of_two(n: int) -> int:
    """The least power of two that is at least n."""
    return 1 << max(n - 1, 0).bit_length()


def _run(
    step: Step, tiles: tuple[int, ...], together: bool, outputs: tuple[tuple[int, Any], ...], sums: Any, params: Any,
    rows: tuple[Array, ...], starts: Array, sizes: Array,
) -> tuple[tuple[Array, ...], Any]:  # fmt: skip
    zeros = tuple(jnp.zeros((rows[0].shape[0], width), dtype) for width, dtype in outputs)
    totals = jax.tree.map(lambda s: jnp.zeros((sizes.shape[0], *s.shape), s.dtype), sums)
    done = jnp.minimum(sizes, tiles[0]) if together else 0
    written, totals = _loop(step, tiles, params, rows, starts + done, sizes - done, zeros, totals)
    return _first_tiles(step, tiles[0], params, rows, starts, sizes, written) if together else written, totals


def _first_tiles(
    step: Step, tile: int, params: Any, rows: tuple[Array, ...], starts: Array, sizes: Array, others: tuple[Array, ...]
) -> tuple[Array, ...]:
    """Outputs of every group's first tile, as batched matmuls, and of `others` in the rows beyond.

    They read the parameters where they are; a loop copies them first, which shows when reading is most of the work. Groups without
    rows cost as much as others.
    """
    place = jnp.arange(tile)
    index = starts[:, None] + place
    inside = (place < sizes[:, None])[..., None]

    def one(mine: Any, tiles: tuple[Array, ...], inside: Array) -> tuple[Array, ...]:
        return step(jax.tree.map(lambda p: p[None], mine), tiles, inside)[0]

    batch = jax.vmap(one)(params, tuple(a[index] for a in rows), inside)
    # From [e, tile, .] back to rows, as a gather: which group a row is of, and its place in that.
    row = jnp.arange(rows[0].shape[0])
    group = jnp.clip(jnp.searchsorted(starts + sizes, row, side="right"), 0, sizes.shape[0] - 1)
    place = row - starts[group]
    here = ((place >= 0) & (place < tile))[:, None]
    source = jnp.clip(group * tile + place, 0, sizes.shape[0] * tile - 1)
    return tuple(
        jnp.where(here, y.reshape(-1, y.shape[-1])[source].astype(other.dtype), other)
        for y, other in zip(batch, others, strict=True)
    )


def _loop(
    step: Step, tiles: tuple[int, ...], params: Any, rows: tuple[Array, ...], starts: Array, sizes: Array,
    outputs: tuple[Array, ...], totals: Any,
) -> tuple[tuple[Array, ...], Any]:  # fmt: skip
    busy = jnp.argsort(sizes == 0, stable=True)
    turns = schedule(sizes, tiles)

    def group(turn: Array, carry: tuple[Any, Any]) -> tuple[Any, Any]:
        i = busy[turn]
        mine = _slice(params, i)
        at, end = starts[i], starts[i] + sizes[i]
        for j, tile in enumerate(tiles):

            def one(t: Array, carry: tuple[Any, Any], at: Array = at, tile: int = tile) -> tuple[Any, Any]:
                outputs, totals = carry
                start = (
                    at + t * tile
                )  # t may only be 0, but must be used: XLA would hoist the body out of the loop, and run it always
                inside = (start + jnp.arange(tile) < end)[:, None]
                written, terms = step(
                    mine, tuple(jax.lax.dynamic_slice(a, (start, 0), (tile, a.shape[1])) for a in rows), inside
                )
                outputs = tuple(
                    jax.lax.dynamic_update_slice(y, w.astype(y.dtype), (start, 0))
                    for y, w in zip(outputs, written, strict=True)
                )
                return outputs, jax.tree.map(partial(_add_at, i), totals, terms)

            carry = jax.lax.fori_loop(0, turns[j, i], one, carry)
            at = at + turns[j, i] * tile
        return carry

    return jax.lax.fori_loop(0, (sizes > 0).sum(), group, (outputs, totals))


def schedule(sizes: Int[Array, "e"], tiles: tuple[int, ...]) -> Int[Array, "t e"]:
    """How many tiles of each size a group takes: as many whole ones of the first as fit, then the smallest that covers the rest."""
    rest = sizes % tiles[0]
    covers = [(rest <= tile) & (rest > smaller) for tile, smaller in zip(tiles, (*tiles[1:], 0), strict=True)]
    turns = [covered.astype(sizes.dtype) for covered in covers]
    turns[0] += sizes // tiles[0]
    return jnp.stack(turns)


def _add_at(i: Array, total: Array, term: Array) -> Array:
    old = jax.lax.dynamic_index_in_dim(total, i, keepdims=False)
    return jax.lax.dynamic_update_index_in_dim(total, old + term.astype(total.dtype), i, 0)


def _slice(params: Any, i: Array | int) -> Any:
    return jax.tree.map(lambda p: jax.lax.dynamic_slice_in_dim(p, i, 1), params)
