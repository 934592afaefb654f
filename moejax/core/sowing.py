"""Sowing: how a layer hands out what one call gave: losses, statistics, plans, and what controllers measure."""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

# Collections in which a module that is called twice keeps the sum; in others it keeps the last.
SUMMED = ("losses", "measured")


def sow(module: nn.Module, collection: str, name: str, value: Any) -> None:
    """Sows one value (not a tuple of values); a module called twice keeps the sum of losses and measurements, the last of the rest.

    `init` sows nothing: its variables are parameters and state, and are passed to the first `apply`, where they would count twice.
    """
    add = collection in SUMMED
    if module.is_initializing():
        return
    module.sow(
        collection,
        name,
        value,
        reduce_fn=(lambda old, new: new if old is None else jax.tree.map(jnp.add, old, new)) if add else (lambda _, new: new),
        init_fn=lambda: None,
    )
