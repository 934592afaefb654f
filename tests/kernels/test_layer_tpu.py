"""A whole mixture layer through the real TPU compiler: which kernels a training step runs."""

import collections
import re
from typing import Any

import jax
import jax.numpy as jnp
import pytest
from kernels.tpu import compile_for, custom_calls

from moejax.core.context import Context
from moejax.experts import GLU
from moejax.layers import MoE
from moejax.routing import Balance, Linear, TopK, ZLoss

D, F, E, K = 512, 1024, 16, 2


def layer() -> MoE:
    return MoE(Linear(E), TopK(k=K), GLU(hidden=F, num_experts=E), losses=(Balance(0.01), ZLoss(1e-3)), backend="grouped")


def step(params: Any, x: jax.Array) -> Any:
    """Loss and gradients of the parameters and of x."""

    def loss(params: Any, x: jax.Array) -> jax.Array:
        y, sown = layer().apply({"params": params}, x, Context(train=True), mutable=["losses"])
        return jnp.square(y.astype(jnp.float32)).mean() + sum(jnp.sum(v) for v in jax.tree.leaves(sown["losses"]))

    return jax.value_and_grad(loss, argnums=(0, 1))(params, x)


@pytest.mark.slow
@pytest.mark.tpu_aot
class TestTrainStep:
    @pytest.fixture(scope="class")
    def compiled(self) -> jax.stages.Compiled:
        x = jax.ShapeDtypeStruct((4, 1024, D), jnp.bfloat16)
        params = jax.eval_shape(layer().init, jax.random.key(0), x)["params"]
        return compile_for("v5e", step, params, x)

    def test_experts_run_in_six_kernels(self, compiled: jax.stages.Compiled) -> None:
        """The gated unit in three, the product with W_out in three; nothing falls back to dense products over all experts."""
        calls = collections.Counter(custom_calls(compiled))
        expected = {
            "grouped_glu_saving": 1,
            "grouped_glu_dx": 1,
            "grouped_glu_dw": 1,
            "grouped_matmul": 2,
            "grouped_matmul_dw": 1,
        }
        assert {name: calls[name] for name in calls if name.startswith("grouped")} == expected

    def test_no_matrix_product_of_experts_is_left_to_xla(self, compiled: jax.stages.Compiled) -> None:
        for line in compiled.as_text().splitlines():
            if re.search(r" (dot|convolution)\(", line):
                assert not re.search(rf"\[{E},\d+,{F}\]|\[\d+,{F}\]", line), line

    def test_flops_are_those_of_the_active_experts(self, compiled: jax.stages.Compiled) -> None:
        """The kernels tell XLA what they cost; three products, forward and twice backward."""
        active = 3 * 3 * 2 * 4 * 1024 * K * D * F
        assert compiled.cost_analysis()["flops"] == pytest.approx(active, rel=0.1)
