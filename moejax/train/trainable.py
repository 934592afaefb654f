"""`config.trainable`: what learns, when, and how fast.

    trainable = {}                                                        # everything, always: the same as no section
    trainable = {'adapters': {}, 'norms': {'rate': 0.1}}                  # roles, by the name of the rule
    trainable = {'late': {'what': ('stack/repeats/1_*',), 'since': 0.5}}  # patterns of paths, from the middle of the run on
    trainable = {'rest': {'what': ('*',), 'but': ('routers',)}}

What no rule names does not learn: it is an argument of the step that nothing is differentiated by, and the optimizer never hears
of it. What learns in some steps only has its optimizer's state from the start; in other steps its update is exactly zero and that
state stands still, as if the optimizer began with its first step. Roles are those of `moejax.core.roles`.
"""

import dataclasses
import itertools
from collections.abc import Collection, Iterable, Mapping
from typing import Any

import flax.traverse_util
import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Bool, Float, Int

from moejax.core.errors import ConfigError, nearest
from moejax.core.fields import Fraction, Positive, Whole, check, checked
from moejax.core.params import Path
from moejax.core.paths import find
from moejax.core.roles import ROLES, Parameter
from moejax.optim.base import Optimizer, global_norm

Tree = Any


@checked
@dataclasses.dataclass(frozen=True)
class Learns:
    """One rule of `config.trainable`.

    Attributes:
      what: roles, or patterns of paths (see `moejax.core.paths.matches`); the rule's own name if left out.
      but: what of it does not learn by this rule, likewise.
      rate: factor of the learning rate, and so of the whole update.
      since: updates of the run before the first one in which it learns; a share of all updates if it is a fraction (0.5).
      until: updates of the run after the last one, likewise; None for the end.

    Raises:
      ConfigError: the steps are in the wrong order, or a value has the wrong type.
    """

    what: tuple[str, ...] = ()
    but: tuple[str, ...] = ()
    rate: Positive = 1.0
    since: Whole | Fraction = 0
    until: Whole | Fraction | None = None


@dataclasses.dataclass(frozen=True)
class Span:
    """Updates `since + 1 .. until` (or to the end), in which a parameter learns at `rate` times the learning rate."""

    since: int
    until: int | None
    rate: float

    @property
    def end(self) -> float:
        """The last update, infinity if there is none."""
        return float("inf") if self.until is None else float(self.until)


ALWAYS = (Span(0, None, 1.0),)


