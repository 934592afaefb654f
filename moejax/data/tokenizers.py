"""Text to token ids."""

from collections.abc import Callable
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

import numpy as np

from moejax.core.errors import ConfigError, nearest


class Tokenizer(NamedTuple):
    """`encode(text) -> int32[n]` and the number of different ids. No special tokens are added: segments separate documents."""

    encode: Callable[[bytes], np.ndarray]
    vocab_size: int


@lru_cache(maxsize=4)
def load(tokenizer: str) -> Tokenizer:
    """The tokenizer that `data.tokenizer` names: `bytes`, or a JSON file of the `tokenizers` package.

    Raises:
      ConfigError: neither, or the `tokenizers` package is missing.
    """
    if tokenizer == "bytes":
        return Tokenizer(_bytes, 256)
    if not Path(tokenizer).is_file():
        hint = "give the path of a JSON file" if tokenizer.endswith(".json") else nearest(tokenizer, ["bytes"])[2:]
        raise ConfigError(f"data.tokenizer='{tokenizer}' is neither 'bytes' nor a file; {hint}")
    try:
        from tokenizers import Tokenizer as Fast
    except ImportError:
        raise ConfigError(
            f"data.tokenizer='{tokenizer}' needs the package `tokenizers`; `pip install tokenizers`, or take 'bytes'"
        ) from None
    try:
        fast = Fast.from_file(tokenizer)
    except Exception as error:  # the package raises bare Exceptions
        raise ConfigError(f"data.tokenizer='{tokenizer}' cannot be read as a tokenizer: {error}") from None

    def encode(text: bytes) -> np.ndarray:
        return np.array(fast.encode(text.decode(errors="replace"), add_special_tokens=False).ids, dtype=np.int32)

    return Tokenizer(encode, fast.get_vocab_size())


def _bytes(text: bytes) -> np.ndarray:
    return np.frombuffer(text, dtype=np.uint8).astype(np.int32)
