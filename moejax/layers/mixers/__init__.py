"""Mixers: what exchanges information between tokens. Attention, mixtures of heads."""

from moejax.core.folders import lazy

__getattr__, __dir__ = lazy(__name__)
