"""What learns and what does not: gradients, optimizer state, memory, phases, meshes, and refusals."""

import dataclasses
import functools

import flax.linen as nn
import flax.traverse_util
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from training_harness import INIT, VOCAB, Info, TinyLM, TinyText, device, run_tiny

from moejax.core.control import Site, control
from moejax.core.errors import ConfigError
from moejax.core.roles import describe
from moejax.optim.base import optimizers
from moejax.parallel import Parallel, make_mesh
from moejax.tasks.base import tasks
from moejax.train.program import get_program
from moejax.train.settings import TrainSettings
from moejax.train.step import init_state, make_train_step
from moejax.train.trainable import learning

STEPS = 8
TASK = tasks.build({"kind": "next_token"}, "task", domains=Info.domains)
BATCH = device(next(TinyText({"batch_size": 8}, "train")))
MODEL = TinyLM(noise=0.0)
NORMS = ("norm/bias", "norm/scale")
ADAM = {"kind": "adamw", "learning_rate": 0.05, "b1": 0.8, "b2": 0.9, "eps": 1e-6, "weight_decay": 0.1, "clip_norm": None}
DESCENT = {"kind": "sgd", "learning_rate": 1.0, "schedule": "constant", "clip_norm": None}


@functools.cache
def parameters(model=MODEL):
    return describe(model, *TASK.inputs(BATCH, jnp.int32(0), train=False))


def learns(rules, model=MODEL):
    return learning(rules, parameters(model), STEPS)


def start(rules, optimizer, model=MODEL):
    built = optimizers.build(optimizer, "optimizer", steps=STEPS)
    make = jax.jit(lambda key: init_state(model, TASK, built, BATCH, key, learns(rules, model)))
    step = jax.jit(make_train_step(model, TASK, built, jit=False, learning=learns(rules, model)))
    return make(jax.random.key(0)), step


def flat(tree):
    return {"/".join(path): np.asarray(x) for path, x in flax.traverse_util.flatten_dict(tree).items()}


def moments(opt_state):
    """Name of a parameter -> all that the optimizer keeps of its shape."""
    names = {tuple(name.split("/")): name for name in flat(parameters())}
    found = {}
    for keys, leaf in jax.tree_util.tree_leaves_with_path(opt_state):
        path = tuple(str(getattr(k, "key", getattr(k, "name", getattr(k, "idx", k)))) for k in keys)
        for i in range(len(path)):
            if path[i:] in names:
                found.setdefault(names[path[i:]], []).append(np.asarray(leaf))
    return found


def test_what_does_not_learn_stays_bit_for_bit_and_has_no_optimizer_state():
    state, step = start({"norms": {}}, ADAM)
    before = flat(state.params)
    for _ in range(3):
        state, metrics = step(state, BATCH)
    after = flat(state.params)
    assert {name for name in after if not np.array_equal(before[name], after[name])} == set(NORMS)
    assert set(moments(state.opt_state)) == set(NORMS)
    size = sum(x.size for x in jax.tree.leaves(state.opt_state) if x.ndim)
    assert size == 2 * sum(before[name].size for name in NORMS)
    assert metrics["train/param_norm"] == pytest.approx(np.sqrt(sum((x**2).sum() for x in after.values())), rel=1e-5)


def test_what_learns_moves_by_its_part_of_the_whole_gradient():
    whole, step = start({}, DESCENT)
    part, part_step = start({"rest": {"what": ("*",), "but": ("norms", "head/kernel")}}, DESCENT)
    whole_end, whole_metrics = step(whole, BATCH)
    part_end, part_metrics = part_step(part, BATCH)
    expected, found, before = flat(whole_end.params), flat(part_end.params), flat(whole.params)
    gradient = {name: before[name] - expected[name] for name in before}
    assert all(np.abs(g).max() > 0 for g in gradient.values())
    for name in before:
        kept = name in (*NORMS, "head/kernel")
        np.testing.assert_allclose(found[name], before[name] if kept else expected[name], rtol=1e-5, atol=1e-7)
    norm = np.sqrt(sum((g**2).sum() for name, g in gradient.items() if name not in (*NORMS, "head/kernel")))
    assert part_metrics["train/grad_norm"] == pytest.approx(norm, rel=1e-4)
    assert part_metrics["train/grad_norm"] < whole_metrics["train/grad_norm"]


