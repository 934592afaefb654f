"""Where trained parameters come from, one file a kind."""

from moejax.core.folders import lazy

__getattr__, __dir__ = lazy(__name__)
