"""Routers: tokens -> logits, one file a kind. `base` says what a router is."""

from moejax.core.folders import lazy

__getattr__, __dir__ = lazy(__name__)
