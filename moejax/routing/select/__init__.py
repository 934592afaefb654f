"""Select rules: logits -> plan, one file a kind. `base` says what a rule is."""

from moejax.core.folders import lazy

__getattr__, __dir__ = lazy(__name__)
