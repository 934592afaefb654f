"""After an optimizer step: the layers' controllers change state, parameters and the optimizer's memory (see `moejax.core.control`)."""

from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int

from moejax.core.control import Declared, Path, Site
from moejax.core.roles import names

Tree = Any


def after_step(
    controllers: Iterable[Declared], measured: Tree, variables: Mapping[str, Any], step: Int[Array, ""] | int
) -> dict[str, Any]:
    """A model's variables after an optimizer step of one's own; `fit` does this by itself.

        with record_controllers() as controllers:                                  # while the step is traced
            y, sown = model.apply(variables, x, Context(train=True), mutable=["losses", "measured"])
        variables = after_step(controllers.values(), sown["measured"], variables, step)   # updates done, this one included

    Optimizer memory of parameters that a controller sets anew stays as it was.
    """
    params, _, state = apply_controllers(
        controllers, measured, variables["params"], None, variables.get("router_state", {}), jnp.asarray(step, jnp.int32), None
    )
    return {**variables, "params": params, "router_state": state}


def apply_controllers(
    declared: Iterable[Declared],
    measured: Tree,
    params: Tree,
    opt_state: Tree,
    router_state: Tree,
    step: Int[Array, ""],
    start: Callable[[Tree], Tree] | None,
) -> tuple[Tree, Tree, Tree]:
    """What the controllers make of parameters, optimizer state and router state.

    Args:
      declared: what `record_controllers` found while the step was traced.
      measured: the collection 'measured', summed over the step's microbatches.
      params, opt_state, router_state: after the step's update.
      step: updates done, this one included.
      start: parameters -> the optimizer's state before the first update; None where there is no optimizer.
    """
    groups: dict[Any, list[Declared]] = defaultdict(list)
    for item in declared:
        groups[item.controller, item.shapes].append(item)
    restarted: Tree = {}
    for (controller, shapes), items in groups.items():
        values = [_at(measured, (*item.path, f"{item.name}_measured")) for item in items]
        everywhere = {name: sum(_over_layers(v[name], shape).sum(0) for v in values) for name, shape in shapes}
        for item, value in zip(items, values, strict=True):
            site = Site(_at(params, item.path), _at(router_state, item.path), value, everywhere, step)
            after = controller.after_step
            # Scanned layers have leading axes that the layer itself did not see.
            name, shape = shapes[0]
            for _ in range(value[name].ndim - len(shape)):
                after = jax.vmap(after, in_axes=(Site(0, 0, 0, None, None),))
            site = after(site)
            params, router_state = _put(params, item.path, site.params), _put(router_state, item.path, site.state)
            if site.restarted:
                restarted = _put(restarted, item.path, site.restarted)
    if restarted and start is not None:
        opt_state = _restart(opt_state, restarted, params, start)
    return params, opt_state, router_state


def _restart(opt_state: Tree, restarted: Tree, params: Tree, start: Callable[[Tree], Tree]) -> Tree:
    """The optimizer's state with that of the marked entries as it was at the start.

    A part of the state belongs to the parameter whose path its own path ends with, and is about single entries if it has the
    parameter's shape. Memory of another shape (factored, per layer) is about more than the marked entries, and stays.
    """
    shapes = {names(path): leaf.shape for path, leaf in jax.tree_util.tree_leaves_with_path(params)}
    marks = {names(path): mark for path, mark in jax.tree_util.tree_leaves_with_path(restarted)}

    def again(path: tuple[Any, ...], memory: Array, fresh: Array) -> Array:
        whole = names(path)
        owner = next((whole[i:] for i in range(len(whole)) if whole[i:] in shapes), None)
        if owner not in marks or memory.shape != shapes[owner]:
            return memory
        return jnp.where(jnp.broadcast_to(marks[owner], memory.shape), fresh, memory)

    return jax.tree_util.tree_map_with_path(again, opt_state, start(params))


def _over_layers(value: Array, shape: tuple[int, ...]) -> Array:
    """Measurements `[*layers, *shape]` with all layers on one axis."""
    return value.reshape(-1, *shape)


def _at(tree: Tree, path: Path) -> Tree:
    """The part of a tree of mappings that is at `path`; empty if there is none."""
    for name in path:
        tree = tree.get(name, {})
    return tree


def _put(tree: Mapping[str, Any], path: Path, value: Tree) -> Tree:
    """A copy of the tree with `value` at `path`."""
    if not path:
        return value
    if not value and path[0] not in tree:
        return tree
    return {**tree, path[0]: _put(tree.get(path[0], {}), path[1:], value)}
