"""What a study is: a base config, arms that change it, and claims that the paper makes, as checked statements.

    STUDY = Study(
        slug='switch', title='Switch Transformers', arxiv='2101.03961', base=base_lm.get_config(),
        arms=(Arm('dense', {'model.pattern': ('dense',)}), Arm('switch')),
        claims=(lower('eval/bits_per_byte', 'switch', 'dense', matched=('flops',), text='better at equal compute', headline=True),),
        presets={'smoke': SMOKE, 'cpu': Preset({'train.steps': 300}), 'paper': Preset({...})},
        departures=Departures(scale='bytes instead of C4', method='none', ...),
    )

Everything is checked on construction, so that `--list --study=NAME` finds a mistake in a second and not after an hour.

An arm starts from the run of another one, of this study or of another, or from one of the study's `starts`, which are trained for
others only:

    starts=(Arm('pretrained', {'model.pattern': ('dense', 'dense')}),),
    arms=(Arm('tuned', {'init.source': {'kind': 'run', 'arm': 'pretrained'}, 'trainable': {'norms': {}}}), ...),

The named arm is resolved at the same preset, with the same overrides of the command line but those of `init`, `adapters` and `trainable`.
"""

import importlib.util
import itertools
import math
import re
import sys
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, TypedDict, Unpack

from ml_collections import ConfigDict

from experiments import constants, departures, matching, overrides
from experiments.boundaries import HEADLINE_LOOKS, LOOKS
from experiments.departures import Departures
from experiments.quantities import Gain, Minus, Optimum, Quantity, Ratio, Side, Speedup, StepsTo, Trend, Value, side
from moejax.core.errors import ConfigError, nearest

ROOT = Path(__file__).parent
PRESETS = ("smoke", "cpu", "paper")
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.+-]*")


@dataclass(frozen=True)
class Arm:
    """One compared configuration: the base config with `overrides` (dotted key -> value; a mapping replaces a sub-dict)."""

    name: str
    overrides: Mapping[str, Any] = field(default_factory=dict)
    note: str = ""


@dataclass(frozen=True)
class Preset:
    """A scale at which a study runs.

    Claims are looked at after given numbers of seeds, fixed before looking at a result, until they are decided; see
    `experiments.decision`. Arms that no open claim needs get no more seeds.

    Attributes:
      overrides: applied to the base before the arms' own.
      arms: arm name -> overrides applied last, for arms that must be scaled in their own way.
      looks: numbers of seeds after which a claim is looked at. Arms that no claim names get the first of them.
      headline_looks: the same for the headline.
    """

    overrides: Mapping[str, Any] = field(default_factory=dict)
    arms: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    looks: tuple[int, ...] = LOOKS
    headline_looks: tuple[int, ...] = HEADLINE_LOOKS

    def __post_init__(self) -> None:
        for name in ("looks", "headline_looks"):
            looks = getattr(self, name)
            rising = all(a < b for a, b in itertools.pairwise(looks))
            if not looks or not rising or looks[0] < 1 or (looks[0] == 1 and len(looks) > 1):
                raise ConfigError(
                    f"{name}={looks} of a preset: rising numbers of seeds, each 2 or more, or (1,) for no verdict"
                )

    def looks_at(self, claim: "Claim") -> tuple[int, ...]:
        """The looks at a claim."""
        return self.headline_looks if claim.headline else self.looks


# Shapes and finite losses, in a few steps: what every study's 'smoke' is unless it needs another.
SMOKE = Preset(
    {
        "train.steps": 4,
        "train.log_every": 2,
        "eval.every": 0,
        "eval.batches": 1,
        "data.batch_size": 4,
        "optimizer.warmup_steps": 1,
    },
    looks=(1,),
    headline_looks=(1,),
)

# What language models' 'paper' presets share; sizes, steps and rates are each study's own.
PAPER_LM = {
    "model.dtype": "bfloat16",
    "model.remat": "full",
    "data.name": "c4",
    "data.domains": None,
    "train.log_every": 100,
    "eval.every": 5_000,
    "checkpoint.every": 1_000,
}


