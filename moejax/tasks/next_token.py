"""Language modelling."""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from moejax.core.context import Context
from moejax.core.fields import Positive
from moejax.tasks.base import Batch, Sums, Task, cross_entropies, ratio, tasks


@tasks.register("next_token")
@dataclasses.dataclass(frozen=True)
class NextToken(Task):
    """Cross entropy of `targets[b, s]` where `valid[b, s]`.

    Metrics: loss (nats a target), bits_per_byte, accuracy, and `<domain>/bits_per_byte` for each domain that has targets.

    Attributes:
      domains: names of the values of `batch['domain']`, from `DataInfo`.
      bytes_per_token: mean bytes of text behind one target, for batches that do not say in `bytes` how many there are behind each;
        1 for byte vocabularies.
    """

    domains: tuple[str, ...] = ()
    bytes_per_token: Positive = 1.0

    reads: ClassVar[tuple[str, ...]] = ("tokens", "targets", "segments", "positions", "valid")

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
        nll, correct = cross_entropies(outputs, batch["targets"], valid)
        sums = {"nll": nll.sum(), "count": self.count(batch), "correct": correct.sum(dtype=jnp.int32)}
        size = batch.get("bytes")
        if size is not None:
            size = jnp.where(valid, size, 0)
            sums["bytes"] = size.sum()
        if self.domains:
            domain, n = batch["domain"].reshape(-1), len(self.domains)
            if size is not None:
                sums["domain_bytes"] = jax.ops.segment_sum(size.reshape(-1), domain, n)
            sums["domain_nll"] = jax.ops.segment_sum(nll.reshape(-1), domain, n)
            sums["domain_count"] = jax.ops.segment_sum(valid.reshape(-1).astype(jnp.int32), domain, n)
        return sums

    def metrics(self, sums: Mapping[str, Any]) -> dict[str, float]:
        loss = ratio(sums["nll"], sums["count"])
        size = sums.get("bytes", sums["count"] * self.bytes_per_token)
        bits = ratio(sums["nll"], size) / math.log(2.0)
        out = {"loss": loss, "bits_per_byte": bits, "accuracy": ratio(sums["correct"], sums["count"])}
        for i, name in enumerate(self.domains):
            if sums["domain_count"][i]:
                size = sums["domain_bytes"][i] if "domain_bytes" in sums else sums["domain_count"][i] * self.bytes_per_token
                out[f"{name}/bits_per_byte"] = ratio(sums["domain_nll"][i], size) / math.log(2.0)
        return out

    def size(self, batch: Batch) -> int:
        return int(np.prod(batch["tokens"].shape))
