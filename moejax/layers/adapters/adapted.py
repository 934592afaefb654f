"""Any Linen model with adapters around some of its layers."""

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
from flax.traverse_util import flatten_dict, unflatten_dict
from jaxtyping import Array

from moejax.core.errors import ConfigError, nearest
from moejax.layers.adapters.around import Around
from moejax.layers.adapters.base import Adapter
from moejax.layers.adapters.places import Named
from moejax.layers.adapters.trees import split_adapters
from moejax.layers.registry import adapters as registry

Tree = Mapping[str, Any]


@dataclasses.dataclass(frozen=True)
class Frozen:
    """A model that Flax does not look into: it is given the scope of the adapted model, and so keeps its own tree of parameters."""

    module: nn.Module


class Adapted(nn.Module):
    """A model some of whose layers have adapters, without the model knowing.

        model = Adapted(model, {"main": LoRA(rank=8, scale=2.0, targets=("*/q", "*/v"))})
        variables = init_adapters(model, variables, key, tokens)      # or model.init(key, tokens): everything anew
        logits = model.apply(variables, tokens)

    The tree of parameters is the model's own, with an entry `adapter_<name>` more beside each adapted kernel, so a pretrained tree fits
    as it is (`split_adapters`, `join_adapters`). Works inside scanned and rematerialised layers. Several adapters of one layer are
    applied in order; those that change its matrix come first.

    For each call, `using` says which adapters are on, and `Context.adapter` which one each token uses.

    Attributes:
      model: any Linen model. What it says of itself (`max_length`, `blocks`, ...), the adapted model says too.
      adapters: name -> adapter.
      active: names of those that are on; None for all of them.

    Raises:
      ConfigError: in a decoder, an adapter that looks at later tokens. When parameters are made: a target that matches nothing (an
        adapter that misses its layers trains nothing and says nothing), or a router that is not meant.
    """

    model: Any
    adapters: Any
    active: tuple[str, ...] | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.model, Frozen):
            object.__setattr__(self, "model", Frozen(self.model))
        if isinstance(self.adapters, Mapping):
            object.__setattr__(self, "adapters", tuple(Named(name, adapter) for name, adapter in self.adapters.items()))
        for named in self.adapters:
            if not isinstance(named.adapter, Adapter):
                raise ConfigError(f"adapters.{named.name} is a {type(named.adapter).__name__}, not a moejax.Adapter")
            if not named.name.isidentifier():
                raise ConfigError(f"'{named.name}' cannot be an adapter's name; use letters, digits and _")
            if getattr(self.base, "causal", False):
                named.adapter.check_causal(f"adapters.{named.name}")
        for name in self.active or ():
            if name not in self.names:
                raise ConfigError(f"there is no adapter '{name}'{nearest(name, self.names)}")
        super().__post_init__()

    @nn.compact
    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """The adapted model's output."""
        around = Around(self.path, self.on, self.names)
        with around.watching():
            y = self.base.clone(parent=self.scope)(*args, **kwargs)
        if self.is_mutable_collection("params"):
            around.check()
        return y

    @property
    def base(self) -> nn.Module:
        """The model without its adapters."""
        return self.model.module

    @property
    def on(self) -> tuple[Named, ...]:
        """The adapters that are on."""
        return tuple(named for named in self.adapters if self.active is None or named.name in self.active)

    @property
    def names(self) -> tuple[str, ...]:
        """The adapters' names, in the order in which `Context.adapter` counts them."""
        return tuple(named.name for named in self.adapters)

    def using(self, *names: str) -> "Adapted":
        """The model with only these adapters on; with none, the frozen model. The parameters stay those of all."""
        return self.clone(active=names)

    def __getattr__(self, name: str) -> Any:
        model = self.__dict__.get("model")
        if isinstance(model, Frozen) and name in _says(type(model.module)):
            return getattr(model.module, name)
        return super().__getattr__(name)


def adapt(model: nn.Module, specs: Mapping[str, Any] | None, where: str = "adapters") -> nn.Module:
    """The model with the adapters of a config, `name -> {'kind': ..., 'targets': ..., ...}`; the model itself if there are none.

    Raises:
      ConfigError: an unknown kind or key, or what `Adapted` refuses.
    """
    built = {name: registry.build(spec, f"{where}.{name}") for name, spec in (specs or {}).items() if spec is not None}
    return Adapted(model, built) if built else model


def init_adapters(model: nn.Module, variables: Tree, key: Array, *args: Any, **kwargs: Any) -> dict[str, Any]:
    """Variables of an adapted model whose own ones are already there: adapters start fresh beside them, and may look at them.

    Args:
      model: an adapted model.
      variables: of the model that it adapts: {'params': ...}.
      key: for the adapters.
      *args: what the model is called with.
    """
    rngs = {name: jax.random.fold_in(key, i) for i, name in enumerate(("params", "router", "dropout"))}

    @jax.jit  # Nothing but the adapters is asked for, so that most of the model is left out.
    def start(variables: Tree, rngs: Tree) -> Tree:
        _, made = model.apply(variables, *args, **kwargs, rngs=rngs, mutable=["params", "router_state"])
        return {name: split_adapters(tree)[1] if name in variables else tree for name, tree in made.items() if tree}

    made = {name: flatten_dict(variables.get(name, {})) | flatten_dict(tree) for name, tree in start(variables, rngs).items()}
    return {**variables, **{name: unflatten_dict(tree) for name, tree in made.items()}}


@functools.cache
def _says(cls: type) -> frozenset[str]:
    """What a model says of itself: its fields, and whether it is causal."""
    return frozenset(field.name for field in dataclasses.fields(cls)) - {"parent", "name"} | {"causal"}
