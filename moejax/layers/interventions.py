"""Interventions: what is forced on routing at inference, to look into a trained model or to change how it routes.

They are arrays in the collection 'interventions', under the path of the layer that routes; a scanned stack takes them with a leading
axis of layers, as it has its parameters:

    layer.apply({**variables, "interventions": {"k": 1}}, x)
    model.apply({**variables, "interventions": {"stack": {"repeats": {"0_moe": {"ffn": {"k": jnp.array([1, 2, 2])}}}}}}, tokens)

    logit_bias   float [o] or [g, n, o]   added to the router's logits, of which there are o
    k            int []                   this many choices of a token instead of the rule's own k, as far as the rule can rank them
    expert       int [g, n, k]            these experts instead of the selected ones

Forced choices get the weights that the rule gives them (normalised over them if the rule normalises), and its capacity for as many
choices as there are: with `k`, that is room for as many as the rule can rank. What fits no rule, or no name, is an error.
"""

from typing import Any

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array

from moejax.core.errors import ConfigError, nearest

COLLECTION = "interventions"
NAMES = ("logit_bias", "k", "expert")


def interventions(module: nn.Module) -> dict[str, Array]:
    """What is forced on this layer.

    Raises:
      ConfigError: an unknown name, or two interventions that both say who is chosen.
    """
    here: Any = module.variables.get(COLLECTION, {})
    found = {name: jnp.asarray(value) for name, value in here.items() if not hasattr(value, "items")}
    where = f"{COLLECTION} of {'/'.join(module.path) or type(module).__name__}"
    for name in found:
        if name not in NAMES:
            raise ConfigError(f"unknown '{name}' in the {where}{nearest(name, NAMES)}")
    if {"k", "expert"} <= found.keys():
        raise ConfigError(f"the {where} give both expert and k; each says who is chosen, so give one of them")
    return found
