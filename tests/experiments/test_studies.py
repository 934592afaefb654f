"""Every study in the tree: its arms build. That its paper preset traces is a property of the battery."""

import pytest

from experiments import catalog
from experiments.study import load, resolve, study_files
from moejax import models

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
