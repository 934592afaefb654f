"""Text to token ids."""

from collections.abc import Callable
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from moejax.core.errors import ConfigError, nearest
from moejax.pretrained.names import MODELS


class Tokenizer(NamedTuple):
    """Whole documents to tokens. No special tokens are added: segments separate documents.

    Attributes:
      encode: text -> ids `int32[n]` and, unless every token is a byte, the bytes of text behind each, `int32[n]`. These add up to
        the text: what lies between two tokens counts with the second, and what follows the last one with that.
      vocab_size: number of ids, from 0.
    """

    encode: Callable[[bytes], tuple[np.ndarray, np.ndarray | None]]
    vocab_size: int


@lru_cache(maxsize=4)
def load(tokenizer: str) -> Tokenizer:
    """The tokenizer that `data.tokenizer` names: `bytes`, a JSON file of the `tokenizers` package, or that of a published model.

    Raises:
      ConfigError: neither, or the `tokenizers` package is missing.
    """
    if tokenizer == "bytes":
        return Tokenizer(_bytes, 256)
    fast = _read(tokenizer)
    # Files carry the settings of the model that they come from, which cut documents short and fill them up.
    fast.no_truncation()
    fast.no_padding()

    def encode(text: bytes) -> tuple[np.ndarray, np.ndarray]:
        characters = text.decode(errors="replace")
        found = fast.encode(characters, add_special_tokens=False)
        return np.array(found.ids, np.int32), _sizes(characters, [end for _, end in found.offsets])

    # Ids may have gaps: the number of words can be less than the largest id.
    return Tokenizer(encode, max(fast.get_vocab().values(), default=-1) + 1)


def _read(tokenizer: str) -> Any:
    """The package's tokenizer, of a JSON file or of a published model."""
    if tokenizer in MODELS or (Path(tokenizer).exists() and not tokenizer.endswith(".json")):
        from moejax.pretrained.tokens import tokenizer_of

        return tokenizer_of(tokenizer)
    if not Path(tokenizer).is_file():
        hint = "give the path of a JSON file" if tokenizer.endswith(".json") else nearest(tokenizer, ["bytes", *MODELS])[2:]
        raise ConfigError(f"data.tokenizer='{tokenizer}' is neither 'bytes', nor a file, nor a published model; {hint}")
    try:
        from tokenizers import Tokenizer as Fast
    except ImportError:
        raise ConfigError(
            f"data.tokenizer='{tokenizer}' needs the package `tokenizers`; `pip install tokenizers`, or take 'bytes'"
        ) from None
    try:
        return Fast.from_file(tokenizer)
    except Exception as error:  # the package raises bare Exceptions
        raise ConfigError(f"data.tokenizer='{tokenizer}' cannot be read as a tokenizer: {error}") from None


def _bytes(text: bytes) -> tuple[np.ndarray, None]:
    return np.frombuffer(text, dtype=np.uint8).astype(np.int32), None


def _sizes(characters: str, ends: list[int]) -> np.ndarray:
    """Bytes of UTF-8 behind each token, of tokens that end before the characters with these numbers."""
    if not ends:
        return np.zeros(0, np.int32)
    code = np.frombuffer(characters.encode("utf-32-le", errors="surrogatepass"), np.uint32)
    width = 1 + (code >= 0x80) + (code >= 0x800) + (code >= 0x10000)
    upto = np.concatenate([[0], np.cumsum(width)])[np.maximum.accumulate([*ends[:-1], len(characters)])]
    return np.diff(upto, prepend=0).astype(np.int32)