@dataclass(frozen=True)
class Claim:
    """A statement that a quantity, measured once per seed, lies strictly between `low` and `high`.

    Attributes:
      quantity: what is measured, see `experiments.quantities`.
      text: the claim in the paper's sense; a plain sentence is made of the rest where it is empty.
      headline: the study's main claim; exactly one is.
      needs: why only the paper preset can decide it ("paper scale because ..."); elsewhere it is out of reach.
      matched: what its arms must have equally, see `experiments.matching.KINDS`; () if nothing. A claim about several arms must say.
    """

    quantity: Quantity
    low: float = -math.inf
    high: float = math.inf
    text: str = ""
    headline: bool = False
    needs: str = ""
    matched: tuple[str, ...] | None = None

    def __post_init__(self) -> None:
        if not self.low < self.high or (math.isinf(self.low) and math.isinf(self.high)):
            raise ConfigError(f"claim on {self.quantity.words}: {self.low} < it < {self.high} says nothing, or cannot be")
        for kind in self.matched or ():
            if kind not in matching.KINDS:
                raise ConfigError(f"claim on {self.quantity.words}: matched='{kind}'{nearest(kind, matching.KINDS)}")
        if fixed := _by_construction(self):
            raise ConfigError(f"claim on {self.quantity.words}: {fixed}; what holds by construction is a test, not a claim")

    @property
    def arms(self) -> tuple[str, ...]:
        """The arms that must have run before the claim can be judged."""
        return self.quantity.arms

    @property
    def metric(self) -> str:
        """The first metric that it reads."""
        return self.quantity.metrics[0]

    @property
    def sentence(self) -> str:
        """The claim in words."""
        return self.text or self.statement

    @property
    def statement(self) -> str:
        """The quantity and its bounds."""
        return f"{self.quantity.words} {self.bounds}"

    @property
    def bounds(self) -> str:
        """Where the quantity is claimed to lie."""
        if math.isinf(self.low):
            return f"< {self.high:g}"
        if math.isinf(self.high):
            return f"> {self.low:g}"
        return f"between {self.low:g} and {self.high:g}"


class About(TypedDict, total=False):
    """What every claim may say besides its numbers."""

    text: str
    headline: bool
    needs: str
    matched: tuple[str, ...]


def lower(metric: str, arm: str | Side, than: str | Side, by: float = 0.0, **about: Unpack[About]) -> Claim:
    """`metric` of `arm` is lower than that of `than`, by more than `by`. Either may be several arms: `mean("a", "b")`, `lowest("a", "b")`."""
    return Claim(_difference(metric, arm, than), high=0.0 - by, **about)


def higher(metric: str, arm: str | Side, than: str | Side, by: float = 0.0, **about: Unpack[About]) -> Claim:
    """`metric` of `arm` is higher than that of `than`, by more than `by`."""
    return Claim(_difference(metric, arm, than), low=by, **about)


def within(metric: str, arm: str | Side, than: str | Side, tolerance: float, **about: Unpack[About]) -> Claim:
    """`metric` of the two arms differs by less than `tolerance`: equivalence, which more seeds make easier to show."""
    return Claim(_difference(metric, arm, than), low=-tolerance, high=tolerance, **about)


def above(metric: str, arm: str | Side, value: float, **about: Unpack[About]) -> Claim:
    """`metric` of `arm` is above `value`."""
    return Claim(Value(metric, side(arm)), low=value, **about)


def below(metric: str, arm: str | Side, value: float, **about: Unpack[About]) -> Claim:
    """`metric` of `arm` is below `value`."""
    return Claim(Value(metric, side(arm)), high=value, **about)


def faster(metric: str, arm: str, than: str, by: float = 1.0, **about: Unpack[About]) -> Claim:
    """`arm` needs more than `by` times fewer steps than `than` to reach the same `metric`."""
    return Claim(Speedup(metric, arm, than), low=by, **about)


def sooner(metric: str, arm: str, than: str, target: float, by: float = 1.0, **about: Unpack[About]) -> Claim:
    """`arm` needs more than `by` times fewer steps than `than` until its `metric` is `target`."""
    return Claim(Ratio(StepsTo(metric, than, target), StepsTo(metric, arm, target)), low=by, **about)


