"""Experts behind a sigmoid gate, on rows one after the other."""

import jax
import numpy as np
import pytest

import moejax as mj
from moejax.core.errors import ConfigError


def test_each_row_and_expert_has_its_gate(rng: np.random.Generator, key: jax.Array) -> None:
    layer = mj.MoE(
        mj.Linear(2),
        mj.TopK(k=1),
        mj.FFN(hidden=4, num_experts=2),
        shared=mj.SigmoidGate(mj.GLU(hidden=3)),
        backend="reference",
    )
    x = rng.normal(size=(1, 5, 6)).astype(np.float32)
    variables = layer.init(key, x)
    without = mj.MoE(mj.Linear(2), mj.TopK(k=1), mj.FFN(hidden=4, num_experts=2), backend="reference")
    shared = variables["params"]["shared"]
    rest = {name: tree for name, tree in variables["params"].items() if name != "shared"}
    added = np.asarray(layer.apply(variables, x)) - np.asarray(without.apply({"params": rest}, x))
    p = {name: np.asarray(w[0], np.float64) for name, w in shared["bank"].items()}
    for row, y in zip(x[0].astype(np.float64), added[0], strict=True):
        hidden = row @ p["w_gate"]
        dense = (hidden / (1 + np.exp(-hidden)) * (row @ p["w_up"])) @ p["w_out"]
        np.testing.assert_allclose(y, dense / (1 + np.exp(-row @ np.asarray(shared["gate"])[0, :, 0])), rtol=1e-4, atol=1e-5)


def test_experts_of_several_kinds_are_refused(key: jax.Array) -> None:
    bank = mj.SigmoidGate(mj.Mixed((mj.FFN(hidden=4), mj.GLU(hidden=4))))
    with pytest.raises(ConfigError, match=r"sigmoid_gate.bank=Mixed holds experts of several kinds"):
        bank.init(key, 6)
