"""Microbatches that hold different numbers of tokens and of targets: losses, gradient and update are those of the whole batch."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np

import moejax as mj
from moejax.models import network
from moejax.optim.base import optimizers
from moejax.tasks.base import tasks
from moejax.train.flops import matmul_flops
from moejax.train.step import init_state, make_train_step

TASK = tasks.build({"kind": "next_token"}, "task")
DESCENT = optimizers.build(
    {"kind": "sgd", "learning_rate": 1.0, "schedule": "constant", "clip_norm": None}, "optimizer", steps=10
)
ROWS, LENGTH, VOCAB = 4, 6, 11


class Size(mj.Loss):
    """A loss of one's own, a mean over tokens."""

    def cost(self, routing):
        return jnp.square(routing.logits).sum() / jnp.maximum(routing.valid.sum(), 1)


MEANS = (mj.ZLoss(0.5), mj.Entropy(0.5), mj.Balance(0.5), Size(0.5))
OVER_THE_BATCH = (mj.DeviceBalance(0.5, over="batch", devices=2), mj.Importance(0.5), mj.Spread(0.5))


def uneven() -> dict:
    """Rows of 1 to 6 tokens, of which few are judged, and in one row none."""
    draw = np.random.default_rng(0)
    tokens = draw.integers(0, VOCAB, (ROWS, LENGTH)).astype(np.int32)
    segments = (np.arange(LENGTH) < np.array([6, 1, 4, 2])[:, None]).astype(np.int32)
    valid = (segments > 0) & (np.arange(LENGTH) % 2 == 0)
    valid[1] = False
    return {
        "tokens": jnp.asarray(tokens),
        "targets": jnp.asarray(np.roll(tokens, -1, 1)),
        "valid": jnp.asarray(valid),
        "segments": jnp.asarray(segments),
        "positions": jnp.tile(jnp.arange(LENGTH, dtype=jnp.int32), (ROWS, 1)),
    }


BATCH = uneven()


def lm(losses):
    ffn = {"kind": "moe", "num_experts": 4, "router": {"kind": "linear"}, "select": {"kind": "top_k", "k": 2}}
    block = {"kind": "feed_forward", "ffn": {**ffn, "bank": {"kind": "ffn", "hidden": 8}}, "norm": {"kind": "rms_norm"}}
    shape = {"kind": "decoder_lm", "vocab_size": VOCAB, "d_model": 8, "num_layers": 2, "scan": True}
    model = network({"model": {**shape, "pattern": ("moe",), "blocks": {"moe": block}}})
    part = model.blocks[0].module
    part = part.copy(ffn=part.ffn.copy(losses=losses))
    return model.copy(blocks=(dataclasses.replace(model.blocks[0], module=part),))


def make_step(losses, accumulation):
    return make_train_step(lm(losses), TASK, DESCENT, accumulation, jit=False)


@functools.cache
def start():
    return jax.jit(lambda: init_state(lm(()), TASK, DESCENT, BATCH, jax.random.key(0)))()


def test_losses_and_gradients_are_those_of_the_whole_batch():
    losses = MEANS + OVER_THE_BATCH
    (whole, wanted), (split, found) = (jax.jit(make_step(losses, n))(start(), BATCH) for n in (1, 4))
    names = [key for key in wanted if key.startswith("losses/")]
    assert len(names) == len(losses)
    for key in ("train/loss", "train/objective", "train/grad_norm", *names):
        np.testing.assert_allclose(found[key], wanted[key], rtol=2e-5, err_msg=key)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), split.params, whole.params)


def test_the_first_pass_costs_nothing_where_losses_are_means_over_tokens():
    def flops(losses, accumulation):
        return matmul_flops(jax.make_jaxpr(make_step(losses, accumulation))(start(), BATCH))

    # The rest is the mean of statistics over microbatches.
    assert flops(MEANS, 2) < 1.01 * flops(MEANS, 1)
    assert flops(OVER_THE_BATCH, 1) < flops(OVER_THE_BATCH, 2) < 1.4 * flops(OVER_THE_BATCH, 1)
