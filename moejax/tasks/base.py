"""Tasks: how a batch enters a model, and which sums its outputs are judged by.

A task gives *sums* over targets rather than means. Sums of microbatches, batches or hosts add up, so a mean taken at the end
is the mean over the whole set, whatever the batch size and however many targets each batch holds.
"""

from collections.abc import Mapping
from typing import Any, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Bool, Float, Int

from moejax.core.context import Context
from moejax.core.registry import Registry

tasks = Registry("task", "moejax.tasks")

Batch = Mapping[str, Any]
Sums = dict[str, Array]


@runtime_checkable
class Task(Protocol):
    """What a train step needs of a task."""

    def inputs(self, batch: Batch, step: Int[Array, ""], train: bool) -> tuple[Array, Context]:
        """The model's arguments."""

    def count(self, batch: Batch) -> Int[Array, ""]:
        """Number of targets that are judged: the weight of this batch among others."""

    def sums(self, outputs: Array, batch: Batch) -> Sums:
        """Additive scores over the valid targets; `nll` (nats) and `count` are always there."""

    def metrics(self, sums: Mapping[str, Any]) -> dict[str, float]:
        """Means of summed sums, by name; `loss` (nats a target) is always there."""

    def size(self, batch: Batch) -> int:
        """Tokens (or examples) in the batch, padding included: the unit of throughput."""


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
