"""Running trained models: decoding with a cache."""

from moejax.core.folders import lazy

__getattr__, __dir__ = lazy(__name__)
