"""Dispatch: executing a plan on a bank. `dispatch(plan, bank, x, backend='auto')`."""

from moejax.core.folders import lazy

__getattr__, __dir__ = lazy(__name__)
