"""Padding and capacity: padded and compact inputs give equal values, losses, stats and gradients.

Without capacity, and for every other rule and layer, this is a property of the battery.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from numpy_layers import close, draw

from moejax import GLU, Balance, Context, Importance, Linear, MoE, TopK, ZLoss
from moejax.routing.select import Select

B, S, D, E = 2, 9, 5, 4
WHERE = [1, 2, 4, 5, 8]  # the tokens among the padding
LOSSES = (Balance(0.5), Balance(0.5, over="batch"), Importance(0.5), ZLoss(0.5))

RULES: dict[str, tuple[Select, str]] = {
    "choice_over_the_batch": (TopK(k=2, capacity_factor=0.7, priority="choice"), "batch"),
    "score": (TopK(k=2, score="sigmoid", capacity_factor=0.7, priority="score"), "sequence"),
}


@pytest.mark.parametrize("name", RULES)
def test_padded_equals_compact(rng: np.random.Generator, name: str) -> None:
    rule, group_by = RULES[name]
    # The reference backend compiles fastest; that backends agree on masked plans is tested with them.
    layer = MoE(Linear(E), rule, GLU(3, num_experts=E), losses=LOSSES, group_by=group_by, backend="reference")
    compact = jnp.asarray(rng.normal(size=(B, len(WHERE), D)), jnp.float32)
    padded = jnp.full((B, S, D), jnp.nan).at[0].set(jnp.inf).at[:, jnp.array(WHERE)].set(compact)
    valid = jnp.broadcast_to(jnp.isin(jnp.arange(S), jnp.array(WHERE)), (B, S))
    variables = draw(layer, compact)

    def run(variables, x, ctx):
        y, sown = layer.apply(variables, x, ctx, mutable=["losses", "stats"])
        return jnp.sin(y).sum() + sum(jax.tree.leaves(sown["losses"])), (y, sown)

    step = jax.jit(jax.value_and_grad(run, argnums=(0, 1), has_aux=True))
    (_, (y, sown)), (grads, dx) = step(variables, compact, Context())
    (_, (padded_y, padded_sown)), (padded_grads, padded_dx) = step(variables, padded, Context(valid=valid))
    close(padded_sown, sown)
    close(padded_grads, grads)
    close([padded_y[:, WHERE], padded_dx[:, WHERE]], [y, dx])
    junk = np.setdiff1d(np.arange(S), WHERE)
    np.testing.assert_array_equal(padded_y[:, junk], 0)
    np.testing.assert_array_equal(padded_dx[:, junk], 0)


def test_the_same_loss_class_twice_is_summed_under_one_name() -> None:
    """The two balance losses above are one entry: what is sown is what is added to the objective, neither is lost."""
    x = jnp.asarray(np.random.default_rng(0).normal(size=(1, 4, D)), jnp.float32)
    both, one = (
        MoE(Linear(E), TopK(), GLU(3, num_experts=E), losses=losses, backend="reference")
        for losses in ((Balance(0.5), Balance(0.25)), (Balance(0.75),))
    )
    variables = draw(both, x)
    sown = [
        jax.jit(lambda v, m=m: m.apply(v, x, mutable=["losses"])[1])(variables)["losses"]["balance_loss"] for m in (both, one)
    ]
    np.testing.assert_allclose(*sown, rtol=1e-6)
