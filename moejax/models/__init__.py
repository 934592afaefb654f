"""Reference networks made of layers: a config names the parts, `build` makes the network."""

from moejax.core.folders import lazy

__getattr__, __dir__ = lazy(__name__)
