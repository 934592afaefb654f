"""What every other room stands on: registry, errors, context, parameters, controllers. Imports nothing above it."""

from moejax.core.folders import lazy

__getattr__, __dir__ = lazy(__name__)
