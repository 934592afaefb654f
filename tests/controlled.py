"""One training call of a module and what its controllers make of it: what a train step does, without an optimizer."""

from typing import Any

import flax.linen as nn

from moejax.core.control import record_controllers
from moejax.train.controllers import after_step


def train_call(
    module: nn.Module, variables: Any, *args: Any, step: int = 1, mutable: tuple[str, ...] = (), **kwargs: Any
) -> tuple[Any, Any, Any]:
    """Output, what was sown (with `mutable` collections beside 'measured'), and the variables after the step."""
    with record_controllers() as controllers:
        y, sown = module.apply(variables, *args, mutable=["measured", *mutable], **kwargs)
    return y, sown, after_step(controllers.values(), sown.get("measured", {}), variables, step)
