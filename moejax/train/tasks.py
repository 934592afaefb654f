"""Tasks: how a batch enters a model, and which sums its outputs are judged by.

A task gives *sums* over targets rather than means. Sums of microbatches, batches or hosts add up, so a mean taken at the end
is the mean over the whole set, whatever the batch size and however many targets each batch holds.
"""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Bool, Float, Int

from moejax.context import Context
from moejax.registry import Registry

tasks = Registry("task")

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


@tasks.register("next_token")
@dataclasses.dataclass(frozen=True)
class NextToken:
    """Cross entropy of `targets[b, s]` where `valid[b, s]`.

    Metrics: loss (nats a target), bits_per_byte, accuracy, and `<domain>/bits_per_byte` for each domain that has targets.

    Attributes:
      domains: names of the values of `batch['domain']`, from `DataInfo`.
      bytes_per_token: mean bytes of text behind one target; 1 for byte vocabularies.
    """

    domains: tuple[str, ...] = ()
    bytes_per_token: float = 1.0

    def inputs(self, batch: Batch, step: Int[Array, ""], train: bool) -> tuple[Int[Array, "b s"], Context]:
        segments = batch["segments"]
        ctx = Context(
            # Not `batch['valid']`: that is about targets, and a document's last token has none but is routed like any other.
            valid=segments != 0,
            positions=batch["positions"],
            segments=segments,
            token_ids=batch["tokens"],
            domain=batch.get("domain"),
            step=step,
            train=train,
        )
        return batch["tokens"], ctx

    def count(self, batch: Batch) -> Int[Array, ""]:
        return jnp.sum(batch["valid"], dtype=jnp.int32)

    def sums(self, outputs: Float[Array, "b s v"], batch: Batch) -> Sums:
        valid = batch["valid"]
        nll, correct = _scores(outputs, batch["targets"], valid)
        sums = {"nll": nll.sum(), "count": self.count(batch), "correct": correct.sum(dtype=jnp.int32)}
        if self.domains:
            domain, n = batch["domain"].reshape(-1), len(self.domains)
            sums["domain_nll"] = jax.ops.segment_sum(nll.reshape(-1), domain, n)
            sums["domain_count"] = jax.ops.segment_sum(valid.reshape(-1).astype(jnp.int32), domain, n)
        return sums

    def metrics(self, sums: Mapping[str, Any]) -> dict[str, float]:
        loss = _ratio(sums["nll"], sums["count"])
        bits = 1.0 / (math.log(2.0) * self.bytes_per_token)
        out = {"loss": loss, "bits_per_byte": loss * bits, "accuracy": _ratio(sums["correct"], sums["count"])}
        for i, name in enumerate(self.domains):
            if sums["domain_count"][i]:
                out[f"{name}/bits_per_byte"] = _ratio(sums["domain_nll"][i], sums["domain_count"][i]) * bits
        return out

    def size(self, batch: Batch) -> int:
        return int(np.prod(batch["tokens"].shape))


@tasks.register("classify")
@dataclasses.dataclass(frozen=True)
class Classify:
    """Cross entropy of `label[b]` where `valid[b]`. Metrics: loss (nats an example), accuracy."""

    def inputs(self, batch: Batch, step: Int[Array, ""], train: bool) -> tuple[Float[Array, "b h w c"], Context]:
        return batch["image"], Context(step=step, train=train)

    def count(self, batch: Batch) -> Int[Array, ""]:
        return jnp.sum(batch["valid"], dtype=jnp.int32)

    def sums(self, outputs: Float[Array, "b v"], batch: Batch) -> Sums:
        nll, correct = _scores(outputs, batch["label"], batch["valid"])
        return {"nll": nll.sum(), "count": self.count(batch), "correct": correct.sum(dtype=jnp.int32)}

    def metrics(self, sums: Mapping[str, Any]) -> dict[str, float]:
        return {"loss": _ratio(sums["nll"], sums["count"]), "accuracy": _ratio(sums["correct"], sums["count"])}

    def size(self, batch: Batch) -> int:
        return int(batch["label"].shape[0])


def _scores(
    logits: Float[Array, "*b v"], targets: Int[Array, "*b"], valid: Bool[Array, "*b"]
) -> tuple[Float[Array, "*b"], Bool[Array, "*b"]]:
    """Negative log likelihood in nats and whether the largest logit is right, both zero where not valid."""
    # Zeroed before the logarithm: a NaN in padding would otherwise reach the gradient through a zero weight.
    logits = jnp.where(valid[..., None], logits.astype(jnp.float32), 0.0)
    # One-hot rather than integer labels: the derivative of picking one logit is a scatter, which a CPU does one by one.
    nll = optax.softmax_cross_entropy(logits, jax.nn.one_hot(targets, logits.shape[-1]))
    return jnp.where(valid, nll, 0.0), valid & (jnp.argmax(logits, -1) == targets)


def _ratio(total: Any, count: Any) -> float:
    return float(total) / float(count) if count else float("nan")
