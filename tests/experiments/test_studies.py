"""Every study in the tree: its arms build, at the paper's size they trace, and its ablations are claimed."""

import json
from typing import Any

import pytest

from experiments import catalog, check_matching
from experiments.battery.properties import paper_size
from experiments.study import load, resolve, study_files
from moejax import models
from moejax.train.settings import plain

SLUGS = sorted(study_files())


@pytest.mark.parametrize("slug", SLUGS)
def test_every_arm_of_the_cpu_preset_builds(slug: str) -> None:
    study = load(slug)
    for arm in study.every_arm:
        models.build(resolve(study, "cpu", arm).model)


def test_catalogue_names_every_study() -> None:
    rows = catalog.load()
    for slug, path in study_files().items():
        if slug in rows:
            assert rows[slug].study == f"experiments/{path.parent.name}/{path.name}"


@pytest.mark.slow
@pytest.mark.parametrize("slug", SLUGS)
def test_every_arm_of_the_paper_preset_traces(slug: str) -> None:
    """Arms that differ in the values of their floats alone are traced once."""
    study, seen = load(slug), set()
    for arm in study.every_arm:
        config = plain(resolve(study, "paper", arm))
        form = json.dumps(
            _form({name: config.get(name) for name in ("model", "task", "adapters")}), sort_keys=True, default=str
        )
        if form not in seen:
            seen.add(form)
            assert paper_size(config) > 0, arm


@pytest.mark.parametrize("slug", SLUGS)
def test_every_ablation_is_named_by_a_claim(slug: str) -> None:
    study = load(slug)
    named = {arm for claim in study.claims for arm in claim.arms}
    for name, arms in study.ablations.items():
        assert named & {arm.name for arm in arms}, f"ablation '{name}': give it the claim that its paper makes, or drop it"


@pytest.mark.slow
@pytest.mark.parametrize("slug", SLUGS)
def test_the_arms_of_the_headline_match(slug: str) -> None:
    """Those of the other claims take minutes to trace: `python -m experiments.check_matching` looks at all, and so does a run before it trains."""
    study = load(slug)
    configs = {arm: resolve(study, "cpu", arm) for arm in study.headline.arms}
    assert check_matching.unjudgeable([study.headline], "cpu", configs) == []


def _form(value: Any) -> Any:
    """A config without the sizes of its floats: what they are worth changes no trace, but whether they are 0 may."""
    match value:
        case dict():
            return {name: _form(part) for name, part in value.items()}
        case list() | tuple():
            return [_form(part) for part in value]
        case float():
            return "zero" if value == 0 else "negative" if value < 0 else "positive"
    return value