def changes_less(metric: str, change: tuple[str, str], than: tuple[str, str], by: float = 0.0, **about: Unpack[About]) -> Claim:
    """From the first arm of `change` to the second `metric` rises less (or falls more) than from the first of `than` to its second."""
    first, second = (_difference(metric, after, before) for before, after in (change, than))
    return Claim(Minus(first, second), high=0.0 - by, **about)


def trend(
    metric: str,
    points: Mapping[float, str],
    low: float = -math.inf,
    high: float = math.inf,
    log: bool = False,
    **about: Unpack[About],
) -> Claim:
    """The slope of `metric` along arms at `points` of an axis lies between `low` and `high`: `trend(m, {2: "e2", 4: "e4"}, high=0)`."""
    return Claim(Trend(metric, points, log), low=low, high=high, **about)


def optimum(
    metric: str, points: Mapping[float, str], low: float = -math.inf, high: float = math.inf, **about: Unpack[About]
) -> Claim:
    """The point of the axis at which a parabola through the arms is lowest (isoFLOP) lies between `low` and `high`."""
    return Claim(Optimum(metric, points), low=low, high=high, **about)


def gains(metric: str, arm: str, cost: float, curve: Mapping[float, str], by: float = 1.0, **about: Unpack[About]) -> Claim:
    """The arms of `curve` (cost -> arm) need more than `by` times the `cost` of `arm` for its `metric`."""
    return Claim(Gain(metric, curve, arm, cost), low=by, **about)


def _difference(metric: str, arm: str | Side, than: str | Side) -> Minus:
    return Minus(Value(metric, side(arm)), Value(metric, side(than)))


def _by_construction(claim: Claim) -> str:
    """Why a claim cannot fail, where that is seen without a run."""
    arms = [side.names for side in _sides(claim.quantity)]
    if len(arms) == 2 and arms[0] == arms[1]:
        return f"it compares {', '.join(arms[0])} with itself"
    return ""


def _sides(quantity: Quantity) -> list[Side]:
    match quantity:
        case Minus(first=Value() as first, second=Value() as second) if first.metric == second.metric:
            return [first.at, second.at]
    return []


@dataclass(frozen=True)
class Study:
    """One paper's experiment.

    Attributes:
      slug: the file's name and the catalogue's row.
      base: the config that arms change.
      departures: what it does otherwise than the paper, for each of the usual suspects; None of a study that no paper has.
      implements: dotted names of what implements the paper's method (`moejax.<Class>`), for the catalogue; a literal.
      starts: configurations that are trained for arms to start from, and not compared.
      ablations: the paper's ablations, each a named group of further arms (`--ablation=NAME`). Claims may name them.
      metrics: columns of the result table, besides those that the claims name.
      notes: doubts and findings, shown in the report.
      full_size: parameters that the largest arm of the headline has at least under the `paper` preset; the tests count them.

    Raises:
      ConfigError: an arm, key, preset or claim that does not fit; names the study and the nearest valid name.
    """

    slug: str
    title: str
    arxiv: str
    base: ConfigDict
    arms: tuple[Arm, ...]
    claims: tuple[Claim, ...]
    presets: Mapping[str, Preset]
    departures: Departures | None
    ablations: Mapping[str, tuple[Arm, ...]] = field(default_factory=dict)
    starts: tuple[Arm, ...] = ()
    metrics: tuple[str, ...] = ()
    notes: str = ""
    implements: tuple[str, ...] = ()
    full_size: float = 1e8

    def __post_init__(self) -> None:
        where = f"study '{self.slug}'"
        if not isinstance(self.base, ConfigDict):
            raise ConfigError(f"base of {where} is {type(self.base).__name__}, not a ConfigDict; call get_config()")
        _check_arms(self, where)
        _check_claims(self, where)
        configs = _check_presets(self, where)
        _check_departures(self, where, configs)

    @cached_property
    def every_arm(self) -> dict[str, Arm]:
        """Name -> arm, those of the ablations included."""
        return {arm.name: arm for group in (self.arms, *self.ablations.values()) for arm in group}

    @property
    def headline(self) -> Claim:
        """The main claim."""
        return next(claim for claim in self.claims if claim.headline)

    def group(self, ablation: str = "") -> tuple[Arm, ...]:
        """The arms to run: the study's own, then those of `ablation` if one is named."""
        if not ablation:
            return self.arms
        if ablation not in self.ablations:
            raise ConfigError(f"unknown ablation '{ablation}' of study '{self.slug}'{nearest(ablation, self.ablations)}")
        return (*self.arms, *self.ablations[ablation])

    def preset(self, name: str) -> Preset:
        """The preset called `name`."""
        if name not in self.presets:
            raise ConfigError(f"unknown preset '{name}' of study '{self.slug}'{nearest(name, self.presets)}")
        return self.presets[name]

    def arm(self, name: str) -> Arm:
        """The arm called `name`, of the study or of an ablation."""
        if name not in self.every_arm:
            raise ConfigError(f"unknown arm '{name}' of study '{self.slug}'{nearest(name, self.every_arm)}")
        return self.every_arm[name]

    def start(self, name: str) -> Arm:
        """What an arm may start from: a start or an arm, by name."""
        every = {**self.every_arm, **{start.name: start for start in self.starts}}
        if name not in every:
            raise ConfigError(f"unknown arm '{name}' of study '{self.slug}'{nearest(name, every)}")
        return every[name]


