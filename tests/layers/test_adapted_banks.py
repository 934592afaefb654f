"""Adapters around banks of experts, whose parameters are stacked."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from adapted_models import B, D, E, S, around
from numpy_layers import close, compiled, draw

from moejax import Adapted, ConfigError, LoRA, MergePlan, TopK
from moejax.dispatch import dispatch
from moejax.experts import FFN, GLU
from moejax.parallel import Parallel, make_mesh, use


class Routed(nn.Module):
    """A bank under a plan."""

    bank: nn.Module
    backend: str
    merged: bool = False

    @nn.compact
    def __call__(self, x: jax.Array, logits: jax.Array) -> jax.Array:
        plan = MergePlan(jax.nn.softmax(logits.mean(1))) if self.merged else TopK(k=2)(logits)
        return dispatch(plan, self.bank(x.shape[-1]), x, self.backend)


@functools.cache
def value_and_grads(model: nn.Module):
    def run(params, x, logits):
        return jnp.sin(model.apply({"params": params}, x, logits)).sum()

    return jax.jit(jax.value_and_grad(run, argnums=(0, 1)))


class TestBanks:
    ADAPTER = LoRA(rank=3, scale=2.0, ranks=(3, 1, 0, 2), targets=("bank/w_*",))

    def effective(self, params) -> dict:
        """The bank's matrices with each expert's low-rank product, of its own rank, multiplied out in NumPy."""
        bank = dict(params["bank"])
        for name, factors in bank.pop("adapter_main").items():
            a, b = (np.asarray(factors[key], np.float64) for key in "ab")
            added = [2.0 * a[e, :, :r] @ b[e, :r] for e, r in enumerate(self.ADAPTER.ranks)]
            bank[name] = jnp.asarray(np.asarray(bank[name], np.float64) + added, jnp.float32)
        return {"bank": bank}

    def expected(self, model: Adapted, params, x: jax.Array, logits: jax.Array) -> tuple:
        """Value and gradient of the oracle, on matrices multiplied out."""
        plain = Routed(model.bank, "reference", model.merged)
        return value_and_grads(plain)(self.effective(params), x, logits)

    @pytest.mark.parametrize("backend", ["reference", "einsum", "capacity", "grouped", "gather", "merged"])
    @pytest.mark.parametrize(
        "bank", [GLU(hidden=6, num_experts=E), FFN(hidden=6, num_experts=E, use_bias=True)], ids=["glu", "ffn"]
    )
    def test_every_backend_computes_the_adapted_matrices(self, bank, backend: str) -> None:
        rng = np.random.default_rng(0)
        x, logits = (jnp.asarray(rng.normal(size=(B, S, n)), jnp.float32) for n in (D, E))
        model = around(Routed(bank, backend, backend == "merged"), self.ADAPTER)
        params = draw(model, x, logits)["params"]
        value, (dp, dx) = value_and_grads(model)(params, x, logits)
        value_, (dp_, dx_) = self.expected(model, params, x, logits)
        np.testing.assert_allclose(value, value_, rtol=1e-4)
        close(dx, dx_, 1e-3, 1e-4)
        for name, factors in dp["bank"].pop("adapter_main").items():
            a, b = (np.asarray(params["bank"]["adapter_main"][name][key], np.float64) for key in "ab")
            dw = 2.0 * np.asarray(dp_["bank"][name], np.float64)
            mask = np.arange(3) < np.array(self.ADAPTER.ranks)[:, None]
            np.testing.assert_allclose(factors["a"], dw @ b.swapaxes(1, 2) * mask[:, None], rtol=1e-3, atol=1e-3)
            np.testing.assert_allclose(factors["b"], (a * mask[:, None]).swapaxes(1, 2) @ dw, rtol=1e-3, atol=1e-3)
        close(dp, dp_, 1e-3, 1e-4)

    @pytest.mark.slow
    @pytest.mark.parametrize("mesh", ["expert=4,data=2", "expert=2,tensor=2,data=2"])
    @pytest.mark.parametrize("merged", [False, True], ids=["top_2", "merged"])
    def test_so_do_eight_devices(self, mesh: str, merged: bool) -> None:
        rng = np.random.default_rng(0)
        x, logits = (jnp.asarray(rng.normal(size=(8, S, n)), jnp.float32) for n in (D, E))
        model = around(Routed(GLU(hidden=6, num_experts=E), "auto", merged), self.ADAPTER)
        params = draw(model, x, logits)["params"]
        value, (dp, dx) = self.expected(model, params, x, logits)
        with use(Parallel(make_mesh(mesh))):
            value_, (dp_, dx_) = value_and_grads.__wrapped__(model)(params, x, logits)
        np.testing.assert_allclose(value_, value, rtol=1e-4)
        close(dx_, dx, 1e-3, 1e-3)
        del dp_["bank"]["adapter_main"]
        close(dp_, dp, 1e-3, 1e-3)

    def test_a_wrapped_bank_keeps_its_adapter(self, rng: np.random.Generator) -> None:
        x = jnp.asarray(rng.normal(size=(B, S, D)), jnp.float32)
        weight = jax.nn.softmax(jnp.asarray(rng.normal(size=(B, E)), jnp.float32))

        class Wrapped(nn.Module):
            @nn.compact
            def __call__(self, x: jax.Array) -> jax.Array:
                experts = GLU(hidden=6, num_experts=E, name="bank")(x.shape[-1]).wrap(before=jnp.tanh, after=jnp.sin)
                return dispatch(MergePlan(weight), experts, x)

        model = around(Wrapped(), self.ADAPTER)
        params = draw(model, x)["params"]
        close(compiled(model)({"params": params}, x), compiled(Wrapped())({"params": self.effective(params)}, x), 1e-4)

    def test_ranks_by_projection_and_by_expert(self) -> None:
        x, logits = jnp.zeros((B, S, D)), jnp.zeros((B, S, E))
        layer = Routed(GLU(hidden=6, num_experts=E), "auto")

        def shapes(**fields) -> dict:
            return jax.eval_shape(around(layer, **fields).init, jax.random.key(0), x, logits)["params"]["bank"]["adapter_main"]

        found = shapes(rank={"*/w_out": 1, "*": 4})
        assert {name: factors["a"].shape for name, factors in found.items()} == {
            "w_gate": (E, D, 4), "w_up": (E, D, 4), "w_out": (E, 6, 1)
        }  # fmt: skip
        with pytest.raises(ConfigError, match="gives no rank for bank/w_gate"):
            shapes(rank={"*/w_out": 1})
        with pytest.raises(ConfigError, match="must be 4 numbers from 0 to rank=2"):
            shapes(ranks=(3, 1, 1, 1))
        with pytest.raises(ConfigError, match="nor sit on a table or a bank"):
            shapes(num_experts=2)