def test_no_rule_and_a_rule_for_all_are_the_same_program_as_before():
    assert learns({}).split({"a": 1}) == ({"a": 1}, {})
    everything, none = learns({"all": {"what": "*"}}), learns(None)
    assert everything.spans is None
    assert none.spans is None
    state, _ = start({"all": {"what": "*"}}, ADAM)
    assert type(state.opt_state) is type(start({}, ADAM)[0].opt_state)


@pytest.mark.parametrize("accumulation", [1, 2])
def test_memory_of_the_compiled_step_shrinks_to_what_learns(accumulation):
    def compiled(rules):
        config = {"model": None, "task": {"kind": "next_token"}, "optimizer": ADAM, "trainable": rules}
        model = TinyLM(width=48, noise=0.0, layers=2)
        program = get_program(config, TrainSettings(STEPS, accumulation), BATCH, {}, model)
        return program, program.train.memory_analysis()

    (whole, all_of_it), (part, some) = compiled({}), compiled({"norms": {}})
    params = 4 * whole.params
    assert part.trainable_params == 2 * 48
    assert whole.trainable_params == whole.params == part.params
    # Arguments: parameters and two moments of each, against parameters and next to nothing.
    assert all_of_it.argument_size_in_bytes > 3 * params
    assert some.argument_size_in_bytes < 1.2 * params
    # What is made and dropped: no gradient of the rest, nor of the batch in two parts.
    assert some.temp_size_in_bytes < all_of_it.temp_size_in_bytes - 0.8 * params


def test_checkpoints_hold_the_state_of_what_learns(tmp_path):
    def size(name, rules):
        run_tiny(tmp_path / name, model=TinyLM(width=64), trainable=rules, train__steps=2, eval__every=0)
        files = (tmp_path / name / "checkpoints/2/state").rglob("*")
        return sum(file.stat().st_size for file in files if file.is_file())

    params = 4 * sum(x.size for x in jax.tree.leaves(describe_sizes(TinyLM(width=64))))
    assert size("part", {"norms": {}}) < size("whole", {}) - params


def describe_sizes(model):
    return jax.tree.map(lambda p: np.zeros(p.shape), describe(model, *TASK.inputs(BATCH, jnp.int32(0), train=False)))


