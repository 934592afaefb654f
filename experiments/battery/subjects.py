"""What the battery tries: the headline arm of every study, and a small model around every kind that no headline arm holds.

A subject is tiny: one repeat of the blocks that are the method's own, twice, without their attention where that is the usual one; 16
wide. Everything that makes the method stays.
"""

import dataclasses
import functools
import typing
from collections.abc import Iterator, Mapping
from typing import Any

import flax.linen as nn
from ml_collections import ConfigDict

from configs import base_vit, small_lm
from experiments import overrides
from experiments.battery.kinds import Kind, kinds, made_of, registries
from experiments.study import Study, load, resolve, study_files
from moejax.core.errors import ConfigError
from moejax.core.registry import Given, Many, Registry
from moejax.models import DecoderLM, ViT
from moejax.models.registry import network
from moejax.train.program import build_task
from moejax.train.settings import plain

WIDTH, VOCABULARY, MAX_LENGTH = 16, 32, 32
# Sizes that a subject has instead of its study's, wherever a field has the name. A token travels as before.
TINY = {"hidden": 8, "segment": 4}
# What stands around a method and is none itself: blocks made of these alone are left out, and attention in other blocks.
PLAIN = frozenset({"transformer", "feed_forward", "attention", "ffn", "glu", "rms_norm", "layer_norm"})
HOMES = {"LM": "decoder_lm", "ViT": "vit"}

# Where in a config a kind of each slot stands. Slots that are not here are no part of a model; see `pieces`.
BLOCK = "model.blocks.moe"
PLACES = {
    "router": f"{BLOCK}.ffn.router",
    "select": f"{BLOCK}.ffn.select",
    "bank": f"{BLOCK}.ffn.bank",
    "balancer": f"{BLOCK}.ffn.balancer",
    "loss": f"{BLOCK}.ffn.losses.tried",
    "ffn": f"{BLOCK}.ffn",
    "mixer": f"{BLOCK}.mixer",
    "norm": f"{BLOCK}.norm",
    "block": BLOCK,
    "adapter": "adapters.tried",
    "task": "task",
}
# Required fields that are no slots, by name; where two kinds mean two things by a name, also by type.
VALUES: dict[str, Any] = {
    "num_experts": 8,
    "hidden": 8,
    "rank": 2,
    "features": WIDTH,
    "num_heads": 4,
    "num_keys": 8,
    "k": 2,
    "scale": 1.0,
    "steps": 10,
    "learning_rate": 0.01,
    "targets": ("*/mixer",),
    "path": "runs/start",
    "config": {"model": {"kind": "decoder_lm"}},
    "paths": ("new",),
    "paths: Mapping": {"old/*": "older/*"},
}
# What fills a required slot.
PARTS: dict[str, Any] = {
    "router": {"kind": "linear"},
    "select": {"kind": "top_k", "k": 2},
    "bank": {"kind": "ffn", "hidden": 8},
    "norm": {"kind": "rms_norm"},
    "initializer": {"kind": "fan_in"},
    "ffn": {"kind": "ffn", "hidden": 8},
    "mixer": {"kind": "attention", "num_heads": 4},
    "source": {"kind": "run", "config": plain(small_lm.get_config())},
    "task": {"kind": "next_token"},
}
PARTS["block"] = {"kind": "transformer", **{slot: PARTS[slot] for slot in ("norm", "mixer", "ffn")}}


@dataclasses.dataclass(frozen=True, eq=False)
class Subject:
    """A method as the battery tries it.

    Attributes:
      name: of its study, or of the kind that it is made for.
      config: of a run, shrunk.
      study: whose headline arm it is, if it is one.
    """

    name: str
    config: ConfigDict
    study: Study | None = None

    def place(self, home: str) -> ConfigDict:
        """The config as a language model ('LM') or as one of images ('ViT')."""
        return _placed(self, home)

    @property
    def home(self) -> str:
        """Where it lives: as a language model, or as one of images."""
        return "ViT" if "image_size" in self.config.model else "LM"

    @functools.cached_property
    def holds(self) -> frozenset[type]:
        """The classes that it is made of, its task's included."""
        return made_of((build(self.config), build_task(plain(self.config)["task"], {})))


def build(config: Mapping[str, Any] | ConfigDict, context: Mapping[str, Any] | None = None, **changes: Any) -> nn.Module:
    """The network of a config, with some fields of its model changed; `context` is what its parts are told, such as a backend."""
    config = plain(config)
    return network({**config, "model": {**config["model"], **changes}}, **(context or {}))


@functools.cache
def of_study(slug: str) -> Subject:
    """The headline arm of a study."""
    study = load(slug)
    return Subject(slug, small(resolve(study, "smoke", study.headline.arms[0])), study)


def names() -> list[str]:
    """The subjects that are studies; imports none of them."""
    return sorted(study_files())


@functools.cache
def of_kind(slot: str, name: str) -> Subject:
    """What the kind is tried in: the first headline arm that holds it, the first other arm that does, or a model made for it.

    Raises:
      ConfigError: nothing can be made of it; says what is missing.
    """
    (kind,) = (kind for kind in kinds() if (kind.slot, kind.name) == (slot, name))
    for slug in names():
        if kind.cls in of_study(slug).holds:
            return of_study(slug)
    for study, arm in arms_that_name(kind):
        subject = Subject(str(kind), small(resolve(study, "smoke", arm), repeats=1))
        if kind.cls in subject.holds:
            return subject
    return made_for(kind)


