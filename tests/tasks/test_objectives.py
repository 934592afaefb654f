"""Tasks own their objective: a toy teacher, penalties, several calls, several tasks in a batch. Users' tasks, none of the library's."""

import dataclasses
from collections.abc import Mapping

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from training_harness import INIT, VOCAB, Info, TinyText, device, registered, tiny_config

from moejax.core.context import Context
from moejax.core.control import Site, control
from moejax.core.errors import ConfigError
from moejax.models.registry import models
from moejax.optim.base import optimizers
from moejax.parallel import Parallel, make_mesh
from moejax.surgery.sources.base import Source, sources
from moejax.tasks.base import ratio, tasks
from moejax.tasks.models import LearningModel
from moejax.tasks.next_token import NextToken
from moejax.train import fit, load
from moejax.train.program import get_program
from moejax.train.settings import TrainSettings
from moejax.train.step import begin_state, make_eval_step, make_train_step

BATCH = device(next(TinyText({"batch_size": 8}, "train")))
DESCENT = {"kind": "sgd", "learning_rate": 1.0, "schedule": "constant", "clip_norm": None}


@dataclasses.dataclass(frozen=True)
class AddOne:
    def after_step(self, site: Site) -> Site:
        return site.replace(state={"steps": site.state["steps"] + 1, "tokens": site.measured["tokens"]})


class Table(nn.Module):
    """Logits are a row of a table for each token; noisy in training, with a loss, a stat and a controller."""

    noise: float = 0.0
    sown: float = 0.0

    @nn.compact
    def __call__(self, tokens: jax.Array, ctx: Context) -> jax.Array:
        logits = self.param("table", INIT, (VOCAB, VOCAB))[tokens]
        self.variable("router_state", "steps", jnp.zeros, ())
        self.variable("router_state", "tokens", jnp.zeros, ())
        control(self, "add", AddOne(), {"tokens": jnp.float32(tokens.size)})
        if ctx.train:
            logits += self.noise * jax.random.uniform(self.make_rng("router"), logits.shape)
        self.sow("losses", "size", self.sown * jnp.square(logits).mean())
        self.sow("stats", "first", tokens[0, 0].astype(jnp.float32))
        self.sow("shown", "logits", logits)
        return logits


@dataclasses.dataclass(frozen=True)
class Distill(NextToken):
    """`hard * nll + soft * KL(teacher || student)`, means over the targets."""

    teacher: Source | None = None
    soft: float = 1.0
    hard: float = 0.0

    def objective(self, model, batch, step):
        inputs, ctx = self.inputs(batch, step, train=True)
        logits, wanted = model(inputs, ctx), model.frozen["teacher"](inputs, ctx)
        sums = self.sums(logits, batch)
        p, q = jax.nn.log_softmax(wanted), jax.nn.log_softmax(logits)
        sums["kl"] = jnp.where(batch["valid"], (jnp.exp(p) * (p - q)).sum(-1), 0.0).sum()
        count = jnp.maximum(sums["count"], 1)
        return self.hard * sums["nll"] / count + self.soft * sums["kl"] / count, sums

    def metrics(self, sums: Mapping):
        extra = {"kl": ratio(sums["kl"], sums["count"])} if "kl" in sums else {}
        return super().metrics(sums) | extra


