"""What a family of published models is: its config in our words and back, and a table of its tensors."""

import dataclasses
import fnmatch
from collections.abc import Collection, Mapping
from typing import Any, ClassVar

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array

from moejax.core.errors import ConfigError, nearest
from moejax.core.registry import Registry
from moejax.pretrained.table import Row

families = Registry("family", "moejax.pretrained.families")

# transformers' names of activations, and ours. The first of a name of ours is what is written back.
ACTIVATIONS = {
    "silu": "silu",
    "swish": "silu",
    "gelu": "gelu_exact",
    "gelu_pytorch_tanh": "gelu",
    "gelu_new": "gelu",
    "relu": "relu",
    "tanh": "tanh",
}
_REQUIRED: Any = object()


class Settings:
    """A published config, read with errors that name the file and the key."""

    def __init__(self, values: Mapping[str, Any], place: str):
        self.values, self.place = values, place

    def __call__(self, name: str, default: Any = _REQUIRED) -> Any:
        """The value of a key; `default` where it is absent or null.

        Raises:
          ConfigError: it is absent, and there is no default.
        """
        value = self.values.get(name)
        if value is not None:
            return value
        if default is _REQUIRED:
            raise ConfigError(f"{self.place} has no '{name}'{nearest(name, self.values)}")
        return default

    def only(self, name: str, *allowed: Any, default: Any = None) -> None:
        """Refuses any other value of a key that would change what the model computes."""
        value = self(name, default if default is not None else allowed[0])
        if value not in allowed:
            raise ConfigError(f"{self.place} has {name}={value!r}, which moejax does not compute; known are {_words(allowed)}")

    def activation(self, name: str = "hidden_act", default: str = "silu") -> str:
        """Our name of an activation."""
        said = self(name, default)
        if said not in ACTIVATIONS:
            raise ConfigError(f"{self.place} has {name}='{said}'{nearest(said, ACTIVATIONS)}")
        return ACTIVATIONS[said]

    def rope_base(self, default: float = 10_000.0) -> float:
        """The base of rotary positions, wherever this version of the config says it. Stretched positions are refused."""
        stretched = self("rope_parameters", None) or self("rope_scaling", None) or {}
        kind = stretched.get("rope_type", stretched.get("type", "default"))
        if kind != "default":
            raise ConfigError(f"{self.place} has rotary positions of type '{kind}', which moejax does not compute")
        return float(stretched.get("rope_theta") or self("rope_theta", default))


@dataclasses.dataclass(frozen=True)
class Family:
    """A family of published models. A value without fields, registered under transformers' `model_type`.

    Attributes:
      architecture: the class of transformers that its config.json names.
      ignored: patterns of keys that hold nothing learnt (buffers of old versions).
      copies: key -> the key whose tensor it repeats, where the model ties them; checked to be equal, and not written.
      gguf: the architecture that GGUF files call it; empty if they do not.
    """

    architecture: ClassVar[str]
    ignored: ClassVar[tuple[str, ...]] = ("*.rotary_emb.inv_freq",)
    gguf: ClassVar[str] = ""

    def model(self, said: Settings) -> dict[str, Any]:
        """`config.model` of a published config. Raises ConfigError for what the library does not compute."""
        raise NotImplementedError

    def settings(self, model: Mapping[str, Any]) -> dict[str, Any]:
        """The published config of a `config.model`: the inverse of `model`."""
        raise NotImplementedError

    def table(self, model: Mapping[str, Any]) -> tuple[Row, ...]:
        """Its tensors and our parameters."""
        raise NotImplementedError

    def copies(self, model: Mapping[str, Any]) -> dict[str, str]:
        """See the class."""
        return {}

    def key(self, name: str) -> str:
        """The key of the table that a file's name means: models saved without their head lack a prefix, or have one more."""
        return name

    def stacks(self, model: nn.Module) -> dict[str, Any]:
        """Our path of each stack -> what has its fields."""
        return {"stack": model}

    def example(self, model: nn.Module) -> tuple[Array, ...]:
        """Arguments with which the model can be traced."""
        return (jnp.zeros((1, 2), jnp.int32),)

    def ignores(self, key: str) -> bool:
        """Whether a key holds nothing learnt."""
        return any(fnmatch.fnmatchcase(key, pattern) for pattern in self.ignored)

    # GGUF files

    def gguf_settings(self, meta: Mapping[str, Any], keys: Collection[str]) -> dict[str, Any]:
        """The published config, of a GGUF file's metadata without the architecture's prefix, and the names of its tensors."""
        raise NotImplementedError

    def gguf_names(self, settings: Mapping[str, Any]) -> dict[str, Any]:
        """Pattern of a GGUF name, with `{layer}` -> pattern of the key, or of that and a function from the stored tensor to the published."""
        raise NotImplementedError


def published(activation: str) -> str:
    """transformers' name of an activation of ours."""
    return next(theirs for theirs, ours in ACTIVATIONS.items() if ours == activation)


def _words(values: Collection[Any]) -> str:
    return ", ".join(map(repr, values))
