"""Routing: routers, select rules, plans, losses and statistics. Knows nothing of models or training."""

from moejax.core.folders import lazy

__getattr__, __dir__ = lazy(__name__)
