"""The body of a network: a pattern of named blocks, repeated.

    pattern=('dense', 'moe'), num_layers=6   ->   dense moe dense moe dense moe

The repeats are one `nn.scan`, so compile time does not grow with depth; parameters, caches, losses, stats, router state and
interventions of the scanned body carry a leading layers axis (one entry a repeat). What layers pass to later layers, or share, is in
`moejax.core.carried`: values go along with the tokens, and parameters that all layers share lie beside the repeats, in 'shared'. `scan=False` unrolls them under names of
their own. A block knows its layer (`ctx.layer`, `ctx.num_layers`), and its fields may vary over depth (`over_depth.py`), which makes one
repeat of all layers; `to_scanned` and `to_unrolled` move any such tree from one layout to the other.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any, Literal, TypeAlias

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from moejax.core.carried import Carried, Shared, carried_by, shared_by
from moejax.core.context import Context
from moejax.core.errors import ConfigError, nearest
from moejax.core.fields import Few
from moejax.core.registry import Many
from moejax.layers.registry import blocks
from moejax.models.over_depth import at_layer, varies
from moejax.models.parts import NamedBlock, walk
from moejax.parallel import constrain
from pallas_kernels.implementations import current_chip

SHALLOW = 8  # layers
SCANNED = "repeats"
UNROLLED = "repeat_"

# What the backward pass may keep of a block's forward pass; the rest is computed again.
REMAT = {
    "none": None,
    "full": jax.checkpoint_policies.nothing_saveable,
    "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
}

Remat: TypeAlias = Literal[*REMAT]


@dataclasses.dataclass(frozen=True)
class BlockTable(Many):
    """The slot `blocks` of a model: a mapping of name -> block spec, built into a tuple of `NamedBlock`.

    `defaults` are what the model knows about its blocks (causal, say); a spec may say otherwise.
    """

    defaults: tuple[tuple[str, Any], ...] = ()

    def build(self, specs: Any, where: str, **context: Any) -> tuple[NamedBlock, ...]:
        if isinstance(specs, tuple):
            return specs
        context = {**dict(self.defaults), **context}
        named = self.named(specs, where).items()
        return tuple(self._named(name, spec, f"{where}.{name}", context) for name, spec in named if spec is not None)

    def _named(self, name: str, spec: Any, where: str, context: dict[str, Any]) -> NamedBlock:
        if not varies(spec):
            return NamedBlock(name, where, self.registry.build(spec, where, **context))
        num_layers = context["num_layers"]
        layers = tuple(
            self.registry.build(at_layer(spec, i, num_layers, where), f"{where} (layer {i})", **context)
            for i in range(num_layers)
        )
        return NamedBlock(name, where, layers[0], layers)


def block_table(**defaults: Any) -> BlockTable:
    """The slot `blocks` of a model whose blocks are built with `defaults`."""
    return BlockTable(blocks, tuple(defaults.items()))


class Stack(nn.Module):
    """`num_layers` blocks: the pattern, repeated.

    Attributes:
      blocks: the blocks that the pattern may name.
      pattern: names of `blocks`, in order.
      num_layers: a multiple of the pattern's length.
      scan: one scan over the repeats, or a Python loop.
      remat: what the backward pass recomputes, block by block: 'none', 'full', or 'dots' (everything but the results of
        matrix products with weights).
    """

    blocks: tuple[NamedBlock, ...]
    pattern: tuple[str, ...]
    num_layers: Few
    scan: bool = True
    remat: Remat = "none"

    def __post_init__(self):
        pattern_blocks(self)
        super().__post_init__()

    @nn.compact
    def __call__(self, x: Float[Array, "b s d"], ctx: Context) -> Float[Array, "b s d"]:
        parts = pattern_blocks(self)
        repeats = self.num_layers // len(parts)
        inside = [part for block in parts for part in walk(block)]
        declared = shared_by(inside, x.shape[-1])
        if declared:
            ctx = ctx.replace(shared=Shared(name="shared")(declared))
        carry = x, carried_by(inside, *x.shape[:2])
        ctx = ctx.replace(num_layers=self.num_layers)
        first = len(parts) * jnp.arange(repeats, dtype=jnp.int32)  # the number of each repeat's first layer
        if not self.scan:
            for i in range(repeats):
                carry, _ = Repeat(parts, self.remat, prevent_cse=True, name=f"{UNROLLED}{i}")(carry, first[i], ctx)
            return carry[0]
        # True: whatever collection a block uses, known to this file or not, gets a layers axis; none is lost. So no variable is the same
        # in all repeats, and the pass that would look for those, which traces every block a second time, is left out.
        scanned = nn.scan(
            Repeat,
            variable_axes={True: 0},
            split_rngs={True: True},
            in_axes=(0, nn.broadcast),
            length=repeats,
            check_constancy_invariants=False,
            unroll=repeats if self._shallow() else 1,
        )
        # Inside a scan the compiler cannot merge recomputation with the forward pass, and the guard only costs.
        (x, _), _ = scanned(parts, self.remat, prevent_cse=False, name=SCANNED)(carry, first, ctx)
        return x

    def _shallow(self) -> bool:
        """Whether the scan is written out for the compiler. On a CPU, slicing parameters and stacking gradients costs a small model a
        tenth to a third of its step. With recomputation the loop stays: written out, the compiler would merge it with the forward pass."""
        return current_chip().platform == "cpu" and self.num_layers <= SHALLOW and self.remat == "none"


# The residual stream `[b, s, d]`, and what the layers so far have left for later ones.
Carry: TypeAlias = tuple[Array, dict[str, Any]]


class Repeat(nn.Module):
    """The pattern once: its blocks in order, named by index and name (`0_dense`, `1_moe`)."""

    parts: tuple[NamedBlock, ...]
    remat: str
    prevent_cse: bool

    @nn.compact
    def __call__(self, carry: Carry, first: Int[Array, ""], ctx: Context) -> tuple[Carry, None]:
        x, carried = carry
        call = _call
        if self.remat != "none":
            call = nn.remat(_call, policy=REMAT[self.remat], prevent_cse=self.prevent_cse)
        for i, part in enumerate(self.parts):
            x, carried = call(part.module.copy(name=block_name(i, part.name)), x, carried, ctx.replace(layer=first + i))
            x = constrain(x, "batch", "seq", "embed")
            carried = jax.tree.map(lambda a: constrain(a, "batch", "seq", *(None,) * (a.ndim - 2)), carried)
        return (x, carried), None


def pattern_blocks(net: Any) -> tuple[NamedBlock, ...]:
    """The blocks of one repeat of a network with the fields of a `Stack`; models check theirs with it when they are made.

    Where a block varies over depth nothing repeats: the blocks of all layers.

    Raises:
      ConfigError: the pattern is empty, names a block that is not there, or does not divide `num_layers`.
    """
    by_name = {block.name: block for block in net.blocks}
    pattern = tuple(net.pattern)
    for name in pattern:
        if name not in by_name:
            raise ConfigError(f"pattern={pattern} names block '{name}', not in blocks{nearest(name, by_name)}")
    if not pattern or net.num_layers % len(pattern) or net.num_layers < 1:
        raise ConfigError(
            f"num_layers={net.num_layers} is not a positive multiple of the {len(pattern)} blocks of pattern={pattern}"
        )
    named = tuple(by_name[name] for name in pattern)
    if any(block.layers for block in named):
        return tuple(named[i % len(named)].at(i) for i in range(net.num_layers))
    return named


def block_name(index: int, name: str) -> str:
    """The parameter name of block `index` of the pattern."""
    return f"{index}_{name}"


def to_scanned(tree: Mapping[str, Any]) -> dict[str, Any]:
    """Any tree of an unrolled model's variables in the layout of the scanned model: repeats stacked on a leading axis."""
    repeats = {key: value for key, value in tree.items() if key.startswith(UNROLLED)}
    out = {key: to_scanned(value) if isinstance(value, Mapping) else value for key, value in tree.items()}
    if repeats:
        out = {key: value for key, value in out.items() if key not in repeats}
        ordered = [repeats[f"{UNROLLED}{i}"] for i in range(len(repeats))]
        out[SCANNED] = jax.tree.map(lambda *leaves: jnp.stack(leaves), *ordered)
    return out


def to_unrolled(tree: Mapping[str, Any]) -> dict[str, Any]:
    """Any tree of a scanned model's variables in the layout of the unrolled model; the inverse of `to_scanned`."""
    out: dict[str, Any] = {}
    for key, value in tree.items():
        if key == SCANNED:
            length = jax.tree.leaves(value)[0].shape[0]
            out |= {f"{UNROLLED}{i}": jax.tree.map(lambda leaf, i=i: leaf[i], value) for i in range(length)}
        else:
            out[key] = to_unrolled(value) if isinstance(value, Mapping) else value
    return out


def _call(block: nn.Module, x: Float[Array, "b s d"], carried: dict[str, Any], ctx: Context) -> Carry:
    box = Carried(carried)
    return block(x, ctx.replace(carried=box)), box.values
