"""Routing statistics of all kinds of plans against NumPy; padding counts nowhere."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from numpy_routing import admit, capacity, expert_choice, service_order, softmax, top_k

from moejax.core.context import Context
from moejax.routing import ExpertChoice, Routing, SoftSlots, TopK, routing_overlap, routing_stats

G, N, E = 2, 9, 4
VALID = np.array([[True] * N, [True, False, True, True, False, True, False, True, False]])


def counts_token_choice(logits: np.ndarray) -> tuple[np.ndarray, np.ndarray, float]:
    used, wanted = np.zeros((G, N, E)), np.zeros((G, N, E))
    for g in range(G):
        expert, _ = top_k(logits[g], 2)
        want = np.repeat(VALID[g][:, None], 2, 1)
        keep = admit(expert, want, service_order("token", np.zeros(N), 2), capacity(int(VALID[g].sum()), E, 2, 0.6))
        for t, j in np.ndindex(N, 2):
            used[g, t, expert[t, j]] += keep[t, j]
            wanted[g, t, expert[t, j]] += want[t, j]
    return used, wanted, np.mean([capacity(int(v.sum()), E, 2, 0.6) for v in VALID])


def counts_expert_choice(logits: np.ndarray) -> tuple[np.ndarray, np.ndarray, float]:
    used = np.zeros((G, N, E))
    for g in range(G):
        for i, tokens in enumerate(expert_choice(logits[g], VALID[g], 1.0)):
            for t, _ in tokens:
                used[g, t, i] = 1
    return used, used, np.mean([capacity(int(v.sum()), E, 1, 1.0) for v in VALID])


def counts_soft(logits: np.ndarray) -> tuple[np.ndarray, np.ndarray, float]:
    share = softmax(logits).reshape(G, N, E, -1).sum(-1) * VALID[..., None]
    return share, share, -1


CASES = {
    "token_choice": (TopK(k=2, capacity_factor=0.6), counts_token_choice),
    "dropless": (TopK(k=2), lambda x: (counts_token_choice(x)[1], counts_token_choice(x)[1], -1)),
    "expert_choice": (ExpertChoice(1.0), counts_expert_choice),
    "soft_slots": (SoftSlots(slots=2), counts_soft),
}


@pytest.mark.parametrize("name", CASES)
def test_statistics_are_numpys(rng: np.random.Generator, name: str) -> None:
    rule, count = CASES[name]
    logits = (2 * rng.normal(size=(G, N, E * rule.outputs_per_expert))).astype(np.float32)
    x, valid = jnp.asarray(logits), jnp.asarray(VALID)
    stats = routing_stats(Routing(x, rule.probabilities(x), rule(x, Context(valid=valid)), valid))
    used, wanted, slots = count(logits)
    probs = softmax(logits).reshape(G, N, E, -1).sum(-1)[VALID]
    load = used.sum((0, 1)) / used.sum()
    expected = {
        "load": load,
        "importance": probs.mean(0),
        "drop_rate": 1 - used.sum() / wanted.sum(),
        "unrouted": (used.sum(-1) == 0)[VALID].mean(),
        "experts_per_token": used.sum() / VALID.sum(),
        "entropy": -(probs * np.log(probs)).sum(-1).mean(),
        "z": (np.log(np.exp(logits.astype(np.float64)).sum(-1)) ** 2)[VALID].mean(),
        "max_logit": np.abs(logits[VALID]).max(),
        "load_entropy": -(load * np.log(load)).sum(),
        "max_violation": load.max() / load.mean() - 1,
        "capacity": slots,
    }
    assert stats.keys() == expected.keys()
    for key, value in expected.items():
        np.testing.assert_allclose(stats[key], value, rtol=1e-5, atol=1e-6, err_msg=key)
    if name == "token_choice":
        assert stats["drop_rate"] > 0.1
        assert stats["unrouted"] > 0


def test_statistics_pass_no_gradient_and_padding_alone_gives_finite_numbers(rng: np.random.Generator) -> None:
    valid = jnp.zeros((G, N), bool)

    def total(x: jax.Array, mask: jax.Array) -> jax.Array:
        rule = TopK(k=2, capacity_factor=0.6)
        return sum(
            value.sum()
            for value in routing_stats(Routing(x, rule.probabilities(x), rule(x, Context(valid=mask)), mask)).values()
        )

    x = jnp.asarray(rng.normal(size=(G, N, E)), jnp.float32)
    assert not np.any(jax.grad(total)(x, jnp.asarray(VALID)))
    assert np.isfinite(total(x, valid))


def test_overlap_is_numpys(rng: np.random.Generator) -> None:
    """Router saturation and change rate: counted token by token, padding and tokens without experts left out."""
    first, second = (rng.normal(size=(G, N, E)).astype(np.float32) for _ in range(2))
    rule = TopK(k=2)
    plans = [rule(jnp.asarray(x), Context(valid=jnp.asarray(VALID))) for x in (first, second)]
    chosen = [[set(row) for g in range(G) for row in top_k(x[g], 2)[0]] for x in (first, second)]
    shares = [len(a & b) / 2 for a, b, valid in zip(*chosen, VALID.ravel(), strict=True) if valid]
    np.testing.assert_allclose(routing_overlap(*plans, jnp.asarray(VALID)), np.mean(shares), rtol=1e-6)
    assert 0 < np.mean(shares) < 1
    assert routing_overlap(plans[0], plans[0], jnp.ones((G, N), bool)) == 1
