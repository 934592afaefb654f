"""Dispatch: executing a plan on experts. `dispatch(plan, experts, x, backend='auto')`."""

from moejax.core.folders import lazy

__getattr__, __dir__ = lazy(__name__)
