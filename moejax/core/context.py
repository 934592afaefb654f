"""What a layer may know about its tokens beyond their vectors: one pytree that flows through every block."""

from collections.abc import Callable, Mapping
from typing import Any

from flax import struct
from jaxtyping import Array, Bool, Int

from moejax.core.memory import Memory

_PER_TOKEN = ("valid", "positions", "segments", "token_ids", "domain", "adapter")


@struct.dataclass
class Context:
    """Side information of a batch `x[b, s, d]`. Layers take what they need and ignore the rest.

    Attributes:
      valid: False marks padding, which is never routed, counted, balanced or attended to. None means all valid.
      positions: position of each token in its document (RoPE, causal masks). None means 0..s-1.
      segments: number of the packed document; attention stays inside a segment. None means one document per row.
      token_ids: vocabulary ids, for routers that look at the token itself (hash layers).
      domain: label of the token's source, for domain routers and for specialisation statistics.
      adapter: of an adapted model, which one of its adapters each token uses, by number; -1 for none. None means all of them, one after
        another. See `moejax.layers.Adapted`.
      step: the training step, for schedules inside a layer.
      train: training behaviour (noise, training select rule). Static.
      decode: the tokens continue a cached prefix. Static.
      shared: parameters that all layers of a stack share; the stack fills it in. See `moejax.core.memory`.
      memory: what earlier layers left for later ones; the stack fills it in, for one block at a time. Static.
    """

    valid: Bool[Array, "b s"] | None = None
    positions: Int[Array, "b s"] | None = None
    segments: Int[Array, "b s"] | None = None
    token_ids: Int[Array, "b s"] | None = None
    domain: Int[Array, "b s"] | None = None
    adapter: Int[Array, "b s"] | None = None
    step: Int[Array, ""] | None = None
    train: bool = struct.field(pytree_node=False, default=False)
    decode: bool = struct.field(pytree_node=False, default=False)
    shared: Mapping[str, Any] | None = None
    memory: Memory | None = struct.field(pytree_node=False, default=None)

    def map_tokens(self, f: Callable[[Array], Array], put: Callable[[Array, Array], Array] | None = None) -> "Context":
        """The context of rearranged tokens.

        Args:
          f: takes every `[b, s, ...]` array to its new arrangement.
          put: `put(new, old)` takes a new arrangement back to the whole one, where `old` keeps what it does not cover: for what
            the layers inside remember.
        """
        mapped = {name: f(value) for name, value in self.per_token().items()}
        return self.replace(**mapped, memory=None if self.memory is None else self.memory.view(f, put))

    def per_token(self) -> dict[str, Array]:
        """What is said of each token: arrays `[b, s]` by name."""
        given = {name: getattr(self, name) for name in _PER_TOKEN}
        return {name: value for name, value in given.items() if value is not None}

    def recall(self, name: str, start: Any) -> Any:
        """What an earlier layer remembered as `name`; outside a stack, `start`."""
        return start if self.memory is None else self.memory[name]

    def remember(self, name: str, value: Any) -> None:
        """Leaves `value` for the layers to come; outside a stack there are none."""
        if self.memory is not None:
            self.memory[name] = value
