"""Families of published models, one file each: a table of their tensors and ours, and their configs in our words."""

from moejax.core.folders import lazy

__getattr__, __dir__ = lazy(__name__)
