"""Exchanges: the ways in which tokens reach experts on other devices, and what each of them moves.

| kind         | what travels                                                                    | for                                    |
|--------------|----------------------------------------------------------------------------------|----------------------------------------|
| ragged       | the rows that are needed, no more                                                | token choice, where XLA has it         |
| padded       | as many rows to each shard, full or not                                          | token choice, on any platform          |
| hierarchical | padded rows to the host first, once, and from there to the host's shards         | token choice, experts of several hosts |
| capacity     | the slots of the plan, full or not (GShard)                                      | plans with slots                       |

The first three send a token to a shard once, however many of its experts are there, along with its choices and weights, and get one
row back: the weighted sum of what those experts made of it. A device holds n tokens, cut into chunks that travel apart; `Sizes`
are those of one chunk.
"""

import dataclasses
import math
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Int

from moejax.core.errors import ConfigError, nearest
from moejax.dispatch.expert_parallel.hops import AXIS, Hop, Padded, Ragged
from moejax.parallel.scope import Parallel
from moejax.routing.plan import ExpertPlan, SlotPlan, TokenPlan
from pallas_kernels.chips import TPUS
from pallas_kernels.implementations import current_chip


@dataclasses.dataclass(frozen=True)
class Sizes:
    """What one device exchanges at a time.

    Attributes:
      tokens: n, of this device and chunk.
      k: choices of a token.
      experts: e, a multiple of `shards`.
      shards: devices along mesh axis `expert`.
      hosts: parts of that axis between which links are slow.
      bound: see `moejax.parallel.Exchange`.
    """

    tokens: int
    k: int
    experts: int
    shards: int
    hosts: int = 1
    bound: float | None = None

    @property
    def experts_per_shard(self) -> int:
        return self.experts // self.shards

    @property
    def most_rows(self) -> int:
        """Rows (token-expert pairs) that may go from here to one shard: all, or `bound` times their mean `n * k / shards`."""
        rows = self.tokens * min(self.k, self.experts_per_shard)
        return rows if self.bound is None else min(rows, max(1, math.ceil(self.bound * self.tokens * self.k / self.shards)))

    @property
    def most(self) -> int:
        """Tokens that may go from here to one shard."""
        return min(self.tokens, self.most_rows)


Step = Callable[[Int[Array, "n k"]], Hop]


@dataclasses.dataclass(frozen=True)
class Devices:
    """What a mesh is made of: how many, of which platform ('cpu', 'gpu', 'tpu'), and which kind, as JAX calls it."""

    count: int
    platform: str
    kind: str = ""


@dataclasses.dataclass(frozen=True)
class TokenExchange:
    """An exchange of tokens.

    Attributes:
      steps: from the sizes, the hops to be taken; each is planned from the shard of each choice, negative for no choice.
      rows: from the sizes, rows of the buffers that a device sends from, one for each hop.
      refuses: why it cannot run on some devices, or None if it can.
    """

    steps: Callable[[Sizes], tuple[Step, ...]]
    rows: Callable[[Sizes], tuple[int, ...]]
    refuses: Callable[[Devices], str | None] = lambda devices: None


def _needed(place: Int[Array, "n k"], places: int) -> Bool[Array, "n w"]:
    return (place[..., None] == jnp.arange(places)).any(1)


def _padded(sizes: Sizes) -> tuple[Step, ...]:
    return (lambda shard: Padded.plan(_needed(shard, sizes.shards), sizes.most),)


def _padded_rows(sizes: Sizes) -> tuple[int, ...]:
    return (sizes.shards * sizes.most,)


def _ragged(sizes: Sizes) -> tuple[Step, ...]:
    (most,) = _ragged_rows(sizes)
    return (lambda shard: Ragged.plan(_needed(shard, sizes.shards), most, sizes.shards * sizes.most),)


def _ragged_rows(sizes: Sizes) -> tuple[int, ...]:
    return (min(sizes.tokens * min(sizes.k, sizes.shards), sizes.shards * sizes.most),)


def _ragged_refuses(devices: Devices) -> str | None:
    if devices.platform == "cpu":
        return "XLA has no ragged all-to-all for CPU"
    if "v5 lite" in devices.kind.lower() and devices.count > 16:
        # Found by compiling for slices of all kinds: of v5e, those of up to 4x4 chips can, larger ones cannot; others all can.
        return f"XLA has no ragged all-to-all for v5e slices of more than 16 chips, and there are {devices.count}"
    return None


