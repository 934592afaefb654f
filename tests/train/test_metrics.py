"""Names of what models sow, and the log that survives being cut off."""

import errno
import itertools
import json
import os
import subprocess
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tensorboardX.proto import event_pb2
from training_harness import TinyLM, TinyText, device

from moejax.core.files import read_lines
from moejax.tasks.next_token import NextToken
from moejax.train.events import Events
from moejax.train.metrics import MetricLog, expand, flatten, numbers


def test_flatten_names_by_module_and_sums_losses():
    sown = {"blocks_1": {"ffn": {"load": (jnp.arange(3.0),), "z": (jnp.float32(2.0),)}}, "z": (jnp.float32(1.0),)}
    flat = flatten(sown, "stats")
    assert set(flat) == {"stats/blocks_1.ffn/load", "stats/blocks_1.ffn/z", "stats/z"}
    losses = {
        "repeats": {"ffn": {"balance": (jnp.array([1.0, 2.0]),), "z": (jnp.array([10.0, 20.0]),)}},
        "last": {"balance": (jnp.float32(4.0), jnp.float32(8.0))},
    }
    assert {k: float(v) for k, v in flatten(losses, "losses", total=True).items()} == {
        "losses/balance": 15.0,
        "losses/z": 30.0,
    }


def test_expand_splits_layers_but_not_experts():
    line = expand(
        {
            "train/loss": 1.0,
            "stats/repeats.ffn/load": np.arange(6.0).reshape(2, 3),
            "stats/repeats.ffn/z": np.array([5.0, 7.0]),
            "stats/head/load": np.arange(2.0),
            "stats/head/z": np.float32(9.0),
        }
    )
    assert numbers(line) == {
        "train/loss": 1.0,
        "stats/repeats.ffn.0/load": [0.0, 1.0, 2.0],
        "stats/repeats.ffn.1/load": [3.0, 4.0, 5.0],
        "stats/repeats.ffn.0/z": 5.0,
        "stats/repeats.ffn.1/z": 7.0,
        "stats/head/load": [0.0, 1.0],
        "stats/head/z": 9.0,
        "stats/z": 7.0,
    }


def test_scanned_and_unrolled_models_log_equally_shaped_stats():
    batch = device(next(TinyText({"batch_size": 2}, "train")))
    inputs, ctx = NextToken().inputs(batch, jnp.int32(0), train=False)
    lines = []
    for scan in (False, True):
        model = TinyLM(layers=2, scan=scan)
        stats = jax.eval_shape(
            lambda m=model: m.init(jax.random.key(0), inputs, ctx, mutable=["params", "router_state", "stats"])
        )["stats"]
        lines.append(expand(flatten(jax.tree.map(lambda s: np.ones(s.shape), stats), "stats")))
    unrolled, scanned = ({k: v.shape for k, v in line.items()} for line in lines)
    assert scanned == {k.replace("layer_", "repeats.ffn."): v for k, v in unrolled.items()}
    assert scanned["stats/repeats.ffn.1/load"] == (3,)


def test_the_log_drops_what_lies_past_the_step_it_goes_on_from(tmp_path):
    log = MetricLog(tmp_path, 0)
    for step in (2, 4, 6):
        log.write(step, {"train/loss": 1 / step, "stats/load": [0.1, 0.2]})
    log.close()
    whole = (tmp_path / "metrics.jsonl").read_bytes()
    with (tmp_path / "metrics.jsonl").open("a") as stream:
        stream.write('{"step": 8, "train/lo')  # a process killed while writing
    log = MetricLog(tmp_path, 4)
    assert [line["step"] for line in log.history()] == [2, 4]
    log.write(6, {"train/loss": 1 / 6, "stats/load": [0.1, 0.2]})
    log.close()
    assert (tmp_path / "metrics.jsonl").read_bytes() == whole
    assert read_lines(tmp_path / "metrics.jsonl")[0] == {"step": 2, "train/loss": 0.5, "stats/load": [0.1, 0.2]}
    assert list(tmp_path.glob("events.out.tfevents.*"))
    json.loads((tmp_path / "metrics.jsonl").read_text().splitlines()[0])


def test_a_clock_that_jumps_stops_nothing(tmp_path, monkeypatch):
    """As far back as no thread can wait, and forth again: every line is in the files, and TensorBoard's too."""
    clock = itertools.cycle([4e9, 0.0, 1e9])
    monkeypatch.setattr(time, "time", lambda: next(clock))
    log = MetricLog(tmp_path, 0)
    for step in range(1, 101):
        log.write(step, {"train/loss": 1 / step, "stats/load": [0.1, 0.2]})
    log.close()
    assert [line["step"] for line in log.history()] == list(range(1, 101))
    (file,) = tmp_path.glob("events.out.tfevents.*")
    assert [event.step for event in events(file) if event.summary.value] == [step for step in range(1, 101) for _ in "ab"]


def events(file):
    """TensorFlow's record format: length (8 bytes), its checksum (4), the event, its checksum (4)."""
    data, place = file.read_bytes(), 0
    while place < len(data):
        size = int.from_bytes(data[place : place + 8], "little")
        yield event_pb2.Event.FromString(data[place + 12 : place + 12 + size])
        place += 16 + size


def test_events_hide_what_an_earlier_process_wrote_past_the_checkpoint(tmp_path):
    Events(tmp_path, 6).close()
    (file,) = tmp_path.glob("events.out.tfevents.*")
    first, second = events(file)
    assert first.file_version == "brain.Event:2"
    assert (second.step, second.session_log.status) == (7, event_pb2.SessionLog.START)


def test_events_that_cannot_be_written_are_left_out_with_a_word(tmp_path, monkeypatch):
    def full(self, *args):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    log = MetricLog(tmp_path, 0)
    monkeypatch.setattr("tensorboardX.record_writer.RecordWriter.write", full)
    with pytest.warns(UserWarning, match="TensorBoard events are left out from here on .*No space left"):
        log.write(1, {"train/loss": 1.0})
    log.write(2, {"train/loss": 0.5})
    log.close()
    assert len(read_lines(tmp_path / "metrics.jsonl")) == 2


def test_events_do_without_pytorch_and_leave_it_importable(tmp_path):
    """The library that writes them would import it, for seconds."""
    (tmp_path / "torch.py").write_text("")
    code = "import sys, moejax.train.events; assert 'torch' not in sys.modules; import torch"
    path = os.pathsep.join([str(tmp_path), *filter(None, sys.path)])
    subprocess.run([sys.executable, "-c", code], check=True, env={**os.environ, "PYTHONPATH": path})