def softmax(z):
    e = np.exp(z - z.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def table_gradient(by_logits):
    """The gradient of a table, from that of the logits of each target."""
    out = np.zeros((VOCAB, VOCAB))
    np.add.at(out, np.asarray(BATCH["tokens"]).reshape(-1), by_logits.reshape(-1, VOCAB))
    return out


def state_of(model, task, frozen=None, seed=0):
    key = jax.random.key(seed)
    variables = model.init(key, *task.inputs(BATCH, jnp.int32(0), train=False), mutable=["params", "router_state"])
    optimizer = optimizers.build(DESCENT, "optimizer", steps=10)
    return begin_state(variables, optimizer, key).replace(frozen=frozen or {}), optimizer


def variables_of(model, seed):
    return state_of(model, NextToken(), seed=seed)[0].variables


@pytest.mark.parametrize("accumulation", [1, 4])
def test_the_gradient_of_a_student_is_that_of_its_formula(accumulation):
    task = Distill(domains=Info.domains, soft=0.7, hard=0.2)
    student, teacher = Table(sown=0.0), Table(noise=5.0, sown=3.0)
    state, optimizer = state_of(student, task, {"teacher": variables_of(teacher, 5)})
    step = jax.jit(make_train_step(student, task, optimizer, accumulation, jit=False, frozen={"teacher": teacher}))
    after, metrics = step(state, BATCH)
    tokens, valid = np.asarray(BATCH["tokens"]), np.asarray(BATCH["valid"])
    z, v = (np.asarray(t, np.float64)[tokens] for t in (state.params["table"], state.frozen["teacher"]["params"]["table"]))
    y, n = np.eye(VOCAB)[np.asarray(BATCH["targets"])], valid.sum()
    by_logits = valid[..., None] * (0.2 * (softmax(z) - y) + 0.7 * (softmax(z) - softmax(v))) / n
    moved = np.asarray(state.params["table"]) - np.asarray(after.params["table"])
    np.testing.assert_allclose(moved, table_gradient(by_logits), rtol=1e-4, atol=1e-6)
    kl = (valid * (softmax(v) * (np.log(softmax(v)) - np.log(softmax(z)))).sum(-1)).sum() / n
    nll = -(valid * (y * np.log(softmax(z))).sum(-1)).sum() / n
    assert metrics["train/loss"] == pytest.approx(0.2 * nll + 0.7 * kl, rel=1e-5)
    # The teacher ran without noise, and what its layers sow and control is nobody's.
    assert metrics["train/objective"] == pytest.approx(float(metrics["train/loss"]), rel=1e-6)
    scores = task.metrics(jax.device_get(metrics["sums"]))
    assert scores["kl"] == pytest.approx(kl, rel=1e-5)
    assert scores["loss"] == pytest.approx(nll, rel=1e-5)
    assert after.collections["router_state"]["steps"] == 1
    jax.tree.map(np.testing.assert_array_equal, after.frozen, state.frozen)


@dataclasses.dataclass(frozen=True)
class Twice(NextToken):
    """Both directions of a sequence, with another weight each, and a penalty on the parameters."""

    def objective(self, model: LearningModel, batch, step):
        inputs, ctx = self.inputs(batch, step, train=True)
        there, back = self.sums(model(inputs, ctx), batch), self.sums(model(inputs[:, ::-1], ctx), batch)
        draw = jax.random.uniform(model.key)
        sums = {**there, "back": back["nll"], "draw": draw}
        count = jnp.maximum(sums["count"], 1)
        penalty = 0.5 * jnp.square(model.params["table"]).sum()
        return (there["nll"] + 2 * back["nll"]) / count + 0.1 * penalty, sums

    def metrics(self, sums: Mapping):
        return super().metrics(sums) | {"back": ratio(sums["back"], sums["count"])}


def test_an_objective_may_call_the_model_as_often_as_it_likes():
    task, model = Twice(), Table(sown=0.3)
    state, optimizer = state_of(model, task)
    step = jax.jit(make_train_step(model, task, optimizer, jit=False))
    after, metrics = step(state, BATCH)
    tokens, valid = np.asarray(BATCH["tokens"]), np.asarray(BATCH["valid"])
    table, y, n = np.asarray(state.params["table"], np.float64), np.eye(VOCAB)[np.asarray(BATCH["targets"])], valid.sum()
    z, back = table[tokens], table[tokens[:, ::-1]]
    by_there = valid[..., None] * (softmax(z) - y) / n + 0.3 * 2 * z / z.size
    by_back = 2 * valid[..., None] * (softmax(back) - y) / n + 0.3 * 2 * back / back.size
    gradient = table_gradient(by_there) + table_gradient(by_back[:, ::-1]) + 0.1 * table
    np.testing.assert_allclose(table - np.asarray(after.params["table"]), gradient, rtol=1e-4, atol=1e-6)
    assert metrics["losses/size"] == pytest.approx(0.3 * ((z**2).mean() + (back**2).mean()), rel=1e-5)
    assert metrics["stats/first"] == pytest.approx((tokens[0, 0] + tokens[0, -1]) / 2)
    # Controllers ran once, by what both calls measured.
    assert after.collections["router_state"] == {"tokens": 2 * tokens.size, "steps": 1}
    assert metrics["sums"]["draw"] != step(state.replace(step=jnp.int32(1)), BATCH)[1]["sums"]["draw"]


def test_each_call_draws_its_own_noise_and_the_first_as_ever():
    @dataclasses.dataclass(frozen=True)
    class Noise(NextToken):
        calls: int = 1

        def objective(self, model, batch, step):
            inputs, ctx = self.inputs(batch, step, train=True)
            outputs = [model(inputs, ctx) for _ in range(self.calls)]
            loss, sums = (
                super().objective(model, batch, step) if not self.calls else (outputs[0].sum(), self.sums(outputs[0], batch))
            )
            return loss, {**sums, "outputs": jnp.stack(outputs)} if outputs else sums

    model = Table(noise=1.0)
    state, optimizer = state_of(model, NextToken())

    def nll(calls):
        step = jax.jit(make_train_step(model, Noise(calls=calls), optimizer, jit=False))
        return step(state, BATCH)[1]["sums"]

    ordinary, one, two = nll(0), nll(1), nll(2)
    assert ordinary["nll"] == one["nll"] == two["nll"]
    assert not np.allclose(two["outputs"][0], two["outputs"][1])


def test_a_task_may_ask_for_what_layers_show():
    @dataclasses.dataclass(frozen=True)
    class Shown(NextToken):
        teacher: Source | None = None

        def objective(self, model, batch, step):
            inputs, ctx = self.inputs(batch, step, train=True)
            outputs, shown = model(inputs, ctx, also=("shown",))
            _, theirs = model.frozen["teacher"](inputs, ctx, also=("shown",))
            gap = jnp.square(shown["shown"]["logits"][0] - theirs["shown"]["logits"][0]).mean()
            return gap, self.sums(outputs, batch)

    model = Table()
    state, optimizer = state_of(model, NextToken(), {"teacher": variables_of(model, 3)})
    step = jax.jit(make_train_step(model, Shown(), optimizer, jit=False, frozen={"teacher": model}))
    tokens = np.asarray(BATCH["tokens"])
    gap = np.asarray(state.params["table"])[tokens] - np.asarray(state.frozen["teacher"]["params"]["table"])[tokens]
    assert step(state, BATCH)[1]["train/loss"] == pytest.approx((gap**2).mean(), rel=1e-5)


@dataclasses.dataclass(frozen=True)
class ByDomain(NextToken):
    """Two tasks in a batch: rows of domain 0 are next tokens, the others say their own token."""

    def sums(self, outputs, batch):
        targets = jnp.where(batch["domain"] == 0, batch["targets"], batch["tokens"])
        return super().sums(outputs, {**batch, "targets": targets})

    def scores(self, model, batch, step):
        inputs, ctx = self.inputs(batch, step, train=False)
        return self.sums(2.0 * model(inputs, ctx), batch)


def test_a_batch_may_hold_several_tasks_and_be_judged_otherwise():
    task, model = ByDomain(), Table()
    state, optimizer = state_of(model, task)
    _, metrics = jax.jit(make_train_step(model, task, optimizer, jit=False))(state, BATCH)
    tokens, valid, domain = (np.asarray(BATCH[name]) for name in ("tokens", "valid", "domain"))
    assert set(np.unique(domain[valid])) == {0, 1}
    targets = np.where(domain == 0, BATCH["targets"], tokens)
    table = np.asarray(state.params["table"])

    def nll(scale):
        logs = np.log(softmax(scale * table[tokens]))
        return -(valid * np.take_along_axis(logs, targets[..., None], -1)[..., 0]).sum()

    np.testing.assert_allclose(metrics["sums"]["nll"], nll(1.0), rtol=1e-5)
    sums, _ = make_eval_step(model, task)(state, BATCH)
    np.testing.assert_allclose(sums["nll"], nll(2.0), rtol=1e-5)


@pytest.fixture(scope="module", autouse=True)
def toys():
    """The toys of this file, by name."""
    with registered(models, "toy_table", Table), registered(tasks, "toy_distill", Distill, {"teacher": sources}):
        yield


def teacher_config(**changes):
    return tiny_config(
        **{"model": {"kind": "toy_table"}, "train__steps": 6, "checkpoint__every": 0, "eval__every": 0, **changes}
    )


def distillation(**changes):
    teacher = {"kind": "run", "config": teacher_config().to_dict()}
    task = {"kind": "toy_distill", "teacher": teacher, "soft": 0.5, "hard": 0.5}
    return {"model": {"kind": "toy_table", "sown": 0.01}, "task": task, **changes}


def train(workdir, seed=0, make_iterator=TinyText, **changes):
    return fit(tiny_config(**changes), seed, workdir, make_iterator=make_iterator, info=Info())


def test_a_run_with_a_teacher_trains_it_first_keeps_it_out_of_checkpoints_and_resumes(tmp_path):
    class Crash(RuntimeError):
        pass

    class Crashing(TinyText):
        def __next__(self):
            if self.shuffle and self.done == 7:
                raise Crash
            return super().__next__()

    whole = train(tmp_path / "whole", **distillation())
    assert {"train/kl", "train/loss", "losses/size", "eval/loss"} <= {name for line in whole.history for name in line}
    (teacher,) = (tmp_path / "whole/starts").iterdir()
    alone = train(tmp_path / "teacher", **{k.replace(".", "__"): v for k, v in teacher_config().to_dict().items()})
    jax.tree.map(np.testing.assert_array_equal, load(teacher).variables, alone.variables)
    with pytest.raises(Crash):
        train(tmp_path / "cut", make_iterator=Crashing, **distillation())
    saved = load(tmp_path / "cut")
    assert set(saved.variables) == {"params", "router_state"}
    assert not [name for name in saved.meta["shapes"] if "frozen" in name or "teacher" in name]
    end = train(tmp_path / "cut", **distillation())
    jax.tree.map(np.testing.assert_array_equal, end.variables, whole.variables)
    assert (tmp_path / "cut/metrics.jsonl").read_bytes() == (tmp_path / "whole/metrics.jsonl").read_bytes()
    task = distillation()["task"]
    other = {**task, "teacher": {**task["teacher"], "seed": 3}}
    with pytest.raises(ConfigError, match=r"holds a run with task.teacher.seed=None, not 3"):
        train(tmp_path / "whole", **distillation(task=other))


def test_a_teacher_from_a_checkpoint_must_stay_what_it_was(tmp_path):
    teacher = {"kind": "checkpoint", "path": str(tmp_path / "teacher")}
    # A schedule under which a run may be made longer.
    changes = {**distillation(task={**distillation()["task"], "teacher": teacher}), "optimizer__schedule": "constant"}
    sections = teacher_config().to_dict()
    train(tmp_path / "teacher", **sections)
    train(tmp_path / "run", **changes, train__steps=4)
    for file in sorted((tmp_path / "teacher").rglob("*"), reverse=True):
        file.rmdir() if file.is_dir() else file.unlink()
    with pytest.raises(ConfigError, match=r"task.teacher.path='.*teacher': no checkpoint"):
        train(tmp_path / "run", **changes)
    train(tmp_path / "teacher", seed=9, **sections)
    with pytest.raises(
        ConfigError, match=r"holds a run whose task.teacher was another checkpoint than the one that is there now"
    ):
        train(tmp_path / "run", **changes)


def test_a_teacher_on_eight_devices_is_the_teacher_on_one():
    config = tiny_config(**distillation()).to_dict()
    teacher = jax.tree.map(np.asarray, dict(variables_of(Table(), 4)))

    def trained(mesh):
        parallel = None if mesh is None else Parallel(make_mesh(mesh))
        program = get_program(config, TrainSettings(8), BATCH, {}, parallel=parallel)
        state = program.init(jax.random.key(0)).replace(frozen=program.place_frozen({"teacher": teacher}))
        batch = BATCH if mesh is None else jax.device_put(BATCH, jax.tree.map(lambda x: x.sharding, program.batch))
        for _ in range(2):
            state, metrics = program.train(state, batch)
        evaluated, _ = program.evaluate(state, batch)
        return jax.device_get((state.params, metrics["sums"]["kl"], evaluated["nll"]))

    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6), trained("data=4,fsdp=2"), trained(None))


@pytest.mark.parametrize(
    ("teacher", "message"),
    [
        ({"kind": "fresh"}, r"task.teacher \(FreshSource\) has no model of its own"),
        (
            {"kind": "run", "config": teacher_config(model={"kind": "toy_tabel"}).to_dict()},
            "unknown model kind 'toy_tabel' in task.teacher",
        ),
        ({"kind": "rum"}, r"unknown source kind 'rum' in task.teacher.kind; did you mean 'run'"),
    ],
)
def test_teachers_that_cannot_be_are_named(tmp_path, teacher, message):
    with pytest.raises(ConfigError, match=message):
        train(tmp_path, **distillation(task={**distillation()["task"], "teacher": teacher}))
