"""Models as a task sees them: called with arguments, with their variables, random keys and collections behind them."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import flax.linen as nn
import jax
from jaxtyping import Array

from moejax.core.context import Context
from moejax.core.control import record_controllers
from moejax.core.sowing import PARTS, WHOLE

# Streams that layers may draw from while training.
STREAMS = ("router", "dropout")

Tree = Any


class FrozenModel:
    """A model that nobody trains: it runs in evaluation mode, draws nothing, and what its layers sow is dropped.

    Attributes:
      params: its parameters; no gradient reaches them, and an objective may compare them with those that learn.
    """

    def __init__(self, model: nn.Module, variables: Mapping[str, Tree]):
        self._model, self._variables = model, jax.lax.stop_gradient(dict(variables))

    @property
    def params(self) -> Tree:
        return self._variables["params"]

    def __call__(self, inputs: Any, ctx: Context, also: tuple[str, ...] = ()) -> Any:
        """The model's outputs; with `also`, the outputs and those collections that layers have sown into."""
        with record_controllers():  # its controllers are not those of the model that learns
            outputs, sown = self._model.apply(self._variables, inputs, ctx.replace(train=False), mutable=list(also))
        return (outputs, sown) if also else outputs


class LearningModel:
    """The model that learns, in one step of training or evaluation.

    A call gives the model's outputs. What its layers sow is collected here, for the step: losses and measurements of all calls add
    up, stats are averaged over the calls. State without gradients is read, and changed by nobody until the step is over.

    Attributes:
      params: its parameters, with gradients: for penalties on them.
      frozen: name -> `FrozenModel`, the models that the task names.
      key: a random key of the step, for the task's own noise; None in evaluation.

    Of a microbatch, the first pass gathers what losses sum over the batch, and the second is given the sums over the `whole`, for
    each call; see `moejax.core.sowing`.
    """

    def __init__(
        self,
        model: nn.Module,
        params: Tree,
        collections: Mapping[str, Tree],
        key: Array | None,
        frozen: Mapping[str, FrozenModel],
        whole: Sequence[Tree] | None = None,
        gather: bool = False,
    ):
        self.params, self.frozen = params, frozen
        self.key = None if key is None else jax.random.fold_in(key, len(STREAMS))
        self.sown: list[Mapping[str, Tree]] = []
        self._model, self._draw, self._collections = model, key, collections
        self._whole, self._gather = whole, gather

    def __call__(self, inputs: Any, ctx: Context, also: tuple[str, ...] = ()) -> Any:
        """The model's outputs; with `also`, the outputs and those collections that layers have sown into."""
        variables = {"params": self.params, **self._collections}
        if self._whole is not None:
            variables[WHOLE] = self._whole[len(self.sown)]
        parts = (PARTS,) if self._gather else () if self._whole is None else (WHOLE,)
        mutable = list(dict.fromkeys(("losses", "stats", *parts, *(() if self._draw is None else ("measured",)), *also)))
        rngs = None if self._draw is None else streams(self._draw, len(self.sown))
        outputs, changed = self._model.apply(variables, inputs, ctx, rngs=rngs, mutable=mutable)
        self.sown.append(changed)
        return (outputs, {name: changed.get(name, {}) for name in also}) if also else outputs

    def summed(self, pick: Callable[[Mapping[str, Tree]], Tree]) -> Tree:
        """What `pick` takes of each call's sown collections, added up; of no call, an empty dict."""
        parts = [pick(changed) for changed in self.sown]
        return jax.tree.map(lambda *leaves: sum(leaves[1:], leaves[0]), *parts) if parts else {}


def streams(key: Array, call: int = 0) -> dict[str, Array]:
    """The random streams of a model's call; each call of a step draws anew."""
    key = key if call == 0 else jax.random.fold_in(key, len(STREAMS) + call)
    return {name: jax.random.fold_in(key, i) for i, name in enumerate(STREAMS)}
