"""What a model author plugs in: feed-forward layers, mixers, depth, norms, adapters, and the blocks that hold them."""

from moejax.core.folders import lazy

__getattr__, __dir__ = lazy(__name__)
