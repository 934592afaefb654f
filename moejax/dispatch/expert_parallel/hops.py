"""Hops: rows from the devices that hold tokens to those that are to see them, and back. All of it runs inside `shard_map`.

A hop is planned once from which token is needed where, and then carries rows of any width both ways over mesh axis `expert`:

    send(hop, x[n, d]) -> rows[r, d]       a copy of each token to every place that needs it; zeros where nobody came
    collect(hop, rows[r, f]) -> y[n, f]    the sum of what a token's copies have become, zero for a token without copies

Each is the other's transpose, so the derivative of one is the other: the backward pass moves what the forward pass moved.
A token goes to a place once, however many of its experts live there.
"""

from typing import TypeAlias

import jax
import jax.numpy as jnp
from flax import struct
from jaxtyping import Array, Bool, Float, Int

AXIS = "expert"


@struct.dataclass
class Padded:
    """As many rows to every place, by one all-to-all of fixed shape; what is not filled are zeros.

    Attributes:
      source: the token that lies in each slot, `size` slots for each of w places; n where the slot is empty.
      slot: where each token's copy for each place lies; only meaningful where it is needed.
      needed: which token has a copy for which place.
      groups: devices of the axis that exchange among themselves, place by place; None for all of them.
    """

    source: Int[Array, "r"]
    slot: Int[Array, "n w"]
    needed: Bool[Array, "n w"]
    groups: tuple[tuple[int, ...], ...] | None = struct.field(pytree_node=False, default=None)

    @classmethod
    def plan(cls, needed: Bool[Array, "n w"], size: int, groups: tuple[tuple[int, ...], ...] | None = None) -> "Padded":
        """Token order within a place; no more than `size` tokens may be needed in one, as `limit` sees to."""
        n, w = needed.shape
        token = jnp.arange(n, dtype=jnp.int32)[:, None]
        source = jnp.sort(jnp.where(needed, token, n), axis=0)[:size]
        position = jnp.cumsum(needed, axis=0, dtype=jnp.int32) - 1
        slot = jnp.minimum(position, size - 1) + size * jnp.arange(w, dtype=jnp.int32)
        return cls(source.T.reshape(-1), slot, needed & (position < size), groups)

    def send(self, x: Float[Array, "n d"]) -> Float[Array, "r d"]:
        return self._exchange(_take(x, self.source))

    def collect(self, rows: Float[Array, "r f"]) -> Float[Array, "n f"]:
        return _sum_copies(self._exchange(rows), self.slot, self.needed)

    def _exchange(self, rows: Array) -> Array:
        groups = None if self.groups is None else [list(group) for group in self.groups]
        return jax.lax.all_to_all(rows, AXIS, 0, 0, tiled=True, axis_index_groups=groups)


@struct.dataclass
class Ragged:
    """Only the rows that are needed, by `jax.lax.ragged_all_to_all`; they lie one after another, in order of where they came from.

    Attributes:
      source: the token of each row to be sent, place by place; n past the last.
      slot, needed: as in `Padded`, `slot` in the list of rows to be sent.
      sent, received: rows to, and from, each place.
      starts: of each place's rows in the list of rows to be sent; landing: where they are to lie at that place.
      arrivals: where each place's rows lie here; origins: where they lay at that place.
      capacity: rows that the receiving buffer holds.
    """

    source: Int[Array, "q"]
    slot: Int[Array, "n w"]
    needed: Bool[Array, "n w"]
    sent: Int[Array, "w"]
    received: Int[Array, "w"]
    starts: Int[Array, "w"]
    landing: Int[Array, "w"]
    arrivals: Int[Array, "w"]
    origins: Int[Array, "w"]
    capacity: int = struct.field(pytree_node=False)

    @classmethod
    def plan(cls, needed: Bool[Array, "n w"], most: int, capacity: int) -> "Ragged":
        """At most `most` copies leave a device and `capacity` arrive."""
        n, w = needed.shape
        place = jnp.arange(w, dtype=jnp.int32)
        key = jnp.where(needed, place * n + jnp.arange(n, dtype=jnp.int32)[:, None], n * w)
        key = jnp.sort(key.reshape(-1))[:most]
        sent = needed.sum(0, dtype=jnp.int32)
        starts = jnp.cumsum(sent) - sent
        received, origins = _swap(jnp.stack([sent, starts], 1)).T
        arrivals = jnp.cumsum(received) - received
        return cls(
            source=jnp.where(key < n * w, key % n, n),
            slot=starts + jnp.maximum(jnp.cumsum(needed, axis=0, dtype=jnp.int32) - 1, 0),
            needed=needed,
            sent=sent,
            received=received,
            starts=starts,
            landing=_swap(arrivals),
            arrivals=arrivals,
            origins=origins,
            capacity=capacity,
        )

    def send(self, x: Float[Array, "n d"]) -> Float[Array, "r d"]:
        landed = jnp.zeros((self.capacity, x.shape[1]), x.dtype)
        rows = _take(x, self.source)
        return jax.lax.ragged_all_to_all(rows, landed, self.starts, self.sent, self.landing, self.received, axis_name=AXIS)

    def collect(self, rows: Float[Array, "r f"]) -> Float[Array, "n f"]:
        returned = jnp.zeros((self.source.shape[0], rows.shape[1]), rows.dtype)
        returned = jax.lax.ragged_all_to_all(
            rows, returned, self.arrivals, self.received, self.origins, self.sent, axis_name=AXIS
        )
        return _sum_copies(returned, jnp.minimum(self.slot, self.source.shape[0] - 1), self.needed)


Hop: TypeAlias = Padded | Ragged


@jax.custom_vjp
def send(hop: Hop, x: Float[Array, "n d"]) -> Float[Array, "r d"]:
    """A copy of every token to each place that needs it."""
    return hop.send(x)


@jax.custom_vjp
def collect(hop: Hop, rows: Float[Array, "r f"]) -> Float[Array, "n f"]:
    """Copies back to where their tokens are, and summed there."""
    return hop.collect(rows)


send.defvjp(lambda hop, x: (send(hop, x), hop), lambda hop, drows: (None, collect(hop, drows)))
collect.defvjp(lambda hop, rows: (collect(hop, rows), hop), lambda hop, dy: (None, send(hop, dy)))


def _take(x: Array, source: Array) -> Array:
    """Rows of x; zeros where `source` points past them."""
    n = x.shape[0]
    return jnp.where((source < n)[:, None], x[jnp.minimum(source, n - 1)], 0)


def _sum_copies(rows: Array, slot: Array, needed: Array) -> Array:
    """Sums in float32; nothing is read into the sum from a slot that is not needed."""
    return jnp.where(needed[..., None], rows[slot].astype(jnp.float32), 0).sum(1).astype(rows.dtype)


def _swap(values: Array) -> Array:
    """Entry j to place j, from which its entry for here comes."""
    return jax.lax.all_to_all(values, AXIS, 0, 0, tiled=True)