def resolve(study: Study, preset: str, arm: str, extra: Mapping[str, Any] | None = None) -> ConfigDict:
    """The config that an arm (or a start) trains: base, then the preset's overrides, the arm's, the preset's for it, `extra`.

    Where it starts from another arm, it holds the config of that one.
    """
    return _resolved(study, preset, arm, extra or {}, ())


def unresolved(study: Study, preset: str, arm: str) -> ConfigDict:
    """As `resolve`, with the names of the arms that it starts from in the place of their configs."""
    scale, chosen = study.preset(preset), study.start(arm)
    config = overrides.copy(study.base)
    where = _where(study, arm)
    overrides.apply(config, scale.overrides, f"preset '{preset}' of study '{study.slug}'")
    overrides.apply(config, chosen.overrides, where)
    overrides.apply(config, scale.arms.get(arm, {}), f"preset '{preset}', {where}")
    return config


def _resolved(study: Study, preset: str, arm: str, extra: Mapping[str, Any], on_the_way: tuple[str, ...]) -> ConfigDict:
    config, where = unresolved(study, preset, arm), _where(study, arm)
    if where in on_the_way:
        raise ConfigError(f"{where} starts from itself: {' from '.join((*on_the_way, where))}")
    # What the command line says of starts, adapters and learning is about the arms that it runs.
    passed = {key: value for key, value in extra.items() if key.split(".")[0] not in overrides.OPEN}

    def filled(value: Any, place: str) -> Any:
        if not isinstance(value, Mapping | ConfigDict):
            return value
        spec = {name: filled(part, f"{place}.{name}") for name, part in value.items()}
        if spec.get("kind") != "run" or "arm" not in spec:
            return spec
        if "config" in spec:
            raise ConfigError(f"{place} in {where} has an arm and a config; give one of them")
        other = load(spec["study"]) if spec.get("study", study.slug) != study.slug else study
        try:
            start = _resolved(other, preset, spec["arm"], passed, (*on_the_way, where))
        except ConfigError as error:
            raise ConfigError(f"{error} ({place} in {where})") from None
        return {**{k: v for k, v in spec.items() if k not in ("arm", "study")}, "config": start.to_dict()}

    for section in ("init", "task"):
        if section in config:
            config[section] = ConfigDict(filled(config[section], section))
    overrides.apply(config, overrides.shortened(config, extra), f"the command line for {where}")
    return config.lock()


def _where(study: Study, arm: str) -> str:
    return f"arm '{arm}' of study '{study.slug}'"


def study_files() -> dict[str, Path]:
    """Slug -> file of every study, found by name without importing any."""
    files = sorted(ROOT.glob("*/*.py"))
    return {f.stem: f for f in files if not f.stem.startswith("_") and f.parent.name not in ("battery", "bench", "ledger")}


