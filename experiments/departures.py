"""What a study does otherwise than its paper, said for the usual suspects and checked as far as configs tell.

    departures=Departures(
        scale="bytes and a decoder instead of C4 and T5",
        method="none",
        left_out="distillation and fine-tuning",
        capacity="none",
        optimizer="AdamW instead of Adafactor, a cosine instead of the inverse square root",
        decay="0.1 here; Adafactor has none",
        init="none",
    )

A study's `paper` preset is its record of what the paper did. Where an arm differs there from what it is at `cpu`, the sentence of the
suspect that the key belongs to may not be 'none'.
"""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ml_collections import ConfigDict

from experiments.overrides import PLACE, flatten
from moejax.core.errors import ConfigError

NONE = "none"


@dataclass(frozen=True, kw_only=True)
class Departures:
    """A sentence for each suspect, or 'none' where the study does as its paper does.

    Attributes:
      scale: data, and how large and long models and their training are.
      method: what the method itself is told otherwise: experts a token, coefficients and rates of its own, its place in the model.
      left_out: parts, variants and measurements of the paper that no arm has.
      capacity: the room of experts, and which tokens compete for it.
      optimizer: its kind, rates, schedule and clipping.
      decay: weight decay.
      init: how parameters begin.
    """

    scale: str
    method: str
    left_out: str
    capacity: str
    optimizer: str
    decay: str
    init: str

    def __post_init__(self) -> None:
        for suspect, sentence in self.items():
            if not sentence.strip():
                raise ConfigError(f"departures: {suspect} is empty; write what departs from the paper, or '{NONE}'")

    def items(self) -> tuple[tuple[str, str], ...]:
        """Suspect and sentence, in the order above."""
        return tuple((field.name, getattr(self, field.name)) for field in dataclasses.fields(self))


@dataclass(frozen=True)
class Difference:
    """A key that an arm has otherwise at `cpu` than at `paper`."""

    key: str
    arm: str
    cpu: Any
    paper: Any


def check(departures: Departures, where: str, found: Mapping[str, list[Difference]]) -> None:
    """Refuses a 'none' where configs tell a difference.

    Raises:
      ConfigError: names the suspect, the key and both values.
    """
    for suspect, sentence in departures.items():
        if sentence == NONE and suspect in found:
            first = found[suspect][0]
            raise ConfigError(
                f"departures of {where} say {suspect}='{NONE}', but {first.key} is {first.cpu!r} at preset 'cpu' and {first.paper!r} at "
                f"'paper' (arm '{first.arm}'); say what departs from the paper"
            )


def differences(cpu: Mapping[str, ConfigDict], paper: Mapping[str, ConfigDict]) -> dict[str, list[Difference]]:
    """Suspect -> what arms (name -> config) have otherwise, each key with the same two values once."""
    found: dict[str, dict[tuple[str, str, str], Difference]] = {}
    for arm in cpu:
        here, there = flatten(cpu[arm]), flatten(paper[arm])
        for key in dict.fromkeys((*here, *there)):
            values = here.get(key), there.get(key)
            if values[0] != values[1] and (suspect := suspect_of(key)):
                one = (key, repr(values[0]), repr(values[1]))
                found.setdefault(suspect, {}).setdefault(one, Difference(key, arm, *values))
    return {suspect: list(each.values()) for suspect, each in found.items()}


_SIZES = frozenset(
    [
        "channels",
        "d_model",
        "dtype",
        "head_dim",
        "heads",
        "hidden",
        "image_size",
        "num_classes",
        "num_experts",
        "num_heads",
        "num_keys",
        "num_kv_heads",
        "num_layers",
        "patch_size",
        "pattern",
        "query_dim",
        "remat",
        "rope_base",
        "scan",
        "tied",
        "vocab_size",
        "width",
    ]
)
_ROOM = frozenset(("capacity_factor", "eval_capacity_factor", "group_by", "priority"))
_BEGIN = frozenset(("embed_std", "router_scale", "scale_init", "key_std"))


def suspect_of(key: str) -> str:
    """The suspect that a dotted key belongs to; empty if it only says where a run computes."""
    section, *path = key.split(".")
    if section in PLACE:
        return ""
    if key == "optimizer.weight_decay":
        return "decay"
    if section == "optimizer":
        return "optimizer"
    if section in ("data", "train", "eval", "checkpoint"):
        return "scale"
    if section == "model" and any(part.startswith("init_") or part in _BEGIN for part in path):
        return "init"
    if path and path[-1] in _ROOM:
        return "capacity"
    begun = path[-1:] == ["config"]  # how long the run was that an arm starts from
    return "scale" if begun or (section == "model" and path[-1] in _SIZES) else "method"
