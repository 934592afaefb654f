"""What a network's routed layers do with real batches, layer by layer.

    layers = observe(model, variables, batches, task, labels=3)
    layers['stack.repeats.1_moe.ffn.0'].specialisation      # share of the domain that its experts tell

Whatever a layer is called, it is seen here if it sows its routing (`layers.routed.sow_routing`). Everything is counted on the
device batch by batch, so that a run of any length takes the memory of one batch.
"""

import dataclasses
import functools
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from moejax import dispatch
from moejax.analysis import measures
from moejax.core.context import Context
from moejax.core.errors import ConfigError
from moejax.routing.plan import ExpertPlan, MergePlan, Plan, SlotPlan, TokenPlan
from moejax.tasks.base import Batch, Task

SAMPLE = 32  # tokens of a batch on which experts are compared
LARGEST_VOCABULARY = 65_536


@dataclasses.dataclass(frozen=True)
class ObservedLayer:
    """One routed layer on the batches it was observed on.

    Attributes:
      counts: use of each expert by tokens of each label; soft layers count shares.
      tokens: tokens of each label.
      uncertainty: mean entropy of a token's distribution over experts, in bits, by label.
      words: use of each expert by each token id, for text.
      similarity: mean cosine between two experts' outputs for the same token; None if the layer has no bank of its own.
      backend: that executed its plans, a name of `moejax.dispatch.BACKENDS`; '' if the layer does not say.
    """

    counts: Float[np.ndarray, "labels e"]
    tokens: Float[np.ndarray, "labels"]
    uncertainty: Float[np.ndarray, "labels"]
    words: Float[np.ndarray, "v e"] | None
    similarity: Float[np.ndarray, "e e"] | None
    backend: str = ""

    @property
    def load(self) -> Float[np.ndarray, "e"]:
        """Share of each expert."""
        return self.counts.sum(0) / max(float(self.counts.sum()), 1e-30)

    @property
    def balance(self) -> float:
        """1 if all experts are used alike, 0 if one takes everything."""
        return measures.balance(self.load)

    @property
    def experts_per_token(self) -> Float[np.ndarray, "labels"]:
        """Mean number of experts of a token, by label."""
        return self.counts.sum(1) / np.maximum(self.tokens, 1)

    @property
    def entropy(self) -> float:
        """Mean entropy of a token's distribution over experts, in bits."""
        return float((self.uncertainty * self.tokens).sum() / max(float(self.tokens.sum()), 1))

    @property
    def specialisation(self) -> float:
        """Share of the label that a token's expert tells."""
        return measures.specialisation(self.counts)

    @property
    def alikeness(self) -> float:
        """Mean similarity of two different experts; nan without a bank."""
        if self.similarity is None or len(self.similarity) < 2:
            return float("nan")
        return float(self.similarity[~np.eye(len(self.similarity), dtype=bool)].mean())


def observe(
    model: nn.Module,
    variables: Mapping[str, Any],
    batches: Iterable[Batch],
    task: Task,
    labels: int = 1,
    vocabulary: int = 0,
    responses: bool = True,
) -> dict[str, ObservedLayer]:
    """Every routed layer of the model on the batches, by name: the module's path and the layer's place in its scan.

    Args:
      labels: how many values a token's label takes: its domain, or an image's class (all 1 where the batch has neither).
      vocabulary: number of token ids to count by; 0 leaves `words` out.
      responses: also compare what experts answer to the same tokens.

    Raises:
      ConfigError: no layer of the model sows its routing, there are no batches, or the vocabulary is too large for a table.
    """
    if vocabulary > LARGEST_VOCABULARY:
        raise ConfigError(
            f"vocabulary={vocabulary} is too large for a table of experts by token; take 0 or at most {LARGEST_VOCABULARY}"
        )

    @jax.jit
    def look(variables: Any, batch: Batch) -> dict[str, Any]:
        x, ctx = task.inputs(batch, jnp.zeros((), jnp.int32), False)
        found = {}
        for name, node in _routing(model, variables, x, ctx, responses):
            found[name] = jax.tree.map(jnp.asarray, _count(node, batch, ctx, labels, vocabulary))
        return found

    total: dict[str, Any] | None = None
    many = 0
    for batch in batches:
        found = look(variables, {k: v for k, v in batch.items() if k != "example_id"})
        total = found if total is None else jax.tree.map(jnp.add, total, found)
        many += 1
    if total is None:
        raise ConfigError("there are no batches to observe; raise eval.batches")
    if not total:
        raise ConfigError(f"no layer of this {type(model).__name__} routes anything; choose an arm with experts")
    return dict(_layers(jax.device_get(total), many))


