"""What the machine cannot hold is refused before anything of it is made."""

import jax
import jax.numpy as jnp
import pytest
from training_harness import TinyLM, run_tiny

from moejax.core.errors import ConfigError
from moejax.train import fits
from moejax.train.fits import held, needed


def test_a_model_that_the_machine_cannot_hold_is_refused_before_it_is_made(tmp_path):
    # A kernel of width x width in each of three experts, as float32, with two moments of Adam: 36 width^2 bytes and more.
    with pytest.raises(
        ConfigError, match=r"its parameters and optimizer state need 3[67],\d{3} GB on each device, which has [\d.]+ GB"
    ):
        run_tiny(tmp_path, model=TinyLM(width=1_000_000))


def test_a_step_that_the_machine_cannot_hold_is_refused_before_it_is_taken(tmp_path, monkeypatch):
    steps = []
    monkeypatch.setattr(fits, "memory", lambda: 6_500)
    with pytest.raises(
        ConfigError, match=r"a step of 24 tokens needs [\d.]+ kB on each device, which has 6\.5 kB; make the model"
    ):
        run_tiny(tmp_path, progress=lambda report: steps.append(report.step))
    assert set(steps) == {0}


def test_bytes_are_those_on_each_device():
    mesh = jax.make_mesh((8,), ("x",))
    split = jax.NamedSharding(mesh, jax.P("x"))
    tree = {
        "whole": jax.ShapeDtypeStruct((16, 3), jnp.bfloat16),
        "split": jax.ShapeDtypeStruct((16, 3), jnp.float32, sharding=split),
    }
    assert held(tree) == 16 * 3 * 2 + 2 * 3 * 4
    compiled = jax.jit(lambda x: (x + 1, x.sum())).lower(jax.ShapeDtypeStruct((1000,), jnp.float32)).compile()
    assert needed(compiled) >= 8004