def load(slug: str) -> Study:
    """Imports the one study called `slug` from `experiments/<family>/<slug>.py`.

    Raises:
      ConfigError: no such study, or its file declares another slug or no STUDY.
    """
    files = study_files()
    if slug not in files:
        _refuse_undone(slug)
        raise ConfigError(f"unknown study '{slug}' in experiments/{nearest(slug, files)}")
    path = files[slug]
    name = f"experiments.{path.parent.name}.{slug}"
    spec = importlib.util.spec_from_file_location(name, path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    study = getattr(module, "STUDY", None)
    if not isinstance(study, Study):
        raise ConfigError(f"{path.parent.name}/{path.name} holds no STUDY; it must declare STUDY = Study(...)")
    if study.slug != slug:
        raise ConfigError(f"slug '{study.slug}' in {path.parent.name}/{path.name} differs from the file's name '{slug}'")
    return study


def _refuse_undone(slug: str) -> None:
    """Says so of a method that the catalogue lists and nobody has a study of."""
    for row in tomllib.loads((Path(__file__).parent / "catalog.toml").read_text())["method"]:
        if row["slug"] == slug:
            raise ConfigError(
                f"'{slug}' ({row['title']}, arXiv {row['arxiv']}) is in the catalogue, but has no study yet; see --list for those that do"
            )


def _check_arms(study: Study, where: str) -> None:
    names = [arm.name for group in (study.arms, *study.ablations.values(), study.starts) for arm in group]
    if not study.arms:
        raise ConfigError(f"{where} has no arms; declare at least one Arm")
    for name in (*names, *study.ablations):
        if not _NAME.fullmatch(name):
            raise ConfigError(f"name '{name}' in {where} may only have letters, digits and _ . + -")
    for name in names:
        if names.count(name) > 1:
            raise ConfigError(f"{where} has {names.count(name)} arms called '{name}'; arm names must be unique")


def _check_claims(study: Study, where: str) -> None:
    for i, claim in enumerate(study.claims):
        for name in claim.arms:
            if name not in study.every_arm:
                raise ConfigError(f"claims[{i}] of {where} names unknown arm '{name}'{nearest(name, study.every_arm)}")
        if len(claim.arms) > 1 and claim.matched is None:
            raise ConfigError(
                f"claims[{i}] of {where} ('{claim.sentence}') compares arms and does not say what they must have equally; give "
                f"matched=('flops',), say, or matched=() ({', '.join(matching.KINDS)})"
            )
    headlines = [claim for claim in study.claims if claim.headline]
    if len(headlines) != 1:
        raise ConfigError(f"{where} has {len(headlines)} headline claims; exactly one claim needs headline=True")
    if not set(headlines[0].arms) <= {arm.name for arm in study.arms}:
        raise ConfigError(f"the headline claim of {where} names an ablation's arm; it must compare the study's own arms")


def _check_presets(study: Study, where: str) -> dict[str, dict[str, ConfigDict]]:
    """The config of each arm and start at each preset."""
    found = {}
    if "smoke" not in study.presets:
        raise ConfigError(f"{where} has no 'smoke' preset; every study needs one of a few steps")
    for name, preset in study.presets.items():
        if name not in PRESETS:
            raise ConfigError(f"unknown preset '{name}' in {where}{nearest(name, PRESETS)}")
        if name != "smoke" and min(*preset.looks, *preset.headline_looks) < 2:
            raise ConfigError(f"a look at one seed in preset '{name}' of {where} decides nothing; take 2 or more")
        for arm in preset.arms:
            study.start(arm)
        configs = {arm: resolve(study, name, arm) for arm in (*study.every_arm, *(start.name for start in study.starts))}
        found[name] = configs
        for i, claim in enumerate(study.claims):
            known = [constants.fixed_at(metric, configs[arm]) for metric in claim.quantity.metrics for arm in claim.arms]
            if all(known):
                raise ConfigError(
                    f"claims[{i}] of {where} ('{claim.sentence}') at preset '{name}': {known[0]}; what holds by construction is a test, "
                    "not a claim"
                )
    return found


def _check_departures(study: Study, where: str, configs: Mapping[str, Mapping[str, ConfigDict]]) -> None:
    if (study.departures is None) != (not study.arxiv):
        raise ConfigError(f"{where} has arxiv='{study.arxiv}': what is of a paper says its departures, and nothing else does")
    if study.departures and {"cpu", "paper"} <= set(configs):
        departures.check(study.departures, where, departures.differences(configs["cpu"], configs["paper"]))
