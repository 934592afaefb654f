"""Distillation: another task, with a teacher beside its targets."""

import dataclasses
from collections.abc import Mapping
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from moejax.core.context import Context
from moejax.core.errors import ConfigError
from moejax.core.fields import NonNegative, Positive
from moejax.core.registry import Many
from moejax.surgery.sources.base import Source, sources
from moejax.tasks.base import Batch, Sums, Task, ratio, tasks
from moejax.tasks.models import LearningModel


@dataclasses.dataclass(frozen=True)
class OneOrNamed(Many):
    """A slot of one source, or of several by name."""

    def build(self, specs: Any, where: str, **context: Any) -> Any:
        if not hasattr(specs, "items") or "kind" in specs:
            return self.registry.build(specs, where, **context)
        return {
            name: self.registry.build(spec, f"{where}.{name}", **context) for name, spec in specs.items() if spec is not None
        }


@tasks.register("distill", slots={"task": tasks, "teacher": OneOrNamed(sources)})
@dataclasses.dataclass(frozen=True, kw_only=True)
class Distill(Task):
    """`soft * T^2 * KL(p(T) || q(T)) + hard * nll`, a mean over targets (Hinton et al. 2015, section 2).

        task = {'kind': 'distill', 'task': {'kind': 'next_token'}, 'teacher': {'kind': 'run', 'config': ...}, 'temperature': 2.0}

    `p(T) = softmax(v / T)` of the teacher's logits v, `q(T)` of the student's; nll is that of the task, at temperature 1. T^2 keeps the
    soft gradient `soft * T * (q - p)` as large whatever T is. The divergence differs from the paper's cross entropy by a constant.
    A student is judged as its task judges.

    Attributes:
      task: what is learned: any task whose batches have `valid` and whose outputs are logits.
      teacher: a trained model, or several by name: then p is the mean of their distributions.
      temperature: T.
      soft: weight of the teacher.
      hard: weight of the targets; "considerably lower" is best.
      mean: of several teachers, 'arithmetic' or 'geometric' (of probabilities at T, renormalised).

    Metrics: those of the task, and in training `divergence` (nats a target, at T).

    Raises:
      ConfigError: a temperature or weight that is none, no teacher, or one with another number of outputs.
    """

    task: Task
    teacher: Source | Mapping[str, Source]
    temperature: Positive = 2.0
    soft: NonNegative = 1.0
    hard: NonNegative = 0.1
    mean: Literal["arithmetic", "geometric"] = "arithmetic"

    def __post_init__(self):
        if not self.soft + self.hard:
            raise ConfigError(f"soft={self.soft} and hard={self.hard} of distill must not both be 0")
        if not self.frozen():
            raise ConfigError("distill has no teacher; name a source, or several")

    def objective(self, model: LearningModel, batch: Batch, step: Int[Array, ""]) -> tuple[Float[Array, ""], Sums]:
        inputs, ctx = self.inputs(batch, step, train=True)
        logits = model(inputs, ctx)
        sums = dict(self.sums(logits, batch))
        valid = batch["valid"]
        # Zeroed before the logarithm, as in `cross_entropies`: a NaN in padding would otherwise reach the gradient.
        found, *teachers = [
            jnp.where(valid[..., None], z.astype(jnp.float32) / self.temperature, 0.0)
            for z in (logits, *(model.frozen[name](inputs, ctx) for name in sorted(self.frozen())))
        ]
        wanted, found = self._wanted(teachers, found.shape), jax.nn.log_softmax(found)
        sums["divergence"] = jnp.where(valid, (jnp.exp(wanted) * (wanted - found)).sum(-1), 0.0).sum()
        count = jnp.maximum(sums["count"], 1)
        soft = self.soft * self.temperature**2 * sums["divergence"] / count
        return soft + self.hard * sums["nll"] / count, sums

    @property
    def reads(self) -> tuple[str, ...]:
        """What the task reads."""
        return self.task.reads

    def inputs(self, batch: Batch, step: Int[Array, ""], train: bool) -> tuple[Any, Context]:
        return self.task.inputs(batch, step, train)

    def count(self, batch: Batch) -> Int[Array, ""]:
        return self.task.count(batch)

    def sums(self, outputs: Any, batch: Batch) -> Sums:
        return self.task.sums(outputs, batch)

    def metrics(self, sums: Mapping[str, Any]) -> dict[str, float]:
        apart = {"divergence": ratio(sums["divergence"], sums["count"])} if "divergence" in sums else {}
        return {**self.task.metrics(sums), **apart}

    def size(self, batch: Batch) -> int:
        return self.task.size(batch)

    def _wanted(self, teachers: list[Float[Array, "*b _"]], shape: tuple[int, ...]) -> Float[Array, "*b v"]:
        """Logarithms of the mean of the distributions whose logits, divided by T, are given."""
        for logits in teachers:
            if logits.shape != shape:
                raise ConfigError(
                    f"the teacher has {logits.shape[-1]} outputs and the student {shape[-1]}; they must be the same classes"
                )
        logs = jnp.stack([jax.nn.log_softmax(logits) for logits in teachers])
        if self.mean == "geometric":
            return jax.nn.log_softmax(logs.mean(0))
        return jax.nn.logsumexp(logs, axis=0) - jnp.log(len(teachers))
