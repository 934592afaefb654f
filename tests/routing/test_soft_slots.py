"""Soft slots against NumPy loops (Puigcerver et al. 2023): dispatch sums to 1 over tokens, combine over all slots of all experts."""

import jax.numpy as jnp
import numpy as np
import pytest

from moejax.core.context import Context
from moejax.core.errors import ConfigError
from moejax.routing import SoftSlots

G, N, E, S = 2, 5, 3, 2
VALID = np.array([[True] * N, [False, True, True, False, True]])


def expected(logits: np.ndarray, valid: np.ndarray, dispatch: str, combine: str) -> tuple[np.ndarray, np.ndarray]:
    """One group, `logits[n, e * s]` with the slots of an expert next to each other."""
    n, slots = logits.shape
    tokens = [t for t in range(n) if valid[t]]
    into, out = np.zeros((n, E, S)), np.zeros((n, E, S))
    for t in tokens:
        for e, s in np.ndindex(E, S):
            j = e * S + s
            into[t, e, s] = (
                np.exp(logits[t, j]) / sum(np.exp(logits[u, j]) for u in tokens) if dispatch == "soft" else 1 / len(tokens)
            )
            out[t, e, s] = (
                np.exp(logits[t, j]) / sum(np.exp(logits[t, i]) for i in range(slots)) if combine == "soft" else 1 / slots
            )
    return into, out


@pytest.mark.parametrize(
    ("dispatch", "combine"), [("soft", "soft"), ("uniform", "soft"), ("soft", "uniform"), ("uniform", "uniform")]
)
def test_plan_is_numpys(rng: np.random.Generator, dispatch: str, combine: str) -> None:
    logits = rng.normal(size=(G, N, E * S))
    plan = SoftSlots(S, dispatch, combine)(jnp.asarray(logits, jnp.float32), Context(valid=jnp.asarray(VALID)))
    for g in range(G):
        into, out = expected(logits[g], VALID[g], dispatch, combine)
        np.testing.assert_allclose(plan.dispatch[g], into, rtol=1e-5)
        np.testing.assert_allclose(plan.combine[g], out, rtol=1e-5)


def test_sums_are_over_tokens_and_over_slots(rng: np.random.Generator) -> None:
    """The classic bug is to swap the two softmax axes."""
    plan = SoftSlots(S)(jnp.asarray(rng.normal(size=(G, N, E * S)), jnp.float32), Context(valid=jnp.ones((G, N), bool)))
    np.testing.assert_allclose(plan.dispatch.sum(1), 1, rtol=1e-5)
    np.testing.assert_allclose(plan.combine.sum((2, 3)), 1, rtol=1e-5)
    assert np.ptp(np.asarray(plan.dispatch.sum((2, 3)))) > 0.1


def test_a_group_of_padding_gives_zeros_and_large_logits_no_infinities() -> None:
    for mask in (jnp.zeros((G, N), bool), jnp.asarray(VALID)):
        plan = SoftSlots(S)(jnp.full((G, N, E * S), 1e4), Context(valid=mask))
        assert np.isfinite(plan.dispatch).all()
        np.testing.assert_array_equal(plan.dispatch[~np.asarray(mask)], 0)
        np.testing.assert_array_equal(plan.combine[~np.asarray(mask)], 0)


def test_a_bias_shifts_both_softmaxes_and_probabilities_are_per_expert(rng: np.random.Generator) -> None:
    logits, bias = rng.normal(size=(G, N, E * S)), rng.normal(size=E * S)
    valid = jnp.ones((G, N), bool)
    biased = SoftSlots(S)(jnp.asarray(logits, jnp.float32), Context(valid=valid), bias=jnp.asarray(bias, jnp.float32))
    into, out = expected(logits[0] + bias, np.ones(N, bool), "soft", "soft")
    np.testing.assert_allclose(biased.dispatch[0], into, rtol=1e-5)
    np.testing.assert_allclose(biased.combine[0], out, rtol=1e-5)
    _, combine = expected(logits[0], np.ones(N, bool), "soft", "soft")
    probs = SoftSlots(S).probabilities(jnp.asarray(logits, jnp.float32))
    np.testing.assert_allclose(probs[0], combine.sum(-1), rtol=1e-5)


def test_errors_and_mean_experts() -> None:
    with pytest.raises(ConfigError, match="slots=0 must be a whole number of at least 1"):
        SoftSlots(0)
    with pytest.raises(ConfigError, match="combine='hard' is unknown; valid names: soft, uniform"):
        SoftSlots(combine="hard")
    assert SoftSlots(slots=3).mean_experts(8) == 8.0
    assert SoftSlots(slots=3).outputs_per_expert == 3