def _hierarchical(sizes: Sizes) -> tuple[Step, ...]:
    """To the device of the same place in each host, then within the host. Only one copy of a token crosses to a host."""
    if sizes.hosts == 1:
        return _padded(sizes)
    hosts, local = sizes.hosts, sizes.shards // sizes.hosts
    to_host, within = (rows // places for rows, places in zip(_hierarchical_rows(sizes), (hosts, local), strict=True))
    across = tuple(tuple(host * local + i for host in range(hosts)) for i in range(local))
    inside = tuple(tuple(host * local + i for i in range(local)) for host in range(hosts))

    def first(shard: Array) -> Hop:
        return Padded.plan(_needed(shard // local, hosts), to_host, across)

    def second(shard: Array) -> Hop:
        mine = (shard // local) == jax.lax.axis_index(AXIS) // local
        return Padded.plan(_needed(jnp.where(mine, shard % local, -1), local), within, inside)

    return first, second


def _hierarchical_rows(sizes: Sizes) -> tuple[int, ...]:
    if sizes.hosts == 1:
        return _padded_rows(sizes)
    # Within a host, every source host's tokens are bounded as in a flat exchange: the same tokens are dropped.
    hosts, local = sizes.hosts, sizes.shards // sizes.hosts
    to_host = min(sizes.tokens, local * sizes.most)
    return hosts * to_host, local * min(hosts * to_host, hosts * sizes.most)


TOKEN_EXCHANGES: dict[str, TokenExchange] = {
    "ragged": TokenExchange(_ragged, _ragged_rows, _ragged_refuses),
    "padded": TokenExchange(_padded, _padded_rows),
    "hierarchical": TokenExchange(_hierarchical, _hierarchical_rows),
}
EXCHANGES = (*TOKEN_EXCHANGES, "capacity")


def overlap_options(parallel: Parallel | None) -> dict[str, str]:
    """What XLA has to be told so that one chunk is exchanged while another is computed; empty where there is nothing to tell.

    That is without chunks, on other platforms than TPU, and on slices that are too large for such exchanges, for which the
    compiler refuses the options. The chip is the one that is traced for (`pallas_kernels.implementations.target`).
    """
    if parallel is None or parallel.exchange.chunks == 1 or current_chip().platform != "tpu":
        return {}
    chip = TPUS.get(current_chip().kind)
    if chip is not None and chip.asynchronous is not None and parallel.mesh.size > chip.asynchronous:
        return {}
    return {"xla_tpu_enable_async_all_to_all": "true", "xla_tpu_enable_async_ragged_all_to_all": "true"}


def exchanged_bytes(
    kind: str, sizes: Sizes, width: int, out_width: int, itemsize: int, slots: int = 0, copies: float | None = None
) -> float:
    """Bytes that one device sends in the forward pass, there and back, its own share included; the backward pass sends as many.

        padded        shards * most * (width + out_width) * itemsize        and the choices: shards * most * 2 k * 4
        hierarchical  the same for both hops: hosts * to_host rows, then shards * most
        ragged        copies * n rows, whatever the buffers hold
        capacity      e * slots rows, and no choices

    Args:
      kind: a name of `EXCHANGES`.
      sizes: of one chunk; multiply by the number of chunks.
      width, out_width: d and f of the rows.
      itemsize: bytes of a number of the rows.
      slots: of each expert on this device, for 'capacity': groups on the device times the plan's slots, in this chunk.
      copies: for 'ragged', shards that a token needs on average: at most `min(k, shards)`, which is the default.
    """
    if kind == "capacity":
        return float(sizes.experts * slots * (width + out_width) * itemsize)
    rows = float(sum(TOKEN_EXCHANGES[kind].rows(sizes)))
    if kind == "ragged":
        rows = sizes.tokens * (min(sizes.k, sizes.shards) if copies is None else copies)
    return rows * ((width + out_width) * itemsize + 2 * sizes.k * 4)


def choose_exchange(
    plan: TokenPlan | ExpertPlan | SlotPlan, kind: str, devices: Devices, sizes: Sizes, local_groups: int
) -> str:
    """The exchange that runs: the named one, or what 'auto' stands for.

    Plans with slots (expert choice, soft slots) exchange slots, whatever is named for token choice. 'auto' takes the slots of a token
    choice with capacity when they are fewer rows than `padded` would send; else the needed rows where the devices can
    (TPU, GPU), else padded ones. It is a matter of counted bytes, not of timings.

    Args:
      kind: a name of `EXCHANGES`, or 'auto'.
      devices: of the mesh.
      local_groups: whole groups on each device; 0 if groups lie across devices.

    Raises:
      ConfigError: an unknown exchange, or one that cannot do this plan on this mesh.
    """
    if kind not in (*EXCHANGES, "auto"):
        raise ConfigError(f"exchange.kind='{kind}' is unknown{nearest(kind, [*EXCHANGES, 'auto'])}")
    if not isinstance(plan, TokenPlan):
        return "capacity"
    if kind == "auto":
        few = plan.capacity is not None and sizes.experts * local_groups * plan.capacity <= sizes.shards * sizes.most
        if local_groups and few:
            return "capacity"
        return "padded" if sizes.shards == 1 or TOKEN_EXCHANGES["ragged"].refuses(devices) else "ragged"
    if kind == "capacity" and plan.capacity is None:
        raise ConfigError(
            "exchange.kind='capacity' exchanges slots, and this plan has none; set capacity_factor of the select rule, or "
            "exchange.kind='auto'"
        )
    if kind in TOKEN_EXCHANGES and sizes.shards > 1 and (reason := TOKEN_EXCHANGES[kind].refuses(devices)):
        raise ConfigError(f"exchange.kind='{kind}' does not run here: {reason}; use exchange.kind='padded' or 'auto'")
    return kind


def count_hosts(processes: Sequence[int]) -> int:
    """Hosts among the processes of devices along an axis; 1 unless they are equal blocks of it, one after another."""
    hosts = len(set(processes))
    if len(processes) % hosts:
        return 1
    each = len(processes) // hosts
    blocks = [host for host in processes[::each] for _ in range(each)]
    return hosts if blocks == list(processes) else 1
