"""Capacity: its one definition, and who is refused, against a simulation that serves one choice after the other."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy_routing import admit, capacity, combine, service_order, softmax, top_k

from moejax.core.context import Context
from moejax.routing import Routing, TokenPlan, TopK, compute_capacity, routing_stats

G, N, E = 2, 9, 4


@pytest.mark.parametrize(
    ("n", "e", "k", "factor", "slots"),
    [
        (64, 8, 1, 1.0, 8),  # perfect balance fits exactly
        (64, 8, 2, 1.0, 16),  # also for k = 2: k is part of the definition
        (64, 8, 1, 1.25, 10),
        (65, 8, 1, 1.0, 9),  # rounded up
        (63, 8, 2, 1.25, 20),
        (100, 10, 1, 1.1, 11),  # 1.1 is a little more than 1.1 in binary: no twelfth slot for that
        (4, 64, 1, 1.0, 1),  # at least one
        (4, 64, 8, 2.0, 1),
        (10, 2, 2, 4.0, 10),  # at most every token
        (1, 1, 1, 0.01, 1),
        (0, 8, 1, 1.0, 0),  # an empty group
    ],
)
def test_the_definition(n: int, e: int, k: int, factor: float, slots: int) -> None:
    assert compute_capacity(n, e, k, factor) == slots
    assert capacity(n, e, k, factor) == slots  # the tests' own, used below


@functools.partial(jax.jit, static_argnums=0)
def planned(rule: TopK, logits: jax.Array, valid: jax.Array) -> TokenPlan:
    return rule(logits, Context(valid=valid))


@settings(max_examples=40, deadline=None, derandomize=True)
@given(
    priority=st.sampled_from(["token", "choice", "score"]), k=st.sampled_from([1, 2, 3]), skew=st.floats(0, 4),
    factor=st.sampled_from([0.3, 0.5, 1.0, 1.25, 3.0]), seed=st.integers(0, 2**16), padding=st.sampled_from([0.0, 0.4, 1.0]),
)  # fmt: skip
def test_drops_equal_the_simulation(priority: str, k: int, factor: float, skew: float, seed: int, padding: float) -> None:
    rng = np.random.default_rng(seed)
    logits = rng.normal(size=(G, N, E)).astype(np.float32) + np.float32(skew) * np.eye(E, dtype=np.float32)[0]
    valid = rng.random((G, N)) >= padding
    rule = TopK(k=k, capacity_factor=factor, priority=priority)
    plan = planned(rule, logits, valid)
    for i in range(G):
        expert, weight = top_k(logits[i], k)
        wanted = np.repeat(valid[i][:, None], k, 1)
        slots = capacity(int(valid[i].sum()), E, k, factor)
        kept = admit(expert, wanted, service_order(priority, softmax(logits[i]).max(-1), k), slots)
        np.testing.assert_array_equal(plan.used[i], kept)
        np.testing.assert_array_equal(plan.dropped[i], wanted & ~kept)
        np.testing.assert_allclose(plan.dense()[i], combine(expert, weight, kept, E), rtol=1e-5, atol=1e-7)
        assert plan.limit[i] == slots
    assert plan.capacity == capacity(N, E, k, factor)


def test_the_first_of_equal_scores_is_served_first() -> None:
    plan = TopK(k=1, capacity_factor=2.0, priority="score")(jnp.zeros((G, N, E)), Context(valid=jnp.ones((G, N), bool)))
    np.testing.assert_array_equal(plan.used[..., 0], [[True] * 5 + [False] * 4] * G)


def test_a_lost_choice_never_rescales_the_other(rng: np.random.Generator) -> None:
    logits = jnp.asarray(rng.normal(size=(G, N, E)), jnp.float32)
    tight, free = (TopK(k=2, normalise=True, capacity_factor=f) for f in (0.5, None))
    half = np.asarray(tight(logits).used.sum(-1) == 1)
    assert half.any()
    np.testing.assert_array_equal(tight(logits).weight, free(logits).weight)


def test_the_drop_rule_is_the_same_in_training_and_evaluation_unless_configured(rng: np.random.Generator) -> None:
    logits = jnp.asarray(rng.normal(size=(G, N, E)), jnp.float32)
    same = TopK(k=2, capacity_factor=0.5)
    jax.tree.map(np.testing.assert_array_equal, same(logits, Context(train=True)), same(logits, Context(train=False)))
    assert same(logits).dropped.any()

    other = TopK(k=2, capacity_factor=0.5, eval_capacity_factor=None)
    assert other(logits, Context(train=True)).dropped.any()
    assert not other(logits).dropped.any()
    assert (other.per_token, same.per_token) == (True, False)

    wider = TopK(k=1, capacity_factor=None, eval_capacity_factor=1.0)
    assert (wider(logits, Context(train=True)).capacity, wider(logits).capacity) == (None, 3)


@pytest.mark.parametrize("priority", ["token", "choice", "score"])
def test_room_for_all_is_dropless(rng: np.random.Generator, priority: str) -> None:
    logits = jnp.asarray(rng.normal(size=(G, N, E)) + 9 * np.eye(E)[1], jnp.float32)
    roomy = TopK(k=2, capacity_factor=float(E), priority=priority)(logits)
    np.testing.assert_array_equal(roomy.used, True)
    np.testing.assert_array_equal(roomy.dense(), TopK(k=2)(logits).dense())


def test_padding_neither_buys_room_nor_takes_it(rng: np.random.Generator) -> None:
    compact = rng.normal(size=(G, 5, E)).astype(np.float32)
    padded = rng.normal(size=(G, N, E)).astype(np.float32)
    where = [0, 3, 4, 6, 8]
    padded[:, where] = compact
    valid = np.isin(np.arange(N), where)[None].repeat(G, 0)
    for priority in ("token", "choice", "score"):
        rule = TopK(k=2, capacity_factor=0.8, priority=priority)
        inside, alone = rule(jnp.asarray(padded), Context(valid=jnp.asarray(valid))), rule(jnp.asarray(compact))
        assert alone.dropped.any()
        np.testing.assert_array_equal(inside.used[:, where], alone.used)
        np.testing.assert_array_equal(inside.dropped[:, where], alone.dropped)
        assert not (inside.used | inside.dropped)[~valid].any()
        np.testing.assert_array_equal(inside.limit, alone.limit)


@pytest.mark.parametrize(("tokens", "slots", "dropped"), [(9, 3, 6), (5, 2, 3), (3, 1, 2)])
def test_statistics_say_the_realised_capacity_and_the_drop_rate(tokens: int, slots: int, dropped: int) -> None:
    """By hand: all tokens want expert 0 of 4, which holds ceil(tokens / 4) of them; the rest of the 9 are padding."""
    logits = jnp.zeros((G, N, E)).at[..., 0].set(5.0)
    valid = jnp.broadcast_to(jnp.arange(N) < tokens, (G, N))
    plan = TopK(k=1, capacity_factor=1.0)(logits, Context(valid=valid))
    stats = routing_stats(Routing(logits, jax.nn.softmax(logits), plan, valid))
    assert stats["capacity"] == slots
    np.testing.assert_allclose(stats["drop_rate"], dropped / tokens, rtol=1e-6)
