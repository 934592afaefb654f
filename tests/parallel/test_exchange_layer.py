"""The MoE layer on a mesh: inside scanned and rematerialised stacks, in bfloat16, in training and evaluation, like on one device."""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moejax.aot.hlo import collectives
from moejax.core.context import Context
from moejax.dispatch import BACKENDS
from moejax.experts import FFN
from moejax.layers import MoE
from moejax.parallel import Exchange, Parallel, make_mesh, use
from moejax.routing import ExpertChoice, Linear, TopK
from moejax.routing.losses.balance import Balance
from moejax.routing.losses.z import ZLoss

B, S, D, E = 8, 6, 8, 8
VALID = jnp.arange(S)[None] < jnp.array([S, 3, 0, 5, S, 1, S, 2])[:, None]
SAVED = jax.checkpoint_policies.save_only_these_names("exchanged")


def layer(select: Any = TopK(k=2, normalise=True), bank: Any = None, **fields: Any) -> MoE:  # noqa: B008
    bank = bank or FFN(hidden=8, num_experts=E)
    return MoE(Linear(E), select, bank, losses=(Balance(0.01), ZLoss(1e-3)), **fields)


class Stack(nn.Module):
    """Two scanned, rematerialised layers."""

    backend: str = "auto"

    @nn.compact
    def __call__(self, x: jax.Array, ctx: Context) -> jax.Array:
        def body(moe: MoE, x: jax.Array, ctx: Context) -> tuple[jax.Array, None]:
            return x + moe(x, ctx), None

        axes = {"params": 0, "stats": 0, "losses": 0}
        scan = nn.scan(nn.remat(body), axes, split_rngs={"params": True}, length=2, in_axes=nn.broadcast)
        return scan(layer(backend=self.backend).copy(name="moe", parent=self), x, ctx)[0]


def tokens(seed: int = 0) -> jax.Array:
    return jax.random.normal(jax.random.key(seed), (B, S, D))


def params_of(module: nn.Module, x: jax.Array) -> Any:
    return jax.jit(lambda key: module.init(key, x, Context())["params"])(jax.random.key(0))


def run(module: nn.Module, variables: Any, x: jax.Array, parallel: Parallel | None, **ctx: Any) -> Any:
    """Output, what was sown, and the gradients of all of it."""

    def loss(variables: Any, x: jax.Array) -> tuple[jax.Array, Any]:
        y, sown = module.apply(variables, x, Context(valid=VALID, **ctx), mutable=["losses", "stats"])
        return jnp.sin(y.astype(jnp.float32)).sum() + sum(jnp.sum(leaf) for leaf in jax.tree.leaves(sown["losses"])), (y, sown)

    with use(parallel):
        (_, (y, sown)), gradients = jax.jit(jax.value_and_grad(loss, argnums=(0, 1), has_aux=True))(variables, x)
    return y, sown, gradients


def close(actual: Any, expected: Any, tolerance: float = 1e-5) -> None:
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(
            np.asarray(a, np.float32), np.asarray(b, np.float32), rtol=10 * tolerance, atol=tolerance
        ),
        actual,
        expected,
    )


def ran(sown: Any) -> set[str]:
    """Takes the names of the backends out of the statistics."""
    indices = [leaf for path, leaf in jax.tree_util.tree_leaves_with_path(sown) if path[-1].key == "backend"]
    return {list(BACKENDS)[i] for i in np.ravel(indices)}


def without_backend(sown: Any) -> Any:
    return jax.tree_util.tree_map_with_path(lambda path, leaf: 0 if path[-1].key == "backend" else leaf, sown)


MESH = Parallel(make_mesh("fsdp=2,expert=2,tensor=2"))


@pytest.mark.slow
def test_a_scanned_and_rematerialised_stack() -> None:
    stack, x = Stack(), tokens()
    params = params_of(Stack("reference"), x)
    with use(MESH):
        close(params_of(stack, x), params, 1e-7)
    expected = run(Stack("reference"), {"params": params}, x, None, train=True)
    actual = run(stack, {"params": params}, x, MESH, train=True)
    assert ran(actual[1]) == {"expert_parallel"}
    close(*({0: y, 1: without_backend(sown), 2: gradients} for y, sown, gradients in (actual, expected)))


