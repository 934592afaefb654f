"""Classification."""

import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from moejax.core.context import Context
from moejax.tasks.base import Batch, Sums, Task, cross_entropies, ratio, tasks


@tasks.register("classify")
@dataclasses.dataclass(frozen=True)
class Classify(Task):
    """Cross entropy of `label[b]` where `valid[b]`. Metrics: loss (nats an example), accuracy."""

    reads: ClassVar[tuple[str, ...]] = ("image", "label", "valid")

    def inputs(self, batch: Batch, step: Int[Array, ""], train: bool) -> tuple[Float[Array, "b h w c"], Context]:
        # Of a whole image, for all of its patches: what fills up a last batch is neither routed nor counted.
        return batch["image"], Context(valid=batch["valid"][:, None], step=step, train=train)

    def count(self, batch: Batch) -> Int[Array, ""]:
        return jnp.sum(batch["valid"], dtype=jnp.int32)

    def sums(self, outputs: Float[Array, "b v"], batch: Batch) -> Sums:
        nll, correct = cross_entropies(outputs, batch["label"], batch["valid"])
        return {"nll": nll.sum(), "count": self.count(batch), "correct": correct.sum(dtype=jnp.int32)}

    def metrics(self, sums: Mapping[str, Any]) -> dict[str, float]:
        return {"loss": ratio(sums["nll"], sums["count"]), "accuracy": ratio(sums["correct"], sums["count"])}

    def size(self, batch: Batch) -> int:
        return int(batch["label"].shape[0])
