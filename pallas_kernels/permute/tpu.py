"""Sums of gathered rows on TPU: rows by indexed copies from HBM, the next tile's under way while this one's are summed.

A tile's indices lie in scalar memory. Each starts one copy of a row from HBM into VMEM, and one wait covers the tile. VMEM holds
the gathered rows of two tiles, `2 * tile * k * d * 4` bytes, and two tiles of each input and output, `tile * d * itemsize` each;
`tile_tokens` sizes the tile by what has to be under way to hide the latency of HBM.

HBM keeps bfloat16 rows in pairs, interleaved in 32-bit words, and copies move words. So the copy of a bfloat16 row brings its
neighbour along: twice the bytes of the row are read, and the number of rows must be even.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Float, Int

from pallas_kernels.chips import TPUS, Tpu
from pallas_kernels.implementations import current_chip

_LATENCY = 1.5e-6  # seconds from the start of a copy from HBM to its end, about
_BUFFERS = 32 << 20  # bytes of VMEM for gathered rows, at most
_STEP = 16  # rows worked on at once: whole registers of either dtype
_LANES = 512  # columns worked on at once, so that sums stay in registers


def refuses(num_rows: int, d: int, dtype: jnp.dtype, k: int) -> str | None:
    """Why k at a time of these rows cannot be gathered, or None."""
    if dtype not in (jnp.float32, jnp.bfloat16):
        return f"rows are {dtype}, not float32 or bfloat16"
    if dtype == jnp.bfloat16 and num_rows % 2:
        return f"it reads bfloat16 rows in pairs, and there are {num_rows}"
    if _buffer_bytes(_STEP, k, d) > _BUFFERS:
        return f"k={k} rows of width {d} for each of {_STEP} tokens are too many for VMEM"
    return None


def _chip() -> Tpu:
    return TPUS.get(current_chip().kind, TPUS["v5e"])


def tile_tokens(n: int, k: int, d: int) -> int:
    """Tokens of a tile: as many as have to be under way, in whole steps, and no more than there are."""
    wanted = int(_chip().bandwidth * _LATENCY) // (4 * k * d)
    return max(_STEP, min(wanted // _STEP * _STEP, pl.cdiv(n, _STEP) * _STEP, 512))


def _buffer_bytes(tile: int, k: int, d: int) -> int:
    return 2 * tile * k * d * 4


def gather_sum(
    source: Float[Array, "s d"],
    index: Int[Array, "n k"],
    weight: Float[Array, "n k"] | None,
    tile: int | None = None,
    interpret: bool = False,
) -> Float[Array, "n d"]:
    """See the package."""
    (n, k), d = index.shape, source.shape[1]
    weight = jnp.ones((n, k)) if weight is None else weight
    return _gather(_sum, source, index, weight, [], [(d, source.dtype)], tile, interpret, "gather_sum")[0]


def gather_scale_dot(
    source: Float[Array, "s d"],
    index: Int[Array, "m"],
    rows: Float[Array, "m d"],
    weight: Float[Array, "m"],
    tile: int | None = None,
    interpret: bool = False,
) -> tuple[Float[Array, "m d"], Float[Array, "m"]]:
    """See the package. The dots leave as a column, which HBM pads to 512 bytes a row."""
    outputs = [(rows.shape[1], source.dtype), (1, jnp.float32)]
    scaled, dots = _gather(
        _scale_dot, source, index[:, None], weight[:, None], [rows], outputs, tile, interpret, "gather_scale_dot"
    )
    return scaled, dots[:, 0]


class _Step(NamedTuple):
    """What a step sees of its tile: which rows it works on, and the gathered rows and weights of each choice."""

    rows: Any
    read: Callable[[int, slice], Array]
    weight: Callable[[int], Array]
    k: int


def _sum(step: _Step, y_ref: Any) -> None:
    for columns in _columns(y_ref.shape[1]):
        total = jnp.zeros((_STEP, columns.stop - columns.start), jnp.float32)
        for j in range(step.k):
            # Selected and not only multiplied: what an unused entry's row holds does not matter.
            total += jnp.where(step.weight(j) != 0, step.weight(j) * step.read(j, columns), 0)
        y_ref[step.rows, columns] = total.astype(y_ref.dtype)


def _scale_dot(step: _Step, rows_ref: Any, scaled_ref: Any, dots_ref: Any) -> None:
    dots = jnp.zeros((_STEP, 1), jnp.float32)
    for columns in _columns(rows_ref.shape[1]):
        gathered = step.read(0, columns)
        scaled_ref[step.rows, columns] = (step.weight(0) * gathered).astype(scaled_ref.dtype)
        dots += jnp.sum(gathered * rows_ref[step.rows, columns].astype(jnp.float32), axis=1, keepdims=True)
    dots_ref[step.rows, :] = dots


def _columns(d: int) -> list[slice]:
    return [slice(c, min(c + _LANES, d)) for c in range(0, d, _LANES)]


def _gather(
    work: Callable[..., None],
    source: Array,
    index: Array,
    weight: Array,
    inputs: list[Array],
    outputs: list[tuple[int, Any]],
    tile: int | None,
    interpret: bool,
    name: str,
) -> Sequence[Array]:
    """Runs `work(step, *blocks of inputs, *blocks of outputs)` over tiles of gathered rows."""
    (n, k), d = index.shape, source.shape[1]
    tile = tile or tile_tokens(n, k, d)
    tiles = pl.cdiv(n, tile)
    cores = min(_chip().cores, tiles)
    turns = pl.cdiv(tiles, cores)
    paired = source.dtype == jnp.bfloat16
    weight = weight.astype(jnp.float32)
    if paired:
        weight = jnp.concatenate([weight, (index % 2).astype(jnp.float32)], axis=1)
        index = index // 2
        # The interpreter has no arrays under another type.
        source = _words(source) if interpret else source
    # Choice after choice within a tile, so that each choice's rows lie together.
    index = jnp.pad(index, ((0, tiles * tile - n), (0, 0))).reshape(tiles, tile, k).swapaxes(1, 2).reshape(tiles, 1, k * tile)

    def tile_at(core: Array, turn: Array) -> Array:
        # With an odd number of tiles the second core does its last one twice.
        return jnp.minimum(core * turns + turn, tiles - 1)

    def indices(ahead: int) -> pl.BlockSpec:
        return pl.BlockSpec((None, 1, k * tile), lambda c, i: (tile_at(c, i + ahead), 0, 0), memory_space=pltpu.SMEM)

    def block(width: int) -> pl.BlockSpec:
        return pl.BlockSpec((tile, width), lambda c, i: (tile_at(c, i), 0))

    arrays = [weight, *inputs]
    moved = n * k * d * 4 + sum(a.size * a.dtype.itemsize for a in arrays)
    return pl.pallas_call(
        partial(_kernel, work, k, paired),
        grid=(cores, turns),
        in_specs=[indices(0), indices(1), pl.BlockSpec(memory_space=pl.ANY), *(block(a.shape[1]) for a in arrays)],
        out_specs=[block(width) for width, _ in outputs],
        out_shape=[jax.ShapeDtypeStruct((n, width), dtype) for width, dtype in outputs],
        scratch_shapes=[
            pltpu.VMEM((2, k * tile, d), jnp.uint32 if paired else jnp.float32),
            pltpu.SemaphoreType.DMA((2,)),
        ],
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "arbitrary"),
            # Rows, two tiles of each block at four bytes, and room for the compiler.
            vmem_limit_bytes=_buffer_bytes(tile, k + len(arrays) + len(outputs), d) + (8 << 20),
        ),
        cost_estimate=pl.CostEstimate(
            flops=3 * n * k * d,
            transcendentals=0,
            bytes_accessed=moved + sum(n * width * jnp.dtype(dtype).itemsize for width, dtype in outputs),
        ),
        interpret=pltpu.InterpretParams(detect_races=True) if interpret else False,
        name=name,
    )(index, index, source, *arrays)


def _words(rows: Array) -> Array:
    """Pairs of bfloat16 rows as rows of 32-bit words, the even row in the low half: what HBM holds."""
    pairs = rows.reshape(rows.shape[0] // 2, 2, rows.shape[1]).swapaxes(1, 2)
    return jax.lax.bitcast_convert_type(pairs, jnp.uint32)


def _kernel(
    work: Callable[..., None], k: int, paired: bool, now: Any, after: Any, source: Any, weights: Any, *refs: Any
) -> None:
    *blocks, buffer, arrived = refs
    i, tile = pl.program_id(1), weights.shape[0]
    words = source.bitcast(jnp.uint32) if source.dtype == jnp.bfloat16 else source

    def fetch(indices: Any, slot: Array) -> None:
        def start(r: Array, _: None) -> None:
            row = words.at[pl.ds(indices[0, r], 1)]
            pltpu.make_async_copy(row, buffer.at[slot, pl.ds(r, 1)], arrived.at[slot]).start()

        jax.lax.fori_loop(0, k * tile, start, None, unroll=8)

    slot = i % 2
    pl.when(i == 0)(lambda: fetch(now, slot))
    pl.when(i + 1 < pl.num_programs(1))(lambda: fetch(after, 1 - slot))
    # A semaphore counts bytes: one wait for a whole tile is a wait for all its rows.
    pltpu.make_async_copy(buffer.at[slot], buffer.at[slot], arrived.at[slot]).wait()

    def step(s: Array, _: None) -> None:
        rows = pl.ds(pl.multiple_of(s * _STEP, _STEP), _STEP)

        def read(j: int, columns: slice) -> Array:
            values = buffer[slot, pl.ds(pl.multiple_of(j * tile + s * _STEP, _STEP), _STEP), columns]
            if not paired:
                return values
            # A word holds the even row in its low half; a bfloat16 is the high half of a float32.
            odd = weights[rows, k + j : k + j + 1] > 0
            return pltpu.bitcast(jnp.where(odd, values & jnp.uint32(0xFFFF0000), values << 16), jnp.float32)

        work(_Step(rows, read, lambda j: weights[rows, j : j + 1], k), *blocks)

    jax.lax.fori_loop(0, tile // _STEP, step, None)
