"""Embedded data is prepared once per test run, in a folder of the run's own."""

import os

import pytest


@pytest.fixture(scope="session", autouse=True)
def prepared_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("moejax_data")
    before = os.environ.get("MOEJAX_DATA")
    os.environ["MOEJAX_DATA"] = str(folder)
    yield folder
    if before is None:
        del os.environ["MOEJAX_DATA"]
    else:
        os.environ["MOEJAX_DATA"] = before
