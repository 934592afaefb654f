"""Mixture-of-depths against NumPy (Raposo et al. 2024), around a block whose output tells which tokens it saw, where and in what order."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from numpy_layers import close, compiled, draw
from numpy_routing import best, capacity, sigmoid

from moejax import ConfigError, Context
from moejax.layers.blocks.transformer import Transformer
from moejax.layers.depth.mixture_of_depths import MixtureOfDepths
from moejax.layers.mixers.attention import Attention
from moejax.layers.registry import blocks
from moejax.models.inspection import check_causal
from moejax.models.parts import NamedBlock
from moejax.routing import Random

B, S, D = 2, 8, 5
VALID = np.array([[True] * S, [True, False, True, True, False, True, True, True]])
GATES = {"raw": lambda r: r, "sigmoid": sigmoid, "one": np.ones_like}


class Block(nn.Module):
    """x + tanh(x w) + position / 10 + the sum of the valid rows so far / 10: pointwise, but for order, positions and mask."""

    @nn.compact
    def __call__(self, x: jax.Array, ctx: Context) -> jax.Array:
        w = self.param("w", nn.initializers.ones, (D, D))
        valid = jnp.ones(x.shape[:2], bool) if ctx.valid is None else ctx.valid
        seen = jnp.cumsum(jnp.where(valid[..., None], x, 0), axis=1)
        return x + jnp.tanh(x @ w) + ctx.positions[..., None] / 10 + seen / 10


def branch(w: np.ndarray, x: np.ndarray, positions: np.ndarray) -> np.ndarray:
    """The block's residual branch on rows that are all valid."""
    return np.tanh(x @ w) + positions[:, None] / 10 + np.cumsum(x, 0) / 10


def mixed(params, x: np.ndarray, r: np.ndarray, chosen: np.ndarray, gate: str, positions: np.ndarray) -> np.ndarray:
    """y of one sequence, given which tokens the block processes."""
    y, w = x.copy(), np.asarray(params["block"]["w"], np.float64)
    y[chosen] += GATES[gate](r[chosen])[:, None] * branch(w, x[chosen], positions[chosen])
    return y


def top_c(r: np.ndarray, valid: np.ndarray, share: float) -> np.ndarray:
    """The chosen tokens, in order of position; a tie goes to the earlier token."""
    tokens = np.flatnonzero(valid)
    return np.sort(tokens[best(r[tokens], capacity(len(tokens), 1, 1, share))])


def inputs(rng: np.random.Generator) -> np.ndarray:
    return rng.normal(size=(B, S, D)).astype(np.float32)


def weights(params, x: np.ndarray) -> np.ndarray:
    return (np.asarray(x, np.float64) @ np.asarray(params["router"]["w"], np.float64))[..., 0]


def predicted(params, x: np.ndarray) -> np.ndarray:
    hidden = np.maximum(np.asarray(x, np.float64) @ np.asarray(params["predictor_in"], np.float64), 0)
    return (hidden @ np.asarray(params["predictor_out"], np.float64))[..., 0]


TRAIN = Context(train=True, valid=jnp.asarray(VALID))
EVAL = Context(valid=jnp.asarray(VALID))


@pytest.mark.parametrize(("gate", "share"), [("raw", 0.5), ("sigmoid", 0.25), ("one", 0.125)])
def test_training_chooses_the_largest_weights(rng: np.random.Generator, gate: str, share: float) -> None:
    layer, x = MixtureOfDepths(Block(), capacity_factor=share, gate=gate), inputs(rng)
    positions = np.stack([np.arange(S), np.array([0, 1, 2, 0, 1, 2, 3, 4])])  # the second row is two packed documents
    variables = draw(layer, jnp.asarray(x))
    y, state = compiled(layer, "stats", "routing")(variables, jnp.asarray(x), TRAIN.replace(positions=jnp.asarray(positions)))
    params, count = variables["params"], 0
    for b in range(B):
        r = weights(params, x[b])
        chosen = top_c(r, VALID[b], share)
        count += len(chosen)
        np.testing.assert_allclose(y[b], mixed(params, x[b], r, chosen, gate, positions[b]), rtol=1e-4, atol=1e-5)
        passed = np.setdiff1d(np.arange(S), chosen)
        np.testing.assert_array_equal(y[b, passed], x[b, passed])
    np.testing.assert_allclose(state["stats"]["experts_per_token"], count / VALID.sum(), rtol=1e-6)
    assert state["stats"]["capacity"] == np.mean([capacity(int(v.sum()), 1, 1, share) for v in VALID])
    assert state["routing"]["logits"].dtype == jnp.float32


