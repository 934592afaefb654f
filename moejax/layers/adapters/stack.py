"""Banks of experts whose matrices have low-rank matrices beside them, on every layout of rows."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Float

from moejax.dispatch.experts import Experts
from moejax.dispatch.layout import Activation, Function, Layout


@dataclasses.dataclass(frozen=True, eq=False)
class LowRankSum:
    """The matrices `w + sum of a b` of e experts, never multiplied out unless they have to be.

    Attributes:
      w: the frozen matrices.
      terms: pairs of factors.
      axes: logical axis names of every pair.
    """

    w: Float[Array, "e d f"]
    terms: tuple[tuple[Float[Array, "e d r"], Float[Array, "e r f"]], ...] = ()
    axes: tuple[tuple[tuple[str | None, ...], tuple[str | None, ...]], ...] = ()

    def plus(self, a: Float[Array, "e d r"], b: Float[Array, "e r f"], inner: str | None, outer: str | None) -> "LowRankSum":
        """With one more term; `inner` and `outer` name the axes d and f."""
        names = (("expert", inner, "rank"), ("expert", "rank", outer))
        return dataclasses.replace(self, terms=(*self.terms, (a, b)), axes=(*self.axes, names))

    def dense(self) -> Float[Array, "e d f"]:
        """One matrix for each expert."""
        products = (jnp.matmul(a, b, precision="highest") for a, b in self.terms)
        return self.w + sum(products).astype(self.w.dtype)


def with_matrices(experts: Experts, changed: Mapping[str, Any]) -> Experts:
    """Experts with other matrices: name -> an array, or a `LowRankSum`, whose terms then are parameters of their own."""
    whole = {name: value for name, value in changed.items() if not isinstance(value, LowRankSum)}
    sums = {name: value for name, value in changed.items() if isinstance(value, LowRankSum)}
    base = {**experts.params, **whole, **{name: value.w for name, value in sums.items()}}
    if not sums:
        return experts.replace(params=base)
    beside = {name: _named(value.terms) for name, value in sums.items()}
    axes = (
        None if experts.axes is None else {"base": experts.axes, "beside": {n: _named(value.axes) for n, value in sums.items()}}
    )
    # The factors of one term have no pieces that add up: devices that share an expert multiply its matrices out (`fold`).
    return experts.replace(
        function=_Extended(experts.function),
        params={"base": base, "beside": beside},
        axes=axes,
        summed=None,
        fold=_Fold(experts.function, experts.summed),
    )


@dataclasses.dataclass(frozen=True)
class _Extended:
    """The experts' own function, on matrices that are sums."""

    function: Function

    def __call__(self, params: Mapping[str, Any], x: Array, layout: Layout, *key: Array) -> Array:
        return self.function({**params["base"], **_sums(params)}, x, _OfSums(layout), *key)


@dataclasses.dataclass(frozen=True)
class _Fold:
    """Experts with their matrices multiplied out: what averaging and cutting to pieces need."""

    function: Function
    summed: str | None

    def __call__(self, experts: Experts) -> Experts:
        params = {**experts.params["base"], **{name: value.dense() for name, value in _sums(experts.params).items()}}
        axes = None if experts.axes is None else experts.axes["base"]
        return experts.replace(function=self.function, params=params, axes=axes, summed=self.summed, fold=None)


@dataclasses.dataclass(frozen=True)
class _OfSums(Layout):
    """A layout whose matrices may be sums: rows go through both parts."""

    rows: Layout

    def dot(self, x: Array, w: Any) -> Array:
        if not isinstance(w, LowRankSum):
            return self.rows.dot(x, w)
        return sum((self.rows.low_rank(x, a, b) for a, b in w.terms), self.rows.dot(x, w.w))

    def take(self, b: Array) -> Array:
        return self.rows.take(b)

    def glu(self, x: Array, w_gate: Any, w_up: Any, activation: Activation) -> Array:
        if isinstance(w_gate, LowRankSum) or isinstance(w_up, LowRankSum):
            return activation(self.dot(x, w_gate)) * self.dot(x, w_up)
        return self.rows.glu(x, w_gate, w_up, activation)

    def low_rank(self, x: Array, a: Any, b: Any) -> Array:
        if isinstance(a, LowRankSum) or isinstance(b, LowRankSum):
            return self.dot(self.dot(x, a), b)
        return self.rows.low_rank(x, a, b)


def _named(pairs: tuple[tuple[Any, Any], ...]) -> dict[str, Any]:
    return {f"{name}_{i}": value for i, pair in enumerate(pairs) for name, value in zip("ab", pair, strict=True)}


def _sums(params: Mapping[str, Any]) -> dict[str, LowRankSum]:
    return {
        name: LowRankSum(params["base"][name], tuple((terms[f"a_{i}"], terms[f"b_{i}"]) for i in range(len(terms) // 2)))
        for name, terms in params["beside"].items()
    }
