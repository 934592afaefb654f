"""Banks: stacks of experts, each kind written once against the layout."""

from moejax.core.folders import lazy

__getattr__, __dir__ = lazy(__name__)
