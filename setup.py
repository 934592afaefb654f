"""moejax: mixtures in JAX. Everything static lives in pyproject.toml; this file is for tools that still call setup.py."""

from setuptools import setup

setup()
