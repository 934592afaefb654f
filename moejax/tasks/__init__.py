"""Tasks: how a batch enters a model, and what its outputs are judged by; one file a kind."""

from moejax.core.folders import lazy

__getattr__, __dir__ = lazy(__name__)
