"""Surgery: from a trained model to the start of another, one file a kind; `sources` is where the trained ones come from."""

from moejax.core.folders import lazy

__getattr__, __dir__ = lazy(__name__)
