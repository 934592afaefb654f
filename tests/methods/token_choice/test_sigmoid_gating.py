"""Sigmoid gates beside a shared expert (Nguyen et al. 2025): each gate by itself, and how much of an early choice stays."""

import jax
import jax.numpy as jnp
import numpy as np

import moejax as mj

E, K, D, F = 5, 2, 6, 4


def layer(normalise: bool) -> mj.MoE:
    shared = mj.FFN(hidden=F, num_experts=1, activation="relu")
    bank = mj.FFN(hidden=F, num_experts=E, activation="relu")
    return mj.MoE(mj.Linear(E, init_w=mj.FanIn(2.0)), mj.TopK(k=K, score="sigmoid", normalise=normalise), bank, shared=shared)


def numpy_layer(params: dict, x: np.ndarray, normalise: bool) -> np.ndarray:
    p = jax.tree.map(lambda a: np.asarray(a, np.float64), params)

    def expert(bank: str, i: int, token: np.ndarray) -> np.ndarray:
        return np.maximum(token @ p[bank]["w_in"][i], 0) @ p[bank]["w_out"][i]

    y = np.zeros_like(x)
    for at in np.ndindex(x.shape[:2]):
        gates = 1 / (1 + np.exp(-x[at] @ p["router"]["w"]))
        chosen = np.argsort(-gates, kind="stable")[:K]
        total = gates[chosen].sum() if normalise else 1.0
        y[at] = expert("shared", 0, x[at]) + sum(gates[i] / total * expert("bank", i, x[at]) for i in chosen)
    return y


def test_values_are_numpys_and_gates_do_not_compete() -> None:
    x = jax.random.normal(jax.random.key(1), (2, 7, D))
    for normalise in (False, True):
        moe = layer(normalise)
        variables = {"params": jax.jit(moe.init)(jax.random.key(0), x)["params"]}
        np.testing.assert_allclose(
            jax.jit(moe.apply)(variables, x),
            numpy_layer(variables["params"], np.asarray(x, np.float64), normalise),
            rtol=1e-4,
            atol=1e-5,
        )
        slope = jax.jit(jax.grad(lambda v, x, moe=moe: jnp.sin(moe.apply(v, x)).sum()))
        assert np.isfinite(slope(variables, x)["params"]["router"]["w"]).all()
        # One token: an expert that it does not take gets no gradient, as under a softmax over all experts it would.
        one = slope(variables, x[:1, :1])["params"]["router"]["w"]
        assert (np.abs(np.asarray(one)).max(0) > 0).sum() == K
