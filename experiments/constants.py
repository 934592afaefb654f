"""Claims that cannot fail, as far as their configs show it: statistics that a select rule makes the same number, whatever is learnt."""

import fnmatch
from collections.abc import Iterator, Mapping
from typing import Any

from ml_collections import ConfigDict

# Statistic -> the kinds of select rule under which it is 0 whatever the router learns; 'dropless' is any without a capacity.
FIXED = {"drop_rate": "dropless", "max_violation": "expert_choice"}
DROPS_BY_CAPACITY = ("top_k", "top_p")  # rules that drop nothing without one


def fixed_at(metric: str, config: ConfigDict) -> str:
    """Why `metric` of a run of `config` is known before it; empty if it is not."""
    name = metric.rpartition("/")[2]
    if name not in FIXED or not fnmatch.fnmatchcase(metric, "*stats/*"):
        return ""
    rules = list(_rules(config.copy_and_resolve_references().to_dict().get("model", {}), metric.startswith("eval/")))
    if not rules:
        return ""
    if FIXED[name] == "dropless" and all(_dropless(rule, metric.startswith("eval/")) for rule in rules):
        return "nothing is dropped where no capacity is set, so the drop rate is 0"
    if FIXED[name] == "expert_choice" and all(rule.get("kind") == "expert_choice" for rule in rules):
        return "experts that choose their tokens all take equally many, so no load is above the mean"
    return ""


def _dropless(rule: Mapping[str, Any], evaluated: bool) -> bool:
    factor = rule.get("capacity_factor")
    if evaluated:
        factor = rule.get("eval_capacity_factor", factor)
    return rule.get("kind") in DROPS_BY_CAPACITY and factor is None


def _rules(model: Mapping[str, Any], evaluated: bool) -> Iterator[Mapping[str, Any]]:
    """The select rules of the blocks that a model's pattern names, those of evaluation if that is what is measured."""
    pattern = model.get("pattern")
    blocks = model.get("blocks", {})
    named = [blocks[name] for name in dict.fromkeys(pattern) if name in blocks] if pattern else [model]
    yield from _selects(named, evaluated)


def _selects(value: Any, evaluated: bool) -> Iterator[Mapping[str, Any]]:
    if isinstance(value, Mapping):
        rule = (value.get("eval_select") if evaluated else None) or value.get("select")
        if isinstance(rule, Mapping):
            yield rule
        for name, part in value.items():
            if name not in ("select", "eval_select"):
                yield from _selects(part, evaluated)
    elif isinstance(value, list | tuple):
        for part in value:
            yield from _selects(part, evaluated)