class TestPhases:
    """The head learns in updates 1 and 2, and 5 to the end; norms from update 4 on; the rest always."""

    CLIP = 0.02

    @staticmethod
    def rules():
        return {
            "first": {"what": ("head",), "until": 2},
            "again": {"what": ("head",), "since": 4, "rate": 0.5},
            "norms": {"since": 3},
            "rest": {"what": ("*",), "but": ("head", "norms")},
        }

    def test_updates_are_zero_outside_and_the_optimizer_begins_with_its_first_step(self):
        """Adam written out in NumPy for each group, by the gradients that the run had."""
        state, step = start(self.rules(), {**ADAM, "clip_norm": self.CLIP, "warmup_steps": 2})
        _, gradient_step = start({}, DESCENT)
        active = {
            "head/kernel": lambda t: 0.0 if t in (2, 3) else 1.0 if t < 2 else 0.5,
            "head/bias": lambda t: 0.0 if t in (2, 3) else 1.0 if t < 2 else 0.5,
            **dict.fromkeys(NORMS, lambda t: float(t >= 3)),
        }
        m, v, age = {}, {}, {}
        shape = lambda n: 0.1 + 0.9 * 0.5 * (1 + np.cos(np.pi * (n - 2) / (STEPS - 2)))  # noqa: E731
        for t in range(6):
            before, kept = flat(state.params), moments(state.opt_state)
            moved, _ = gradient_step(start({}, DESCENT)[0].replace(params=state.params), BATCH)
            gradient = {name: before[name] - x for name, x in flat(moved.params).items()}
            state, metrics = step(state, BATCH)
            after, remembered = flat(state.params), moments(state.opt_state)
            now = {name: active.get(name, lambda t: 1.0)(t) for name in before}
            norm = np.sqrt(sum((gradient[name] ** 2).sum() for name in before if now[name]))
            assert norm > self.CLIP, "the gradient is clipped by the norm of what learns now"
            assert metrics["train/grad_norm"] == pytest.approx(norm, rel=1e-3)
            rate = 0.05 * ((t + 1) / 2 if t < 2 else shape(t + 1))
            for name in before:
                if not now[name]:
                    np.testing.assert_array_equal(after[name], before[name], err_msg=f"{name} at {t}")
                    for old, new in zip(kept[name], remembered[name], strict=True):
                        np.testing.assert_array_equal(old, new)
                    continue
                g = gradient[name] * self.CLIP / norm
                age[name] = age.get(name, 0) + 1
                m[name] = 0.8 * m.get(name, 0) + 0.2 * g
                v[name] = 0.9 * v.get(name, 0) + 0.1 * g**2
                direction = (m[name] / (1 - 0.8 ** age[name])) / (np.sqrt(v[name] / (1 - 0.9 ** age[name])) + 1e-6)
                decay = 0.1 * before[name] if name.endswith(("kernel", "embedding", "w_in")) else 0.0
                expected = -now[name] * rate * (direction + decay)
                np.testing.assert_allclose(after[name] - before[name], expected, rtol=0.02, atol=2e-4, err_msg=f"{name} at {t}")
        assert age == {name: {"head": 4, "norm": 3}.get(name.split("/")[0], 6) for name in before}

    def test_shares_of_the_run_are_steps(self):
        found = learns({"norms": {"since": 0.5, "until": 1.0}, "head": {"what": "head", "since": 1}})
        spans = {"/".join(path): (s.since, s.until) for path, (s,) in found.spans.items()}
        assert spans == {**dict.fromkeys(NORMS, (4, 8)), "head/kernel": (1, None), "head/bias": (1, None)}


def test_a_rate_scales_the_whole_update():
    slow, slow_step = start({"norms": {"rate": 0.25}, "rest": {"what": "*", "but": "norms"}}, ADAM)
    fast, fast_step = start({}, ADAM)
    before, after = flat(slow.params), flat(slow_step(slow, BATCH)[0].params)
    expected = flat(fast_step(fast, BATCH)[0].params)
    for name in before:
        factor = 0.25 if name in NORMS else 1.0
        np.testing.assert_allclose(after[name] - before[name], factor * (expected[name] - before[name]), rtol=1e-4, atol=1e-7)


@dataclasses.dataclass(frozen=True)
class SetToOne:
    """Sets both parameters to 1 after each step, and counts."""

    def after_step(self, site: Site) -> Site:
        ones = {name: jnp.ones_like(x) for name, x in site.params.items()}
        restarted = {name: jnp.ones(x.shape, bool) for name, x in site.params.items()}
        return site.replace(params=ones, state={"count": site.state["count"] + 1}, restarted=restarted)


class Controlled(nn.Module):
    @nn.compact
    def __call__(self, tokens, ctx):
        a, b = (self.param(name, INIT, (VOCAB, VOCAB)) for name in ("a", "b"))
        self.variable("router_state", "count", jnp.zeros, ())
        control(self, "ones", SetToOne(), {"tokens": jnp.float32(tokens.size)})
        return (a + b)[tokens]