def test_ties_go_to_the_earlier_token(rng: np.random.Generator) -> None:
    layer, x = MixtureOfDepths(Block(), capacity_factor=0.5, gate="one", remedy=None), inputs(rng)
    variables = draw(layer, jnp.asarray(x))
    variables["params"]["router"]["w"] = jnp.zeros((D, 1))
    y = compiled(layer)(variables, jnp.asarray(x), Context(train=True))
    changed = (np.asarray(y) != x).any(-1)
    np.testing.assert_array_equal(changed, [[True] * 4 + [False] * 4] * B)


@pytest.mark.parametrize("remedy", ["predictor", "router"])
def test_evaluation_asks_the_remedy_and_hides_the_other_tokens(rng: np.random.Generator, remedy: str) -> None:
    layer, x = MixtureOfDepths(Block(), capacity_factor=0.5, remedy=remedy, predictor_hidden=6), inputs(rng)
    variables = draw(layer, jnp.asarray(x))
    params = variables["params"]
    y, state = compiled(layer, "stats", "losses")(variables, jnp.asarray(x), EVAL)
    r = weights(params, x)
    used = ((predicted(params, x) if remedy == "predictor" else r) > 0) & VALID
    assert 0 < used.sum() < VALID.sum()
    for b in range(B):
        expected = mixed(params, x[b], r[b], np.flatnonzero(used[b]), "raw", np.arange(S))
        np.testing.assert_allclose(y[b], expected, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(state["stats"]["experts_per_token"], used.sum() / VALID.sum(), rtol=1e-6)

    # The rule is causal: nothing later moves the earlier tokens.
    changed = x.copy()
    changed[:, 5:] = inputs(rng)[:, 5:]
    after, _ = compiled(layer, "stats", "losses")(variables, jnp.asarray(changed), EVAL)
    np.testing.assert_array_equal(after[:, :5], y[:, :5])


def test_top_k_at_evaluation_is_the_rule_of_training_and_sees_the_future(rng: np.random.Generator) -> None:
    layer, x = MixtureOfDepths(Block(), capacity_factor=0.5, eval_select="top_k"), inputs(rng)
    variables = draw(layer, jnp.asarray(x))
    y = compiled(layer)(variables, jnp.asarray(x), EVAL)
    np.testing.assert_array_equal(y, compiled(layer)(variables, jnp.asarray(x), TRAIN))
    leaks = False
    for _ in range(5):
        changed = x.copy()
        changed[:, 5:] = 3 * inputs(rng)[:, 5:]
        leaks |= (compiled(layer)(variables, jnp.asarray(changed), EVAL)[:, :5] != y[:, :5]).any()
    assert leaks


@pytest.mark.parametrize("remedy", ["predictor", "router"])
def test_the_remedy_learns_the_choice_and_the_predictor_leaves_the_model_alone(rng: np.random.Generator, remedy: str) -> None:
    layer, x = MixtureOfDepths(Block(), capacity_factor=0.5, remedy=remedy, remedy_coef=0.3), inputs(rng)
    variables = draw(layer, jnp.asarray(x))
    params = variables["params"]

    def remedy_loss(variables, x):
        _, state = layer.apply(variables, x, TRAIN, mutable=["losses", "stats"])
        return state["losses"]["remedy_loss"], state["stats"]["predictor_accuracy"]

    step = jax.jit(jax.value_and_grad(remedy_loss, argnums=(0, 1), has_aux=True))
    (loss, accuracy), (grads, dx) = step(variables, jnp.asarray(x))
    logit = predicted(params, x) if remedy == "predictor" else weights(params, x)
    target = np.zeros((B, S))
    for b in range(B):
        target[b, top_c(weights(params, x)[b], VALID[b], 0.5)] = 1
    p = sigmoid(logit)
    cross_entropy = -(target * np.log(p) + (1 - target) * np.log(1 - p))[VALID].mean()
    np.testing.assert_allclose(loss, 0.3 * cross_entropy, rtol=1e-5)
    np.testing.assert_allclose(accuracy, ((logit > 0) == target)[VALID].mean(), rtol=1e-6)

    grads = grads["params"]
    assert not np.any(grads["block"]["w"])
    if remedy == "predictor":
        assert not np.any(dx)
        assert not np.any(grads["router"]["w"])
        assert np.abs(grads["predictor_in"]).max() > 1e-4
        assert np.abs(grads["predictor_out"]).max() > 1e-4
    else:
        assert (np.abs(dx).max(-1)[VALID] > 1e-4).all()
        expected = 0.3 * np.einsum("bs,bsd->d", np.where(VALID, p - target, 0), x) / VALID.sum()
        np.testing.assert_allclose(grads["router"]["w"][:, 0], expected, rtol=1e-3, atol=1e-6)


def test_the_raw_gate_is_what_teaches_the_router(rng: np.random.Generator) -> None:
    x = jnp.asarray(inputs(rng))
    for gate, learns in (("raw", True), ("one", False)):
        layer = MixtureOfDepths(Block(), capacity_factor=0.5, gate=gate, remedy=None)
        variables = draw(layer, x)
        grads = jax.jit(jax.grad(lambda v, layer=layer: jnp.sin(layer.apply(v, x, TRAIN)).sum()))(variables)["params"]
        assert np.any(grads["router"]["w"]) == learns
        assert np.any(grads["block"]["w"])


def test_random_routing_draws_in_training_and_repeats_at_evaluation(rng: np.random.Generator) -> None:
    layer, x = MixtureOfDepths(Block(), capacity_factor=0.5, router=Random(1), gate="one", eval_select="top_k"), inputs(rng)
    variables = draw(layer, jnp.asarray(x))
    assert "router" not in variables["params"]

    def touched(ctx: Context, seed: int) -> np.ndarray:
        y = compiled(layer)(variables, jnp.asarray(x), ctx, rngs={"router": jax.random.key(seed)})
        return (np.asarray(y) != x).any(-1)

    draws = [touched(Context(train=True), seed) for seed in range(3)]
    assert all((d.sum(1) == 4).all() for d in draws)
    assert any((draws[0] != d).any() for d in draws[1:])
    np.testing.assert_array_equal(touched(Context(), 0), touched(Context(), 1))
    assert (touched(Context(), 0).sum(1) == 4).all()


def test_padding_is_inert(rng: np.random.Generator) -> None:
    layer, x = MixtureOfDepths(Block(), capacity_factor=0.5), inputs(rng)
    variables = draw(layer, jnp.asarray(x))
    junk = np.where(VALID[..., None], x, 50).astype(np.float32)
    for ctx in (TRAIN, EVAL):
        y, sown = compiled(layer, "losses", "stats")(variables, jnp.asarray(x), ctx)
        other, other_sown = compiled(layer, "losses", "stats")(variables, jnp.asarray(junk), ctx)
        np.testing.assert_allclose(other[VALID], y[VALID], rtol=1e-5)
        np.testing.assert_array_equal(other[~VALID], junk[~VALID])
        close(other_sown, sown)


class TestErrorsAndQuestions:
    @pytest.mark.parametrize(
        ("fields", "message"),
        [
            (dict(capacity_factor=0.0), r"capacity_factor=0\.0 must be a number above 0 and of at most 1"),
            (dict(capacity_factor=1.5), r"capacity_factor=1\.5 must be a number above 0 and of at most 1"),
            (dict(gate="tanh"), "gate='tanh' is unknown; valid names: one, raw, sigmoid"),
            (dict(remedy="none"), "remedy='none' is unknown; valid names: predictor, router"),
            (dict(eval_select="none"), "eval_select='none' is unknown; valid names: causal, top_k"),
        ],
    )
    def test_fields(self, fields: dict, message: str) -> None:
        with pytest.raises(ConfigError, match=message):
            MixtureOfDepths(Block(), **fields)

    def test_a_decoder_needs_a_remedy(self) -> None:
        with pytest.raises(ConfigError, match=r"model\.mod\.remedy=None: .* selects over later tokens; set remedy='predictor'"):
            MixtureOfDepths(Block(), remedy=None).check_causal("model.mod")
        MixtureOfDepths(Block()).check_causal("model.mod")
        with pytest.raises(ConfigError, match=r"model\.mod\.block\.remedy=None"):
            check_causal((NamedBlock("mod", "model.mod", MixtureOfDepths(MixtureOfDepths(Block(), remedy=None))),))
        assert "selects over the whole sequence" in MixtureOfDepths(Block(), eval_select="top_k").decodable()
        assert MixtureOfDepths(Block()).decodable() is None
        x = jnp.ones((B, S, D))
        with pytest.raises(ConfigError, match="decodes without a causal rule; set remedy='predictor'"):
            jax.eval_shape(MixtureOfDepths(Block(), remedy=None).init, jax.random.key(0), x, Context(decode=True))

    def test_an_moe_inside_keeps_its_own_rules(self) -> None:
        """Fields of the outer block are not taken for the slots of the same name inside."""
        moe = dict(
            kind="moe", num_experts=4, router=dict(kind="linear"), select=dict(kind="top_k"), bank=dict(kind="glu", hidden=3)
        )
        inner = dict(kind="transformer", mixer=dict(kind="attention", num_heads=1), norm=dict(kind="rms_norm"), ffn=moe)
        spec = dict(kind="mixture_of_depths", eval_select="top_k", router=dict(kind="random"), block=inner)
        built = blocks.build(spec, where="mod")
        assert (built.eval_select, built.router) == ("top_k", Random(1))
        assert isinstance(built.block, Transformer)
        assert isinstance(built.block.mixer, Attention)
        assert built.block.ffn.eval_select is None
        assert type(built.block.ffn.router).__name__ == "Linear"
