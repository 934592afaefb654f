"""Every study in the tree: its arms build, and its paper preset traces at full size without computing anything."""

import math

import jax
import jax.numpy as jnp
import pytest
from ml_collections import ConfigDict

from experiments import catalog
from experiments.study import load, resolve, study_files
from moejax import models
from moejax.core.context import Context

SLUGS = sorted(study_files())
FULL_SIZE = {"switch": 7e9, "expert_choice": 1e9, "soft_moe": 1e10, "mixture_of_depths": 1e9, "shootout": 5e7}


def trace(config: ConfigDict) -> tuple[int, tuple[int, ...]]:
    """Number of parameters and shape of the output of one training forward pass on two examples."""
    model = models.build(config.model)
    if "image_size" not in config.model:
        inputs = jax.ShapeDtypeStruct((2, config.data.seq_len), jnp.int32)
        ctx = Context(domain=jnp.zeros(inputs.shape, jnp.int32), step=jnp.int32(0))
    else:
        ctx = Context(step=jnp.int32(0))
        side = config.model.image_size
        inputs = jax.ShapeDtypeStruct((2, side, side, config.model.channels), jnp.float32)
    key = jax.random.key(0)
    streams = {"params": key, "router": key, "dropout": key}
    variables = jax.eval_shape(lambda x: model.init(streams, x, ctx), inputs)
    out, sown = jax.eval_shape(
        lambda v, x: model.apply(v, x, ctx.replace(train=True), rngs=streams, mutable=["losses", "stats"]),
        variables,
        inputs,
    )
    assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(sown.get("losses", {})))
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(variables["params"])), out.shape


@pytest.mark.parametrize("slug", SLUGS)
def test_every_arm_of_the_cpu_preset_builds(slug: str) -> None:
    study = load(slug)
    for arm in study.every_arm:
        models.build(resolve(study, "cpu", arm).model)


@pytest.mark.parametrize("slug", SLUGS)
@pytest.mark.slow
def test_paper_preset_traces_at_full_size(slug: str) -> None:
    study = load(slug)
    # The arms of the headline; the others differ from them in few words, and tracing them all takes minutes.
    sizes = [trace(resolve(study, "paper", arm))[0] for arm in study.headline.arms]
    assert max(sizes) > FULL_SIZE.get(slug, 1e8)


def test_catalogue_names_every_study() -> None:
    rows = catalog.load()
    for slug, path in study_files().items():
        if slug in rows:
            assert rows[slug].study == f"experiments/{path.parent.name}/{path.name}"
