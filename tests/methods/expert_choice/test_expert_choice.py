"""Expert choice against NumPy (Zhou et al. 2022): each expert sorts the tokens, one expert after the other."""

import jax.numpy as jnp
import numpy as np
import pytest
from numpy_routing import capacity, expert_choice, softmax

from moejax.core.context import Context
from moejax.core.errors import ConfigError
from moejax.routing import ExpertChoice

G, N, E = 2, 9, 4
VALID = np.array([[True] * N, [True, False, True, True, False, True, False, True, False]])


def expected_dense(logits: np.ndarray, valid: np.ndarray, *args, **kwargs) -> np.ndarray:
    out = np.zeros(logits.shape)
    for g in range(len(logits)):
        for i, tokens in enumerate(expert_choice(logits[g], valid[g], *args, **kwargs)):
            for t, weight in tokens:
                out[g, t, i] += weight
    return out


@pytest.mark.parametrize("factor", [0.3, 1.0, 2.0, 99.0])
@pytest.mark.parametrize(("score", "normalise"), [("softmax", False), ("softmax", True), ("sigmoid", True), ("logit", False)])
@pytest.mark.parametrize("in_order", [False, True])
def test_plan_is_numpys(rng: np.random.Generator, factor: float, score: str, normalise: bool, in_order: bool) -> None:
    logits = rng.normal(size=(G, N, E)).astype(np.float32)
    plan = ExpertChoice(factor, score=score, normalise=normalise, in_order=in_order)(
        jnp.asarray(logits), Context(valid=jnp.asarray(VALID))
    )
    np.testing.assert_allclose(plan.dense(), expected_dense(logits, VALID, factor, score, normalise), rtol=1e-5, atol=1e-7)
    assert plan.token.shape[-1] == capacity(N, E, 1, factor) <= N
    for g, i in np.ndindex(G, E):
        chosen = [t for t, _ in expert_choice(logits[g], VALID[g], factor, score)[i]]
        ours = np.asarray(plan.token[g, i])[np.asarray(plan.used[g, i])]
        np.testing.assert_array_equal(ours, sorted(chosen) if in_order else chosen)


def test_load_is_perfect_and_ties_go_to_the_earlier_token() -> None:
    plan = ExpertChoice(1.0)(jnp.zeros((G, N, E)), Context(valid=jnp.asarray(VALID)))
    np.testing.assert_array_equal(plan.used.sum(-1), [[3] * E, [2] * E])  # ceil(9 / 4) and ceil(5 / 4)
    np.testing.assert_array_equal(plan.token[0], [[0, 1, 2]] * E)
    np.testing.assert_array_equal(plan.token[1, :, :2], [[0, 2]] * E)


def test_a_bias_ranks_but_never_weighs(rng: np.random.Generator) -> None:
    """Experts rank tokens, so only what differs between tokens of one expert can change a choice: a bias per expert cannot."""
    logits = jnp.asarray(rng.normal(size=(G, N, E)), jnp.float32)
    plain, biased = (
        ExpertChoice()(logits, Context(valid=jnp.asarray(VALID))),
        ExpertChoice()(logits, Context(valid=jnp.asarray(VALID)), bias=jnp.arange(4.0)),
    )
    np.testing.assert_array_equal(plain.dense(), biased.dense())


def test_an_empty_group_chooses_nobody(rng: np.random.Generator) -> None:
    logits = jnp.asarray(rng.normal(size=(G, N, E)), jnp.float32)
    for normalise in (False, True):
        plan = ExpertChoice(normalise=normalise)(logits, Context(valid=jnp.zeros((G, N), bool)))
        assert not plan.used.any()
        np.testing.assert_array_equal(plan.dense(), 0)


def test_probabilities_errors_and_mean_experts(rng: np.random.Generator) -> None:
    logits = rng.normal(size=(G, N, E)).astype(np.float32)
    np.testing.assert_allclose(ExpertChoice().probabilities(jnp.asarray(logits)), softmax(logits), rtol=1e-5)
    assert ExpertChoice(2.0).mean_experts(8) == 2.0
    assert ExpertChoice(9.0).mean_experts(8) == 8.0
    with pytest.raises(ConfigError, match="capacity_factor=0 must be a number above 0"):
        ExpertChoice(0)
    with pytest.raises(ConfigError, match="score='max' is unknown; did you mean 'softmax'"):
        ExpertChoice(score="max")
