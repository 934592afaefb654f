"""Fewer experts where they matter least: a k for each layer of a trained model, under a budget (LExI, Chitty-Venkata et al. 2025)."""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any, Literal, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float, Int

from moejax.core.context import Context
from moejax.core.errors import ConfigError
from moejax.core.fields import Count, Whole
from moejax.layers.ffn.allotted import STATE, AllottedMoE
from moejax.models.parts import walk
from moejax.models.registry import build
from moejax.models.stack import UNROLLED, block_name, pattern_blocks, to_scanned, to_unrolled
from moejax.surgery import budgets
from moejax.surgery.base import Checkpoint, Target, surgeries

Path = tuple[str, ...]
Text = tuple[Array, Context, dict[str, Array]]  # tokens, their context, and what is judged


@surgeries.register("allot")
@dataclasses.dataclass(frozen=True)
class Allot:
    """Gives each mixture of kind 'allotted' its own number of experts per token, `budget` in all; no parameter changes.

        init = {'source': trained, 'surgeries': {'allot': {'budget': 12}}}         # model.blocks.moe.ffn.kind = 'allotted'

    First `D[j, k]`, what k experts instead of the rule's own number cost in layer j: the mean over draws of the Frobenius norm of the
    change in that layer's output (algorithm 1); then the k_j of least total cost (algorithm 2). Shared experts are always on, and not
    in the budget.

    Attributes:
      budget: the sum of all layers' k.
      by: what the cost is measured with: 'gaussian' inputs N(0, 1) to the mixture itself, after its norm (the paper; no data);
        'hidden', what it is given on batches of the run's training data; 'loss', the rise of the language model's loss on these
        batches when one layer's k is lowered; 'nothing' draws amounts at random, the control.
      relative: divides each change by the norm of the layer's output, so that layers of large outputs count no more than others.
      search: 'exact' by dynamic programming, or 'evolution' (the paper's; no better).
      least: of each layer's k.
      draws: inputs, or batches, that the cost is a mean over.
      shape: rows and tokens of a row of each Gaussian input.
      population, generations: of evolution.

    Raises:
      ConfigError: the model has no such mixture, the budget cannot be met, or 'hidden' and 'loss' are asked of other data than text.
    """

    budget: Count
    by: Literal["gaussian", "hidden", "loss", "nothing"] = "gaussian"
    relative: bool = False
    search: Literal["exact", "evolution"] = "exact"
    least: Count = 1
    draws: Count = 4
    shape: tuple[Count, Count] = (4, 64)
    population: Count = 64
    generations: Whole = 200

    def __call__(self, checkpoint: Checkpoint, target: Target) -> Checkpoint:
        model = build(target.config["model"])
        found = sites(model)
        if not found:
            raise ConfigError("allot: the model has no mixture of kind 'allotted'; give its ffn that kind")
        key, search = jax.random.split(target.key)
        rng = np.random.default_rng(np.asarray(jax.random.key_data(search)))
        unrolled = {name: to_unrolled(tree) for name, tree in checkpoint.variables.items()}
        cost = self.cost(model, found, with_amounts(unrolled, found, [site.most for site in found]), key, target)
        if self.by == "nothing":
            amounts = budgets.drawn(cost, self.budget, rng, self.least)
        elif self.search == "exact":
            amounts = budgets.exact(cost, self.budget, self.least)
        else:
            amounts = budgets.evolved(cost, self.budget, rng, self.least, self.population, self.generations)
        state = with_amounts(unrolled, found, amounts)["router_state"]
        state = to_scanned(state) if model.scan else state
        return checkpoint._replace(variables={**checkpoint.variables, "router_state": state})

    def cost(
        self, model: nn.Module, found: list["Site"], variables: Mapping[str, Any], key: Array, target: Target
    ) -> Float[np.ndarray, "l k"]:
        """`D[j, k]`, infinite for a k above the rule's own; `variables` are unrolled."""
        match self.by:
            case "gaussian":
                width = model.d_model
                inputs = [jax.random.normal(k, (self.draws, *self.shape, width)) for k in jax.random.split(key, len(found))]
                rows = [
                    changes(site, variables, xs, [Context()] * self.draws, self.relative)
                    for site, xs in zip(found, inputs, strict=True)
                ]
            case "hidden":
                batches = [_text(batch) for batch in target.batches(self.draws)]
                given = seen(model, found, variables, batches)
                contexts = [ctx for _, ctx, _ in batches]
                rows = [
                    changes(site, variables, [xs[j] for xs in given], contexts, self.relative) for j, site in enumerate(found)
                ]
            case "loss":
                rows = rises(model, found, variables, [_text(batch) for batch in target.batches(self.draws)])
            case _:
                rows = [np.zeros(site.most) for site in found]
        table = np.full((len(found), max(map(len, rows))), np.inf)
        for j, row in enumerate(rows):
            table[j, : len(row)] = row
        return table


class Site(NamedTuple):
    """A mixture of one layer: which layer, where its variables are in the unrolled model, and its module."""

    layer: int
    num_layers: int
    path: Path
    module: AllottedMoE

    @property
    def most(self) -> int:
        return self.module.most


