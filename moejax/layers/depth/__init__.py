"""What decides how deep or how wide a token goes: mixture-of-depths, nested widths."""

from moejax.core.folders import lazy

__getattr__, __dir__ = lazy(__name__)
