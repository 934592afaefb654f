"""What every method must have, as functions of a subject.

A property gives a short text, the cell of a matrix. It raises ConfigError where the library itself refuses (a rule that sees later
tokens in a decoder, say), and AssertionError where something is wrong: a bug of the method.
"""

import contextlib
import functools
import json
import math
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from experiments.battery.kinds import inside
from experiments.battery.programs import GROUPS, LENGTH, Batch, blocks_traced_once, example, programs, trace
from experiments.battery.subjects import WIDTH, Subject, build
from experiments.study import resolve
from moejax.core.errors import ConfigError
from moejax.models.registry import network
from moejax.optim.base import optimizers
from moejax.serve import generate
from moejax.train.checkpoints import Checkpoints, load
from moejax.train.settings import plain
from moejax.train.step import begin_state

MESH = "data=4,expert=2"
NEW = 3  # tokens that are decoded
CUT = LENGTH // 2
AMONG = np.array([1, 2, 4, 5, 7])  # tokens between padding
# All that a train step does to a model at once; `_together` looks for the culprit among them when they fail.
TOGETHER = {"scan": True, "remat": "full", "accumulation": 2}

Tree = Any


def lm(subject: Subject) -> str:
    """A decoder of it can be trained: a pass traces in bfloat16, scanned and rematerialised."""
    _ = programs(subject, "LM").traced
    return "yes"


def vit(subject: Subject) -> str:
    """The same of a model of images."""
    _ = programs(subject, "ViT").traced
    return "yes"


def backends(subject: Subject) -> str:
    """Every backend that takes it agrees with `reference`, in value and in gradient; names them."""
    if not _has_backend(subject):
        return "-"
    found, refused = programs(subject).backends(*_rows())
    if "reference" in refused:
        raise ConfigError(refused["reference"])
    for name, out in found.items():
        same(out, found["reference"], f"backend '{name}' and 'reference'")
    return ", ".join(found)


def padding(subject: Subject) -> str:
    """Padding is never routed, counted or balanced: values, losses and gradients are those of the tokens without it.

    In training, where draws would differ, other junk in the padding must change nothing. 'counted' of layers that say that they
    count it, see `moejax.Layer.counts_padding`: of them only the junk is tried.
    """
    (x, valid), made = _rows(), programs(subject)
    counted = any(getattr(part, "counts_padding", False) for part in inside(made.model))
    padded = made.layer(x, valid)
    d_params, dx = padded["gradients"]
    if not counted:
        compact = made.layer(x[:, AMONG], valid[:, AMONG])
        compact_d_params, compact_dx = compact["gradients"]
        same(padded["y"][:, AMONG], compact["y"], "outputs with padding and without")
        same(padded["losses"], compact["losses"], "losses with padding and without")
        same(d_params, compact_d_params, "gradients with padding and without")
        same(dx[:, AMONG], compact_dx, "gradients of tokens with padding and without")
    assert not dx[:, np.setdiff1d(np.arange(LENGTH), AMONG)].any(), "padding has a gradient"
    if subject.home == "LM":
        one, other = (_with_padding(made.batch(), junk) for junk in (1, 2))
        found = [made.oracle(batch) for batch in (one, other)]
        for out in found:
            out["outputs"] = np.where(one["valid"][..., None], out["outputs"], 0)
        same(*found, "a training step with one junk in the padding and with another")
    return "counted" if counted else "inert"


def causal(subject: Subject) -> str:
    """Later tokens change nothing before them, in evaluation; 'at inference' where in training they do."""
    made = _decoder(subject)
    batch = made.batch()
    other = {**batch, "tokens": batch["tokens"].copy()}
    other["tokens"][:, CUT:] = made.batch(1)["tokens"][:, CUT:]
    same(made.evaluate(batch)[:, :CUT], made.evaluate(other)[:, :CUT], "outputs before a token that changed, in evaluation")
    one, two = (made.oracle(b)["outputs"][:, :CUT] for b in (batch, other))
    return "yes" if np.allclose(one, two, rtol=1e-4, atol=1e-4) else "at inference"


def decode(subject: Subject) -> str:
    """Tokens decoded with a cache have the logits of the whole text at once."""
    made = _decoder(subject)
    tokens = made.batch()["tokens"]
    prompt = tokens[:, : LENGTH - NEW]
    out = generate(made.model, made.variables, prompt, max_new_tokens=NEW, keep_logits=True)
    text = np.concatenate([prompt, np.asarray(out.tokens)], 1)
    logits = made.evaluate({**made.batch(), "tokens": text})[:, LENGTH - NEW - 1 : -1]
    same(np.asarray(out.logits), logits, "logits with a cache and of the whole text", 1e-3)
    return "yes"


