"""Decoding with caches equals running the whole sequence again for every token."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moejax.core.context import Context
from moejax.core.errors import ConfigError
from moejax.models import build
from moejax.serve import Temperature, complete, generate

V, LENGTHS, NEW = 23, np.array([2, 6, 4]), 5
NORM = dict(kind="rms_norm")
MIXER = dict(kind="attention", num_heads=4, num_kv_heads=2)
DENSE = dict(kind="transformer", mixer=MIXER, norm=NORM, ffn=dict(kind="glu", hidden=16))
WINDOW = dict(DENSE, mixer=dict(MIXER, window=3, qk_norm="head"))
MOE = dict(
    DENSE,
    ffn=dict(
        kind="moe",
        num_experts=4,
        router=dict(kind="linear"),
        select=dict(kind="top_k", k=2),
        bank=dict(kind="glu", hidden=8),
    ),
)
MOD = dict(kind="mixture_of_depths", capacity_factor=0.5, block=DENSE)
BLOCKS = dict(dense=DENSE, window=WINDOW, moe=MOE, mod=MOD)


def make(pattern, **fields):
    """A model away from its start, and prompts of unequal lengths, padded with junk."""
    blocks = {name: BLOCKS[name] for name in pattern}
    sizes = {"vocab_size": V, "d_model": 16, "num_layers": 2 * len(pattern), "max_length": 12, **fields}
    model = build(dict(kind="decoder_lm", pattern=pattern, blocks=blocks, **sizes))
    prompt = jnp.asarray(np.random.default_rng(0).integers(0, V, (3, 6)))
    return model, random_params(model, prompt), prompt


def random_params(model, prompt):
    """Parameters away from their start, so that no layer is near the identity; drawn without compiling anything."""
    shapes = jax.eval_shape(model.init, jax.random.key(0), prompt)["params"]
    rng = np.random.default_rng(1)

    def draw(leaf):
        noise = rng.normal(size=leaf.shape)
        return jnp.asarray(noise / np.sqrt(leaf.shape[-2]) if leaf.ndim > 1 else 1 + 0.2 * noise, leaf.dtype)

    return jax.tree.map(draw, shapes)


def whole(model, params, prompt, out):
    """Every row's prompt and continuation, and the logits of one uncached pass over them."""
    rows = [np.concatenate([p[:n], t]) for p, n, t in zip(np.asarray(prompt), LENGTHS, np.asarray(out.tokens), strict=True)]
    padded = jnp.asarray([np.pad(row, (0, 12 - len(row))) for row in rows])  # causal: padding on the right is not seen
    return jax.jit(model.apply)({"params": params}, padded)


@pytest.mark.parametrize(
    ("pattern", "scan"), [(("dense", "moe"), True), (("window", "moe"), False), (("mod", "dense"), True), (("mod",), False)]
)
@pytest.mark.slow
def test_cached_greedy_decoding_equals_full_passes(pattern, scan):
    model, params, prompt = make(pattern, scan=scan)
    out = generate(model, params, prompt, LENGTHS, NEW, keep_logits=True)
    logits = whole(model, params, prompt, out)
    for row, n in enumerate(LENGTHS):
        expected = np.asarray(logits[row, n - 1 : n - 1 + NEW])
        np.testing.assert_allclose(out.logits[row], expected, atol=1e-5)
        np.testing.assert_array_equal(out.tokens[row], expected.argmax(-1))
    assert out.lengths.tolist() == [NEW] * 3
    assert len(set(np.asarray(out.tokens).ravel().tolist())) > 2  # not one token over and over


def test_depth_blocks_store_only_the_tokens_that_they_process():
    model, params, prompt = make(("mod",))
    positions = jnp.broadcast_to(jnp.arange(6), (3, 6))
    ctx = Context(positions=positions, valid=positions < LENGTHS[:, None], decode=True)
    _, state = jax.jit(lambda p: model.apply({"params": p}, prompt, ctx, mutable=["cache"]))(params)
    (used,) = [leaf for path, leaf in jax.tree_util.tree_leaves_with_path(state) if "used" in str(path[-1])]
    assert used.shape == (2, 3)
    assert (used <= LENGTHS).all()
    assert 0 < used.sum() < 2 * LENGTHS.sum()


def test_sampling_is_reproducible_and_follows_the_key():
    model, params, prompt = make(("dense",))
    sampler = Temperature(2.0, top_k=10)
    first, again, other = (
        generate(model, params, prompt, LENGTHS, NEW, sampler, jax.random.key(seed)).tokens for seed in (0, 0, 1)
    )
    np.testing.assert_array_equal(first, again)
    assert (first != other).any()


@pytest.mark.slow
def test_stop_token_ends_a_row_and_leaves_the_others_alone():
    model, params, prompt = make(("dense", "moe"))
    free = np.asarray(generate(model, params, prompt, LENGTHS, NEW).tokens)
    stop = int(free[1, 1])
    out = generate(model, params, prompt, LENGTHS, NEW, stop_token=stop)
    for row in range(3):
        hits = np.flatnonzero(free[row] == stop)
        length = hits[0] + 1 if hits.size else NEW
        assert int(out.lengths[row]) == length
        np.testing.assert_array_equal(out.tokens[row, :length], free[row, :length])
        assert (np.asarray(out.tokens[row, length:]) == stop).all()


def test_unpadded_prompts_need_no_lengths_and_variables_may_be_complete():
    model, params, prompt = make(("dense",))
    out = generate(model, {"params": params}, np.asarray(prompt), max_new_tokens=2)
    expected = generate(model, params, prompt, np.full(3, 6), 2)
    np.testing.assert_array_equal(out.tokens, expected.tokens)


def test_complete_continues_bytes():
    model, params, _ = make(("dense",), vocab_size=256, max_length=64)
    text = "dépth"
    data = list(text.encode())
    out = generate(model, params, np.array([data]), max_new_tokens=4)
    expected = bytes(np.asarray(out.tokens[0], np.uint8)).decode(errors="replace")
    assert complete(model, params, text, 4) == expected
    with pytest.raises(ConfigError, match=r"exceed model\.max_length=64"):
        complete(model, params, "x" * 62, 4)
    with pytest.raises(ConfigError, match="at least one byte"):
        complete(model, params, "", 4)


def test_what_cannot_be_decoded_is_refused():
    model, params, prompt = make(("dense",))
    with pytest.raises(ConfigError, match=r"6 tokens and max_new_tokens=7 exceed model\.max_length=12"):
        generate(model, params, prompt, LENGTHS, 7)
    with pytest.raises(ConfigError, match=r"lengths=\[0, 6, 4\] must lie in 1\.\.6"):
        generate(model, params, prompt, np.array([0, 6, 4]), 2)
    with pytest.raises(ConfigError, match="max_new_tokens=0"):
        generate(model, params, prompt, LENGTHS, 0)
    with pytest.raises(ConfigError, match="256 bytes"):
        complete(model, params, "text")
    capacity = dict(MOE, ffn=dict(MOE["ffn"], select=dict(kind="top_k", k=1, capacity_factor=1.0, normalise=False)))
    limited = build(dict(kind="decoder_lm", vocab_size=V, d_model=16, num_layers=1, pattern=("m",), blocks=dict(m=capacity)))
    with pytest.raises(ConfigError, match=r"cannot be decoded token by token: model\.blocks\.m\.ffn: .*eval_capacity_factor"):
        generate(limited, params, prompt, LENGTHS, 2)
