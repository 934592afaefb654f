"""Questions about a network that its parts answer: is it causal, can it decode, how many parameters does a token use."""

from collections.abc import Iterator, Mapping
from typing import Any

import flax.linen as nn
import jax
from flax.traverse_util import flatten_dict

from moejax.core.errors import ConfigError
from moejax.core.layer import Layer
from moejax.layers.adapters.adapted import Adapted
from moejax.layers.adapters.places import Named
from moejax.models.parts import NamedBlock, Part, walk
from moejax.models.stack import SCANNED, UNROLLED, block_name, pattern_blocks

# Flax's own modules that treat each token by itself.
ROW_WISE = (nn.Dense, nn.DenseGeneral, nn.Embed, nn.LayerNorm, nn.RMSNorm)


def check_causal(blocks: tuple[NamedBlock, ...]) -> None:
    """Refuses blocks in which a token could see later ones, and parts that do not say whether it could.

    Every module inside is asked by itself, for itself and for the rules that it holds, since it knows its remedies.

    Raises:
      ConfigError: with the place of the first such part.
    """
    for part in _modules(blocks):
        if not isinstance(part.value, ROW_WISE):
            _answering(part).check_causal(part.where)


def why_not_decodable(model: nn.Module) -> str | None:
    """Why the model cannot be decoded token by token, with the place; None if it can. Asks every module inside."""
    adapters = tuple(NamedBlock(named.name, f"adapters.{named.name}", named.adapter) for named in _adapters(model))
    for part in _modules((*pattern_blocks(model), *adapters)):
        reason = None if isinstance(part.value, ROW_WISE) else _answering(part).decodable()
        if reason is not None:
            return f"{part.where}: {reason}"
    return None


def _modules(blocks: tuple[NamedBlock, ...]) -> Iterator[Part]:
    """Every module in the blocks, the blocks themselves included."""
    return (part for block in blocks for part in walk(block) if isinstance(part.value, nn.Module))


def _answering(part: Part) -> Layer:
    if not isinstance(part.value, Layer):
        raise ConfigError(
            f"{part.where} ({type(part.value).__name__}) does not say whether its tokens see each other; derive it from moejax.Layer "
            "and write check_causal and decodable, or from moejax.RowWise if it treats each token by itself"
        )
    return part.value


def count_params(params: Any) -> int:
    """The number of parameters of a tree of arrays or of their shapes."""
    return sum(leaf.size for leaf in jax.tree.leaves(params))


def active_params(model: nn.Module, params: Mapping[str, Any]) -> int:
    """The parameters that one token uses: all of them, except that a bank counts by the share of its experts that run.

    A layer with a bank says that share itself, in `active_fraction()`; its bank's parameters lie under 'bank'.

    Args:
      model: a network made of a `Stack` named 'stack', adapted or not.
      params: its parameters or their shapes, scanned or unrolled.
    """
    total = float(count_params(params))
    repeats = [tree for name, tree in params["stack"].items() if name == SCANNED or name.startswith(UNROLLED)]
    for i, block in enumerate(pattern_blocks(model)):
        for part in walk(block):
            fraction = part.value.active_fraction() if isinstance(part.value, Layer) else 1.0
            if fraction < 1.0:
                for repeat in repeats:
                    bank = _at(repeat[block_name(i, block.name)], part.path).get("bank", {})  # null experts have no parameters
                    total -= (1.0 - fraction) * count_params(bank)
    for named in _adapters(model):
        fraction = named.adapter.active_fraction()
        for path, leaf in flatten_dict(params).items():
            if named.scope in path and "bank" in path[path.index(named.scope) :]:
                total -= (1.0 - fraction) * leaf.size
    return round(total)


def _adapters(model: nn.Module) -> tuple[Named, ...]:
    return model.on if isinstance(model, Adapted) else ()


def _at(tree: Mapping[str, Any], path: tuple[str, ...]) -> Any:
    for name in path:
        tree = tree[name]
    return tree
