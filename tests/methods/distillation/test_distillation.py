"""Distillation (Hinton et al. 2015): the loss and its gradient in NumPy, its limit at high temperature, and what a teacher may be."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moejax.core.errors import ConfigError
from moejax.surgery.sources.base import sources
from moejax.tasks.base import tasks
from moejax.tasks.models import FrozenModel, LearningModel

V, B, S = 5, 3, 4
SOURCE = sources.build({"kind": "checkpoint", "path": "runs/teacher"}, "s")


class Table(nn.Module):
    """Logits are a row of a table for each input; in training something is added, which a teacher must not see."""

    outputs: int = V

    @nn.compact
    def __call__(self, x: jax.Array, ctx) -> jax.Array:
        # An image says by its only pixel which row it is.
        x = x if x.dtype == jnp.int32 else x[:, 0, 0, 0].astype(jnp.int32)
        table = self.param("table", nn.initializers.normal(2.0), (7, self.outputs))
        return table[x] + (0.3 if ctx.train else 0.0) * jnp.arange(self.outputs)


def build(kind: str = "next_token", teacher=SOURCE, **fields):
    return tasks.build({"kind": "distill", "task": {"kind": kind}, "teacher": teacher, **fields}, "task", domains=("a", "b"))


def batch_of(rng: np.random.Generator, kind: str = "next_token") -> dict:
    shape = (B, S) if kind == "next_token" else (B,)
    valid = np.ones(shape, bool)
    valid.flat[[0, -1]] = False
    tokens, targets = rng.integers(0, 7, shape), rng.integers(0, V, shape)
    if kind == "classify":
        return {
            "image": jnp.asarray(tokens, jnp.float32).reshape(B, 1, 1, 1),
            "label": jnp.asarray(targets),
            "valid": jnp.asarray(valid),
        }
    more = {"segments": np.ones(shape, np.int32), "positions": np.zeros(shape, np.int32), "domain": tokens % 2}
    return {name: jnp.asarray(x) for name, x in {"tokens": tokens, "targets": targets, "valid": valid, **more}.items()}


def tables(rng: np.random.Generator, *names: str) -> dict[str, np.ndarray]:
    return {name: rng.normal(size=(7, V)) for name in names}


def loss(task, student: np.ndarray, teachers: dict, batch: dict) -> tuple:
    frozen = {name: FrozenModel(Table(), {"params": {"table": jnp.asarray(t, jnp.float32)}}) for name, t in teachers.items()}

    def of(table: jax.Array) -> tuple:
        return task.objective(LearningModel(Table(), {"table": table}, {}, jax.random.key(0), frozen), batch, jnp.int32(0))

    (value, sums), slope = jax.value_and_grad(of, has_aux=True)(jnp.asarray(student, jnp.float32))
    return float(value), jax.device_get(sums), slope


def softmax(z: np.ndarray) -> np.ndarray:
    e = np.exp(z - z.max())
    return e / e.sum()


def numpy_loss(student, teachers, batch, temperature, soft, hard, mean="arithmetic") -> tuple:
    """Target after target: the loss, the divergence, and the gradient by the table."""
    x = np.asarray(batch["tokens" if "tokens" in batch else "image"], int).ravel()
    y = np.asarray(batch["targets" if "targets" in batch else "label"]).ravel()
    valid = np.asarray(batch["valid"]).ravel()
    total, apart, slope, n = 0.0, 0.0, np.zeros((7, V)), valid.sum()
    for i in np.flatnonzero(valid):
        z = student[x[i]] + 0.3 * np.arange(V)
        parts = np.stack([softmax(t[x[i]] / temperature) for t in teachers.values()])
        p = parts.mean(0) if mean == "arithmetic" else softmax(np.log(parts).mean(0))
        q, q1, label = softmax(z / temperature), softmax(z), np.eye(V)[y[i]]
        divergence = (p * np.log(p / q)).sum()
        apart += divergence / n
        total += (soft * temperature**2 * divergence - hard * np.log(q1[y[i]])) / n
        slope[x[i]] += (soft * temperature * (q - p) + hard * (q1 - label)) / n
    return total, apart, slope


@pytest.mark.parametrize("kind", ["next_token", "classify"])
@pytest.mark.parametrize(
    "fields",
    [
        {"temperature": 1.0, "soft": 1.0, "hard": 0.0},
        {"temperature": 3.0, "soft": 0.7, "hard": 0.2},
        {"temperature": 0.5, "soft": 0.0, "hard": 1.0},
    ],
    ids=str,
)
def test_the_loss_and_its_gradient_are_numpys(rng: np.random.Generator, kind: str, fields: dict) -> None:
    found, teachers, batch = tables(rng, "student")["student"], tables(rng, "teacher"), batch_of(rng, kind)
    task = build(kind, **fields)
    value, sums, slope = loss(task, found, teachers, batch)
    total, apart, expected = numpy_loss(found, teachers, batch, **fields)
    assert value == pytest.approx(total, rel=1e-5)
    assert task.metrics(sums)["divergence"] == pytest.approx(apart, rel=1e-5)
    np.testing.assert_allclose(slope, expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("mean", ["arithmetic", "geometric"])
def test_several_teachers_are_averaged(rng: np.random.Generator, mean: str) -> None:
    student, teachers, batch = tables(rng, "s")["s"], tables(rng, "teacher.a", "teacher.b", "teacher.c"), batch_of(rng)
    task = build(teacher={"a": SOURCE, "b": SOURCE, "c": SOURCE}, temperature=2.0, soft=1.0, hard=0.3, mean=mean)
    assert set(task.frozen()) == set(teachers)
    value, _, slope = loss(task, student, teachers, batch)
    total, _, expected = numpy_loss(student, teachers, batch, 2.0, 1.0, 0.3, mean)
    assert value == pytest.approx(total, rel=1e-5)
    np.testing.assert_allclose(slope, expected, rtol=1e-4, atol=1e-6)


def test_at_a_high_temperature_it_matches_logits(rng: np.random.Generator) -> None:
    """With logits of mean zero the gradient tends to (z - v) / v's number of classes, as large as at T = 1."""
    student, teachers, batch = tables(rng, "s")["s"], tables(rng, "teacher"), batch_of(rng)
    student -= (student + 0.3 * np.arange(V)).mean(-1, keepdims=True)
    teachers["teacher"] -= teachers["teacher"].mean(-1, keepdims=True)
    _, _, slope = loss(build(temperature=300.0, hard=0.0), student, teachers, batch)
    x, valid = np.asarray(batch["tokens"]), np.asarray(batch["valid"])
    shown = np.bincount(x[valid], minlength=7)[:, None] / valid.sum()
    expected = shown * (student + 0.3 * np.arange(V) - teachers["teacher"]) / V
    np.testing.assert_allclose(slope, expected, rtol=0.05, atol=2e-3)


