"""The bench of the GPU at hand, on a CPU: what it calls right and wrong, and that its layer and its training step run."""

import jax.numpy as jnp
import pytest

from experiments.bench import gpu
from experiments.bench.table import BACKWARD, FORWARD
from pallas_kernels.rank_one import IMPLEMENTATIONS


def test_a_right_kernel_is_ok_and_a_wrong_one_and_one_that_fails_are_told(monkeypatch: pytest.MonkeyPatch) -> None:
    right = gpu.kernels
    monkeypatch.setattr(gpu, "kernels", lambda *args: {name: right(*args)[name] for name in ("permute", "rank_one")})
    assert all(" ok " in line for line in gpu.values("xla", sizes=(1,)))
    wrong = IMPLEMENTATIONS["xla"]
    monkeypatch.setitem(IMPLEMENTATIONS, "xla", lambda *args: 1.1 * wrong(*args))
    lines = gpu.values("xla", sizes=(1,))
    assert [("WRONG" in line) for line in lines] == ["rank_one" in line for line in lines]
    monkeypatch.setitem(IMPLEMENTATIONS, "xla", lambda *args: jnp.zeros(3).reshape(2))
    assert sum("FAILED" in line for line in gpu.values("xla", sizes=(1,))) == 2


def test_layer_and_training_step_run_at_any_size() -> None:
    [layer] = gpu.layers(3, {"tiny": gpu.Size(n=16, d=8, f=4, e=4, k=2)})
    assert set(layer.timings) == {FORWARD, BACKWARD}
    assert set(layer.timings[FORWARD]) == {"dense", "grouped", "capacity at 1.25"}
    [step] = gpu.train(3, rows=1, length=8, width=64, layers=1, vocabulary=64)
    assert set(step.timings[gpu.STEP]) == {"dense", "mixture"}
    # 2 of 16 experts of half the width: the dense layer's FLOPs, and the router's.
    flops = [step.timings[gpu.STEP][name].flops for name in ("dense", "mixture")]
    assert flops[0] < flops[1] < 1.1 * flops[0]