def made_for(kind: Kind) -> Subject:
    """A small decoder around a kind, or a small model of images where a decoder would be refused it."""
    if kind.slot not in PLACES:
        raise ConfigError(
            f"{kind}: nobody says where in a model a {kind.slot} stands; say it in experiments/battery/subjects.py"
        )
    config = small(small_lm.get_config(), repeats=1, attention=kind.slot in ("mixer", "adapter"))
    with config.unlocked(), config.ignore_type():
        *path, last = PLACES[kind.slot].split(".")
        node = config
        for part in path:
            if part not in node:
                node[part] = ConfigDict()
            node = node[part]
        node[last] = ConfigDict(spec_of(kind))
    subject = Subject(str(kind), config)
    try:
        build(config)
    except ConfigError:  # no decoder may hold it
        subject = Subject(str(kind), subject.place("ViT"))
    if kind.cls not in subject.holds:
        raise ConfigError(f"{kind}: the model made for it does not hold it; mend experiments/battery/subjects.py")
    return subject


def spec_of(kind: Kind) -> dict[str, Any]:
    """The shortest config of a kind: required fields only."""
    slots = registries()[kind.slot].slots(kind.name)
    spec: dict[str, Any] = {"kind": kind.name}
    for field in dataclasses.fields(kind.cls):
        given = field.default is not dataclasses.MISSING or field.default_factory is not dataclasses.MISSING
        if not field.init or given or field.name in ("parent", "name"):
            continue
        slot, typed = slots.get(field.name), f"{field.name}: {_type_name(field.type)}"
        if slot is not None:
            spec[field.name] = _part(slot)
        elif typed in VALUES or field.name in VALUES:
            spec[field.name] = VALUES.get(typed, VALUES.get(field.name))
        else:
            raise ConfigError(
                f"{kind} needs '{field.name}', of which the battery has no example; give it one in {__name__}.VALUES"
            )
    return spec


def small(config: ConfigDict, repeats: int = 2, attention: bool = False) -> ConfigDict:
    """Tiny sizes, and of the blocks what is the method's own; everything that makes the method stays.

    Args:
      repeats: of the pattern.
      attention: keeps it. It stays anyway where adapters sit, which may be around it.
    """
    config = overrides.copy(config)
    model = config.model
    with config.ignore_type():
        pattern = tuple(dict.fromkeys(model.pattern))
        own = tuple(name for name in pattern if set(_named(model.blocks[name])) - PLAIN)
        model.pattern = own or pattern[-1:]
        model.num_layers = repeats * len(model.pattern)
        keep = attention or config.get("adapters") or not own
        model.blocks = {name: model.blocks[name] if keep else _alone(model.blocks[name]) for name in model.pattern}
        model.d_model = WIDTH
        if "vocab_size" in model:
            model.vocab_size, model.max_length = VOCABULARY, MAX_LENGTH
        _shrink(model.blocks)
    return config


@functools.cache
def _placed(subject: Subject, home: str) -> ConfigDict:
    """The subject's blocks in another kind of model, on its data; its own config where it is of that kind already."""
    config = subject.config
    if config.model.kind == HOMES[home] or config.model.kind not in HOMES.values():
        return config
    other = overrides.copy((small_lm if home == "LM" else base_vit).get_config())
    shared = {f.name for f in dataclasses.fields(DecoderLM)} & {f.name for f in dataclasses.fields(ViT)}
    with other.ignore_type():
        for key in shared & set(config.model) - {"kind"}:
            other.model[key] = config.model[key]
        if home == "LM":
            other.model.vocab_size, other.model.max_length = VOCABULARY, MAX_LENGTH
        for key in set(config) - {"model", "data", "task", "eval"}:
            other[key] = config[key]
    return other


def arms_that_name(kind: Kind) -> Iterator[tuple[Study, str]]:
    """Arms of studies in whose words the kind occurs; what they are is seen when they are built."""
    for slug in names():
        study = of_study(slug).study
        for arm in study.every_arm.values():
            if kind.name in _words(arm.overrides):
                yield study, arm.name


def _words(overrides: Any) -> Iterator[str]:
    """The kinds that overrides name, and the parts of their keys: of some slots these are kinds too."""
    if isinstance(overrides, Mapping | ConfigDict):
        for key, value in overrides.items():
            yield from str(key).split(".")
            yield from _words(value)
    elif isinstance(overrides, tuple | list):
        for value in overrides:
            yield from _words(value)
    elif isinstance(overrides, str):
        yield overrides


def _named(spec: Any) -> Iterator[str]:
    """The kinds that a config names."""
    if isinstance(spec, Mapping | ConfigDict):
        for key, value in spec.items():
            if key == "kind":
                yield str(value)
            else:
                yield from _named(value)
    elif isinstance(spec, tuple | list):
        for value in spec:
            yield from _named(value)


def _alone(block: ConfigDict) -> ConfigDict:
    """A transformer block without its attention, if that is the usual one: its feed-forward part."""
    if block.kind != "transformer" or set(_named(block.mixer)) - PLAIN:
        return block
    return ConfigDict({**{name: block[name] for name in block if name != "mixer"}, "kind": "feed_forward"})


def _part(slot: Registry | Many | Given) -> Any:
    """What fills a slot."""
    if type(slot) is Many:
        return {"one": PARTS[slot.registry.slot]}
    if isinstance(slot, Many):  # of one item or of several
        return PARTS[slot.registry.slot]
    if isinstance(slot, Given):
        part = _part(slot.registry)
        return {f"{i}": {**part["one"], "num_experts": 4} for i in range(2)} if isinstance(slot.registry, Many) else part
    return PARTS[slot.slot]


def _type_name(annotation: Any) -> str:
    """`Mapping` of `Mapping[str, str]`."""
    return getattr(typing.get_origin(annotation) or annotation, "__name__", str(annotation))


def _shrink(spec: ConfigDict) -> None:
    for key, value in spec.items():
        if isinstance(value, ConfigDict):
            _shrink(value)
        elif key in TINY and isinstance(value, int):
            spec[key] = TINY[key]
