"""What lies in tokens that nobody is to see, and in weights of unused entries, is inert in value and gradient, on every local backend."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moejax import FFN
from moejax.dispatch import dispatch
from moejax.routing.plan import ExpertPlan, SlotPlan, TokenPlan

N, D, E, K = 6, 4, 3, 2
UNSEEN = [1, 4]
LOCAL = {
    "token": ["reference", "einsum", "capacity", "grouped", "gather", "auto"],
    "expert": ["reference", "einsum", "capacity", "grouped", "gather", "auto"],
    "slot": ["reference", "einsum", "auto"],
}


def make(kind, weight, fill):
    """A plan of weights [..] in which tokens 1 and 4 have no part; unused entries weigh `fill`."""
    if kind == "token":
        expert = jnp.array([[0, 1], [2, 0], [1, 2], [0, 2], [1, 1], [2, 1]])[None]
        used = jnp.ones((1, N, K), bool).at[0, jnp.array(UNSEEN)].set(False).at[0, 5, 1].set(False)
        return TokenPlan(expert, jnp.where(used, weight, fill), used, jnp.zeros_like(used), num_experts=E)
    if kind == "expert":
        token = jnp.array([[0, 2, 1], [3, 5, 4], [2, 0, 1]])[None]
        used = jnp.broadcast_to(jnp.array([True, True, False]), (1, E, 3))
        return ExpertPlan(token, jnp.where(used, weight[:, :3].repeat(2, -1)[..., :3], fill), used, num_tokens=N)
    slots = (weight[:, :, None] + jnp.arange(E)[:, None]).at[0, jnp.array(UNSEEN)].set(0.0)
    return SlotPlan(slots, slots)


@pytest.mark.parametrize("kind", LOCAL)
@pytest.mark.parametrize("junk", [np.nan, np.inf])
def test_junk_is_inert(rng, kind, junk):
    x = jnp.asarray(rng.normal(size=(1, N, D)), jnp.float32)
    weight = jnp.asarray(rng.uniform(0.5, 1, (1, N, K)), jnp.float32)
    bank = FFN(hidden=5, num_experts=E)
    params = bank.init(jax.random.key(0), D)["params"]
    unseen = jnp.array(UNSEEN)
    dirty = x.at[0, unseen].set(junk)

    def run(params, x, weight, fill, backend):
        y = dispatch(make(kind, weight, fill), bank.apply({"params": params}, D), x, backend)
        return jnp.sin(y).sum(), y

    for backend in LOCAL[kind]:
        step = jax.jit(jax.value_and_grad(lambda *a, b=backend: run(*a, b), argnums=(0, 1, 2), has_aux=True))
        (_, y), grads = step(params, dirty, weight, jnp.float32(0.0 if kind == "slot" else junk))
        (_, wanted), right = step(params, x.at[0, unseen].set(0.0), weight, jnp.float32(0))
        np.testing.assert_allclose(y, wanted, atol=1e-6, err_msg=backend)
        np.testing.assert_array_equal(y[0, unseen], 0)
        jax.tree.map(lambda a, b, n=backend: np.testing.assert_allclose(a, b, atol=1e-6, err_msg=n), grads, right)


def test_what_an_expert_makes_of_tokens_of_others_counts_nothing():
    """Expert 1 overflows on a token that is not its own."""
    x = jnp.array([[[1.0, 1.0], [1e4, 1e4]]])
    params = {"w_in": jnp.stack([jnp.eye(2), 1e36 * jnp.eye(2)]), "w_out": jnp.stack([jnp.eye(2)] * 2)}
    bank = FFN(hidden=2, num_experts=2, activation="identity")
    plan = TokenPlan(
        jnp.array([[[1], [0]]]), jnp.ones((1, 2, 1)), jnp.ones((1, 2, 1), bool), jnp.zeros((1, 2, 1), bool), num_experts=2
    )
    for backend in LOCAL["token"]:
        y = dispatch(plan, bank.apply({"params": params}, 2), x, backend)
        np.testing.assert_allclose(y, [[[1e36, 1e36], [1e4, 1e4]]], rtol=1e-6, err_msg=backend)