def changed(
    model: nn.Module,
    before: Mapping[str, Any],
    after: Mapping[str, Any],
    batches: Iterable[Batch],
    task: Task,
    disturb: Callable[[Batch], Batch] | None = None,
) -> dict[str, float]:
    """Share of the choices of each layer under `before` that `after` does not make, for the same tokens: 0 is no change.

    Soft layers compare shares: half of the distance between two tokens' distributions over experts.

    Args:
      disturb: gives what `after` sees instead of a batch, such as `with_noise`. Tokens that it replaced are not counted, so what
        is measured is how far the others' routing depends on them. `before` and `after` may then be the same.
    """

    @jax.jit
    def look(before: Any, after: Any, batch: Batch, seen: Batch) -> dict[str, Array]:
        (x, ctx), (other, its) = (task.inputs(each, jnp.zeros((), jnp.int32), False) for each in (batch, seen))
        old, new = dict(_routing(model, before, x, ctx, False)), dict(_routing(model, after, other, its, False))
        found = {}
        for name, node in old.items():
            counted = _valid(node, ctx)
            if ctx.token_ids is not None:
                counted = counted & _arrange(x == other, node)
            uses = [_assigned(each["plan"]) for each in (node, new[name])]
            gone = (jnp.maximum(uses[0] - uses[1], 0) * counted[..., None]).sum((-3, -2, -1))
            found[name] = jnp.stack([gone, (uses[0] * counted[..., None]).sum((-3, -2, -1))])
        return found

    total: dict[str, Any] = {}
    for batch in batches:
        batch = {k: v for k, v in batch.items() if k != "example_id"}
        found = look(before, after, batch, disturb(batch) if disturb else batch)
        total = {name: total.get(name, 0) + np.asarray(value) for name, value in found.items()}
    return {
        f"{name}{_place(at)}": float(v[(0, *at)] / max(v[(1, *at)], 1e-9))
        for name, v in total.items()
        for at in np.ndindex(v.shape[1:])
    }


def with_noise(batch: Batch, share: float, rng: np.random.Generator) -> dict[str, Any]:
    """The batch with noise: that share of its tokens replaced by others of the batch, or images with Gaussian noise.

    Args:
      share: of tokens replaced; of images, the noise's standard deviation as a share of the images' own.
    """
    if "tokens" in batch:
        tokens = np.asarray(batch["tokens"])
        others = rng.choice(tokens[np.asarray(batch["segments"]) != 0], size=tokens.shape)
        return {**batch, "tokens": np.where(rng.random(tokens.shape) < share, others, tokens)}
    image = np.asarray(batch["image"])
    return {**batch, "image": image + (share * image.std() * rng.normal(size=image.shape)).astype(image.dtype)}


def _routing(model: nn.Module, variables: Any, x: Array, ctx: Context, responses: bool) -> Iterator[tuple[str, dict[str, Any]]]:
    """Name and sown routing of every layer; a scan's layers are one, with an axis in front."""
    with nn.intercept_methods(_compare_experts if responses else _go_on):
        _, sown = model.apply(variables, x, ctx, mutable=["routing", "stats"])
    for path, node in _nodes(sown.get("routing", {}), ()):
        stats = functools.reduce(lambda tree, key: tree.get(key, {}), path, sown.get("stats", {}))
        yield ".".join(path), {**node, **{name: stats[name] for name in ("backend",) if name in stats}}


def _nodes(tree: Mapping[str, Any], path: tuple[str, ...]) -> Iterator[tuple[tuple[str, ...], dict[str, Any]]]:
    # Product keys give a plan alone: probabilities of a million experts nobody wants.
    if {"plan", "probs"} <= tree.keys() and not isinstance(tree["plan"], (Mapping, MergePlan)):
        yield path, dict(tree)
    for key, value in tree.items():
        if isinstance(value, Mapping):
            yield from _nodes(value, (*path, key))


def _count(node: Mapping[str, Any], batch: Batch, ctx: Context, labels: int, vocabulary: int) -> dict[str, Array]:
    uses = _assigned(node["plan"])
    valid = _valid(node, ctx)
    probs = node["probs"]
    entropy = -(probs * jnp.log2(probs + 1e-20)).sum(-1)
    label = _arrange(_labels(batch, ctx, valid), node)
    by_label = jax.nn.one_hot(label, labels) * valid[..., None]
    found = {
        "counts": jnp.einsum("gnl,...gne->...le", by_label, uses),
        "tokens": jnp.broadcast_to(by_label.sum((0, 1)), (*uses.shape[:-3], labels)),
        "entropy": jnp.einsum("gnl,...gn->...l", by_label, entropy),
    }
    if vocabulary and ctx.token_ids is not None:
        words = _arrange(ctx.token_ids, node)
        flat = (uses * valid[..., None]).reshape(*uses.shape[:-3], -1, uses.shape[-1])
        table = jnp.zeros((*uses.shape[:-3], vocabulary, uses.shape[-1]))
        found["words"] = table.at[..., words.reshape(-1), :].add(flat)
    if "similarity" in node:
        found["similarity"] = node["similarity"]
    if "backend" in node and jnp.shape(node["backend"]) == uses.shape[:-3]:
        found["backend"] = node["backend"]
    return found


