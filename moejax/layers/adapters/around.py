"""Finding a model's layers while it runs, and running adapters around them: the model knows nothing of it."""

import contextlib
import functools
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import flax.linen as nn
import jax.numpy as jnp
from flax.core import Scope
from jaxtyping import Array

from moejax.core.context import Context
from moejax.core.errors import ConfigError
from moejax.core.params import Dense, Names, Path, changing, for_use, splittable
from moejax.core.paths import listed, nearest_paths
from moejax.core.roles import ROLES, roles_of
from moejax.dispatch.experts import Experts
from moejax.experts.base import Bank
from moejax.layers.adapters.base import Site
from moejax.layers.adapters.maps import linear_map
from moejax.layers.adapters.places import ROUTERS, Named, Place, note
from moejax.layers.adapters.stack import with_matrices


class Around:
    """One call of an adapted model.

    Args:
      root: path of the model.
      adapters: in the order in which they are applied; those that change a matrix come first whatever the order.
      order: all adapters of the model by name, in the order in which `Context.adapter` counts them.
    """

    def __init__(self, root: tuple[str, ...], adapters: tuple[Named, ...], order: tuple[str, ...]):
        self._root, self._adapters, self._order = root, adapters, order
        self._places: dict[tuple[str, str], Place] = {}  # by path and form
        self._used: set[tuple[str, str]] = set()  # adapter, target
        # Of the modules that are being called, the innermost that was given a context describes the tokens of a layer: blocks may
        # see some of the tokens, or rearranged ones.
        self._contexts: list[Context | None] = [None]
        self._modules: list[nn.Module] = []
        self._inside: set[tuple[str, ...]] = set()  # layers that are called again by their own adapters
        self._paused = False

    @contextlib.contextmanager
    def watching(self) -> Iterator[None]:
        """Adapts the layers that are called inside the `with` block."""
        with nn.intercept_methods(self._intercept), changing(self._changed_parameter):
            yield

    def check(self) -> None:
        """Raises ConfigError for a target that matched nothing."""
        for named in self._adapters:
            reached = {path: place for (path, form), place in self._places.items() if form in named.adapter.reaches()}
            for target in named.adapter.targets:
                if (named.name, target) not in self._used:
                    there = listed([f"{path} ({place.kind})" for path, place in sorted(reached.items())], 24) or "none"
                    near = "" if target in ROLES or not reached else f"{nearest_paths(target, reached)}; "
                    raise ConfigError(
                        f"targets='{target}' of adapter '{named.name}' matches no layer that {type(named.adapter).__name__} can "
                        f"change; {near}there are: {there}"
                    )

    def _intercept(self, call: Callable[..., Any], args: tuple, kwargs: dict[str, Any], context: Any) -> Any:
        module = context.module
        table = isinstance(module, nn.Embed) and context.method_name == "attend"
        if self._paused or not (context.method_name == "__call__" or table) or module.path in self._inside:
            return call(*args, **kwargs)
        self._contexts.append(next((a for a in (*args, *kwargs.values()) if isinstance(a, Context)), self._contexts[-1]))
        self._modules.append(module)
        try:
            if isinstance(module, nn.Embed):
                return self._table(module, context.method_name, call, args, kwargs)
            if not (args or kwargs):
                return call(*args, **kwargs)
            return self._layer(module, _Own(self, module, call, args, kwargs))
        finally:
            self._contexts.pop()
            self._modules.pop()

    def _layer(self, module: nn.Module, own: "_Own") -> Any:
        """A layer's output, adapted."""
        path = module.path[len(self._root) :]
        view = linear_map(module, own.given)
        if view is not None:
            axes = module.axes if isinstance(module, Dense) else (None, None)
            kernel_at = Place("/".join(path), "linear", view.kind, self._roles(path), path, "kernel", view.shape, axes, view)
            if chosen := self._chosen(kernel_at):
                return self._linear(module, own, kernel_at, chosen)
        if isinstance(own.given, int) and hasattr(module, "num_experts"):
            experts = own(own.given)
            return self._bank(module, experts) if isinstance(experts, Experts) else experts
        if not path:
            return own(own.given)
        place = Place("/".join(path), "layer", type(module).__name__, self._roles(path), path)
        call: Callable[[Any], Any] = own
        for named in self._chosen(place):
            adapted = _Kept(functools.partial(self._run, named, module, place, place.site(call=call, module=module)))
            call = self._switched(named, adapted, call)
        return call(own.given)

    def _bank(self, module: nn.Module, experts: Experts) -> Experts:
        """A bank's experts, with those of their matrices adapted that the bank itself declared."""
        path = module.path[len(self._root) :]
        changed = {}
        for name, w in experts.params.items() if isinstance(experts.params, Mapping) else ():
            if name not in module.variables.get("params", {}) or w.ndim != 3:
                continue
            axes = (None,) * 3 if experts.axes is None else experts.axes[name]
            roles = self._roles(path, "experts" if "expert" in splittable(axes) else ())
            place = Place("/".join((*path, name)), "stack", "bank", roles, path, name, w.shape, axes, below=(name,))
            for named in sorted(self._chosen(place), key=lambda named: not named.adapter.by_weight("stack")):
                self._refuse_switch(place)
                site = place.site(module=module)
                changed[name] = self._run(named, module, place, site, changed.get(name, w))
        return with_matrices(experts, changed) if changed else experts

    def _linear(self, module: nn.Module, own: "_Own", place: Place, chosen: list[Named]) -> Array:
        own(own.given)  # The kernel is there after the first call only, where parameters are being made.
        params = module.variables["params"]
        stored = for_use(params["kernel"], place.axes) if isinstance(module, Dense) else params["kernel"]
        kernel, bias = place.map.matrix(stored), place.map.vector(params["bias"]) if "bias" in params else None
        call: Callable[[Array], Array] = own
        by_token = self._by_token(own.given)
        for named in sorted(chosen, key=lambda named: not named.adapter.by_weight("linear")):
            before = own if by_token else call
            site = place.site(call=before, module=module, kernel=kernel, bias=bias)
            if named.adapter.by_weight("linear"):
                changed = self._run(named, module, place, site, kernel, form="weight")
                call_changed = _Kept(functools.partial(self._run_with, module, {"kernel": place.map.kernel(changed)}))
                call, kernel = self._switched(named, call_changed, call), kernel if by_token else changed
            else:
                call = self._switched(named, _Kept(functools.partial(self._run, named, module, place, site)), call)
        return call(own.given)

    def _table(self, module: nn.Embed, method: str, call: Callable[..., Any], args: tuple, kwargs: dict[str, Any]) -> Array:
        """An embedding's output with its table adapted: looked up and attended to alike."""
        y = call(*args, **kwargs)
        path = module.path[len(self._root) :]
        value, roles = module.variables["params"]["embedding"], self._roles(path)
        place = Place("/".join(path), "weight", "embed", roles, path, "embedding", value.shape, (None, None), table=True)
        changed = self._changed(module, place, value)
        return y if changed is value else self._run_with(module, {"embedding": changed}, *args, method=method, **kwargs)

    def _changed_parameter(self, module: nn.Module, name: str, value: Array, axes: Names, role: str | tuple[str, ...]) -> Array:
        """A matrix that a model declares for itself, such as a head."""
        if self._paused or value.ndim != 2 or "expert" in axes or isinstance(module, Bank):
            return value
        path = (*module.path[len(self._root) :], name)
        roles = self._roles(path, role)
        table = "embeddings" in roles
        kind = "embed" if table else "matrix"
        place = Place("/".join(path), "weight", kind, roles, path[:-1], name, value.shape, axes, below=(name,), table=table)
        return self._changed(module, place, value)

    def _changed(self, module: nn.Module, place: Place, value: Array) -> Array:
        for named in self._chosen(place):
            self._refuse_switch(place)
            value = self._run(named, module, place, place.site(module=module), value)
        return value

    def _run(self, named: Named, module: nn.Module, place: Place, site: Site, given: Any, form: str | None = None) -> Any:
        """One adapter, in a scope of the layer's own: lifted transforms (scan, remat) treat it like the layer's kernel."""
        scope = module.scope
        for name in place.scope(named)[len(place.module) :]:
            scope = scope.push(name, reuse=True)
        with self._pause(True):
            return named.adapter.clone(parent=scope)(form or place.form, given, site, self._contexts[-1])

    def _run_with(
        self, module: nn.Module, params: Mapping[str, Array], *args: Any, method: str = "__call__", **kwargs: Any
    ) -> Any:
        """A layer's own method with some of its parameters replaced."""
        variables = {**module.variables, "params": {**module.variables["params"], **params}}
        scope = Scope(variables, path=module.scope.path, debug_path=module.scope.debug_path, flags=module.scope.flags)
        with self._pause(True):
            return getattr(module.clone(parent=scope, name=None), method)(*args, **kwargs)

    def _chosen(self, place: Place) -> list[Named]:
        """The adapters that are to change a place."""
        self._places[place.path, place.form] = place
        chosen = []
        for named in self._adapters:
            hits = [target for target in named.adapter.targets if place.targeted(target)]
            if place.form not in named.adapter.reaches() or not hits:
                continue
            if ROUTERS in place.roles and not named.adapter.on_routers and ROUTERS not in hits:
                raise ConfigError(
                    f"targets='{hits[0]}' of adapter '{named.name}' matches the router at {place.path}, which decides where tokens go; "
                    "take narrower targets, or set on_routers=True if that is meant"
                )
            self._used |= {(named.name, target) for target in hits}
            chosen.append(named)
            note(named, place)
        return chosen

    def _roles(self, path: Path, said: str | tuple[str, ...] = ()) -> frozenset[str]:
        """What a layer is for: what the modules around it say, and it itself."""
        said = (said,) if isinstance(said, str) else said
        # A router of a model that says nothing is known by its name.
        named = (ROUTERS,) if "router" in path else ()
        return frozenset((*said, *named, *(role for module in self._modules for role in roles_of(module))))

    def _by_token(self, x: Array | None) -> bool:
        """Whether each token says which adapter it uses."""
        ctx = self._contexts[-1]
        if ctx is None or ctx.adapter is None:
            return False
        if x is not None and x.shape[: ctx.adapter.ndim] != ctx.adapter.shape:
            raise ConfigError(f"Context.adapter has shape {ctx.adapter.shape}, which does not fit a layer's input {x.shape}")
        return True

    def _refuse_switch(self, place: Place) -> None:
        if self._by_token(None):
            raise ConfigError(f"{place.path} is one matrix for all tokens; Context.adapter cannot switch adapters of it")

    def _switched(
        self, named: Named, call: Callable[[Array], Array], before: Callable[[Array], Array]
    ) -> Callable[[Array], Array]:
        """`call` for the tokens that use this adapter, `before` for the others."""
        ctx, index = self._contexts[-1], self._order.index(named.name)
        if ctx is None or ctx.adapter is None:
            return call

        def switched(x: Array) -> Array:
            y, other = call(x), before(x)
            return jnp.where((ctx.adapter == index).reshape(*ctx.adapter.shape, *(1,) * (y.ndim - ctx.adapter.ndim)), y, other)

        return _Kept(switched)

    @contextlib.contextmanager
    def _pause(self, paused: bool, inside: tuple[str, ...] | None = None) -> Iterator[None]:
        before, added = self._paused, inside is not None and inside not in self._inside
        self._paused = paused
        if added:
            self._inside.add(inside)
        try:
            yield
        finally:
            self._paused = before
            if added:
                self._inside.remove(inside)


