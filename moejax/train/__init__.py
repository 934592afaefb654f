"""Training: `fit(config, seed, workdir)`, and the parts it is made of."""

from moejax.core.folders import lazy

__getattr__, __dir__ = lazy(__name__)
