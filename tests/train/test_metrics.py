"""Names of what models sow, and the log that survives being cut off."""

import json

import jax
import jax.numpy as jnp
import numpy as np
from training_harness import TinyLM, TinyText, device

from moejax.tasks.next_token import NextToken
from moejax.train.metrics import MetricLog, expand, flatten, numbers, read_lines


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