def sites(model: nn.Module) -> list[Site]:
    """The allotted mixtures of a network made of a `Stack` named 'stack', from the first layer on."""
    parts = pattern_blocks(model)
    found = []
    for layer in range(model.num_layers):
        repeat, i = divmod(layer, len(parts))
        for part in walk(parts[i]):
            if isinstance(part.value, AllottedMoE):
                path = ("stack", f"{UNROLLED}{repeat}", block_name(i, parts[i].name), *part.path)
                found.append(Site(layer, model.num_layers, path, part.value))
    return found


def with_amounts(variables: Mapping[str, Any], found: list[Site], amounts: Any) -> dict[str, Any]:
    """Unrolled variables in which each mixture has its k."""
    state = variables.get("router_state", {})
    for site, k in zip(found, amounts, strict=True):
        state = _put(state, (*site.path, STATE), jnp.int32(k))
    return {**variables, "router_state": state}


def changes(
    site: Site, variables: Mapping[str, Any], inputs: Any, contexts: list[Context], relative: bool = False
) -> Float[np.ndarray, "k"]:
    """Mean norm of the change of a mixture's output under 1, 2, ... experts, the last of which is exactly 0.

    Args:
      inputs: to the mixture, one `[b, s, d]` for each of `contexts`.
      relative: as a share of the norm of the output.
    """
    own = {name: _at(tree, site.path) for name, tree in variables.items()}
    layer = {"layer": jnp.int32(site.layer), "num_layers": site.num_layers}
    module = site.module.clone(parent=None)
    each = [_norms(module, relative, own, x, ctx.replace(**layer)) for x, ctx in zip(inputs, contexts, strict=True)]
    return np.mean(each, axis=0).astype(float)


@functools.partial(jax.jit, static_argnums=(0, 1))
def _norms(module: AllottedMoE, relative: bool, own: Any, x: Float[Array, "b s d"], ctx: Context) -> Float[Array, "k"]:
    """Of the change of the output for one input; compiled once for all layers that are alike."""

    def output(k: Int[Array, ""]) -> Float[Array, "b s d"]:
        y = module.apply({**own, "router_state": {**own["router_state"], STATE: k}}, x, ctx)
        return y.astype(jnp.float32)

    base = output(jnp.int32(module.most))
    moved = jax.lax.map(lambda k: jnp.linalg.norm((output(k) - base).ravel()), jnp.arange(1, module.most + 1))
    return moved / jnp.maximum(jnp.linalg.norm(base.ravel()), 1e-12) if relative else moved


def seen(model: nn.Module, found: list[Site], variables: Mapping[str, Any], batches: list[Text]) -> list[list[Array]]:
    """What each mixture is given in a forward pass of each batch, `[b, s, d]`."""

    def note(call: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any], context: Any) -> Any:
        if isinstance(context.module, AllottedMoE) and context.method_name == "__call__":
            context.module.sow("inputs", "x", args[0])
        return call(*args, **kwargs)

    @jax.jit
    def run(variables: Any, tokens: Array, ctx: Context) -> list[Array]:
        with nn.intercept_methods(note):
            _, sown = model.clone(scan=False).apply(variables, tokens, ctx, mutable=["inputs"])
        return [_at(sown["inputs"], site.path)["x"][0] for site in found]

    return [run(dict(variables), tokens, ctx) for tokens, ctx, _ in batches]


def rises(
    model: nn.Module, found: list[Site], variables: Mapping[str, Any], batches: list[Text]
) -> list[Float[np.ndarray, "k"]]:
    """How much the mean loss of the batches rises, in nats a target, if one layer uses 1, 2, ... experts."""
    model = model.clone(scan=False)

    @jax.jit
    def loss(
        variables: Any, amounts: Int[Array, "l"], tokens: Array, ctx: Context, batch: Mapping[str, Array]
    ) -> Float[Array, ""]:
        logits = model.apply(with_amounts(variables, found, list(amounts)), tokens, ctx)
        each = optax.softmax_cross_entropy_with_integer_labels(logits, batch["targets"])
        return jnp.where(batch["valid"], each, 0).sum() / jnp.maximum(batch["valid"].sum(), 1)

    def mean(amounts: list[int]) -> float:
        return float(np.mean([loss(dict(variables), jnp.array(amounts), *batch) for batch in batches]))

    most = [site.most for site in found]
    base = mean(most)
    return [
        np.array([mean([*most[:j], k, *most[j + 1 :]]) - base for k in range(1, site.most)] + [0.0])
        for j, site in enumerate(found)
    ]


def _text(batch: Mapping[str, Any]) -> Text:
    """A batch of text as a language model takes it, and what is judged."""
    if "tokens" not in batch:
        raise ConfigError("allot: by='hidden' and by='loss' read text; for other data take by='gaussian'")
    given = {name: jnp.asarray(batch[name]) for name in ("tokens", "positions", "segments", "targets", "valid")}
    segments, tokens = given["segments"], given["tokens"]
    ctx = Context(valid=segments != 0, positions=given["positions"], segments=segments, token_ids=tokens)
    return tokens, ctx, {name: given[name] for name in ("targets", "valid")}


def _at(tree: Mapping[str, Any], path: Path) -> Any:
    """The part of a tree at a path; empty if there is none."""
    for name in path:
        tree = tree.get(name, {})
    return tree


def _put(tree: Any, path: Path, value: Any) -> Any:
    if not path:
        return value
    return {**tree, path[0]: _put(tree.get(path[0], {}), path[1:], value)}