def devices(subject: Subject) -> str:
    """Scanned, rematerialised, in microbatches and on eight devices a step does what it does layer by layer on one.

    'experts' if they are split and tokens travel; 'parameters' if XLA splits the layer by its parameters' names.
    """
    wheres: list[tuple[str, dict[str, Any]]] = [("parameters", {"mesh": MESH}), ("parameters", {"mesh": "fsdp"})]
    if _has_backend(subject):
        wheres.insert(0, ("experts", {"mesh": MESH, "backend": "expert_parallel"}))
    for i, (text, where) in enumerate(wheres):
        try:
            _together(subject, {**TOGETHER, **where})
        except ConfigError:
            if i == len(wheres) - 1:
                raise
            continue
        return text
    raise AssertionError("unreachable")


def bfloat16(subject: Subject) -> str:
    """In a bfloat16 model routing, losses, parameters and outputs are float32."""
    outputs, sown = programs(subject).traced
    for what, tree in {"outputs": outputs, "parameters": sown["params"], "losses": sown.get("losses", {})}.items():
        wrong = {str(leaf.dtype) for leaf in jax.tree.leaves(tree)} - {"float32"}
        assert not wrong, f"{what} of a bfloat16 model are {wrong}"
    floats = [leaf for leaf in jax.tree.leaves(sown.get("routing", {})) if jnp.issubdtype(leaf.dtype, jnp.floating)]
    assert all(leaf.dtype == jnp.float32 for leaf in floats), "a bfloat16 model routes in less than float32"
    return "float32"


def degenerate(subject: Subject) -> str:
    """Values and gradients are finite, whatever comes: constant tokens, one token, all padding, huge parameters."""
    made = programs(subject)
    batch = made.batch()
    if subject.home == "LM":
        first = np.zeros(batch["valid"].shape, bool)
        first[0, 0] = True
        inputs = {
            "constant tokens": {**batch, "tokens": 0 * batch["tokens"]},
            "one token": {**batch, "valid": first, "segments": first.astype(np.int32)},
            "all padding": {**batch, "valid": 0 * first == 1, "segments": 0 * batch["segments"]},
        }
    else:
        inputs = {
            "constant images": {**batch, "image": 0 * batch["image"]},
            "huge images": {**batch, "image": 1e4 * batch["image"]},
            "no valid image": {**batch, "valid": 0 * batch["label"] == 1},
        }
    for name, given in inputs.items():
        finite(made.oracle(given), name)
    huge = {**made.variables, "params": jax.tree.map(lambda p: 30 * p, made.variables["params"])}
    finite(made.oracle(batch, huge), "parameters 30 times as large")
    return "finite"


def saved(subject: Subject) -> str:
    """Config and state come back from text and disk as they were, to the bit."""
    made = programs(subject)
    config = json.loads(json.dumps(made.config))
    assert build(config) == build(made.config), "a model built from the saved config differs"
    optimizer = optimizers.build(made.config["optimizer"], "optimizer", steps=made.config["train"]["steps"])
    state = begin_state(jax.tree.map(jnp.asarray, made.variables), optimizer, jax.random.key(0))
    with tempfile.TemporaryDirectory() as folder:
        with_files = Checkpoints(Path(folder) / "checkpoints", keep=1, asynchronous=False)
        with_files.save(1, state, {}, {"config": config, "seed": 0})
        restored = with_files.restore(1, state).state
        with_files.close()
        alone = load(folder)
    identical = jax.tree.map(lambda a, b: a.dtype == b.dtype and bool((a == b).all()), _arrays(restored), _arrays(state))
    assert all(jax.tree.leaves(identical)), "a state that was saved comes back changed"
    assert alone.config == config
    assert jax.tree.structure(dict(alone.variables)) == jax.tree.structure(dict(state.variables))
    return "same"


def paper(subject: Subject) -> str:
    """The arms of the headline trace at the paper's size, without computing anything; the parameters of the largest."""
    study = subject.study
    if study is None:
        return "-"
    return f"{max(paper_size(plain(resolve(study, 'paper', arm))) for arm in study.headline.arms):.2g}"


PROPERTIES: dict[str, Callable[[Subject], str]] = {
    "LM": lm,
    "ViT": vit,
    "backends": backends,
    "devices": devices,
    "causal": causal,
    "decode": decode,
    "padding": padding,
    "bfloat16": bfloat16,
    "degenerate": degenerate,
    "saved": saved,
    "paper": paper,
}
# Of a kind that no headline arm holds, what it can change is tried, and not what costs most.
OF_KINDS = {
    "loss": ("LM", "padding", "bfloat16", "degenerate"),
    "router": ("LM", "ViT", "causal", "decode", "padding", "bfloat16", "degenerate"),
    "bank": ("LM", "ViT", "backends", "padding", "bfloat16", "degenerate"),
    "task": ("LM", "degenerate", "saved"),
}
OF_A_KIND = ("LM", "ViT", "backends", "causal", "decode", "padding", "bfloat16", "degenerate")
# What a method may be without; the others every one must have.
REFUSABLE = frozenset({"LM", "ViT", "causal", "decode"})


