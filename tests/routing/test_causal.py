"""The flags `causal` and `per_token` are true, and neither is merely cautious: one leak test over every rule and priority."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moejax.routing import (
    BalancedAssignment,
    ExpertChoice,
    ExpertDropout,
    GShard,
    NullExperts,
    ReLU,
    Sinkhorn,
    SoftSlots,
    TopAny,
    TopK,
)
from moejax.routing.select import Select, num_outputs

G, N, E, CUT, DRAWS = 2, 9, 4, 6, 6

RULES: dict[str, tuple[Select, bool, bool]] = {  # rule, causal, per_token
    "dropless": (TopK(k=2), True, True),
    "dropless_by_score": (TopK(k=2, priority="score"), True, True),
    "token": (TopK(k=2, capacity_factor=0.7), True, False),
    "choice": (TopK(k=2, capacity_factor=0.7, priority="choice"), False, False),
    "choice_1": (TopK(k=1, capacity_factor=0.7, priority="choice"), True, False),
    "score": (TopK(k=2, capacity_factor=0.7, priority="score"), False, False),
    "score_1": (TopK(k=1, capacity_factor=0.7, priority="score"), False, False),
    "score_in_training": (TopK(capacity_factor=0.7, eval_capacity_factor=None, priority="score"), False, True),
    "score_in_evaluation": (TopK(capacity_factor=None, eval_capacity_factor=0.7, priority="score"), False, False),
    "gshard": (GShard(0.7), False, False),
    "gshard_dropless": (GShard(None), True, True),
    "null_experts": (NullExperts(k=3, num_null=5), True, True),
    "relu": (ReLU(), True, True),
    "top_any": (TopAny(), True, True),
    "expert_dropout": (ExpertDropout(TopK(k=2, score="sigmoid"), 0.3), True, True),
    "limited_groups": (TopK(k=2, groups=2, groups_kept=1), True, True),
    "balanced_assignment": (BalancedAssignment(), False, False),
    "sinkhorn": (Sinkhorn(), False, False),
    "expert_choice": (ExpertChoice(1.0), False, False),
    "expert_choice_in_order": (ExpertChoice(0.3, score="logit", in_order=True), False, False),
    "soft": (SoftSlots(), False, False),
    "soft_slots": (SoftSlots(slots=2), False, False),
}


def logits(rng: np.random.Generator, rule: Select, n: int = N) -> np.ndarray:
    return rng.normal(size=(G, n, num_outputs(rule, E))).astype(np.float32)


def what_tokens_get(rule: Select, x: np.ndarray, train: bool) -> tuple[np.ndarray, ...]:
    """Per token: its row of the combine matrix, and for soft plans also its row of the dispatch matrix."""
    key = {"key": jax.random.key(0)} if train and rule.needs_key else {}
    plan = rule(jnp.asarray(x), jnp.ones(x.shape[:2], bool), train=train, **key)
    return (plan.dense(),) if hasattr(plan, "dense") else (plan.dispatch, plan.combine)


@pytest.mark.parametrize("name", RULES)
def test_later_tokens_change_earlier_plans_exactly_where_the_rule_is_not_causal(rng: np.random.Generator, name: str) -> None:
    rule, causal, _ = RULES[name]
    changed = []
    for _ in range(DRAWS):
        before = logits(rng, rule)
        after = before.copy()
        after[:, CUT:] = logits(rng, rule, N - CUT)
        for train in (True, False):
            pairs = zip(what_tokens_get(rule, before, train), what_tokens_get(rule, after, train), strict=True)
            changed += [not np.array_equal(a[:, :CUT], b[:, :CUT]) for a, b in pairs]
    assert any(changed) == (not causal)
    assert rule.causal == causal


@pytest.mark.parametrize("name", RULES)
def test_a_token_alone_gets_the_same_plan_exactly_where_the_rule_is_per_token(rng: np.random.Generator, name: str) -> None:
    rule, _, per_token = RULES[name]
    same = []
    for _ in range(DRAWS):
        x = logits(rng, rule)
        together = what_tokens_get(rule, x, train=False)
        alone = what_tokens_get(rule, x.reshape(G * N, 1, -1), train=False)
        same += [np.allclose(a, np.asarray(b).reshape(a.shape), rtol=1e-6) for a, b in zip(together, alone, strict=True)]
    assert all(same) == per_token
    assert rule.per_token == per_token
