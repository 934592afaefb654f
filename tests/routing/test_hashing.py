"""Hash layers: who goes where depends on ids alone, balanced tables balance the corpus, and gates are 1."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from numpy_layers import compiled

from moejax.core.context import Context
from moejax.core.errors import ConfigError
from moejax.experts import FFN
from moejax.layers import MoE
from moejax.routing import Hash, TopK
from moejax.routing.routers.hash import balanced_table

E = 4


def experts(router: Hash, ids: np.ndarray, **context) -> np.ndarray:
    x = jnp.zeros((*ids.shape, 3))
    logits = router.apply({}, x, Context(token_ids=jnp.asarray(ids), **context))
    plan = TopK(k=1)(logits)
    np.testing.assert_array_equal(plan.weight, 1)
    return np.asarray(plan.expert[..., 0])


def test_random_is_a_function_of_the_id_and_spreads_over_the_experts() -> None:
    ids = np.arange(4000).reshape(2, 2000)
    first = experts(Hash(E, seed=1), ids)
    np.testing.assert_array_equal(first, experts(Hash(E, seed=1), ids[::-1])[::-1])
    counts = np.bincount(first.ravel(), minlength=E)
    # Four standard deviations of a fair draw; nor do two seeds agree more than by chance.
    assert abs(counts - 1000).max() < 4 * np.sqrt(1000 * 3 / 4)
    assert abs((first == experts(Hash(E, seed=2), ids)).mean() - 1 / E) < 0.05


def test_balanced_gives_the_next_most_frequent_id_to_the_lightest_expert(rng: np.random.Generator) -> None:
    zipf = tuple(1000.0 / (rank + 1) for rank in rng.permutation(64))
    table = balanced_table(zipf, E)
    sums = np.bincount(table, weights=zipf, minlength=E)
    assert sums.max() / sums.mean() < 1.1
    random = experts(Hash(E), np.arange(64)[None])[0]
    assert sums.max() < np.bincount(random, weights=zipf, minlength=E).max()
    np.testing.assert_array_equal(experts(Hash(E, hash="balanced", frequencies=zipf), np.arange(64)[None])[0], table)
    assert balanced_table((5.0, 3.0, 2.0, 2.0), 2).tolist() == [0, 1, 1, 0]


def test_previous_bigram_and_position_look_where_they_say(rng: np.random.Generator) -> None:
    ids = rng.integers(0, 50, size=(1, 40))
    positions = jnp.asarray(np.r_[np.arange(25), np.arange(15)][None])
    previous, bigram, position = (
        experts(Hash(E, hash=k), ids, positions=positions) for k in ("previous", "bigram", "position")
    )
    np.testing.assert_array_equal(previous[0, 1:25], experts(Hash(E), ids)[0, :24])
    assert previous[0, 0] == previous[0, 25]  # documents start alike, whatever was packed before
    np.testing.assert_array_equal(position[0], experts(Hash(E), np.asarray(positions))[0])
    changed = ids.copy()
    changed[0, 10] += 1
    assert set(np.flatnonzero(experts(Hash(E, hash="bigram"), changed, positions=positions)[0] != bigram[0])) <= {10, 11}


def test_a_layer_without_router_parameters(rng: np.random.Generator) -> None:
    """Equal to calling each token's expert by hand, and in no need of a gradient."""
    moe, x = MoE(Hash(E), TopK(k=1), FFN(8, num_experts=E)), jnp.asarray(rng.normal(size=(2, 6, 5)), jnp.float32)
    ids = rng.integers(0, 30, size=(2, 6))
    ctx = Context(token_ids=jnp.asarray(ids))
    variables = jax.jit(moe.init)(jax.random.key(0), x, ctx)
    assert set(variables["params"]) == {"bank"}
    w_in, w_out = (np.asarray(variables["params"]["bank"][name]) for name in ("w_in", "w_out"))
    chosen = experts(Hash(E), ids)
    hidden = np.asarray(jax.nn.gelu(jnp.einsum("bsd,bsdf->bsf", x, w_in[chosen])))
    np.testing.assert_allclose(compiled(moe)(variables, x, ctx), np.einsum("bsf,bsfd->bsd", hidden, w_out[chosen]), atol=1e-5)


def test_what_cannot_be_hashed_raises() -> None:
    x = jnp.zeros((1, 2, 3))
    with pytest.raises(ConfigError, match="needs the context's token ids"):
        Hash(E).apply({}, x, Context())
    with pytest.raises(ConfigError, match="needs them"):
        Hash(E, hash="balanced")
    with pytest.raises(ConfigError, match="hash='hashed' is unknown"):
        Hash(E, hash="hashed")
    with pytest.raises(ConfigError, match="cannot decode"):
        Hash(E, hash="bigram").apply({}, x, Context(token_ids=jnp.zeros((1, 2), jnp.int32), decode=True))
