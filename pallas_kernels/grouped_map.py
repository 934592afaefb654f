"""Each group's rows through a function of that group's own parameters, as loops that XLA compiles well on a CPU.

One turn of the outer loop takes one group that has rows, and copies its parameters once; inner loops take its rows in tiles: whole
large ones, then the smallest that covers what is left. Trip counts follow the group sizes, so empty groups cost nothing and
ragged ones little. What a tile computes between its input and its output stays in cache.

What was tried and is slower on a CPU (two cores, 32 groups of about 256 rows, an FFN of 256 x 1024; forward, 1.0 is the dense FFN):
one pair of loops per matmul, with the hidden layer in memory between them: 1.6; tiles of one size: 1.2; a ragged tile chosen
by `lax.switch`, which copies the output at every turn: 1.6 to 4.4; loops of one turn or none whose trip count XLA can see,
which it turns into running all of them and selecting: 1.6 to 2.1; sums of gradients kept per group and copied out: 1.8 instead of
1.35 with the backward pass. This form: 1.0.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

Step = Callable[[Any, tuple[Array, ...], Array | None], tuple[tuple[Array, ...], Any]]


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def grouped_map(
    function: Callable[[Any, Array], Array],
    params: Any,
    x: Float[Array, "m d"],
    group_sizes: Int[Array, "e"],
    stored: Int[Array, "e"],
) -> Float[Array, "m f"]:
    """`y[rows of group i] = function(params of group i, x[rows of group i])`; rows past the last group give zero.

    The derivative computes `function` again, tile by tile, instead of keeping what it had in between; it adds up the gradients
    of a group's parameters in float32 and writes them once.

    Args:
      function: of one group's parameters (a leading axis of size 1) and rows [t, d]; each row's result depends on that row only.
        Static: it must not close over traced values.
      params: pytree of arrays with a leading axis of stored groups.
      x: rows sorted by group.
      group_sizes: rows of each group.
      stored: where in `params` each group's parameters are; several groups may share them.
    """
    f = jax.eval_shape(function, _slice(params, 0), jax.ShapeDtypeStruct((1, x.shape[1]), x.dtype))

    def step(mine: Any, tiles: tuple[Array, ...], inside: Array | None) -> tuple[tuple[Array, ...], None]:
        return (function(mine, tiles[0]),), None

    (y,), _ = over_groups(step, params, (x,), group_sizes, stored, outputs=((f.shape[1], f.dtype),))
    return y


def _fwd(function: Any, params: Any, x: Array, group_sizes: Array, stored: Array) -> tuple[Array, tuple[Any, ...]]:
    return grouped_map(function, params, x, group_sizes, stored), (params, x, group_sizes, stored)


def _bwd(function: Any, residuals: tuple[Any, ...], dy: Array) -> tuple[Any, Array, None, None]:
    params, x, group_sizes, stored = residuals

    def step(mine: Any, tiles: tuple[Array, ...], inside: Array | None) -> tuple[tuple[Array, ...], Any]:
        rows, grads = tiles if inside is None else (jnp.where(inside, a, 0) for a in tiles)
        _, pull = jax.vjp(function, mine, rows)
        dmine, drows = pull(grads)
        return (drows,), jax.tree.map(lambda a: a[0], dmine)

    sums = jax.tree.map(lambda p: jax.ShapeDtypeStruct(p.shape[1:], jnp.float32), params)
    (dx,), totals = over_groups(step, params, (x, dy), group_sizes, stored, outputs=((x.shape[1], x.dtype),), sums=sums)
    return jax.tree.map(lambda t, p: t.astype(p.dtype), totals, params), dx, None, None


grouped_map.defvjp(_fwd, _bwd)


def over_groups(
    step: Step,
    params: Any,
    rows: tuple[Array, ...],
    group_sizes: Int[Array, "e"],
    stored: Int[Array, "e"],
    first: Array | int = 0,
    outputs: tuple[tuple[int, Any], ...] = (),
    sums: Any = None,
) -> tuple[tuple[Array, ...], Any]:
    """The loops. `step(params of the group, tiles of rows, inside)` gives tiles of each output, and terms of each group's sums.

    `inside` [t, 1] says which rows of the tile are the group's, None if all are. Outputs may be anything in rows that are not:
    the next group's turn overwrites them, and rows past the last group are zeroed.

    Args:
      params: pytree with a leading axis of stored groups; `stored` maps groups to it.
      rows: arrays [m, .], sorted by group; group 0 starts at row `first`.
      outputs: width and dtype of each output [m, .].
      sums: pytree of shapes and dtypes; None for no sums.

    Returns:
      The outputs, zero in rows of no group, and the sums with a leading axis like that of `params` (e without any): each
      adds up the groups that are stored there, zero if those are empty.
    """
    m, e = rows[0].shape[0], group_sizes.shape[0]
    num_stored = next((p.shape[0] for p in jax.tree.leaves(params)), e)
    tiles = tile_sizes(m, e)
    padding = tiles[0]
    loop = partial(_loop, step, tiles)
    loop.__name__ = f"grouped_rows_{m}_{tiles[0]}"  # for moejax.train.flops: no jaxpr tells how often such loops turn
    ends = first + jnp.cumsum(group_sizes)
    written, totals = jax.jit(loop)(
        params,
        tuple(jnp.pad(a, ((0, padding), (0, 0))) for a in rows),
        ends - group_sizes,
        group_sizes,
        stored,
        tuple(jnp.zeros((m + padding, width), dtype) for width, dtype in outputs),
        jax.tree.map(lambda s: jnp.zeros((num_stored, *s.shape), s.dtype), sums),
    )
    row = jnp.arange(m)
    mine = ((row >= first) & (row < ends[-1]))[:, None]
    return tuple(jnp.where(mine, y[:m], 0) for y in written), totals


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


def _loop(
    step: Step, tiles: tuple[int, ...], params: Any, rows: tuple[Array, ...], starts: Array, sizes: Array, stored: Array,
    outputs: tuple[Array, ...], totals: Any,
) -> tuple[tuple[Array, ...], Any]:  # fmt: skip
    busy = jnp.argsort(sizes == 0, stable=True)
    # Read from memory, where XLA cannot see that a loop turns at most once: it would run its body always, and select.
    turns = schedule(sizes, tiles)

    def group(turn: Array, carry: tuple[Any, Any]) -> tuple[Any, Any]:
        i = busy[turn]
        home = stored[i]
        mine = _slice(params, home)
        at, end = starts[i], starts[i] + sizes[i]
        for j, tile in enumerate(tiles):

            def one(t: Array, carry: tuple[Any, Any], at: Array = at, tile: int = tile, whole: bool = False) -> tuple[Any, Any]:
                outputs, totals = carry
                start = at + t * tile
                inside = None if whole else (start + jnp.arange(tile) < end)[:, None]
                written, terms = step(
                    mine, tuple(jax.lax.dynamic_slice(a, (start, 0), (tile, a.shape[1])) for a in rows), inside
                )
                outputs = tuple(
                    jax.lax.dynamic_update_slice(y, w.astype(y.dtype), (start, 0))
                    for y, w in zip(outputs, written, strict=True)
                )
                return outputs, jax.tree.map(partial(_add_at, home), totals, terms)

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
