"""`--compile_for` and the configs of published sizes: they trace at full size, and what is written of them is right."""

import json
import re

import jax
import numpy as np
import pytest
from PIL import Image

from experiments import docs, pods, run
from experiments.flags import load_config
from experiments.plots import COLOURS
from moejax.aot import ahead, report
from moejax.aot.cost import Costs
from moejax.aot.report import Exchanged, Memory, Report

FILES = sorted(f for f in pods.CONFIGS.glob("*.py") if f.stem != "__init__")
# Billions of parameters: published, or counted from the paper's sizes. The rest of Switch and V-MoE is dense.
BILLIONS = {"mixtral_8x7b": 46.7, "deepseek_moe_16b": 16.9, "switch_base_128": 7.4, "vmoe_l16": 3.4}


@pytest.mark.tpu_aot
@pytest.mark.parametrize("file", FILES, ids=lambda f: f.stem)
def test_pod_configs_have_their_published_size_and_divide_among_both_slices(file):
    before = len(jax.live_arrays())
    config = load_config(str(file))[1]
    for topology in pods.SLICES:
        program = ahead.program_for(config, ahead.topology(topology))
        held = report.held_bytes(program)
        assert program.params == pytest.approx(BILLIONS[file.stem] * 1e9, rel=0.02)
        # Float32 parameters and two moments. What is not split over all devices is small.
        assert held["optimizer"] == pytest.approx(2 * held["parameters"], abs=100)
        assert held["parameters"] < ahead.topology(topology).chip.hbm / 10
    assert len(jax.live_arrays()) < before + 100


def made(name="toy", topology="v5e:2x2", **changes):
    fields = dict(
        name=name,
        topology=topology,
        devices=4,
        mesh="fsdp=4",
        tokens=4096,
        params=10**9,
        active_params=2 * 10**8,
        trainable_params=10**9,
        memory=Memory(10**9, 0, 2 * 10**9, 10**6, 5 * 10**9, 10**4, 10**7, 16 * 10**9),
        costs=Costs(1e12, 2e10, 0.05, 0.02, 0.01),
        exchanges=(
            Exchanged("all-gather", ("fsdp",), 4, 96, 3e9, 0.5, True),
            Exchanged("all-reduce", ("fsdp",), 4, 3, 1e9, 0.0, False),
        ),
        trace_seconds=2.0,
        compile_seconds=61.0,
    )
    return Report(**{**fields, **changes})


def test_tables_show_memory_against_the_limit_the_estimate_and_every_exchange():
    memory, work, exchanges = pods.tables(made())
    assert ("temporaries", "5 GB", "31.2 %") in memory.rows
    assert ("in all", "8.01 GB", "50.1 %") in memory.rows
    assert ("step, an estimate and no measurement", "60 ms") in work.rows
    assert exchanges.rows == (
        ("all-gather", "fsdp", "4", "96", "3 GB", "50.0 %"),
        ("all-reduce", "fsdp", "4", "3+", "1 GB", "0.0 %"),
    )


def test_json_and_picture(tmp_path):
    file = pods.write(made(), tmp_path)
    assert file.name == "toy.v5e-2x2.json"
    found = json.loads(file.read_text())
    assert found["memory"]["total"] == made().memory.total
    assert found["costs"]["estimated_seconds"] == pytest.approx(0.06)
    assert "jax" in found["made"]
    assert pods.picture([found, found], tmp_path / "memory.png").stat().st_size > 5000


