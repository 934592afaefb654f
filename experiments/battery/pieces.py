"""What is asked of kinds that are no part of a model: optimizers, surgeries, sources and initialisers.

As with `properties`: a short text, a ConfigError that is the library's own refusal, or an AssertionError that is a bug.
"""

import inspect
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import flax.traverse_util
import jax
import jax.numpy as jnp
import numpy as np

from experiments.battery.kinds import Kind, registries
from experiments.battery.subjects import arms_that_name, spec_of
from moejax.core.context import Context
from moejax.core.errors import ConfigError
from moejax.core.roles import Parameter
from moejax.surgery.base import Checkpoint, Target
from moejax.surgery.sources.base import Reader

LAYERS, UPDATES = 3, 3
Tree = Any


def optimizer(kind: Kind) -> str:
    """A stack of layers is updated as each of its layers would be alone; gradients of zero leave everything finite."""
    rng = np.random.default_rng(0)
    shapes = {"w_in": (LAYERS, 4, 5), "scale": (LAYERS, 4), "b": (LAYERS, 5)}
    axes = {"w_in": ("layers", "embed", "mlp"), "scale": ("layers", "embed"), "b": ("layers", "mlp")}
    params = {name: rng.normal(size=shape).astype(np.float32) for name, shape in shapes.items()}
    grads = [{name: rng.normal(size=shape).astype(np.float32) for name, shape in shapes.items()} for _ in range(UPDATES)]
    made = build(kind, clip_norm=None, weight_decay=0.1)

    def trained(params: Tree, grads: list[Tree], first: int) -> Tree:
        known = {name: Parameter((name,), x.shape, axes[name][first:]) for name, x in params.items()}
        transform = made.transform(known)
        state = transform.init(params)
        for grad in grads:
            updates, state = transform.update(grad, state, params, step=jnp.int32(0))
            params = jax.tree.map(jnp.add, params, updates)
        return params

    stacked = jax.jit(trained, static_argnums=2)(params, grads, 0)
    single = jax.jit(trained, static_argnums=2)
    for layer in range(LAYERS):
        one = single(take(params, layer), [take(grad, layer) for grad in grads], 1)
        for name in shapes:
            np.testing.assert_allclose(
                stacked[name][layer], one[name], rtol=1e-5, atol=1e-6, err_msg=f"{name} of a stack and of one layer alone"
            )
    still = jax.jit(trained, static_argnums=2)(params, [jax.tree.map(np.zeros_like, grads[0])], 0)
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(still)), "gradients of zero make a parameter infinite"
    assert any((np.asarray(stacked[name]) != params[name]).any() for name in shapes), "nothing is updated"
    return "per slice"


def initializer(kind: Kind) -> str:
    """Finite numbers of the shape and type that were asked for, the same for the same key."""
    made, shape = build(kind), (3, 8, 4)
    one, again = (np.asarray(made(jax.random.key(0), shape, jnp.float32)) for _ in range(2))
    assert one.shape == shape
    assert one.dtype == np.float32
    assert np.isfinite(one).all()
    np.testing.assert_array_equal(one, again)
    assert made(jax.random.key(0), shape, jnp.bfloat16).dtype == jnp.bfloat16
    drawn = not np.array_equal(one, np.asarray(made(jax.random.key(1), shape, jnp.float32)))
    return "drawn" if drawn else "constant"


def source(kind: Kind) -> str:
    """Gives the checkpoint that its reader finds, whole."""
    config, found = {"model": {"kind": "decoder_lm"}}, toy()
    reader = Reader(
        place="init.source",
        seed=1,
        fresh=lambda: found,
        load=lambda path, step: found,
        config_of=lambda path, step: config,
        train=lambda config, seed: found,
        published=lambda path: found,
        published_config=lambda path: config,
    )
    read = build(kind).read(reader)
    assert jax.tree.structure(dict(read.variables)) == jax.tree.structure(dict(found.variables))
    jax.tree.map(np.testing.assert_array_equal, dict(read.variables), dict(found.variables))
    return "whole"


def surgery(kind: Kind) -> str:
    """A pure function: the same twice, finite, and what it was given is as it was.

    One that does not take a checkpoint so small must be tried by a study, whose arms the tests of starts run.
    """
    before, untouched = toy(), toy()
    try:
        made = build(kind)
        after, again = (made(before, target()) for _ in range(2))
    except ConfigError:
        for study, arm in arms_that_name(kind):
            return f"in {study.slug}, {arm}"
        raise
    for name, x in before.leaves.items():
        np.testing.assert_array_equal(x, untouched.leaves[name], err_msg=f"{name} was changed in place")
    assert isinstance(after, Checkpoint)
    assert after.leaves, "nothing is left"
    for name, x in after.leaves.items():
        assert np.isfinite(np.asarray(x, np.float32)).all(), f"{name} is not finite"
        np.testing.assert_array_equal(x, again.leaves[name], err_msg=f"{name} differs when it is done twice")
    return "pure"