def test_bfloat16_tokens_on_float32_parameters() -> None:
    moe, x = layer(), tokens(1)
    params = params_of(layer(backend="reference", bank=moe.bank), x)
    expected, _, wanted = run(layer(backend="reference"), {"params": params}, x, None)
    y, _, (gradients, dx) = run(moe, {"params": params}, x.astype(jnp.bfloat16), MESH)
    assert y.dtype == dx.dtype == jnp.bfloat16
    assert {a.dtype for a in jax.tree.leaves(gradients)} == {jnp.dtype(jnp.float32)}
    close(y, expected, 0.03)
    close(gradients["params"]["bank"], wanted[0]["params"]["bank"], 0.05)


@pytest.mark.parametrize(
    "select", [TopK(k=2, capacity_factor=0.75), ExpertChoice(capacity_factor=1.0)], ids=["token_choice", "expert_choice"]
)
def test_tokens_that_compete_across_sequences(select: Any) -> None:
    """Groups of one position each lie across the devices that the batch is split over."""
    moe, x = layer(select, group_by="position"), tokens(2)
    params = {"params": params_of(layer(backend="reference"), x)}
    expected = run(layer(select, group_by="position", backend="reference"), params, x, None)
    actual = run(moe, params, x, MESH)
    assert ran(actual[1]) == {"expert_parallel"}
    close(*({0: y, 1: without_backend(sown), 2: gradients} for y, sown, gradients in (actual, expected)))


def test_what_a_bound_drops_is_in_the_statistics() -> None:
    moe, x = layer(), tokens(3)
    params = {"params": params_of(layer(backend="reference"), x)}
    bounded = Parallel(make_mesh("expert=8"), Exchange("padded", bound=0.5))
    for parallel, drops in ((None, False), (bounded, True)):
        with use(parallel):
            _, state = jax.jit(lambda p: moe.apply(p, x, Context(valid=VALID), mutable=["stats"]))(params)
        assert (state["stats"]["drop_rate"] > 0.05) == drops


def test_dropout_is_drawn_anew_for_every_row_of_every_device() -> None:
    bank = FFN(D, num_experts=E, activation="identity", dropout=0.5)
    moe, x = layer(TopK(k=1, normalise=True, constant_gate=True), bank), jnp.ones((B, S, D))
    params = params_of(layer(backend="reference", bank=moe.bank), x)
    eye = jnp.broadcast_to(jnp.eye(D), (E, D, D))
    params = {**params, "bank": {"w_in": eye, "w_out": eye}}
    with use(MESH):
        apply = jax.jit(lambda key: moe.apply({"params": params}, x, Context(train=True), rngs={"dropout": key}))
        y, other = (np.asarray(apply(jax.random.key(i))).reshape(-1, D) for i in range(2))
    assert set(np.unique(y.round(5))) == {0.0, 2.0}
    assert 0.4 < (y > 0).mean() < 0.6
    assert (y != other).any()
    assert len(np.unique(y, axis=0)) > 35  # of 48 rows with 256 patterns: 44 on average
    # All tokens chose one expert, whose hidden layer is in two pieces, each with a pattern of its own.
    assert (y[:, : D // 2] != y[:, D // 2 :]).any()


@pytest.mark.slow
def test_saved_exchanges_are_not_repeated_by_rematerialisation() -> None:
    x = tokens(4)
    params = {"params": params_of(layer(backend="reference"), x)}
    parallel = Parallel(make_mesh("expert=8"), Exchange("padded"))

    def exchanges(policy: Any) -> int:
        call = jax.checkpoint(lambda p, x: layer().apply(p, x), policy=policy)
        with use(parallel):
            step = jax.jit(jax.grad(lambda p, x: jnp.sin(call(p, x)).sum(), argnums=(0, 1)))
            text = step.lower(params, x).compile().as_text()
        return sum(c.kind == "all-to-all" for c in collectives(text, parallel.mesh))

    assert exchanges(SAVED) == 6  # tokens and choices there, outputs back, and the same in the backward pass
    assert exchanges(None) > 6
