"""Questions about a network that its parts answer: is it causal, can it decode, how many parameters does a token use."""

from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax

from moejax.core.errors import ConfigError
from moejax.models.parts import NamedBlock, walk
from moejax.models.stack import SCANNED, UNROLLED, block_name, pattern_blocks


def check_causal(blocks: tuple[NamedBlock, ...]) -> None:
    """Refuses blocks in which a token could see later ones.

    A part with a method `check_causal(where)` decides for itself and for the rules it holds, since it knows its remedies;
    any other part is refused if it has an attribute `causal` that is False.

    Raises:
      ConfigError: with the place of the first such part.
    """
    for block in blocks:
        for part in walk(block):
            if hasattr(part.value, "check_causal"):
                part.value.check_causal(part.where)
            elif getattr(part.value, "causal", None) is False and not hasattr(part.owner, "check_causal"):
                raise ConfigError(
                    f"{part.where} ({type(part.value).__name__}) is not causal: tokens would see the future in a decoder; "
                    "take a causal kind, or use it in a bidirectional model"
                )


def why_not_decodable(model: nn.Module) -> str | None:
    """Why the model cannot be decoded token by token, with the place; None if it can.

    Asks every part that has a method `decodable() -> str | None`.
    """
    for block in pattern_blocks(model):
        for part in walk(block):
            if hasattr(part.value, "decodable"):
                reason = part.value.decodable()
                if reason is not None:
                    return f"{part.where}: {reason}"
    return None


def count_params(params: Any) -> int:
    """The number of parameters of a tree of arrays or of their shapes."""
    return sum(leaf.size for leaf in jax.tree.leaves(params))


def active_params(model: nn.Module, params: Mapping[str, Any]) -> int:
    """The parameters that one token uses: all of them, except that a bank counts by the share of its experts that run.

    A layer with a bank says that share itself, in `active_fraction()`; its bank's parameters lie under 'bank'.

    Args:
      model: a network made of a `Stack` named 'stack'.
      params: its parameters or their shapes, scanned or unrolled.
    """
    total = float(count_params(params))
    repeats = [tree for name, tree in params["stack"].items() if name == SCANNED or name.startswith(UNROLLED)]
    for i, block in enumerate(pattern_blocks(model)):
        for part in walk(block):
            fraction = part.value.active_fraction() if hasattr(part.value, "active_fraction") else 1.0
            if fraction < 1.0:
                for repeat in repeats:
                    bank = _at(repeat[block_name(i, block.name)], part.path).get("bank", {})  # null experts have no parameters
                    total -= (1.0 - fraction) * count_params(bank)
    return round(total)


def _at(tree: Mapping[str, Any], path: tuple[str, ...]) -> Any:
    for name in path:
        tree = tree[name]
    return tree
