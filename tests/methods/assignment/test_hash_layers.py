"""Hash layers' tables and neighbours, what is counted in the training data, and MultiHash against a loop over tokens."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from ml_collections import ConfigDict
from numpy_layers import close, draw

from moejax.core.context import Context
from moejax.core.errors import ConfigError
from moejax.data import token_clusters, token_frequencies, token_successors, with_computed
from moejax.layers import MultiHash
from moejax.models import build
from moejax.routing import Hash
from moejax.routing.routers.hash import balanced_table, dispersed_table, neighbour

E = 4
POSITIONS = np.array([[0, 1, 2, 0, 1, 2]])


def experts(router: Hash, ids: np.ndarray, **context) -> np.ndarray:
    logits = router.apply({}, jnp.zeros((*ids.shape, 2)), Context(token_ids=jnp.asarray(ids), **context))
    return np.asarray(logits).argmax(-1)


def batches(config: object, **_: object) -> itertools.chain:
    """Ids 0-3 follow each other at random, as 4-7 do; id 0 is half of its kind, 7 comes in padding only."""
    rng = np.random.default_rng(0)
    for _ in range(100):
        low = rng.choice([0, 0, 0, 1, 2, 3], size=(2, 20))
        tokens = np.concatenate([low, rng.integers(4, 7, size=(2, 20))])
        targets = np.roll(tokens, -1, 1)
        valid = np.arange(20) < 15
        tokens[:, 16:] = 7
        yield {"tokens": tokens, "targets": targets, "valid": np.broadcast_to(valid, tokens.shape)}


def test_dispersed_spreads_each_cluster_and_clustered_keeps_it_together() -> None:
    clusters = (0, 1, 0, 2, 1, 0, 0, 0, 1, 2, 0)
    ids = np.arange(len(clusters))[None]
    np.testing.assert_array_equal(experts(Hash(E, hash="clustered", clusters=clusters), ids)[0], clusters)
    spread = experts(Hash(E, hash="dispersed", clusters=clusters), ids)[0]
    np.testing.assert_array_equal(spread, dispersed_table(clusters, E))
    for cluster in set(clusters):
        counts = np.bincount(spread[np.array(clusters) == cluster], minlength=E)
        assert counts.max() - counts.min() <= 1
    counts = np.bincount(spread, minlength=E)
    assert counts.max() - counts.min() <= 1


def test_neighbours_stay_inside_their_document(rng: np.random.Generator) -> None:
    ids = rng.integers(0, 50, size=(1, 6))
    before, after = (np.asarray(neighbour(jnp.asarray(ids), jnp.asarray(POSITIONS), step)) for step in (-1, 1))
    a, b, c, d, e, f = ids[0]
    np.testing.assert_array_equal(before[0], [-1, a, b, -1, d, e])
    np.testing.assert_array_equal(after[0], [b, c, -1, e, f, -1])
    positions = jnp.asarray(POSITIONS)
    following = experts(Hash(E, hash="next"), ids, positions=positions)[0]
    np.testing.assert_array_equal(following[[0, 1, 3, 4]], experts(Hash(E), ids)[0, [1, 2, 4, 5]])
    assert neighbour(jnp.asarray(ids), None, 1)[0, -1] == -1


def test_counts_are_of_the_training_data_and_not_of_padding() -> None:
    frequencies = token_frequencies({}, 8, batches=5, make_iterator=batches)
    expected = np.zeros(8)
    for batch in itertools.islice(batches({}), 5):
        np.add.at(expected, batch["tokens"][:, :15], 1)
    np.testing.assert_array_equal(frequencies, expected)
    assert frequencies[7] == 0
    assert frequencies[0] > 2 * frequencies[1]


def test_tokens_that_occur_alike_are_one_cluster() -> None:
    clusters = token_clusters({}, 8, clusters=2, batches=50, width=2, make_iterator=batches)
    assert len(set(clusters[:4])) == len(set(clusters[4:7])) == 1
    assert clusters[0] != clusters[4]


def test_a_predicted_hash_is_that_of_the_token_that_usually_follows() -> None:
    successors = token_successors({}, 8, batches=5, make_iterator=batches)
    counts = np.zeros((8, 8))
    for batch in itertools.islice(batches({}), 5):
        np.add.at(counts, (batch["tokens"][batch["valid"]], batch["targets"][batch["valid"]]), 1)
    np.testing.assert_array_equal(successors, counts.argmax(1))
    assert successors[:4] == (0, 0, 0, 0)
    ids = np.arange(8)[None]
    predicted = experts(Hash(E, hash="predicted", successors=successors, seed=3), ids)
    np.testing.assert_array_equal(predicted, experts(Hash(E, seed=3), np.asarray(successors)[ids]))


def model(router: dict) -> ConfigDict:
    moe = {"kind": "moe", "num_experts": E, "router": router, "select": {"kind": "top_k", "k": 1}}
    block = {
        "kind": "transformer",
        "mixer": {"kind": "attention", "num_heads": 1},
        "norm": {"kind": "rms_norm"},
        "ffn": {**moe, "bank": {"kind": "ffn", "hidden": 4}},
    }
    lm = {"kind": "decoder_lm", "vocab_size": 8, "d_model": 4, "num_layers": 1, "pattern": ("b",), "blocks": {"b": block}}
    return ConfigDict({"model": lm, "data": {}})


def test_a_config_asks_for_what_the_data_say() -> None:
    asked = model({"kind": "hash", "hash": "balanced", "frequencies": {"from_data": "token_frequencies", "batches": 5}})
    filled = with_computed(asked.lock(), batches)
    frequencies = token_frequencies({}, 8, batches=5, make_iterator=batches)
    assert filled.model.blocks.b.ffn.router.frequencies == frequencies
    assert filled.data == asked.data
    router = build(filled.model).blocks[0].module.ffn.router
    ids = np.arange(8)[None]
    np.testing.assert_array_equal(experts(router, ids)[0], balanced_table(frequencies, E))
    # Before anything is counted, ids are dealt out in turn, and the module can be hashed.
    unasked = build(asked.model).blocks[0].module.ffn.router
    np.testing.assert_array_equal(experts(unasked, ids)[0], ids[0] % E)
    assert isinstance(hash(unasked), int)
    plain = model({"kind": "hash"})
    assert with_computed(plain, batches) is plain


@pytest.mark.parametrize(
    ("recipe", "message"),
    [
        (
            {"from_data": "token_frequency"},
            "unknown recipe 'token_frequency' in model.blocks.b.ffn.router.frequencies.from_data",
        ),
        ({"from_data": "token_frequencies", "batch": 3}, "unexpected keyword argument 'batch'.*in model.blocks.b.ffn.router"),
    ],
)
def test_a_wrong_recipe_is_told(recipe: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        with_computed(model({"kind": "hash", "hash": "balanced", "frequencies": recipe}), batches)


def test_what_cannot_be_hashed_is_told() -> None:
    with pytest.raises(ConfigError, match="hash='dispersed' with clusters=None"):
        Hash(E, hash="dispersed")
    with pytest.raises(ConfigError, match=r"hash='random' with clusters=\(0,\)"):
        Hash(E, clusters=(0,))
    with pytest.raises(ConfigError, match="clusters has 9 clusters for num_experts=4"):
        Hash(E, hash="clustered", clusters=(8, 0))
    with pytest.raises(ConfigError, match=r"router.hash='next' reads the token that is to be predicted; set leak=True"):
        build(model({"kind": "hash", "hash": "next"}).model)
    build(model({"kind": "hash", "hash": "next", "leak": True}).model)
    assert "looks at a neighbouring token" in Hash(E, hash="bigram").decodable()
    assert Hash(E).decodable() is None


class TestMultiHash:
    D, F, N = 6, 8, 2

    def layer(self, **fields) -> MultiHash:
        return MultiHash(num_experts=E, hidden=self.F, hashes=self.N, seed=3, **fields)

    def inputs(self, rng: np.random.Generator) -> tuple[jax.Array, Context]:
        x = jnp.asarray(rng.normal(size=(2, 5, self.D)), jnp.float32)
        ids = jnp.asarray(rng.integers(0, 40, size=(2, 5)))
        return x, Context(token_ids=ids, valid=jnp.asarray([[True] * 5, [True, True, False, True, False]]))

    @pytest.mark.parametrize("backend", ["reference", "grouped", "gather"])
    def test_it_is_a_loop_over_tokens(self, rng: np.random.Generator, backend: str) -> None:
        x, ctx = self.inputs(rng)
        layer = self.layer(backend=backend)
        variables = draw(layer, x, ctx)
        bank = {name: np.asarray(value, np.float64) for name, value in variables["params"]["bank"].items()}
        chosen = [experts(Hash(E, seed=3 + i), np.asarray(ctx.token_ids)) for i in range(self.N)]
        expected = np.zeros(x.shape)
        for b, t in np.argwhere(np.asarray(ctx.valid)):
            k = [chosen[i][b, t] for i in range(self.N)]
            v = np.maximum(np.concatenate([np.asarray(x[b, t]) @ bank[f"w_in_{i}"][k[i]] for i in range(self.N)]), 0)
            expected[b, t] = np.concatenate([v @ bank[f"w_out_{i}"][k[i]] for i in range(self.N)])
        y, sown = jax.jit(lambda v: layer.apply(v, x, ctx, mutable=["stats"]))(variables)
        np.testing.assert_allclose(y, expected, rtol=1e-4, atol=1e-5)
        load = np.bincount(np.concatenate([c[np.asarray(ctx.valid)] for c in chosen]), minlength=E)
        np.testing.assert_allclose(sown["stats"]["load"], load / load.sum(), rtol=1e-6)
        assert any((a != b).any() for a, b in itertools.combinations(chosen, 2))

    def test_gradients_are_those_of_the_oracle(self, rng: np.random.Generator) -> None:
        x, ctx = self.inputs(rng)
        variables = draw(self.layer(), x, ctx)

        def gradients(backend: str) -> tuple:
            layer = self.layer(backend=backend)
            return jax.jit(jax.grad(lambda v, x: jnp.sin(layer.apply(v, x, ctx)).sum(), argnums=(0, 1)))(variables, x)

        close(gradients("grouped"), gradients("reference"), 1e-3)

    def test_it_has_the_parameters_of_a_hash_layer_of_which_a_token_uses_one_in_e(self, rng: np.random.Generator) -> None:
        params = draw(self.layer(), *self.inputs(rng))["params"]
        assert sum(leaf.size for leaf in jax.tree.leaves(params)) == 2 * E * self.D * self.F
        assert self.layer().active_fraction() == 1 / E
        assert self.layer().decodable() is None

    def test_sizes_that_do_not_divide_are_refused(self, rng: np.random.Generator) -> None:
        with pytest.raises(ConfigError, match="hashes=4 does not divide the width 6"):
            MultiHash(num_experts=E, hidden=8, hashes=4).init(jax.random.key(0), *self.inputs(rng))
