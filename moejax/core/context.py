"""What a layer may know about its tokens beyond their vectors: one pytree that flows through every block."""

from collections.abc import Callable, Mapping
from typing import Any

import jax.numpy as jnp
from flax import struct
from jaxtyping import Array, Bool, Int, Key, Shaped

from moejax.core.carried import Carried
from moejax.core.errors import ConfigError

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
      layer: which layer of the network this is, counted from 0; the stack fills it in. None outside of one.
      key: for a select rule that draws at random; the layer that asks the rule fills it in.
      num_layers: layers of the network; the stack fills it in. Static.
      train: training behaviour (noise, training select rule). Static.
      decode: the tokens continue a cached prefix. Static.
      shared: parameters that all layers of a stack share; the stack fills it in. See `moejax.core.carried`.
      carried: what earlier layers left for later ones; the stack fills it in, for one block at a time. Static.
    """

    valid: Bool[Array, "b s"] | None = None
    positions: Int[Array, "b s"] | None = None
    segments: Int[Array, "b s"] | None = None
    token_ids: Int[Array, "b s"] | None = None
    domain: Int[Array, "b s"] | None = None
    adapter: Int[Array, "b s"] | None = None
    step: Int[Array, ""] | None = None
    layer: Int[Array, ""] | None = None
    key: Key[Array, ""] | None = None
    num_layers: int | None = struct.field(pytree_node=False, default=None)
    train: bool = struct.field(pytree_node=False, default=False)
    decode: bool = struct.field(pytree_node=False, default=False)
    shared: Mapping[str, Any] | None = None
    carried: Carried | None = struct.field(pytree_node=False, default=None)

    def fit(self, x: Any) -> tuple[Any, Any, Any]:
        """The sizes b, s, d of tokens `x`.

        Raises:
          ConfigError: `x` is no `[b, s, d]`, or what is said of each token is not `[b, s]`; `valid` must also be true or false.
        """
        if jnp.ndim(x) != 3:
            fix = {2: "add a batch axis, x[None]", 4: "flatten the axes between the first and the last"}.get(
                jnp.ndim(x), "reshape it"
            )
            raise ConfigError(f"x of shape {jnp.shape(x)} must be tokens [b, s, d]: {fix}")
        for name, value in self.per_token().items():
            if jnp.shape(value) != x.shape[:2]:
                raise ConfigError(
                    f"ctx.{name} of shape {jnp.shape(value)} must be {x.shape[:2]}, one for each token of x {x.shape}"
                )
        if self.valid is not None and jnp.result_type(self.valid) != jnp.bool_:
            raise ConfigError(
                f"ctx.valid is {jnp.result_type(self.valid)} and must be bool: valid=mask.astype(bool), or mask > 0"
            )
        return x.shape

    def real(self, x: Shaped[Array, "b s *d"]) -> Bool[Array, "b s"]:
        """Which tokens of `x` are no padding."""
        return jnp.ones(x.shape[:2], bool) if self.valid is None else self.valid

    def clean(self, x: Shaped[Array, "b s *d"]) -> Shaped[Array, "b s *d"]:
        """`x` with zeros for padding, so that whatever lies there (NaN, say) touches neither values nor gradients."""
        if self.valid is None:
            return x
        return jnp.where(self.valid.reshape(*self.valid.shape, *(1,) * (x.ndim - 2)), x, jnp.zeros((), x.dtype))

    def map_tokens(self, f: Callable[[Array], Array], put: Callable[[Array, Array], Array] | None = None) -> "Context":
        """The context of rearranged tokens.

        Args:
          f: takes every `[b, s, ...]` array to its new arrangement.
          put: `put(new, old)` takes a new arrangement back to the whole one, where `old` keeps what it does not cover: for what
            the layers inside remember.
        """
        mapped = {name: f(value) for name, value in self.per_token().items()}
        return self.replace(**mapped, carried=None if self.carried is None else self.carried.view(f, put))

    def per_token(self) -> dict[str, Array]:
        """What is said of each token: arrays `[b, s]` by name."""
        given = {name: getattr(self, name) for name in _PER_TOKEN}
        return {name: value for name, value in given.items() if value is not None}

    def recall(self, name: str, start: Any) -> Any:
        """What an earlier layer remembered as `name`; outside a stack, `start`."""
        return start if self.carried is None else self.carried[name]

    def remember(self, name: str, value: Any) -> None:
        """Leaves `value` for the layers to come; outside a stack there are none."""
        if self.carried is not None:
            self.carried[name] = value