def model(kind: Kind) -> str:
    """Two small blocks of it: finite, and in every real place the same whatever lies in padding."""
    block = {"kind": "transformer", "norm": {"kind": "layer_norm"}, "mixer": {"kind": "attention", "num_heads": 2}}
    sizes = {"vocab_size": 7, "image_size": 4, "channels": 1, "patch_size": 2, "num_classes": 3, "d_model": 8, "num_layers": 2}
    fields = {name: value for name, value in sizes.items() if name in inspect.signature(kind.cls).parameters}
    blocks = {"one": {**block, "ffn": {"kind": "ffn", "hidden": 8}}}
    network = registries()["model"].build({"kind": kind.name, "pattern": ("one",), "blocks": blocks, **fields}, str(kind))
    texts = kind.cls.reads == "tokens"
    inputs = jnp.array([[1, 2, 3, 4]]) if texts else jnp.linspace(0, 1, 16).reshape(1, 4, 4, 1)
    valid = jnp.array([[True, True, True, False]])
    variables = network.init(jax.random.key(0), inputs)
    # The last token; of an image the last patch.
    other = inputs.at[0, 3].set(5) if texts else inputs.at[0, 2:, 2:].set(5)
    one, two = (network.apply(variables, x, Context(valid=valid)) for x in (inputs, other))
    assert np.isfinite(one).all()
    one, two = (y[:, :3] if texts else y for y in (one, two))
    np.testing.assert_allclose(one, two, atol=1e-6, err_msg="what lies in padding changes the rest")
    return "padding is inert"


def family(kind: Kind) -> str:
    """Of published models: a test computes it beside the code that it was published with."""
    tests = Path(__file__).parents[2] / "tests" / "parity"
    named = [file.name for file in sorted(tests.glob("test_*.py")) if f'"{kind.cls.architecture}"' in file.read_text()]
    assert named, f"no test in {tests} names {kind.cls.architecture}"
    return ", ".join(named)


# Slot -> what is asked of its kinds. The kinds of every other slot are parts of models; see `subjects`.
PIECES: dict[str, Callable[[Kind], str]] = {
    "optimizer": optimizer,
    "initializer": initializer,
    "source": source,
    "surgery": surgery,
    "model": model,
    "family": family,
}


def toy() -> Checkpoint:
    """A dense feed-forward layer, stacked over two repeats, that begins where a mixture of three experts is to be."""
    rng = np.random.default_rng(0)
    shapes = {"stack/repeats/0_moe/ffn/expert/w_in": (2, 1, 4, 6), "old/w": (3, 4), "head": (4,)}
    leaves = {("params", *name.split("/")): rng.normal(size=shape).astype(np.float32) for name, shape in shapes.items()}
    return Checkpoint({"model": {}}, {}).with_leaves({**leaves, ("router_state", "stack", "load"): np.float32([1, 2])})


def target() -> Target:
    """The mixture."""
    shapes = {"stack/repeats/0_moe/ffn/bank/w_in": (2, 3, 4, 6), "new/w": (3, 4), "head": (4,)}
    axes = {"stack/repeats/0_moe/ffn/bank/w_in": ("layers", "expert", "embed", "mlp")}
    known = {
        tuple(name.split("/")): Parameter(tuple(name.split("/")), shape, axes.get(name, (None,) * len(shape)))
        for name, shape in shapes.items()
    }
    wanted = {("params", *path): jax.ShapeDtypeStruct(p.shape, np.float32) for path, p in known.items()}
    return Target(
        config={},
        shapes=flax.traverse_util.unflatten_dict(wanted),
        parameters=flax.traverse_util.unflatten_dict(known),
        key=jax.random.key(0),
        others={"other": toy()},
        fresh=lambda paths: {path: np.full(wanted[path].shape, 7, np.float32) for path in paths},
        batches=lambda count: [],
    )


def build(kind: Kind, **fields: Any) -> Any:
    """The shortest of a kind, with those of the fields that it has."""
    own = {name: value for name, value in fields.items() if name in inspect.signature(kind.cls).parameters}
    return registries()[kind.slot].build({**spec_of(kind), **own}, str(kind))


def take(tree: Mapping[str, Any], index: int) -> dict[str, Any]:
    return {name: x[index] for name, x in tree.items()}