@pytest.mark.parametrize("limit", [None, 16 * 10**9])
@pytest.mark.parametrize("scale", [1e9, 1e6, 1e3])
def test_the_bars_of_a_small_config_can_be_seen(tmp_path, limit, scale):
    parts = dict(parameters=1, frozen=0, optimizer=2, inputs=0, temporaries=5, results=0, code=0)
    memory = {name: int(scale) * size for name, size in parts.items()} | {"total": 8 * int(scale), "limit": limit}
    shown = pods.picture([{"name": "toy", "topology": "v5e:2x2", "mesh": "fsdp=4", "memory": memory}], tmp_path / "memory.png")
    pixels = np.asarray(Image.open(shown).convert("RGB"))
    areas = {}
    for part in ("parameters", "optimizer", "temporaries"):
        rgb = tuple(bytes.fromhex(COLOURS[pods.PARTS.index(part)].removeprefix("#")))
        # Without the legend, which is below the picture's middle.
        areas[part] = int((pixels[: len(pixels) // 2] == rgb).all(axis=-1).sum())
    assert areas["parameters"] > 1000
    assert areas["optimizer"] / areas["parameters"] == pytest.approx(2, rel=0.05)
    assert areas["temporaries"] / areas["parameters"] == pytest.approx(5, rel=0.05)


def test_the_table_of_the_page_is_made_from_the_record(tmp_path, monkeypatch):
    pods.write(made("a"), tmp_path / "pods")
    pods.write(made("b", "v5p:2x2x1"), tmp_path / "pods")
    table = pods.markdown(tmp_path / "pods")
    assert "| a | v5e:2x2 (4) | fsdp=4 | 1B (200M) | 8.01 of 16.00 (5.00) | 1e+12 | 4.0 (37.5 %) | 60 ms | 61 s |" in table
    text = "before\n<!-- ledger:pods -->\nold\n<!-- end -->\nafter"
    rendered = docs.render(text, tmp_path)
    assert table in rendered
    assert rendered.startswith("before")
    assert docs.render(rendered, tmp_path) == rendered


@pytest.mark.slow
def test_the_command_compiles_a_config_for_simulated_devices(tmp_path, capsys):
    source = (
        "from configs import base_lm\n\ndef get_config():\n    config = base_lm.get_config()\n    config.mesh = 'fsdp x ep'\n"
    )
    (tmp_path / "split.py").write_text(source + "    return config\n")
    small = ["--config.model.d_model=32", "--config.model.num_layers=2", "--config.data.seq_len=16"]
    command = [f"--config={tmp_path}/split.py", "--compile_for=cpu:8", f"--runs={tmp_path}", *small]
    assert run.main(command) == 0
    printed = capsys.readouterr().out
    assert "split for cpu:8: compiling" in printed
    assert "split on cpu:8: 8 devices, mesh fsdp=4,expert=2" in printed
    assert re.search(r"all-to-all\s+expert\s+2", printed)
    found = json.loads((tmp_path / "pods" / "split.cpu-8.json").read_text())
    assert found["devices"] == 8
    assert (tmp_path / "pods" / "split.cpu-8.png").exists()


def test_a_study_is_compiled_arm_by_arm_at_the_scale_of_its_preset(tmp_path, monkeypatch):
    seen = {}
    monkeypatch.setattr(pods, "compile_configs", lambda configs, topology, folder, console: seen.update(configs, at=topology))
    assert (
        run.main(["--study=switch", "--preset=paper", "--arms=switch,dense", "--compile_for=v5e:16x16", f"--runs={tmp_path}"])
        == 0
    )
    assert seen.pop("at") == "v5e:16x16"
    assert list(seen) == ["switch.paper.dense", "switch.paper.switch"]
    assert seen["switch.paper.switch"].model.num_layers == 24


@pytest.mark.parametrize(
    ("command", "message"),
    [
        (["--config=configs/base_lm.py", "--compile_for=v5x:2x2"], "unknown chip 'v5x'"),
        (["--config=configs/pods/vmoe_l16.py", "--compile_for=cpu:8", "--config.mesh=fsdq"], "unknown axis or preset 'fsdq'"),
        (
            ["--config=configs/base_lm.py", "--compile_for=cpu:8", "--config.data.batch_size=9"],
            "data.batch_size=9 does not divide",
        ),
        (["--config=configs/base_lm.py", "--compile_for=cpu:8", "--seeds=2"], "--seeds=2 does not go with --compile_for"),
        (["--list", "--compile_for=cpu:8"], "--compile_for=cpu:8 does not go with --list"),
        (["--study=switch", "--config=configs/base_lm.py", "--compile_for=cpu:8"], "--study=switch does not go with --config"),
    ],
)
def test_a_mistake_is_one_line_and_status_2(command, message, capsys, tmp_path):
    assert run.main([*command, *([] if "--list" in command else [f"--runs={tmp_path}"])]) == 2
    assert message in capsys.readouterr().err


def test_what_does_not_fit_ends_with_status_2_and_what_to_change(tmp_path, monkeypatch, capsys):
    def too_much(name, config, where, say):
        raise ahead.DoesNotFit(f"{name} does not fit {where.name}: it needs 20.00 GB a chip; set model.remat='full'")

    monkeypatch.setattr(report, "make_report", too_much)
    assert run.main(["--config=configs/base_lm.py", "--compile_for=cpu:8", f"--runs={tmp_path}"]) == 2
    assert "does not fit cpu:8: it needs 20.00 GB a chip; set model.remat='full'" in capsys.readouterr().err
