"""The flags `causal` and `per_token` are true, and neither is merely cautious: one leak test over every rule and priority."""

import dataclasses
import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moejax.core.context import Context
from moejax.routing.select.base import Select, selects

G, N, E, CUT, DRAWS = 2, 9, 4, 6, 6

# What a rule's flags are to be, where its settings make a difference; every registered rule is tried with its defaults besides.
VARIANTS: dict[str, tuple[dict, ...]] = {
    "top_k": (
        {"k": 2},
        {"k": 2, "priority": "score"},
        {"k": 2, "capacity_factor": 0.7},
        {"k": 2, "capacity_factor": 0.7, "priority": "choice"},
        {"k": 1, "capacity_factor": 0.7, "priority": "choice"},
        {"k": 2, "capacity_factor": 0.7, "priority": "score"},
        {"k": 1, "capacity_factor": 0.7, "priority": "score"},
        {"capacity_factor": 0.7, "eval_capacity_factor": None, "priority": "score"},
        {"capacity_factor": None, "eval_capacity_factor": 0.7, "priority": "score"},
        {"k": 2, "expert_groups": 2, "groups_kept": 1},
    ),
    "gshard": ({"capacity_factor": 0.7}, {"capacity_factor": None}),
    "null_experts": ({"k": 3, "num_null": 5},),
    "expert_dropout": ({"select": {"kind": "top_k", "k": 2, "score": "sigmoid"}, "rate": 0.3},),
    "expert_choice": ({"capacity_factor": 1.0}, {"capacity_factor": 0.3, "score": "logit", "in_order": True}),
    "soft_slots": ({"slots": 2},),
}


def rules() -> dict[str, Select]:
    """Every registered rule with its defaults, where it has them, and its variants."""
    found = {}
    for kind, cls in selects.items():
        complete = all(f.default is not dataclasses.MISSING for f in dataclasses.fields(cls))
        for fields in (*(({},) if complete else ()), *VARIANTS.get(kind, ())):
            name = "-".join((kind, *(f"{key}={value}" for key, value in fields.items() if key != "select")))
            found[name] = selects.build({"kind": kind, **fields}, "select")
    return found


RULES = rules()


def test_every_registered_rule_is_tried() -> None:
    assert {type(rule) for rule in RULES.values()} == {cls for _, cls in selects.items()}, "give the rule variants above"


def logits(rng: np.random.Generator, rule: Select, n: int = N) -> np.ndarray:
    return rng.normal(size=(G, n, rule.num_outputs(E))).astype(np.float32)


def what_tokens_get(rule: Select, x: np.ndarray, train: bool) -> tuple[np.ndarray, ...]:
    """Per token: its row of the combine matrix, and for soft plans also its row of the dispatch matrix."""
    return _compiled(rule, train)(jnp.asarray(x))


@functools.cache
def _compiled(rule: Select, train: bool) -> Callable[[jax.Array], tuple[jax.Array, ...]]:
    def run(x: jax.Array) -> tuple[jax.Array, ...]:
        plan = rule(x, Context(train=train, key=jax.random.key(0), step=jnp.int32(0)))
        return (plan.dense(),) if hasattr(plan, "dense") else (plan.dispatch, plan.combine)

    return jax.jit(run)


@pytest.mark.parametrize("name", RULES)
def test_later_tokens_change_earlier_plans_exactly_where_the_rule_is_not_causal(rng: np.random.Generator, name: str) -> None:
    rule, changed = RULES[name], []
    for _ in range(DRAWS):
        before = logits(rng, rule)
        after = before.copy()
        after[:, CUT:] = logits(rng, rule, N - CUT)
        for train in (True, False):
            pairs = zip(what_tokens_get(rule, before, train), what_tokens_get(rule, after, train), strict=True)
            changed += [not np.array_equal(a[:, :CUT], b[:, :CUT]) for a, b in pairs]
    assert any(changed) == (not rule.causal)


@pytest.mark.parametrize("name", RULES)
def test_a_token_alone_gets_the_same_plan_exactly_where_the_rule_is_per_token(rng: np.random.Generator, name: str) -> None:
    rule, same = RULES[name], []
    for _ in range(DRAWS):
        x = logits(rng, rule)
        together = what_tokens_get(rule, x, train=False)
        alone = what_tokens_get(rule, x.reshape(G * N, 1, -1), train=False)
        same += [np.allclose(a, np.asarray(b).reshape(a.shape), rtol=1e-6) for a, b in zip(together, alone, strict=True)]
    assert all(same) == rule.per_token
