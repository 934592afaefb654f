"""Small trainable parts around the layers of a frozen model."""

from moejax.core.folders import lazy

__getattr__, __dir__ = lazy(__name__)