def test_a_student_that_is_the_teacher_has_nothing_to_learn_of_it(rng: np.random.Generator) -> None:
    teacher, batch = tables(rng, "teacher"), batch_of(rng)
    value, _, slope = loss(build(hard=0.0), teacher["teacher"] - 0.3 * np.arange(V), teacher, batch)
    np.testing.assert_allclose(slope, 0.0, atol=1e-6)
    assert value == pytest.approx(0.0, abs=1e-5)


def test_no_gradient_reaches_the_teacher_and_no_number_comes_from_padding(rng: np.random.Generator) -> None:
    student, batch = tables(rng, "s")["s"], batch_of(rng)
    task = build()

    def of(table: jax.Array) -> jax.Array:
        frozen = {"teacher": FrozenModel(Table(), {"params": {"table": table}})}
        return task.objective(LearningModel(Table(), {"table": jnp.float32(student)}, {}, None, frozen), batch, jnp.int32(0))[0]

    teacher = jnp.float32(tables(rng, "t")["t"])
    assert not np.any(jax.grad(of)(teacher))
    # Inputs that only padding has lead to no number in either model.
    only = int(batch["tokens"][0, 0])
    tokens = jnp.where(batch["valid"] & (batch["tokens"] == only), (only + 1) % 7, batch["tokens"])
    broken = {**batch, "tokens": tokens}
    student, teacher = np.array(student), np.array(teacher)
    clean = loss(task, student, {"teacher": teacher}, broken)
    student[only], teacher[only] = np.nan, np.nan
    dirty = loss(task, student, {"teacher": teacher}, broken)
    assert np.isfinite(dirty[0])
    assert clean[0] == dirty[0]
    np.testing.assert_array_equal(clean[2], dirty[2])


def test_a_student_is_judged_by_its_task_alone(rng: np.random.Generator) -> None:
    task, plain, batch = build(), tasks.build({"kind": "next_token"}, "task", domains=("a", "b")), batch_of(rng)
    model = LearningModel(Table(), {"table": jnp.float32(tables(rng, "s")["s"])}, {}, None, {})
    found, expected = task.scores(model, batch, jnp.int32(0)), plain.scores(model, batch, jnp.int32(0))
    jax.tree.map(np.testing.assert_array_equal, found, expected)
    assert task.metrics(found) == plain.metrics(expected)
    assert "a/bits_per_byte" in task.metrics(found)
    assert (task.size(batch), task.count(batch)) == (plain.size(batch), plain.count(batch))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"temperature": 0.0}, r"task.temperature=0.0 must be a number above 0"),
        ({"soft": 0.0, "hard": 0.0}, "soft=0.0 and hard=0.0 of distill"),
        ({"hard": -1.0}, "task.hard=-1.0 must be a number of at least 0"),
        ({"mean": "harmonic"}, "harmonic"),
        ({"teacher": {}}, "distill has no teacher"),
        ({"teacher": {"kind": "rum"}}, r"unknown source kind 'rum' in task.teacher.kind; did you mean 'run'"),
        ({"teacher": {"a": {"kind": "run"}}}, r"task.teacher.a \(source 'run'\) needs 'config'"),
        ({"kind": "next_tokn"}, r"unknown task kind 'next_tokn' in task.task.kind; did you mean 'next_token'"),
    ],
)
def test_what_does_not_fit_is_named(fields: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        build(**fields)


def test_a_teacher_of_other_classes_is_refused(rng: np.random.Generator) -> None:
    frozen = {"teacher": FrozenModel(Table(6), {"params": {"table": jnp.ones((7, 6))}})}
    model = LearningModel(Table(), {"table": jnp.ones((7, V))}, {}, None, frozen)
    with pytest.raises(ConfigError, match="the teacher has 6 outputs and the student 5"):
        build().objective(model, batch_of(rng), jnp.int32(0))
