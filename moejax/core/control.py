"""State that a rule changes once per optimizer step, where no gradient can: a coefficient that follows the global sparsity, a
pool of experts that grows and shrinks.

A module declares such a rule while it runs, with the sums that the rule wants to know:

    control(self, "pool", AdaptPool(...), {"chosen": chosen.sum((0, 1)), "tokens": valid.sum()})

What is measured is summed over all microbatches of a step and over all devices. After the gradients' update, the train step
gives every rule the module's parameters, its part of 'router_state' and its measurements, and takes back what the rule makes
of them. A rule is written for one layer: under a scan over layers it is mapped over them. Outside training nothing is measured
and nothing changes.
"""

import contextlib
import dataclasses
from collections.abc import Iterator, Mapping
from contextvars import ContextVar
from typing import Any, Protocol, runtime_checkable

import flax.linen as nn
import jax
from flax import struct
from jaxtyping import Array, Int

from moejax.core.sowing import sow

Path = tuple[str, ...]


@struct.dataclass
class Site:
    """One layer, as a controller sees it and gives it back.

    Attributes:
      params: parameters of the module that declared the controller, after the step's update.
      state: its part of 'router_state'.
      measured: what it measured in this step.
      everywhere: the same, summed over all layers that declared an equal controller. Read only.
      step: updates done, this one included. Read only.
      restarted: parameter name -> True where the optimizer is to forget what it knew about that parameter (momentum and the
        like), of the parameter's shape or broadcastable to it. Names of nested parameters are nested.
    """

    params: Mapping[str, Any]
    state: Mapping[str, Any]
    measured: Mapping[str, Array]
    everywhere: Mapping[str, Array]
    step: Int[Array, ""]
    restarted: Mapping[str, Any] = struct.field(default_factory=dict)


@runtime_checkable
class Controller(Protocol):
    """A frozen dataclass. Equal ones in several layers share what they measure."""

    def after_step(self, site: Site) -> Site:
        """The layer after an optimizer step. A pure function."""
        ...


@dataclasses.dataclass(frozen=True)
class Declared:
    """A controller's place: its module's path, the name of its measurements, and their shapes before any scan over layers."""

    controller: Controller
    path: Path
    name: str
    shapes: tuple[tuple[str, tuple[int, ...]], ...]


_recorder: ContextVar[dict[tuple[Path, str], Declared] | None] = ContextVar("controllers", default=None)


def control(module: nn.Module, name: str, controller: Controller, measured: Mapping[str, Array]) -> None:
    """Declares `controller` for `module` in this call, with its measurements: sums over the valid tokens of the call.

    `name` tells the controllers of one module apart. Measurements of a module that is called twice are added up.
    """
    recorder = _recorder.get()
    if recorder is not None:
        shapes = tuple((key, value.shape) for key, value in sorted(measured.items()))
        recorder[(module.path, name)] = Declared(controller, module.path, name, shapes)
    sow(module, "measured", f"{name}_measured", jax.lax.stop_gradient(dict(measured)))


@contextlib.contextmanager
def record_controllers() -> Iterator[dict[tuple[Path, str], Declared]]:
    """Collects the controllers of the modules that are traced inside the `with` block."""
    found: dict[tuple[Path, str], Declared] = {}
    token = _recorder.set(found)
    try:
        yield found
    finally:
        _recorder.reset(token)
