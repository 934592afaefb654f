"""Losses on routing, one file a kind. `base` says what a loss is given."""

from moejax.core.folders import lazy

__getattr__, __dir__ = lazy(__name__)