class Learning:
    """Which parameters learn: splits trees like that of the parameters, and makes an optimizer for those that do.

    Args:
      parameters: a tree like the parameters, of `Parameter`s; None if nothing is known of them.
      spans: path -> when it learns, for those that do; None for all, always.
    """

    def __init__(self, parameters: Tree | None = None, spans: Mapping[Path, tuple[Span, ...]] | None = None):
        self.parameters = parameters
        self.spans = None if spans is None or _is_all(spans, parameters) else dict(spans)

    @property
    def phased(self) -> bool:
        """Whether some parameters learn in some steps only."""
        return len(self._groups()) > 1 or any(self._windows(path) != ((0, None),) for path in self.spans or ())

    def split(self, tree: Tree) -> tuple[Tree, Tree]:
        """A tree like the parameters as those that learn and those that do not: two trees, the second empty if all do."""
        if self.spans is None:
            return tree, {}
        flat = flax.traverse_util.flatten_dict(tree)
        parts = ({p: x for p, x in flat.items() if (p in self.spans) == learns} for learns in (True, False))
        learned, kept = map(flax.traverse_util.unflatten_dict, parts)
        return learned, kept

    def join(self, learned: Tree, kept: Tree) -> Tree:
        """The inverse of `split`."""
        if self.spans is None:
            return learned
        flat = flax.traverse_util.flatten_dict(learned) | flax.traverse_util.flatten_dict(kept)
        return flax.traverse_util.unflatten_dict(flat)

    def now(self, grads: Tree, step: Int[Array, ""]) -> Tree:
        """Gradients of those that learn, zero for what does not learn in the update after `step`."""
        if not self.phased:
            return grads
        return _by_path(grads, lambda path, g: jnp.where(_active(self._windows(path), step), g, jnp.zeros_like(g)))

    def transform(self, optimizer: Optimizer) -> optax.GradientTransformationExtraArgs:
        """The optimizer of the parameters that learn. Its `update` takes the number of updates done as `step`."""
        whole = self.parameters if self.parameters is None else self.split(self.parameters)[0]
        if not self.phased:
            return self._scaled(optax.with_extra_args_support(optimizer.transform(whole)))
        # Parameters with the same steps share an optimizer that counts those steps alone: a correction of moments by their
        # age is right in every phase. The schedule, and the norm for clipping, are the run's.
        groups = self._groups()
        parts = {name: optax.with_extra_args_support(optimizer.transform(_part(whole, p))) for name, p in groups.items()}

        def init(params: Tree) -> dict[str, Tree]:
            return {name: parts[name].init(_part(params, paths)) for name, paths in groups.items()}

        def update(grads: Tree, state: dict[str, Tree], params: Tree = None, *, step: Any, **extra: Any) -> tuple[Tree, Any]:
            norm, updates, after = global_norm(grads), {}, {}
            for name, paths in groups.items():
                active = _active(self._windows(paths[0]), step)
                moved, new = parts[name].update(
                    _part(grads, paths), state[name], _part(params, paths), step=step, norm=norm, **extra
                )
                moved = jax.tree.map(lambda u, active=active: jnp.where(active, u, jnp.zeros_like(u)), moved)
                after[name] = jax.tree.map(lambda n, o, active=active: jnp.where(active, n, o), new, state[name])
                updates |= flax.traverse_util.flatten_dict(moved)
            return flax.traverse_util.unflatten_dict(updates), after

        return self._scaled(optax.GradientTransformationExtraArgs(init, update))

    def _scaled(self, inner: optax.GradientTransformationExtraArgs) -> optax.GradientTransformationExtraArgs:
        """With each parameter's factor of the learning rate; the state stays that of `inner`."""
        if self.spans is None or all(span.rate == 1.0 for spans in self.spans.values() for span in spans):
            return inner

        def update(grads: Tree, state: Tree, params: Tree = None, *, step: Any, **extra: Any) -> tuple[Tree, Tree]:
            updates, state = inner.update(grads, state, params, step=step, **extra)
            return _by_path(updates, lambda path, u: u * self._rate(path, step).astype(u.dtype)), state

        return optax.GradientTransformationExtraArgs(inner.init, update)

    def _rate(self, path: Path, step: Int[Array, ""]) -> Float[Array, ""]:
        spans = self.spans[path]
        return sum((jnp.where(_active(((s.since, s.until),), step), s.rate, 0.0) for s in spans), jnp.zeros(()))

    def _windows(self, path: Path) -> tuple[tuple[int, int | None], ...]:
        """When a parameter learns, at whatever rate: neighbouring spans are one."""
        windows: list[tuple[int, int | None]] = []
        for span in self.spans[path]:
            if windows and windows[-1][1] == span.since:
                windows[-1] = (windows[-1][0], span.until)
            else:
                windows.append((span.since, span.until))
        return tuple(windows)

    def _groups(self) -> dict[str, list[Path]]:
        """The parameters that learn, by when they do."""
        groups: dict[str, list[Path]] = {}
        for path in sorted(self.spans or ()):
            name = "_".join(f"{since}_to_{'end' if until is None else until}" for since, until in self._windows(path))
            groups.setdefault(name, []).append(path)
        return groups


def learning(rules: Mapping[str, Any] | None, parameters: Tree, steps: int) -> Learning:
    """What the rules of `config.trainable` say of a model.

    Args:
      rules: name -> fields of `Learns`, or None for a rule that is left out.
      parameters: a tree of `Parameter`s, from `moejax.core.roles`.
      steps: of the run.

    Raises:
      ConfigError: an unknown key, a role or pattern that matches nothing, or two rules for one parameter and step.
    """
    rules = {name: rule for name, rule in (rules or {}).items() if rule is not None}
    if not rules:
        return Learning(parameters)
    known = {p.name: p for p in flax.traverse_util.flatten_dict(parameters).values()}
    found: dict[str, list[tuple[Span, str]]] = {}
    for name, fields in sorted(rules.items()):
        rule = parse_rule(name, fields)
        span = _span(rule, f"trainable.{name}", steps)
        names = _named(rule.what, known, f"trainable.{name}.what") - _named(rule.but, known, f"trainable.{name}.but")
        if not names:
            raise ConfigError(f"trainable.{name}: all that 'what' matches is left out by 'but'; nothing is left to learn")
        for path in names:
            found.setdefault(path, []).append((span, name))
    for path, spans in found.items():
        spans.sort(key=lambda one: (one[0].since, one[0].end))
        for (a, first), (b, second) in itertools.pairwise(spans):
            if b.since < a.end:
                raise ConfigError(
                    f"{path} learns by trainable.{first} and by trainable.{second} in the same steps; leave it out of one of them "
                    "with 'but', or give them other steps"
                )
    return Learning(parameters, {known[path].path: tuple(span for span, _ in spans) for path, spans in found.items()})


