"""What a file of tensors is, whatever its format: names, shapes, and arrays one at a time."""

import numpy as np


class Store:
    """Named tensors that are read when they are asked for.

    Attributes:
      place: the file or folder, for errors.
    """

    place: str

    def names(self) -> tuple[str, ...]:
        """The names."""
        raise NotImplementedError

    def shape(self, key: str) -> tuple[int, ...]:
        """Of a tensor, without reading it."""
        raise NotImplementedError

    def where(self, key: str) -> str:
        """The file in which a tensor lies."""
        raise NotImplementedError

    def read(self, key: str) -> np.ndarray:
        """A tensor. Nothing of it stays behind."""
        raise NotImplementedError
