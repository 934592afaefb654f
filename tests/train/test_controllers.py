"""Controllers: one change per optimizer step, by what all microbatches, layers and devices measured; resumed, sharded, scanned."""

import dataclasses
import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from training_harness import INIT, VOCAB, Info, TinyText, device, run_tiny

from moejax.core.context import Context
from moejax.core.control import Site, control
from moejax.optim.base import optimizers
from moejax.parallel import Parallel, make_mesh
from moejax.tasks.base import tasks
from moejax.train import load
from moejax.train.program import get_program
from moejax.train.settings import TrainSettings
from moejax.train.step import init_state, make_eval_step, make_train_step

WIDTH, LAYERS, AT = 4, 3, 2
TASK = tasks.build({"kind": "next_token"}, "task", domains=Info.domains)
ADAMW = {"kind": "adamw", "learning_rate": 0.01, "weight_decay": 0.1, "schedule": "constant"}
OPTIMIZER = optimizers.build(ADAMW, "optimizer", steps=10)
BATCH = device(next(TinyText({"batch_size": 8}, "train")))


@dataclasses.dataclass(frozen=True)
class Rewrite:
    """Adds up what was measured; at update `at` sets row 1 of `w` to the layers' common measurement, and its moments to zero."""

    at: int = AT

    def after_step(self, site: Site) -> Site:
        own, everywhere = site.measured["sum"], site.everywhere["sum"]
        row = (jnp.arange(3) == 1)[:, None] & (site.step == self.at)
        return site.replace(
            params={**site.params, "w": jnp.where(row, everywhere, site.params["w"])},
            state={
                **site.state,
                "own": site.state["own"] + own,
                "tokens": site.measured["tokens"],
                "odd": ~site.state["odd"],
            },
            restarted={"w": row},
        )


class Layer(nn.Module):
    controller: Rewrite = Rewrite()

    @nn.compact
    def __call__(self, x, ctx: Context):
        w = self.param("w", INIT, (3, WIDTH))
        valid = ctx.valid[..., None]
        self.variable("router_state", "own", jnp.zeros, (WIDTH,))
        self.variable("router_state", "tokens", jnp.zeros, ())
        self.variable("router_state", "odd", lambda: jnp.zeros((), bool))
        self.variable("router_state", "seed", lambda: jax.random.bits(self.make_rng("params")))
        measured = {"sum": (x * valid).sum((0, 1)), "tokens": valid.sum().astype(jnp.float32)}
        control(self, "rewrite", self.controller, measured)
        self.sow("stats", "z", x.mean())
        return x + jnp.tanh(x @ w.T) @ w, measured


class Model(nn.Module):
    scan: bool = True

    @nn.compact
    def __call__(self, tokens, ctx: Context):
        x = nn.Embed(VOCAB, WIDTH, embedding_init=INIT, name="embed")(tokens)
        if self.scan:
            body = nn.scan(Layer, variable_axes={True: 0}, split_rngs={True: True}, in_axes=(nn.broadcast,), length=LAYERS)
            x, measured = body(name="layers")(x, ctx)
            self.sow("shown", "measured", measured)
        else:
            for i in range(LAYERS):
                x, _ = Layer(name=f"layer_{i}")(x, ctx)
        return nn.Dense(VOCAB, kernel_init=INIT, name="head")(x)


@functools.cache
def step_of(scan=True, accumulation=1):
    return jax.jit(make_train_step(Model(scan), TASK, OPTIMIZER, accumulation, jit=False))


@functools.cache
def start():
    return jax.jit(lambda key: init_state(Model(), TASK, OPTIMIZER, BATCH, key))(jax.random.key(0))


def measure(params):
    """What every layer measures of the whole batch: `[layers, d]`, and the number of tokens."""
    state = start().collections
    ctx = TASK.inputs(BATCH, jnp.int32(0), train=True)[1]
    out = Model().apply({"params": params, **state}, BATCH["tokens"], ctx, mutable=["shown"])[1]
    return np.asarray(out["shown"]["measured"][0]["sum"]), int((BATCH["segments"] > 0).sum())


def run(step, state, steps=AT):
    for _ in range(steps):
        state, metrics = step(state, BATCH)
    return jax.device_get(state), metrics


def moments(state):
    """Adam's two memories of `w`."""
    adam = next(part for part in state.opt_state if hasattr(part, "mu"))
    return [np.asarray(tree["layers"]["w"]) for tree in (adam.mu, adam.nu)]


def assert_close(a, b, **tolerance):
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, **{"rtol": 2e-5, "atol": 1e-6, **tolerance}), a, b)


def numbers(state):
    return jax.device_get((state.params, state.opt_state, state.collections))