def _labels(batch: Batch, ctx: Context, valid: Array) -> Int[Array, "b s"]:
    """Each token's label: its domain, its image's class, or 0."""
    if ctx.domain is not None:
        return ctx.domain
    tokens = valid.size
    if "label" in batch:
        each = batch["label"]
        return jnp.broadcast_to(each[:, None], (len(each), tokens // len(each)))
    return jnp.zeros(valid.shape, jnp.int32)


def _valid(node: Mapping[str, Any], ctx: Context) -> Array:
    g, n = node["probs"].shape[-3:-1]
    if ctx.valid is None:
        return jnp.ones((g, n), bool)
    b = len(ctx.valid)
    return _arrange(jnp.broadcast_to(ctx.valid, (b, g * n // b)), node)  # of images there is one for all patches


def _arrange(values: Array, node: Mapping[str, Any]) -> Array:
    """`values[b, s]` in the groups that the layer routed: by sequence, by position, or all together."""
    shape = node["probs"].shape[-3:-1]
    if values.shape == shape:
        return values
    return values.T if values.shape[::-1] == shape else values.reshape(shape)


def _assigned(plan: Plan) -> Float[Array, "*layers g n e"]:
    """Use of experts by tokens; the layers of a scan are axes in front."""
    assigned, layers = type(plan).assigned, jax.tree.leaves(plan)[0].ndim - _RANKS[type(plan)]
    for _ in range(layers):
        assigned = jax.vmap(assigned)
    return assigned(plan)


# Dimensions of a plan's first leaf.
_RANKS = {TokenPlan: 3, ExpertPlan: 3, SlotPlan: 4}


def _compare_experts(go_on: Any, args: Any, kwargs: Any, call: nn.module.InterceptorContext) -> Any:
    """After a layer with a bank has run: the answers of all its experts to the same few tokens."""
    y = go_on(*args, **kwargs)
    module = call.module
    bank = getattr(module, "bank", None)
    if call.method_name != "__call__" or bank is None or not hasattr(module, "select"):
        return y
    x, ctx = args[0], args[1] if len(args) > 1 else Context()
    e, rows = bank.num_experts, x.reshape(-1, x.shape[-1])
    rows = rows[:: max(1, len(rows) // SAMPLE)][:SAMPLE]
    experts = jnp.repeat(jnp.arange(e, dtype=jnp.int32), len(rows))[None, :, None]
    used = jnp.ones(experts.shape, bool)
    plan = TokenPlan(experts, used.astype(jnp.float32), used, ~used, num_experts=e)
    answers = dispatch.dispatch(plan, module.bank(x.shape[-1], ctx), jnp.tile(rows, (e, 1))[None], "reference")
    answers = answers.astype(jnp.float32).reshape(e, len(rows), -1)
    answers = answers / (jnp.linalg.norm(answers, axis=-1, keepdims=True) + 1e-9)
    module.sow(
        "routing",
        "similarity",
        jnp.einsum("itd,jtd->ij", answers, answers) / len(rows),
        reduce_fn=lambda _, new: new,
        init_fn=lambda: None,
    )
    return y


def _go_on(go_on: Any, args: Any, kwargs: Any, call: nn.module.InterceptorContext) -> Any:
    return go_on(*args, **kwargs)


def _layers(total: Mapping[str, Mapping[str, np.ndarray]], batches: int) -> Iterator[tuple[str, ObservedLayer]]:
    for name, found in total.items():
        for at in np.ndindex(found["tokens"].shape[:-1]):
            each = {key: value[at] for key, value in found.items()}
            uncertainty = each["entropy"] / np.maximum(each["tokens"], 1)
            similarity = each["similarity"] / batches if "similarity" in each else None
            # The number of a backend, once for each batch.
            backend = dispatch.backend_name(round(float(each["backend"]) / batches)) if "backend" in each else ""
            yield (
                f"{name}{_place(at)}",
                ObservedLayer(each["counts"], each["tokens"], uncertainty, each.get("words"), similarity, backend),
            )


def _place(at: tuple[int, ...]) -> str:
    return "".join(f".{i}" for i in at)
