"""Top-k without sorting, against `lax.top_k`."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.top_k import top_k


@pytest.mark.parametrize(("e", "k"), [(8, 3), (40, 1), (300, 8)])
def test_top_k_equals_lax(e: int, k: int, rng: np.random.Generator) -> None:
    scores = jnp.asarray(rng.integers(-5, 6, (2, 50, e)), jnp.float32)
    values, index = top_k(scores, k)
    expected_values, expected_index = jax.lax.top_k(scores, k)
    np.testing.assert_array_equal(values, expected_values)
    np.testing.assert_array_equal(index, expected_index)
    assert ("topk" in jax.jit(lambda s: top_k(s, k)).lower(scores).as_text().lower().replace("_", "")) == (e == 300)


def test_many_experts_are_not_sorted() -> None:
    """XLA makes a full sort of `lax.top_k` when its results are taken apart, ten times slower, unless it is kept from that."""

    def first_and_last(scores: jax.Array) -> tuple[jax.Array, jax.Array]:
        values, index = top_k(scores, 8)
        return values[:, 0], index[:, 7]

    compiled = jax.jit(first_and_last).lower(jnp.ones((64, 256))).compile().as_text()
    assert "TopK" in compiled
    assert " sort(" not in compiled


def test_top_k_takes_each_index_once_also_among_infinities() -> None:
    _, index = top_k(jnp.full((1, 4), -jnp.inf).at[0, 2].set(1), 4)
    np.testing.assert_array_equal(index, [[2, 0, 1, 3]])
