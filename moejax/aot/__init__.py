"""Compiling for machines that are not here: ahead of time, with costs and exchanges read from the compiled program."""

from moejax.core.folders import lazy

__getattr__, __dir__ = lazy(__name__)
