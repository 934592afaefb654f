"""Experts as a value: what a bank returns, dispatch executes, and surgery, adapters and analysis look at, slice, replace and wrap.

experts = FFN(hidden=64, num_experts=8).apply(variables, 32)   # or bank(32, ctx) inside a module: 32 is the width of its tokens
experts.params["w_in"].shape                                   # (8, 32, 64): experts come first on every leaf
y = dispatch(plan, experts, x)                                 # on any backend and mesh
y = dispatch(plan, experts.wrap(before=norm, after=jnp.tanh), x)
two = experts[2:4]                                             # some of them, or experts[[0, 0, 1]]: shared ones
half = experts.replace(params=jax.tree.map(lambda p: p.astype(jnp.bfloat16), experts.params))
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from moejax.core.errors import ConfigError
from moejax.dispatch.layout import Batched, Function, Layout

Rows: TypeAlias = Callable[[Array], Array]
# Parameters by name: arrays, or what a layout multiplies like one (a sum of a matrix and low-rank ones, around which adapters are).
Matrices: TypeAlias = Mapping[str, Any]


@jax.tree_util.register_pytree_node_class
@dataclasses.dataclass(frozen=True)
class Experts:
    """e experts: a function of rows, and the parameters of each. A pytree whose leaves are `params` and `key`.

    Attributes:
      function: `function(params, rows, layout)`, or `function(params, rows, layout, key)` where there is a key. Pure, and row by row:
        it works with `layout.dot`, `layout.take` and elementwise operations on whatever share of the experts it is given, closes over no
        traced value, keeps no statistics and draws only from `key`. Rows that are nobody's are zeros: value and derivative must be
        finite there.
      params: pytree with the experts on every leaf's first axis; may be empty.
      axes: logical axis names of every leaf, in a pytree like `params`. None: only the experts are spread over devices.
      summed: logical axis that outputs are sums over ('mlp' in a feed-forward expert), so that devices may each compute a piece and
        add up. Leaves without it are terms of that sum of their own, as an output bias is. None where outputs are no such sum.
      key: for experts that draw; each row, chunk and device draws its own.
      num_experts: e; only to be given where no parameter tells.
      light: so cheap that a token had better stay where it is: nothing is sorted or exchanged for them unless a backend is named.
      fold: for parameters that may be neither averaged nor cut into pieces as they are, because the function multiplies them with each
        other: gives the same experts with parameters that may. See `folded`.
    """

    function: Function
    params: Any
    axes: Any = None
    summed: str | None = None
    key: Any = None
    num_experts: int = 0
    light: bool = False
    fold: Callable[["Experts"], "Experts"] | None = None

    def __post_init__(self) -> None:
        leaves = jax.tree.leaves(self.params)
        if not self.num_experts:
            if not leaves:
                raise ConfigError("experts without parameters do not tell how many they are; give Experts its num_experts")
            object.__setattr__(self, "num_experts", int(leaves[0].shape[0]))

    @property
    def parts(self) -> tuple["Experts", ...]:
        """Experts of one kind are one part; see `MixedExperts`."""
        return (self,)

    def run(self, x: Float[Array, "*m d"], layout: Layout) -> Float[Array, "*m f"]:
        """The experts on rows that lie as `layout` says."""
        return layout.map(self.function, self.params, x, self.key)

    def folded(self) -> "Experts":
        """The same experts with parameters that may be averaged over experts, and cut into pieces where outputs are `summed`."""
        return self if self.fold is None else self.fold(self)

    def replace(self, **fields: Any) -> "Experts":
        """The same with some fields replaced; other parameters tell anew how many experts there are."""
        if jax.tree.leaves(fields.get("params")):
            fields = {"num_experts": 0, **fields}
        return dataclasses.replace(self, **fields)

    def __getitem__(self, index: Any) -> "Experts":
        """Some of the experts: an index, a slice, a mask, or an array of indices, in which one may come twice."""
        picked = index if isinstance(index, jax.Array) else np.atleast_1d(np.arange(self.num_experts)[index])
        at = index if isinstance(index, slice) else picked
        return dataclasses.replace(self, params=jax.tree.map(lambda p: p[at], self.params), num_experts=picked.shape[0])

    def wrap(self, before: Rows | None = None, after: Rows | None = None) -> "Experts":
        """Experts that compute `after(expert(before(rows)))`; both are functions of rows, such as a norm or a nonlinearity.

        What comes `after` need not be linear, so outputs are no longer added up from pieces (`summed`).
        """
        inner = self.function

        def function(params: Any, x: Array, layout: Layout, *key: Array) -> Array:
            y = inner(params, x if before is None else before(x), layout, *key)
            return y if after is None else after(y)

        fold = self.fold and (lambda experts: self.fold(experts.replace(function=inner)).wrap(before, after))
        return self.replace(function=function, summed=self.summed if after is None else None, fold=fold)

    def tree_flatten(self) -> tuple[tuple[Any, Any], tuple[Any, ...]]:
        names, structure = jax.tree.flatten(self.axes, is_leaf=_is_names)
        return (self.params, self.key), (
            self.function,
            tuple(names),
            structure,
            self.summed,
            self.num_experts,
            self.light,
            self.fold,
        )

    @classmethod
    def tree_unflatten(cls, static: tuple[Any, ...], leaves: tuple[Any, Any]) -> "Experts":
        function, names, structure, summed, num_experts, light, fold = static
        return cls(function, leaves[0], jax.tree.unflatten(structure, names), summed, leaves[1], num_experts, light, fold)


@jax.tree_util.register_pytree_node_class
@dataclasses.dataclass(frozen=True)
class MixedExperts:
    """Experts of several kinds and sizes, numbered one part after another; dispatch runs each part on its share of a plan."""

    parts: tuple[Experts, ...]

    @property
    def num_experts(self) -> int:
        return sum(part.num_experts for part in self.parts)

    def run(self, x: Float[Array, "e c d"], layout: Layout) -> Float[Array, "e c f"]:
        """Every expert on rows of its own: experts of several kinds know no other layout."""
        if not isinstance(layout, Batched):
            raise ConfigError(
                f"experts of several kinds do not run on {type(layout).__name__} rows; hand them to dispatch(plan, experts, x)"
            )
        ends = np.cumsum([part.num_experts for part in self.parts])
        rows = jnp.split(x, ends[:-1])
        ys = [None if part.function is nothing else part.run(r, layout) for part, r in zip(self.parts, rows, strict=True)]
        like = next((y for y in ys if y is not None), x)
        zeros = [jnp.zeros((*r.shape[:-1], like.shape[-1]), like.dtype) for r in rows]
        return jnp.concatenate([zero if y is None else y for y, zero in zip(ys, zeros, strict=True)])

    def wrap(self, before: Rows | None = None, after: Rows | None = None) -> "MixedExperts":
        """See `Experts.wrap`."""
        return MixedExperts(tuple(part.wrap(before, after) for part in self.parts))

    def tree_flatten(self) -> tuple[tuple[Experts, ...], None]:
        return self.parts, None

    @classmethod
    def tree_unflatten(cls, static: None, parts: Any) -> "MixedExperts":
        return cls(tuple(parts))


AnyExperts: TypeAlias = Experts | MixedExperts


def nothing(params: Any, x: Float[Array, "*m d"], layout: Layout) -> Float[Array, "*m d"]:
    """The function of null experts. Dispatch knows it and leaves out what only it would get."""
    return jnp.zeros_like(x)


def _is_names(value: Any) -> bool:
    return isinstance(value, tuple) and all(name is None or isinstance(name, str) for name in value)
