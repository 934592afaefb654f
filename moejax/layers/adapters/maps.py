"""Linear layers as one matrix: which of their input, kernel and output is what it multiplies, itself, and what it gives."""

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import numpy as np
from jaxtyping import Array, Float


@dataclasses.dataclass(frozen=True, eq=False)
class LinearMap:
    """`put(rows(x) @ matrix(kernel)) = layer(x)`, but for the bias.

    Attributes:
      kind: of the layer.
      stored: shape of the kernel.
      inner: axes of the kernel that are summed over, in the order in which `rows` has them.
      outer: its other axes, in the order in which `put` takes them.
      rows: from the layer's input to vectors `[*b, d]`.
      put: from vectors `[*b, o]` to the layer's output.
    """

    kind: str
    stored: tuple[int, ...]
    inner: tuple[int, ...]
    outer: tuple[int, ...]
    rows: Callable[[Array], Array]
    put: Callable[[Array], Array]

    @property
    def shape(self) -> tuple[int, int]:
        """(d, o)."""
        return math.prod(self.stored[i] for i in self.inner), math.prod(self.stored[i] for i in self.outer)

    @property
    def unnamed(self) -> tuple[None, ...]:
        """Logical axis names of a kernel that has none."""
        return (None,) * len(self.stored)

    def matrix(self, kernel: Array) -> Float[Array, "d o"]:
        """The kernel as a matrix."""
        return kernel.transpose(*self.inner, *self.outer).reshape(self.shape)

    def kernel(self, matrix: Float[Array, "d o"]) -> Array:
        """The matrix as a kernel."""
        order = (*self.inner, *self.outer)
        return matrix.reshape([self.stored[i] for i in order]).transpose(np.argsort(order).tolist())

    def vector(self, bias: Array) -> Float[Array, "o"]:
        """The bias, one number for each column of the matrix."""
        return bias.reshape(-1)  # Its axes come in the order of the output's, and so do `outer`.


def linear_map(module: nn.Module, x: Any) -> LinearMap | None:
    """How a linear layer maps `x`; None if `module` is no layer that is one matrix (grouped or masked convolutions, per-head maps)."""
    if isinstance(module, nn.Dense):
        return LinearMap("dense", (x.shape[-1], module.features), (0,), (1,), _same, _same)
    if isinstance(module, nn.DenseGeneral):
        return _dense_general(module, x)
    if isinstance(module, nn.Einsum):
        return _einsum(module, x)
    if isinstance(module, nn.Conv):
        return _conv(module, x)
    return None


def _dense_general(module: nn.DenseGeneral, x: Array) -> LinearMap | None:
    if module.batch_dims:
        return None
    features = _tuple(module.features)
    axes = tuple(axis % x.ndim for axis in _tuple(module.axis))
    kept = [axis for axis in range(x.ndim) if axis not in axes]
    inner = tuple(range(len(axes)))
    return LinearMap(
        "dense_general",
        (*(x.shape[axis] for axis in axes), *features),
        inner,
        tuple(range(len(axes), len(axes) + len(features))),
        lambda x: x.transpose(*kept, *axes).reshape(*(x.shape[axis] for axis in kept), -1),
        lambda y: y.reshape(*y.shape[:-1], *features),
    )


def _einsum(module: nn.Einsum, x: Array) -> LinearMap | None:
    if module.einsum_str is None:
        return None
    inputs, output = module.einsum_str.replace(" ", "").split("->")
    left, right = inputs.split(",")
    if "." in right:
        return None
    # An ellipsis of the input is as many letters that nobody uses.
    spare = [letter for letter in "ABCDEFGHIJKLMNOPQRSTUVWXYZ" if letter not in module.einsum_str]
    missing = "".join(spare[: x.ndim - len(left.replace("...", ""))])
    left, output = left.replace("...", missing), output.replace("...", missing)
    inner = [letter for letter in right if letter in left and letter not in output]
    outer = [letter for letter in output if letter in right and letter not in left]
    kept = [letter for letter in output if letter in left and letter not in right]
    if len(inner) + len(outer) != len(right) or len(inner) + len(kept) != len(left) or len(set(right)) < len(right):
        return None  # An axis of input, kernel and output alike, or one that is summed alone: not one matrix.
    sizes = [module.shape[right.index(letter)] for letter in outer]
    return LinearMap(
        "einsum",
        tuple(module.shape),
        tuple(right.index(letter) for letter in inner),
        tuple(right.index(letter) for letter in outer),
        lambda x: x.transpose([left.index(letter) for letter in [*kept, *inner]]).reshape(
            *(x.shape[left.index(letter)] for letter in kept), -1
        ),
        lambda y: y.reshape(*y.shape[:-1], *sizes).transpose([[*kept, *outer].index(letter) for letter in output]),
    )


def _conv(module: nn.Conv, x: Array) -> LinearMap | None:
    size = _tuple(module.kernel_size)
    if module.feature_group_count != 1 or module.mask is not None or module.padding in ("CIRCULAR", "CAUSAL", "REFLECT"):
        return None
    batch = x.ndim - len(size) - 1

    def every(value: Any) -> tuple[int, ...]:
        return (value or 1,) * len(size) if value is None or isinstance(value, int) else tuple(value)

    def padding() -> Any:
        if isinstance(module.padding, str):
            return module.padding
        each = (module.padding,) * len(size) if isinstance(module.padding, int) else module.padding
        return [(pad, pad) if isinstance(pad, int) else tuple(pad) for pad in each]

    def patches(x: Array) -> Array:
        flat = x.reshape(-1, *x.shape[batch:])
        last = (0, x.ndim - batch, *range(1, x.ndim - batch))
        numbers = jax.lax.ConvDimensionNumbers(last, (len(size) + 1, len(size), *range(len(size))), last)
        rows = jax.lax.conv_general_dilated_patches(
            flat, size, every(module.strides), padding(), every(module.input_dilation), every(module.kernel_dilation), numbers
        )
        return rows.reshape(*x.shape[:batch], *rows.shape[1:])

    # Patches come channel by channel.
    inner = (len(size), *range(len(size)))
    return LinearMap("conv", (*size, x.shape[-1], module.features), inner, (len(size) + 1,), patches, _same)


def _same(x: Array) -> Array:
    return x


def _tuple(value: Any) -> tuple[int, ...]:
    return (value,) if isinstance(value, int) else tuple(value)