def spans(rules: Mapping[str, Any] | None, steps: int) -> dict[str, Span]:
    """Rule -> when what it names learns in a run of so many steps; raises as `parse_rule`."""
    there = {name: parse_rule(name, fields) for name, fields in (rules or {}).items() if fields is not None}
    return {name: _span(rule, f"trainable.{name}", steps) for name, rule in there.items()}


def parse_rule(name: str, fields: Any) -> Learns:
    """The rule called `name`.

    Raises:
      ConfigError: it is no mapping, or has an unknown key or a value of the wrong type.
    """
    where = f"trainable.{name}"
    if not hasattr(fields, "items"):
        raise ConfigError(f"{where}={fields!r} must be a mapping of fields such as {{'rate': 0.1}}, or None to leave it out")
    names = [field.name for field in dataclasses.fields(Learns)]
    for key in fields:
        if key not in names:
            raise ConfigError(f"unknown key '{key}' in {where}{nearest(key, names)}")
    given = dict(fields.items())
    for key in ("what", "but"):
        value = given.get(key, ())
        given[key] = (value,) if isinstance(value, str) else tuple(value) if isinstance(value, list) else value
    given["what"] = given["what"] or (name,)
    check(Learns, given, where)
    return Learns(**given)


def _span(rule: Learns, where: str, steps: int) -> Span:
    def number(key: str) -> int | None:
        value = getattr(rule, key)
        return round(value * steps) if isinstance(value, float) else value

    since, until = number("since"), number("until")
    if until is not None and since >= until:
        raise ConfigError(f"{where}: since={since} must be less than until={until}")
    return Span(since, until, float(rule.rate))


def _named(words: Collection[str], known: Mapping[str, Parameter], where: str) -> set[str]:
    """The names of all parameters that have one of these roles or match one of these patterns. What is both is a role."""
    found: set[str] = set()
    there = {role for parameter in known.values() for role in parameter.roles}
    for word in words:
        if word in there:
            found |= {name for name, parameter in known.items() if word in parameter.roles}
            continue
        try:
            found |= set(find(word, known, where))
        except ConfigError as error:
            wrong = f"no parameter of this model has the role '{word}' ({where})" if word in ROLES else str(error)
            raise ConfigError(f"{wrong}; roles of its parameters: {', '.join(sorted(there)) or 'none'}") from None
    return found


def _is_all(spans: Mapping[Path, tuple[Span, ...]], parameters: Tree) -> bool:
    """Whether every parameter learns in every step at the common rate."""
    return set(spans.values()) == {ALWAYS} and set(spans) == set(flax.traverse_util.flatten_dict(parameters))


def _active(windows: Iterable[tuple[int, int | None]], step: Int[Array, ""]) -> Bool[Array, ""]:
    """Whether the update after `step` is in one of the windows."""
    inside = jnp.zeros((), bool)
    for since, until in windows:
        inside |= (step >= since) & (True if until is None else step < until)
    return inside


def _part(tree: Tree | None, paths: Collection[Path]) -> Tree | None:
    if tree is None:
        return None
    flat = flax.traverse_util.flatten_dict(tree)
    return flax.traverse_util.unflatten_dict({path: flat[path] for path in paths})


def _by_path(tree: Tree, f: Any) -> Tree:
    flat = flax.traverse_util.flatten_dict(tree)
    return flax.traverse_util.unflatten_dict({path: f(path, x) for path, x in flat.items()})
