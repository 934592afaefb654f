"""Sowing: how a layer hands out what one call gave: losses, statistics, plans, and what controllers measure."""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax.core.scope import DenyList

# Collections in which a module that is called twice keeps the sum; in others it keeps the last.
SUMMED = ("losses", "measured")


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
