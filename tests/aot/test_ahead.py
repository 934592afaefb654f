"""Compiling train steps for devices that are not there, and the report on them."""

import ast
import gc
import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest

from configs import base_lm, base_vit
from moejax.aot import ahead, report
from moejax.aot.hlo import Collective
from moejax.core.errors import ConfigError
from moejax.data import make_iterator
from pallas_kernels.chips import GIB, TPUS


def tiny(batch_size=8, **changes):
    """Two layers, four experts."""
    config = base_lm.get_config()
    config.model.update(dict(d_model=32, num_layers=2, vocab_size=64) | changes)
    config.model.blocks.moe.ffn.update(dict(num_experts=4))
    for block in config.model.blocks.values():
        block.mixer.update(dict(num_heads=2, num_kv_heads=1))
    config.model.blocks.dense.ffn.hidden = config.model.blocks.moe.ffn.bank.hidden = 64
    config.data.update(dict(batch_size=batch_size, seq_len=16))
    return config


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("v5x:2x2", "unknown chip 'v5x'; did you mean 'v5"),
        ("v5e", "names no slice; write v5e:16x16; common ones: 2x2, 2x4"),
        ("v5e:3x3", "knows no slice 'v5e:3x3'; common ones: v5e:2x2"),
        ("cpu:many", "names no number of devices; write cpu:8"),
        ("cpu:4000", "needs 4000 simulated devices"),
    ],
)
def test_wrong_names_are_answered_with_what_there_is(name, message):
    jax.devices()
    with pytest.raises(ConfigError, match=message):
        ahead.topology(name)


@pytest.mark.tpu_aot
@pytest.mark.parametrize(("name", "devices"), [("v5e:16x16", 256), ("v5p:8x8x8", 512), ("v6e:16x16", 256), ("tpu7x:2x2x2", 16)])
def test_named_slices_are_described(name, devices):
    where = ahead.topology(name)
    assert len(where.devices) == devices
    assert where.chip.hbm > 15 * GIB


@pytest.mark.parametrize("config", [base_lm.get_config(), base_vit.get_config()], ids=["text", "images"])
def test_shapes_of_batches_are_those_of_the_data(config):
    batch = next(make_iterator(config.data, split="train"))
    expected = {name: (x.shape, x.dtype) for name, x in batch.items() if name != "example_id"}
    assert {name: (x.shape, x.dtype) for name, x in ahead.batch_shapes(config).items()} == expected


def test_report_on_simulated_devices_counts_by_hand_and_allocates_nothing():
    config = tiny()
    config.mesh = "fsdp=2,ep=4"
    jax.random.key(0)
    gc.collect()  # what other tests have left is not to go meanwhile
    before = len(jax.live_arrays())
    phases = []
    found = report.make_report("tiny", config, ahead.topology("cpu:8"), phases.append)
    assert len(jax.live_arrays()) == before
    assert phases == ["tracing", "compiling", "reading"]
    assert (found.devices, found.mesh, found.tokens) == (8, "fsdp=2,expert=4", 8 * 16)

    # Embedding, attention (q, k, v, o), dense layer, experts, router; norms and what is not of width d are whole.
    d, heads, kv, hidden, e = 32, 32, 16, 64, 4
    split = 64 * d + 2 * d * (2 * heads + 2 * kv) + 3 * d * hidden + d * e
    experts, norms = e * 3 * d * hidden, 5 * d
    assert found.params == split + experts + norms
    assert found.memory.parameters == 4 * (split / 2 + experts / 8 + norms)
    assert 2 * found.memory.parameters <= found.memory.optimizer < 2 * found.memory.parameters + 64
    assert found.memory.inputs >= 16 * (5 * 4 + 1)  # one row of the batch
    assert found.memory.total < 1e7
    assert found.memory.limit is None

    # Three times the forward pass, whose products are with every parameter but the embedding's look-up; 1 of 4 experts.
    active = split + experts / e - d * e
    assert found.costs.flops * 8 > 3 * 2 * found.tokens * active
    assert found.costs.seconds is None

    along = {(e.kind, e.axes) for e in found.exchanges}
    assert {("all-gather", ("fsdp",)), ("all-to-all", ("expert",))} <= along
    assert found.to_json()["memory"]["total"] == found.memory.total


SCRIPT = """
from test_ahead import tiny
from moejax.aot import ahead, report

config = tiny(dtype="bfloat16", d_model=128)
ffn = config.model.blocks.moe.ffn
ffn.num_experts, ffn.bank.hidden, ffn.select = 8, 128, dict(kind="top_k", k=2)
config.mesh = "fsdp=2,ep=4"
where = ahead.topology("v5e:2x4")
found = report.make_report("tiny", config, where)
kernels = ahead.lower_train(ahead.program_for(config, where), where).as_text().count("tpu_custom_call")
print([kernels, found.memory.total, found.memory.limit, found.costs.seconds, [[e.kind, *e.axes] for e in found.exchanges]])
"""