def test_no_controller_changes_what_does_not_learn():
    state, step = start({"a": {"what": "a"}}, ADAM, Controlled())
    after, _ = step(state, BATCH)
    np.testing.assert_array_equal(after.params["a"], 1.0)
    np.testing.assert_array_equal(after.params["b"], state.params["b"])
    assert after.collections["router_state"]["count"] == 1
    assert all(not x.any() for x in jax.tree.leaves(after.opt_state) if x.ndim), "moments of what was rewritten are forgotten"


def test_eight_devices_do_as_one():
    rules = {"norms": {}, "late": {"what": "layer_*", "since": 1, "rate": 0.5}}
    config = {"model": None, "task": {"kind": "next_token"}, "optimizer": ADAM, "trainable": rules}

    def trained(mesh):
        parallel = None if mesh is None else Parallel(make_mesh(mesh))
        program = get_program(config, TrainSettings(STEPS), BATCH, {}, MODEL, parallel)
        batch, state = BATCH, program.init(jax.random.key(0))
        if mesh is not None:
            batch = jax.device_put(BATCH, jax.tree.map(lambda x: x.sharding, program.batch))
        first = flat(state.params)
        for _ in range(3):
            state, _ = program.train(state, batch)
        return first, flat(state.params), jax.device_get(state.opt_state)

    first, alone, alone_state = trained(None)
    first_there, together, state = trained("data=4,fsdp=2")
    for name in alone:
        np.testing.assert_array_equal(first[name], first_there[name])
        np.testing.assert_allclose(together[name], alone[name], rtol=1e-3, atol=1e-5)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-2, atol=1e-5), state, alone_state)
    np.testing.assert_array_equal(together["head/kernel"], first["head/kernel"])


@pytest.mark.parametrize(
    ("rules", "message"),
    [
        (
            {"nroms": {}},
            r"'nroms' in trainable.nroms.what matches no parameter; the nearest are norm/.*; roles of its parameters: biases, .*norms",
        ),
        ({"x": {"what": ("layer_0/wi_n",)}}, r"the nearest are layer_0/w_in"),
        (
            {"routers": {}},
            r"no parameter of this model has the role 'routers' \(trainable.routers.what\); roles of its parameters: biases, emb",
        ),
        ({"norms": {"but": ("norm/gain",)}}, r"'norm/gain' in trainable.norms.but matches no parameter"),
        ({"norms": {"but": ("norm",)}}, r"trainable.norms: all that 'what' matches is left out by 'but'"),
        ({"norms": {"rates": 1}}, r"unknown key 'rates' in trainable.norms; did you mean 'rate'"),
        ({"norms": {"rate": 0}}, r"trainable.norms.rate=0 must be a number above 0"),
        ({"norms": 0.1}, r"trainable.norms=0.1 must be a mapping"),
        ({"norms": {"since": 5, "until": 5}}, r"trainable.norms: since=5 must be less than until=5"),
        (
            {"norms": {"until": 1.5}},
            r"trainable.norms.until=1.5 must be a whole number of at least 0, or a number between 0 and 1, or None",
        ),
        (
            {"norms": {}, "all": {"what": "*"}},
            r"norm/.* learns by trainable.(norms|all) and by trainable.(norms|all) in the same steps",
        ),
    ],
)
def test_rules_that_do_not_fit_are_named(rules, message):
    with pytest.raises(ConfigError, match=message):
        learns(rules)


def test_a_run_learns_what_its_config_says_and_says_so(tmp_path):
    result = run_tiny(tmp_path, train__steps=2, trainable={"head": {"what": "head"}, "biases": None})
    assert result.trainable_params == 8 * VOCAB + VOCAB
    assert result.params > 2 * result.trainable_params
    again = run_tiny(tmp_path, train__steps=2, trainable={"head": {"what": "head"}})
    assert again.metrics == result.metrics
    with pytest.raises(ConfigError, match=r"holds a run with trainable.head.what=\['head'\]|trainable.head.rate"):
        run_tiny(tmp_path, train__steps=2, trainable={"head": {"what": "head", "rate": 0.5}})
