"""Sowing: how a layer hands out what one call gave: losses, statistics, plans, and what controllers measure.

A batch may be cut into microbatches, and a loss on routing is still that of the whole batch. Each microbatch gives its share, by its
share of the tokens, and what a loss looks at over the whole batch it asks for by `batch_sum`. So there are two passes: the
first, forward, gathers sums in the collection 'parts'; the second is given their totals in the collection 'whole'. Of the first
one only what those sums depend on is computed: nothing but counts, where all losses are means over tokens.
"""

import contextlib
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax.core.scope import DenyList
from jaxtyping import Array, Float, Shaped

# Collections in which a module that is called twice keeps the sum; in others it keeps the last.
SUMMED = ("losses", "measured")
# Of a microbatch, what losses sum over the whole batch; and the same of the whole batch.
PARTS, WHOLE = "parts", "whole"


def sow(module: nn.Module, collection: str, name: str, value: Any) -> None:
    """Sows one value (not a tuple of values); a module called twice keeps the sum of losses and measurements, the last of the rest.

    `init` gives parameters and state, which are passed to the first `apply`: nothing that is summed is sown there, since it would count
    twice, and the rest only into a collection that `mutable` names.
    """
    add = collection in SUMMED
    if module.is_initializing() and (add or isinstance(module.scope.mutable, DenyList | bool)):
        return
    module.sow(
        collection,
        name,
        value,
        reduce_fn=(lambda old, new: new if old is None else jax.tree.map(jnp.add, old, new)) if add else (lambda _, new: new),
        init_fn=lambda: None,
    )


def sow_loss(module: nn.Module, name: str, cost: Callable[[], Float[Array, ""]], tokens: Shaped[Array, ""]) -> None:
    """Sows a loss that is a mean over tokens, or a function of such means; of a microbatch, its share of that of the whole batch.

    Args:
      module: the layer.
      name: of the loss.
      cost: gives the loss. What it looks at over the whole batch, it asks for by `batch_sum`.
      tokens: number of tokens that the loss is about.
    """
    share: Any = 1.0
    if module.is_mutable_collection(PARTS) and not module.is_initializing():
        sums: list[Array] = [tokens]
        with _asked(lambda x: sums.append(x) or x):
            value = cost()
        # A module that is called twice has an entry for each call.
        module.sow(PARTS, name, tuple(jax.lax.stop_gradient(x) for x in sums))
    elif module.has_variable(WHOLE, name):
        (total, *totals), *later = module.get_variable(WHOLE, name)
        module.put_variable(WHOLE, name, tuple(later))
        share = tokens / jnp.maximum(total, 1)
        # The share is taken of the loss: of what is summed, all of the gradient must remain.
        undo, rest = jnp.where(tokens > 0, 1 / jnp.where(tokens > 0, share, 1), 0), iter(totals)
        with _asked(lambda x: _with_value(undo * x, next(rest))):
            value = cost()
    else:
        value = cost()
    sow(module, "losses", name, share * value)


def batch_sum(x: Shaped[Array, "*d"]) -> Shaped[Array, "*d"]:
    """A sum over the tokens at hand as the sum over the whole batch, in value and in gradient. For the `cost` of a loss."""
    ask = _ask.get()
    return x if ask is None else ask(x)


_ask: ContextVar[Callable[[Array], Array] | None] = ContextVar("batch_sum", default=None)


@contextlib.contextmanager
def _asked(ask: Callable[[Array], Array]) -> Iterator[None]:
    token = _ask.set(ask)
    try:
        yield
    finally:
        _ask.reset(token)


def _with_value(x: Array, value: Array) -> Array:
    """`value` with the gradient of `x`."""
    return jax.lax.stop_gradient(value) + (x - jax.lax.stop_gradient(x))