@pytest.mark.slow
@pytest.mark.tpu_aot
def test_report_on_absent_tpus_uses_their_kernels_and_their_clock():
    """In a process of its own: JAX hands kernels constants that are no arrays to the type checks of this one."""
    here = Path(__file__).resolve()
    environment = {**os.environ, "PYTHONPATH": f"{here.parent}:{here.parents[2]}", "JAX_PLATFORMS": "cpu"}
    done = subprocess.run([sys.executable, "-c", SCRIPT], capture_output=True, text=True, env=environment, timeout=600)
    assert done.returncode == 0, done.stderr
    kernels, total, limit, seconds, exchanges = ast.literal_eval(done.stdout.splitlines()[-1])
    assert kernels >= 4
    assert 0 < total < limit == TPUS["v5e"].hbm
    assert seconds > 0
    assert ["all-to-all", "expert"] in exchanges


def test_exchanges_are_added_up_by_kind_and_axes():
    def made(kind, axes, size, times, overlapped):
        return Collective(kind, axes, 4, size, size, times, True, overlapped, "f32", "", "")

    found = report.summarise(
        [
            made("all-to-all", ("expert",), 400, 10, True),
            made("all-to-all", ("expert",), 400, 30, False),
            made("all-reduce", ("fsdp",), 400, 1, False),
            Collective("all-reduce", (), 1, 8, 8, 1, True, False, "f32", "", ""),
        ]
    )
    assert [(e.kind, e.axes, e.count, e.bytes, e.overlapped) for e in found] == [
        ("all-to-all", ("expert",), 40, 300 * 40, 0.25),
        ("all-reduce", ("fsdp",), 1, 600, 0.0),
    ]


def advice(parameters, remat="full", rows=256, accumulation=1, **mesh):
    sizes = {"data": 1, "fsdp": 1, "expert": 1, "tensor": 1, **mesh}
    return report.advice(3 * int(parameters), int(16e9), sizes, rows, accumulation, remat)


def test_advice_names_the_key_to_change():
    assert "fsdp=256 instead of data=256" in advice(5e9, data=256)
    assert "take a larger slice" in advice(5e9, fsdp=256)
    assert "model.remat='full' (now 'none')" in advice(1e9, remat="none", fsdp=256)
    assert "data.batch_size from 1024 to 256, or raise train.accumulation from 1 to 4" in advice(1e9, rows=1024, fsdp=256)
    assert "data.batch_size from 1024 to 512, or raise train.accumulation from 2 to 4" in advice(
        1e9, rows=1024, accumulation=2, fsdp=256
    )
    assert "raise tensor=1 in mesh, or lower the row's length" in advice(1e9, fsdp=256)


@pytest.mark.tpu_aot
def test_what_does_not_fit_is_refused_with_what_to_change():
    """The compiler's own refusal of a program, and ours of one that compiled."""
    where = ahead.topology("v5e:2x2")
    x = jax.ShapeDtypeStruct((300_000, 300_000), jnp.float32, sharding=jax.sharding.SingleDeviceSharding(where.devices[0]))
    with pytest.raises(ahead.DoesNotFit, match=r"it needs \d{3}\.\d\d GB a chip, and v5e has 16\.91 GB"):
        ahead.compile_lowered(jax.jit(lambda x: x * 2 + 1).lower(x), where)


@pytest.mark.tpu_aot
def test_what_the_compiler_refuses_is_one_sentence(monkeypatch):
    where = ahead.topology("v5e:16x16")

    def refuse(self, compiler_options):
        assert compiler_options is None
        raise jax.errors.JaxRuntimeError("UNIMPLEMENTED: no such exchange\n\n%all-to-all = ...")

    monkeypatch.setattr(jax.stages.Lowered, "compile", refuse)
    with pytest.raises(ConfigError, match=r"refuses this program for v5e:16x16; .*: UNIMPLEMENTED: no such exchange$"):
        ahead.compile_lowered(jax.jit(jnp.sin).lower(1.0), where)


@pytest.mark.tpu_aot
def test_chunks_are_overlapped_where_the_compiler_can():
    def options(topology, **exchange):
        config = tiny(batch_size=512)
        config.mesh, config.exchange = "ep=4 x dp", exchange
        where = ahead.topology(topology)
        return ahead.compiler_options(ahead.program_for(config, where), where)

    assert options("v5e:4x4", chunks=1) == {}
    told = options("v5e:4x4", chunks=2)
    assert told["xla_tpu_enable_async_all_to_all"] == "true"
    assert options("v5e:4x8", chunks=2) == {}
    assert options("v5p:4x4x8", chunks=2) == told
