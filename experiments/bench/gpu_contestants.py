"""What `gpu_kernels` lets compete: for each of our GPU kernels its peers, one dense product of the same FLOPs, and NumPy to check it.

All are functions of the operation's operands and the rows of each group.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from pallas_kernels.grouped_glu import gpu as glu
from pallas_kernels.grouped_matmul import gpu
from pallas_kernels.grouped_matmul.gpu import Table, Tiles

Sides = tuple[tuple[int, ...], ...]


@dataclass(frozen=True)
class Shape:
    """Sizes of a grouped product: m rows of width d in e groups, times matrices [d, f].

    `skewed` gives group i a share of 1 / (i + 1), as an untrained router may; otherwise groups are equal.
    """

    name: str
    m: int
    d: int
    f: int
    e: int
    dtype: str = "bfloat16"
    skewed: bool = False

    def sizes(self) -> np.ndarray:
        """Rows of each group; they sum to m."""
        share = 1 / np.arange(1, self.e + 1) if self.skewed else np.ones(self.e)
        ends = np.round(np.cumsum(share / share.sum()) * self.m).astype(np.int32)
        return np.diff(ends, prepend=0).astype(np.int32)


SHAPES = {
    s.name: s
    for s in (
        Shape("mixtral", m=16384, d=4096, f=14336, e=8),
        Shape("olmoe", m=65536, d=2048, f=1024, e=64),
        Shape("skewed", m=65536, d=2048, f=1024, e=64, skewed=True),
        Shape("fine", m=16384, d=7168, f=2048, e=32),
        Shape("short", m=2048, d=2048, f=1024, e=64),
        Shape("decode", m=512, d=2048, f=1024, e=64),
        Shape("float32", m=8192, d=1024, f=1024, e=16, dtype="float32"),
    )
}


@dataclass(frozen=True)
class Operation:
    """One kernel and its peers.

    Attributes:
      name: its key in the tuning table.
      table: that table.
      sides: shapes of the operands.
      rows: how many of the operands are rows, and so differ from call to call.
      tiles_read: tiles of [rows, depth] and of [depth, columns] that a step of the kernel reads.
      sums: accumulators of a program.
      products: grouped products, of 2 m d f FLOPs each.
      ours: (tiles, or None for those of the table; interpret) -> function.
      ragged: grouped products of somebody else's: takes a function like `jax.lax.ragged_dot_general` first.
      dense: a dense product of the same FLOPs, which takes the first matrix for all rows.
      torch: takes the torch module first, and the ends of the groups on the device last.
      exact: in NumPy.
    """

    name: str
    table: dict[str, Table]
    sides: Callable[[Shape], Sides]
    rows: int
    tiles_read: tuple[int, int]
    sums: int
    products: int
    ours: Callable[[Tiles | None, bool], Callable[..., Array]]
    ragged: Callable[..., Array]
    dense: Callable[..., Array]
    torch: Callable[..., Any]
    exact: Callable[..., np.ndarray]

    def flops(self, shape: Shape) -> int:
        return 2 * shape.m * shape.d * shape.f * self.products

    def bucket(self, shape: Shape, chip: str) -> tuple[str, int, int | float]:
        """The key that the tuning table has for a shape."""
        size, mean = jnp.dtype(shape.dtype).itemsize, shape.m / shape.e
        known = self.table["default"] | self.table.get(chip, {})
        return min(key for key in known if key[:2] == (self.name, size) and mean <= key[2])


def ours_gmm(tiles: Tiles | None, interpret: bool) -> Callable[..., Array]:
    return lambda x, w, sizes: gpu.gmm(x, w, sizes, jnp.int32(0), False, tiles, interpret)


def ours_tgmm(tiles: Tiles | None, interpret: bool) -> Callable[..., Array]:
    return lambda x, dy, sizes: gpu.tgmm(x, dy, sizes, jnp.int32(0), len(sizes), x.dtype, tiles, interpret)


def ours_glu(tiles: Tiles | None, interpret: bool) -> Callable[..., Array]:
    return lambda x, w_gate, w_up, sizes: glu.glu(x, w_gate, w_up, sizes, jnp.int32(0), jax.nn.silu, tiles, interpret)


def ours_glu_dx(tiles: Tiles | None, interpret: bool) -> Callable[..., Array]:
    def dx(dgate: Array, dup: Array, w_gate: Array, w_up: Array, sizes: Array) -> Array:
        grads, matrices = [dgate, dup], [w_gate, w_up]
        (m, f), d = dgate.shape, w_gate.shape[1]
        chosen = tiles or gpu.tiles_for("glu_dx", dgate.dtype, m, len(sizes), glu.TILES).within(columns=d, depth=f)
        return gpu.gmm_sum(grads, matrices, sizes, jnp.int32(0), True, chosen, interpret, "grouped_glu_dx")

    return dx


def ragged(
    general: Callable[..., Array],
    x: Array,
    y: Array,
    sizes: Array,
    contract: tuple[int, int] = (1, 1),
    group: tuple[int, ...] = (0,),
) -> Array:
    numbers = jax.lax.RaggedDotDimensionNumbers((((contract[0],), (contract[1],)), ((), ())), [0], list(group))
    return general(x, y, sizes, numbers)


def tokamax_general() -> Callable[..., Array]:
    """Tokamax's grouped product by its Mosaic GPU kernels.

    Raises:
      ImportError: it is not installed.
    """
    import tokamax

    return partial(tokamax.ragged_dot_general, implementation="mosaic")


def torch_grouped(torch: Any, x: Any, w: Any, sizes: np.ndarray, ends: Any) -> Any:
    if x.dtype == torch.bfloat16 and hasattr(torch, "_grouped_mm"):
        return torch._grouped_mm(x, w, offs=ends)
    return torch.cat([rows @ w[i] for i, rows in enumerate(torch.split(x, sizes.tolist()))])


def torch_tgmm(torch: Any, x: Any, dy: Any, sizes: np.ndarray, ends: Any) -> Any:
    if x.dtype == torch.bfloat16 and hasattr(torch, "_grouped_mm"):
        return torch._grouped_mm(x.T, dy, offs=ends)
    pairs = zip(torch.split(x, sizes.tolist()), torch.split(dy, sizes.tolist()), strict=True)
    return torch.stack([rows.T @ grads for rows, grads in pairs])


def torch_glu(torch: Any, x: Any, w_gate: Any, w_up: Any, sizes: np.ndarray, ends: Any) -> Any:
    gate, up = (torch_grouped(torch, x, w, sizes, ends) for w in (w_gate, w_up))
    return torch.nn.functional.silu(gate) * up


def torch_glu_dx(torch: Any, dgate: Any, dup: Any, w_gate: Any, w_up: Any, sizes: np.ndarray, ends: Any) -> Any:
    pairs = ((dgate, w_gate), (dup, w_up))
    from_gate, from_up = (torch_grouped(torch, a, w.swapaxes(1, 2), sizes, ends) for a, w in pairs)
    return from_gate + from_up


def exact_gmm(x: np.ndarray, w: np.ndarray, sizes: np.ndarray) -> np.ndarray:
    *groups, rest = np.split(x, np.cumsum(sizes))
    return np.concatenate([*(rows @ w[i] for i, rows in enumerate(groups)), np.zeros((len(rest), w.shape[2]))])


def exact_tgmm(x: np.ndarray, dy: np.ndarray, sizes: np.ndarray) -> np.ndarray:
    pairs = zip(np.split(x, np.cumsum(sizes))[:-1], np.split(dy, np.cumsum(sizes))[:-1], strict=True)
    return np.stack([rows.T @ grads for rows, grads in pairs])


def exact_glu(x: np.ndarray, w_gate: np.ndarray, w_up: np.ndarray, sizes: np.ndarray) -> np.ndarray:
    gate, up = (exact_gmm(x, w, sizes) for w in (w_gate, w_up))
    return gate / (1 + np.exp(-gate)) * up


def exact_glu_dx(dgate: np.ndarray, dup: np.ndarray, w_gate: np.ndarray, w_up: np.ndarray, sizes: np.ndarray) -> np.ndarray:
    return exact_gmm(dgate, w_gate.swapaxes(1, 2), sizes) + exact_gmm(dup, w_up.swapaxes(1, 2), sizes)


OPERATIONS = (
    Operation(
        "gmm", gpu.TILES, lambda s: ((s.m, s.d), (s.e, s.d, s.f)), rows=1, tiles_read=(1, 1), sums=1, products=1,
        ours=ours_gmm,
        ragged=ragged,
        dense=lambda x, w, sizes: x @ w[0],
        torch=torch_grouped,
        exact=exact_gmm,
    ),
    Operation(
        "tgmm", gpu.TILES, lambda s: ((s.m, s.d), (s.m, s.f)), rows=2, tiles_read=(1, 1), sums=1, products=1,
        ours=ours_tgmm,
        ragged=lambda dot, x, dy, sizes: ragged(dot, x, dy, sizes, (0, 0), group=()),
        dense=lambda x, dy, sizes: x.T @ dy,
        torch=torch_tgmm,
        exact=exact_tgmm,
    ),
    Operation(
        "glu", glu.TILES, lambda s: ((s.m, s.d), *2 * ((s.e, s.d, s.f),)), rows=1, tiles_read=(1, 2), sums=2, products=2,
        ours=ours_glu,
        ragged=lambda dot, x, a, b, sizes: jax.nn.silu(ragged(dot, x, a, sizes)) * ragged(dot, x, b, sizes),
        dense=lambda x, a, b, sizes: jax.nn.silu(x @ a[0]) * (x @ b[0]),
        torch=torch_glu,
        exact=exact_glu,
    ),
    Operation(
        "glu_dx", glu.TILES, lambda s: (*2 * ((s.m, s.f),), *2 * ((s.e, s.d, s.f),)), rows=2, tiles_read=(2, 2), sums=1,
        products=2,
        ours=ours_glu_dx,
        ragged=lambda dot, x, y, a, b, sizes: ragged(dot, x, a, sizes, (1, 2)) + ragged(dot, y, b, sizes, (1, 2)),
        dense=lambda x, y, a, b, sizes: x @ a[0].T + y @ b[0].T,
        torch=torch_glu_dx,
        exact=exact_glu_dx,
    ),
)  # fmt: skip


def bound_text(bound: int | float) -> str:
    return "math.inf" if bound == math.inf else str(bound)
