"""Tasks: what a model is trained for and judged by. A task owns its objective: the step runs it, differentiates it, and asks no more.

    @tasks.register("distill", slots={"teacher": sources})
    @dataclasses.dataclass(frozen=True, kw_only=True)
    class Distill(NextToken):
        teacher: Source                     # a field that is a source is a frozen model of the step

        def objective(self, model, batch, step):
            inputs, ctx = self.inputs(batch, step, train=True)
            logits, wanted = model(inputs, ctx), model.frozen["teacher"](inputs, ctx)
            ...
            return loss, self.sums(logits, batch)

A task gives *sums* over targets rather than means. Sums of microbatches, batches or hosts add up, so a mean taken at the end
is the mean over the whole set, whatever the batch size and however many targets each batch holds.
"""

import dataclasses
from collections.abc import Collection, Mapping
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Bool, Float, Int

from moejax.core.context import Context
from moejax.core.errors import ConfigError
from moejax.core.registry import Registry
from moejax.surgery.sources.base import Source
from moejax.tasks.models import LearningModel

tasks = Registry("task", "moejax.tasks")

Batch = Mapping[str, Any]
Sums = dict[str, Array]


class Task:
    """What a train step needs of a task. A frozen dataclass; its fields are the keys of its config.

    Most tasks write `inputs`, `sums`, `count`, `metrics` and `size`, and descend the mean of `nll`. One with another objective (a
    teacher, several losses, pairs of answers, other targets in each part of a batch) writes `objective`, and `scores` if it is
    also judged otherwise.

    Attributes:
      reads: what of a batch it cannot do without, by name.
    """

    reads: ClassVar[tuple[str, ...]] = ()

    def inputs(self, batch: Batch, step: Int[Array, ""], train: bool) -> tuple[Any, Context]:
        """The model's arguments. Parameters are made for these."""
        raise NotImplementedError

    def count(self, batch: Batch) -> Int[Array, ""]:
        """Number of targets that are judged: the weight of this batch among others."""
        raise NotImplementedError

    def sums(self, outputs: Any, batch: Batch) -> Sums:
        """Additive scores over the valid targets; `nll` (nats) and `count` are always there."""
        raise NotImplementedError

    def metrics(self, sums: Mapping[str, Any]) -> dict[str, float]:
        """Means of summed sums, by name; `loss` (nats a target) is always there."""
        raise NotImplementedError

    def size(self, batch: Batch) -> int:
        """Tokens (or examples) in the batch, padding included: the unit of throughput."""
        raise NotImplementedError

    def objective(self, model: LearningModel, batch: Batch, step: Int[Array, ""]) -> tuple[Float[Array, ""], Sums]:
        """What training descends, and the sums that are logged of it.

        Args:
          model: runs the model that learns, as often as need be, and frozen ones; see `moejax.tasks.models.LearningModel`.
          batch: a microbatch.
          step: updates done.

        Returns:
          the loss, as a mean over the batch's targets (microbatches are weighted by `count`), to which the step adds what layers
          have sown; and sums as of `sums`, with more entries where `metrics` shows more.
        """
        inputs, ctx = self.inputs(batch, step, train=True)
        sums = self.sums(model(inputs, ctx), batch)
        return sums["nll"] / jnp.maximum(sums["count"], 1), sums

    def scores(self, model: LearningModel, batch: Batch, step: Int[Array, ""]) -> Sums:
        """The sums of an evaluation batch, without noise."""
        inputs, ctx = self.inputs(batch, step, train=False)
        return self.sums(model(inputs, ctx), batch)

    def frozen(self) -> dict[str, Source]:
        """The models that the objective runs and nobody trains: every field that is a source, or a mapping of names to sources."""
        found: dict[str, Source] = {}
        for field in dataclasses.fields(self) if dataclasses.is_dataclass(self) else ():
            value = getattr(self, field.name)
            parts = (
                {field.name: value} if not isinstance(value, Mapping) else {f"{field.name}.{k}": v for k, v in value.items()}
            )
            found |= {name: part for name, part in parts.items() if isinstance(part, Source)}
        return found

    def frozen_inputs(self, name: str, batch: Batch, step: Int[Array, ""]) -> tuple[Any, Context]:
        """The arguments of a frozen model, for the shapes of its parameters."""
        return self.inputs(batch, step, train=False)


def cross_entropies(
    logits: Float[Array, "*b v"], targets: Int[Array, "*b"], valid: Bool[Array, "*b"]
) -> tuple[Float[Array, "*b"], Bool[Array, "*b"]]:
    """Negative log likelihood in nats and whether the largest logit is right, both zero where not valid."""
    # Zeroed before the logarithm: a NaN in padding would otherwise reach the gradient through a zero weight.
    logits = jnp.where(valid[..., None], logits.astype(jnp.float32), 0.0)
    # One-hot rather than integer labels: the derivative of picking one logit is a scatter, which a CPU does one by one.
    nll = optax.softmax_cross_entropy(logits, jax.nn.one_hot(targets, logits.shape[-1]))
    return jnp.where(valid, nll, 0.0), valid & (jnp.argmax(logits, -1) == targets)


def ratio(total: Any, count: Any) -> float:
    return float(total) / float(count) if count else float("nan")


def check_batch(task: Task, gives: Collection[str]) -> None:
    """Raises ConfigError if a batch of `gives`, by name, is none for the task."""
    missing = [name for name in task.reads if name not in gives]
    if missing:
        able = [
            kind for kind, cls in tasks.items() if isinstance(cls.reads, tuple) and cls.reads and set(cls.reads) <= set(gives)
        ]
        raise ConfigError(
            f"the task {type(task).__name__} reads '{missing[0]}', and batches of these data have {', '.join(gives)}; take other data, or "
            f"for these task.kind={' or '.join(map(repr, able))}"
        )
