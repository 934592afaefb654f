"""Initialisers: their statistics, how a stack of experts starts, and that configs reach them everywhere."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moejax.core.context import Context
from moejax.core.errors import ConfigError
from moejax.core.initializers import DenseMatched, FanIn, Normal, Orthogonal, Same, Uniform, Zeros, initializers
from moejax.core.params import per_expert
from moejax.experts.registry import banks
from moejax.layers.registry import ffns, mixers
from moejax.routing.routers.base import routers

E, D, F = 5, 48, 32
KEY = jax.random.key(0)
STD = {
    "fan_in": (FanIn(2.0), np.sqrt(2 / D)),
    "normal": (Normal(0.3), 0.3),
    "uniform": (Uniform(0.6), 0.6 / np.sqrt(3)),
    "orthogonal": (Orthogonal(0.5), 0.5 / np.sqrt(D)),
    "zeros": (Zeros(), 0.0),
    "dense_matched": (DenseMatched("expert", 3), np.sqrt(2 / (D * 3))),
    "same": (Same(Normal(0.2)), 0.2),
}


@pytest.mark.parametrize("kind", initializers.kinds())
def test_the_spread_is_what_it_says(kind: str) -> None:
    init, std = STD[kind]
    for values in (init(KEY, (D, F)), per_expert(init)(KEY, (E, D, F))):
        np.testing.assert_allclose(values.std(), std, rtol=0.06)
        np.testing.assert_allclose(values.mean(), 0, atol=0.1 * std + 1e-9)


def test_orthogonal_columns_have_one_length() -> None:
    w = np.asarray(Orthogonal(0.1)(KEY, (D, 4)))
    np.testing.assert_allclose(w.T @ w, 0.01 * np.eye(4), atol=1e-6)


def test_a_stack_may_start_alike_or_by_the_width_of_all() -> None:
    same = per_expert(Same(Normal(0.2)))(KEY, (E, D, F))
    assert (same == same[:1]).all()
    together = per_expert(DenseMatched("all", 2))(KEY, (E, D, F))
    np.testing.assert_allclose(together.std(), np.sqrt(2 / (E * D * 2)), rtol=0.05)
    assert len(np.unique(np.asarray(together).round(6))) > 0.9 * E * D * F  # no two alike


@pytest.mark.parametrize(
    ("registry", "spec", "args", "leaf"),
    [
        (banks, {"kind": "ffn", "hidden": F, "init_out": {"kind": "zeros"}}, (D,), "w_out"),
        (banks, {"kind": "glu", "hidden": F, "init_in": {"kind": "zeros"}}, (D,), "w_up"),
        (banks, {"kind": "low_rank", "rank": 2, "features": 3, "init_a": {"kind": "zeros"}}, (D,), "a"),
        (banks, {"kind": "residual", "hidden": F, "init_in": {"kind": "zeros"}}, (D,), "w_in_0"),
        (banks, {"kind": "constant", "init_v": {"kind": "zeros"}}, (D,), "v"),
        (ffns, {"kind": "ffn", "hidden": F, "init_in": {"kind": "zeros"}}, (jnp.ones((1, 2, D)),), "w_in"),
        (routers, {"kind": "linear", "num_experts": 3, "init_w": {"kind": "zeros"}}, (jnp.ones((1, 2, D)), None), "w"),
        (mixers, {"kind": "attention", "num_heads": 2, "init_qkv": {"kind": "zeros"}}, (jnp.ones((1, 2, D)), None), "kernel"),
    ],
)  # fmt: skip
def test_a_config_says_how_parameters_start(registry, spec, args, leaf: str) -> None:
    args = [Context() if a is None else a for a in args]
    module, plain = registry.build(spec, "part"), registry.build({k: v for k, v in spec.items() if k[:5] != "init_"}, "part")
    started, usual = (jax.jit(lambda key, m=m: m.init(key, *args))(KEY)["params"] for m in (module, plain))
    names = [path[-1].key for path, _ in jax.tree_util.tree_leaves_with_path(started)]
    assert leaf in names
    changed = [not np.array_equal(a, b) for a, b in zip(jax.tree.leaves(started), jax.tree.leaves(usual), strict=True)]
    zero = [not np.any(a) for a in jax.tree.leaves(started)]
    assert any(z and c and name == leaf for name, z, c in zip(names, zero, changed, strict=True))
    assert all(z for z, c in zip(zero, changed, strict=True) if c)


def test_bad_settings_raise() -> None:
    with pytest.raises(ConfigError, match="fan_in='alll'"):
        DenseMatched("alll")
    with pytest.raises(ConfigError, match="distribution='gauss'"):
        FanIn(distribution="gauss")
    with pytest.raises(ConfigError, match=r"unknown initializer kind 'normall' in bank\.init_in\.kind; did you mean 'normal'"):
        banks.build({"kind": "ffn", "hidden": 2, "init_in": {"kind": "normall"}}, "bank")