def paper_size(config: Mapping[str, Any]) -> int:
    """Number of parameters of a config whose training forward pass traces on two examples."""
    # Adapters sit in blocks by their places, so that equal blocks may have other ones.
    with contextlib.nullcontext() if config.get("adapters") else blocks_traced_once():
        _, sown = trace(network(config), *example(config, rows=2))
    assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(sown.get("losses", {})))
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(sown["params"]))


def same(one: Tree, other: Tree, what: str, tolerance: float = 2e-4) -> None:
    """Raises AssertionError if two trees of arrays differ: `what` says which they are.

    The tolerance is of the largest entry of each array: sums of large numbers have small rests.
    """
    assert jax.tree.structure(one) == jax.tree.structure(other), f"{what} have other parts"

    def compare(path: Any, a: Any, b: Any) -> None:
        a, b = np.asarray(a), np.asarray(b)
        name = f"{what}: {jax.tree_util.keystr(path)}"
        scale = max(float(np.abs(b).max(initial=0.0)), 1e-2)
        np.testing.assert_allclose(a, b, rtol=tolerance, atol=tolerance * scale, err_msg=name)

    jax.tree_util.tree_map_with_path(compare, one, other)


def finite(tree: Tree, what: str) -> None:
    """Raises AssertionError if an array of a tree has NaN or an infinity."""
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        assert np.isfinite(leaf).all(), f"{what}: {jax.tree_util.keystr(path)} is not finite"


def _together(subject: Subject, parts: Mapping[str, Any]) -> None:
    """Compares a step under `parts` with the oracle; of a difference, says which part alone makes it.

    Raises:
      ConfigError: the mesh, or the exchange of tokens, does not take the subject.
    """
    made = programs(subject)

    @functools.cache
    def oracle(count: int) -> dict[str, Tree]:
        found = [made.oracle(batch) for batch in made.step_of(count)[1]]
        return {
            name: jax.tree.map(lambda *x: sum(x) / len(x), *(out[name] for out in found)) for name in ("losses", "gradients")
        }

    def check(parts: Mapping[str, Any]) -> None:
        got, wanted = made.together(parts), oracle(parts.get("accumulation", 1))
        what = "a step with " + ", ".join(f"{key}={value}" for key, value in parts.items())
        for name in ("losses", "gradients"):
            same(got[name], wanted[name], f"{what} and the oracle", 1e-3)

    try:
        check(parts)
    except AssertionError as error:
        # Only now: every part by itself is a program of its own.
        place = {name: parts[name] for name in ("mesh", "backend") if name in parts}
        alone = [{name: value} for name, value in parts.items() if name not in place] + [place]
        for one in alone:
            try:
                check(one)
            except AssertionError as culprit:
                raise culprit from None
        raise error


def _has_backend(subject: Subject) -> bool:
    return any(hasattr(part, "backend") for part in inside(programs(subject).model))


def _rows() -> tuple[np.ndarray, np.ndarray]:
    """Rows with junk between them, and which are none."""
    rng = np.random.default_rng(1)
    x = 9 * rng.normal(size=(GROUPS, LENGTH, WIDTH)).astype(np.float32)
    x[:, AMONG] = rng.normal(size=(GROUPS, len(AMONG), WIDTH))
    return x, np.broadcast_to(np.isin(np.arange(LENGTH), AMONG), (GROUPS, LENGTH))


def _with_padding(batch: Batch, junk: int) -> Batch:
    """The batch with the ends of its rows as padding, which holds other tokens for another `junk`."""
    lengths = np.resize([LENGTH, 5, 1, 3], len(batch["valid"]))[:, None]
    valid = np.arange(LENGTH) < lengths
    tokens = np.random.default_rng(junk).integers(0, 32, valid.shape).astype(np.int32)
    return {
        **batch,
        "tokens": np.where(valid, batch["tokens"], tokens),
        "targets": np.where(valid, batch["targets"], tokens),
        "segments": valid.astype(np.int32),
        "valid": valid,
    }


def _decoder(subject: Subject) -> Any:
    """The programs of a subject as a decoder; raises the refusal if it can be none."""
    build(subject.place("LM"))
    return programs(subject) if subject.home == "LM" else programs(subject, "LM")


def _arrays(state: Any) -> Any:
    """A state as NumPy arrays, which are compared without a compilation; random keys as numbers."""
    return jax.tree.map(
        lambda x: np.asarray(jax.random.key_data(x) if jnp.issubdtype(jnp.asarray(x).dtype, jax.dtypes.prng_key) else x), state
    )
