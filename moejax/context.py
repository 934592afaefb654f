"""What a layer may know about its tokens beyond their vectors: one pytree that flows through every block."""

from collections.abc import Callable

from flax import struct
from jaxtyping import Array, Bool, Int

_PER_TOKEN = ("valid", "positions", "segments", "token_ids", "domain")


@struct.dataclass
class Context:
    """Side information of a batch `x[b, s, d]`. Layers take what they need and ignore the rest.

    Attributes:
      valid: False marks padding, which is never routed, counted, balanced or attended to. None means all valid.
      positions: position of each token in its document (RoPE, causal masks). None means 0..s-1.
      segments: number of the packed document; attention stays inside a segment. None means one document per row.
      token_ids: vocabulary ids, for routers that look at the token itself (hash layers).
      domain: label of the token's source, for domain routers and for specialisation statistics.
      step: the training step, for schedules inside a layer.
      train: training behaviour (noise, training select rule). Static.
      decode: the tokens continue a cached prefix. Static.
    """

    valid: Bool[Array, "b s"] | None = None
    positions: Int[Array, "b s"] | None = None
    segments: Int[Array, "b s"] | None = None
    token_ids: Int[Array, "b s"] | None = None
    domain: Int[Array, "b s"] | None = None
    step: Int[Array, ""] | None = None
    train: bool = struct.field(pytree_node=False, default=False)
    decode: bool = struct.field(pytree_node=False, default=False)

    def map_tokens(self, f: Callable[[Array], Array]) -> "Context":
        """The context of rearranged tokens: `f` takes every `[b, s]` array to its new arrangement."""
        given = {name: getattr(self, name) for name in _PER_TOKEN}
        return self.replace(**{name: f(value) for name, value in given.items() if value is not None})
