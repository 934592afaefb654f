"""Every method has what every method must have, every kind is tried, and the battery finds what is wrong.

python -m pytest tests/battery -k switch
"""

import dataclasses
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import pytest
from ml_collections import ConfigDict

from configs import small_lm
from experiments.battery import subjects
from experiments.battery.kinds import Kind, kinds, registries
from experiments.battery.pieces import PIECES
from experiments.battery.programs import blocks_traced_once, example, trace
from experiments.battery.properties import OF_A_KIND, OF_KINDS, PROPERTIES, REFUSABLE
from moejax.core.context import Context
from moejax.core.errors import ConfigError
from moejax.core.layer import RowWise
from moejax.core.sowing import sow
from moejax.layers.registry import ffns
from moejax.models.registry import network
from moejax.train.settings import plain

SLOW = {"devices", "paper"}
# Cells that are known from the papers. 'no' is a refusal.
KNOWN = {
    ("switch", "backends"): "reference, einsum, capacity, grouped, gather",
    ("switch", "devices"): "experts",
    ("switch", "causal"): "yes",
    ("switch", "decode"): "no",  # it evaluates with a capacity, so its tokens are planned together
    ("soft_moe", "LM"): "no",
    ("soft_moe", "ViT"): "yes",
    ("soft_moe", "causal"): "no",
    ("base_layers", "causal"): "at inference",
    ("base_layers", "decode"): "yes",
    ("smear", "devices"): "parameters",  # no mesh of eight divides three experts
    ("mone_nested", "padding"): "counted",
}


def cases() -> list[Any]:
    return [
        pytest.param(slug, name, id=f"{slug}-{name}", marks=[pytest.mark.slow] if name in SLOW else [])
        for slug in subjects.names()
        for name in PROPERTIES
    ]


def ask(subject: subjects.Subject, name: str) -> str:
    try:
        return PROPERTIES[name](subject)
    except ConfigError:
        if name not in REFUSABLE:
            raise
        return "no"


@pytest.mark.parametrize(("slug", "name"), cases())
def test_method(slug: str, name: str) -> None:
    text = ask(subjects.of_study(slug), name)
    assert text == KNOWN.get((slug, name), text)
    if name == "paper":
        assert float(text) >= subjects.of_study(slug).study.full_size


@pytest.mark.parametrize("kind", kinds(), ids=str)
def test_kind(kind: Kind) -> None:
    """Every registered kind is tried by itself, or in a model that holds it. Those of headline arms are, above."""
    if kind.slot in PIECES:
        assert PIECES[kind.slot](kind)
        return
    subject = subjects.of_kind(kind.slot, kind.name)
    assert kind.cls in subject.holds
    if subject.study is None:
        for name in OF_KINDS.get(kind.slot, OF_A_KIND):
            ask(subject, name)


def test_every_registry_is_known_and_every_example_is_of_one() -> None:
    assert set(registries()) == set(PIECES) | set(subjects.PLACES)
    assert set(subjects.PARTS) <= set(registries())


def test_a_kind_that_nothing_can_be_made_of_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    """Not left out in silence: it fails `test_kind`."""

    @dataclasses.dataclass(frozen=True)
    class Unheard:
        unheard_of: int

    monkeypatch.setitem(ffns._classes, "unheard", Unheard)
    monkeypatch.setitem(ffns._slots, "unheard", {})
    with pytest.raises(ConfigError, match=r"ffn\.unheard needs 'unheard_of', of which the battery has no example"):
        subjects.made_for(Kind("ffn", "unheard", Unheard))


def test_shapes_of_a_model_whose_blocks_are_traced_once_are_those_of_the_model() -> None:
    config = plain(small_lm.get_config())
    names = list(config["model"]["blocks"])
    pattern = (*names, *names, names[0])
    for d_model in (16, 32):  # of the second, nothing may be taken from the first
        model = {**config["model"], "d_model": d_model, "pattern": pattern, "num_layers": 2 * len(pattern)}
        made = network({**config, "model": model}), *example(config, rows=2)
        whole = trace(*made)
        with blocks_traced_once():
            first, again = trace(*made), trace(*made)
        assert jax.tree.leaves(whole[1]["params"])
        assert whole == first == again


class Buggy(RowWise):
    """A layer with one bug, that says that it treats each token by itself."""

    bug: str
    backend: str = "auto"

    @nn.compact
    def __call__(self, x: jax.Array, ctx: Context | None = None) -> jax.Array:
        y = nn.Dense(x.shape[-1], name="dense")(x).astype(x.dtype)
        real = ctx.real(x)[..., None]
        match self.bug:
            case "sees_later_tokens":
                return y + x.mean(1, keepdims=True)
            case "sees_later_tokens_in_training":
                return y + (x.mean(1, keepdims=True) if ctx.train else 0)
            case "counts_padding":
                sow(self, "losses", "mean_loss", jnp.where(real, y, 0).mean())
            case "divides_by_tokens":
                y = y / jnp.where(real.sum() > 1, 1.0, real.sum() - 1.0) * 1.0
            case "depends_on_backend":
                y = y * (2 if self.backend == "capacity" else 1)
            case "depends_on_scan":
                y = y * (2 if "repeats" in self.path else 1)
            case "routes_in_bfloat16":
                sow(self, "routing", "logits", y)
            case "needs_positions_from_0":
                y = y * (2 if ctx.decode else 1)
        return y


def buggy(bug: str) -> subjects.Subject:
    config = small_lm.get_config()
    with config.ignore_type():
        config.model.blocks.moe.ffn = ConfigDict({"kind": "buggy", "bug": bug})
    return subjects.Subject(bug, subjects.small(config))


@pytest.mark.parametrize(
    ("bug", "name", "message"),
    [
        ("sees_later_tokens", "causal", "outputs before a token that changed, in evaluation"),
        ("counts_padding", "padding", "losses with padding and without"),
        ("divides_by_tokens", "degenerate", "one token|all padding"),
        ("depends_on_backend", "backends", "backend 'capacity' and 'reference'"),
        ("routes_in_bfloat16", "bfloat16", "routes in less than float32"),
        ("needs_positions_from_0", "decode", "logits with a cache and of the whole text"),
        pytest.param("depends_on_scan", "devices", "a step with scan=True and the oracle", marks=pytest.mark.slow),
    ],
)
def test_a_planted_bug_is_found(monkeypatch: pytest.MonkeyPatch, bug: str, name: str, message: str) -> None:
    monkeypatch.setitem(ffns._classes, "buggy", Buggy)
    monkeypatch.setitem(ffns._slots, "buggy", {})
    with pytest.raises(AssertionError, match=message):
        PROPERTIES[name](buggy(bug))


def test_what_leaks_in_training_only_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(ffns._classes, "buggy", Buggy)
    monkeypatch.setitem(ffns._slots, "buggy", {})
    assert PROPERTIES["causal"](buggy("sees_later_tokens_in_training")) == "at inference"
    assert PROPERTIES["causal"](buggy("none")) == "yes"
