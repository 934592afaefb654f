"""How parameters start: a slot of banks, routers and projections, with one kind a class and Flax's own initialisers as welcome."""

from moejax.core.folders import lazy

__getattr__, __dir__ = lazy(__name__)