def test_state_parameters_and_moments_change_once_a_step_by_what_the_whole_batch_measured():
    step = step_of()
    first, _ = run(step, start(), 1)
    sums, tokens = measure(start().params)
    np.testing.assert_allclose(first.collections["router_state"]["layers"]["own"], sums, rtol=1e-5)
    np.testing.assert_array_equal(first.collections["router_state"]["layers"]["tokens"], tokens)
    assert all(np.abs(m).min() > 0 for m in moments(first)), "nothing restarts before its time"
    assert first.collections["router_state"]["layers"]["odd"].all()
    more, _ = measure(first.params)
    second, metrics = run(step, first, 1)
    np.testing.assert_allclose(second.collections["router_state"]["layers"]["own"], sums + more, rtol=1e-5)
    for layer in range(LAYERS):
        # The sum over layers, although each layer has its own `w`.
        np.testing.assert_allclose(second.params["layers"]["w"][layer, 1], more.sum(0), rtol=1e-5)
    for memory in moments(second):
        np.testing.assert_array_equal(memory[:, 1], 0)
        assert np.abs(memory[:, [0, 2]]).min() > 0
    assert not any(name.startswith("measured") for name in metrics), "measurements are no metrics"


def test_microbatches_add_up():
    assert_close(numbers(run(step_of(accumulation=4), start())[0]), numbers(run(step_of(), start())[0]), atol=1e-4)


def test_unrolled_layers_do_as_scanned_ones():
    def unrolled(tree):
        layers = tree["layers"]
        rest = {name: value for name, value in tree.items() if name != "layers"}
        return rest | {f"layer_{i}": jax.tree.map(lambda x, i=i: x[i], layers) for i in range(LAYERS)}

    params = unrolled(start().params)
    collections = {"router_state": unrolled(start().collections["router_state"])}
    state = start().replace(params=params, collections=collections, opt_state=OPTIMIZER.transform().init(params))
    separate, _ = run(step_of(scan=False), state)
    together, _ = run(step_of(), start())
    assert_close(separate.params, unrolled(together.params))
    assert_close(separate.collections["router_state"], unrolled(together.collections["router_state"]))


def test_controllers_that_differ_share_nothing():
    class Two(nn.Module):
        @nn.compact
        def __call__(self, tokens, ctx):
            x = nn.Embed(VOCAB, WIDTH, embedding_init=INIT, name="embed")(tokens)
            x, _ = Layer(Rewrite(1), name="first")(x, ctx)
            x, _ = Layer(Rewrite(2), name="second")(x, ctx)
            return nn.Dense(VOCAB, kernel_init=INIT, name="head")(x)

    key = jax.random.key(0)
    state = jax.jit(lambda key: init_state(Two(), TASK, OPTIMIZER, BATCH, key))(key)
    after, _ = run(make_train_step(Two(), TASK, OPTIMIZER), state, 1)
    router_state = after.collections["router_state"]
    np.testing.assert_allclose(after.params["first"]["w"][1], router_state["first"]["own"], rtol=1e-5)
    assert not np.allclose(after.params["second"]["w"][1], router_state["second"]["own"], rtol=0.1)


def test_evaluation_changes_nothing():
    sums, _ = jax.device_get(make_eval_step(Model(), TASK)(start(), BATCH))
    assert sums["count"] > 0


@pytest.mark.parametrize(("mesh", "accumulation"), [("dp", 1), ("data=4,fsdp=2", 1), ("data=4,tensor=2", 2)])
def test_eight_devices_do_as_one(mesh, accumulation):
    config = {"model": None, "task": {"kind": "next_token"}, "optimizer": ADAMW}
    parallel = Parallel(make_mesh(mesh))
    program = get_program(config, TrainSettings(10, accumulation), BATCH, {}, Model(), parallel)
    place = lambda tree, like: jax.device_put(tree, jax.tree.map(lambda x: x.sharding, like))  # noqa: E731
    batch, state = place(BATCH, program.batch), place(jax.tree.map(jnp.copy, start()), program.state)
    for _ in range(AT):
        state, _ = program.train(state, batch)
    assert_close(numbers(state), numbers(run(step_of(), start())[0]), rtol=1e-4, atol=1e-4)


def test_a_run_that_was_cut_off_ends_with_the_same_bits(tmp_path):
    class Crash(RuntimeError):
        pass

    class Crashing(TinyText):
        def __next__(self):
            if self.shuffle and self.done == 5:
                raise Crash
            return super().__next__()

    whole = run_tiny(tmp_path / "whole", model=Model())
    with pytest.raises(Crash):
        run_tiny(tmp_path / "cut", model=Model(), make_iterator=Crashing)
    assert np.abs(load(tmp_path / "cut", 3)[1]["router_state"]["layers"]["own"]).max() > 0
    resumed = run_tiny(tmp_path / "cut", model=Model())
    jax.tree.map(np.testing.assert_array_equal, resumed.variables, whole.variables)


def test_other_optimizers_forget_too():
    optimizer = optimizers.build({"kind": "lion", "learning_rate": 0.01}, "optimizer", steps=10)
    state = start().replace(opt_state=optimizer.transform().init(start().params))
    after, _ = run(jax.jit(make_train_step(Model(), TASK, optimizer, jit=False)), state)
    (memory,) = (x for x in jax.tree.leaves(after.opt_state) if x.shape == (LAYERS, 3, WIDTH))
    np.testing.assert_array_equal(memory[:, 1], 0)
    assert np.abs(memory[:, 0]).min() > 0