class _Kept:
    """A function of one array that remembers what it gave for it."""

    def __init__(self, function: Callable[[Any], Any]):
        self._function, self._seen = function, []

    def __call__(self, x: Any) -> Any:
        for given, y in self._seen:
            if given is x:
                return y
        y = self._function(x)
        self._seen.append((x, y))
        return y


class _Own(_Kept):
    """A layer's own function of its first argument. What lies inside the layer is adapted as ever."""

    def __init__(self, around: Around, module: nn.Module, call: Callable[..., Any], args: tuple, kwargs: Mapping[str, Any]):
        super().__init__(self._call)
        self._around, self._module, self._first = around, module, call
        # A layer may be called with its input by name.
        self._name, self.given = (None, args[0]) if args else next(iter(kwargs.items()))
        self._rest, self._named = args[1:], {key: value for key, value in kwargs.items() if key != self._name}

    def _call(self, x: Any) -> Any:
        first, self._first = self._first, None
        if first is None or self._around._paused:
            # Called again, or by an adapter, which Flax would take for the parent of what the layer makes: a copy, in the same scope.
            first = self._module.clone(parent=self._module.scope.rewound(), name=None)
        with self._around._pause(False, self._module.path):
            return first(x, *self._rest, **self._named) if self._name is None else first(**{self._name: x}, **self._named)
