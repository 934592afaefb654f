"""What routers learnt: load, uncertainty, specialisation by domain, similarity of experts, change between checkpoints and under noise."""

from moejax.core.folders import lazy

__getattr__, __dir__ = lazy(__name__)
