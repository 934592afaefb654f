"""The tokenizer that a published model was trained with."""

from collections.abc import Mapping, Sequence
from typing import Any

from moejax.core.errors import ConfigError, nearest
from moejax.pretrained.gguf_files import read_meta
from moejax.pretrained.names import tokenizer_file

_CONTROL, _USER_DEFINED = 3, 4  # GGUF's kinds of tokens that no text is cut into


def tokenizer_of(name: str) -> Any:
    """A `tokenizers.Tokenizer`: of a folder's tokenizer.json, or made of a GGUF file's metadata.

        tokenizer = mj.pretrained.tokenizer_of("smollm2-135m")
        ids = tokenizer.encode("The cat sat on").ids

    It cuts nothing short and fills nothing up. What it puts around a text is the model's own; `add_special_tokens=False` turns that off.

    Args:
      name: as for `load`.

    Raises:
      ConfigError: there is none, its kind is unknown, or the package `tokenizers` is absent.
    """
    file = tokenizer_file(name)
    tokenizers = _package(str(file))
    if file.suffix == ".gguf":
        return _of_gguf(tokenizers, read_meta(file), str(file))
    try:
        found = tokenizers.Tokenizer.from_file(str(file))
    except Exception as error:  # the package raises bare Exceptions
        raise ConfigError(f"{file} cannot be read as a tokenizer: {error}") from None
    found.no_truncation()
    found.no_padding()
    return found


def _package(place: str) -> Any:
    try:
        import tokenizers
    except ImportError:
        raise ConfigError(
            f"{place}: its tokenizer needs the package `tokenizers`; `pip install 'moejax[pretrained]'`"
        ) from None
    return tokenizers


def _of_gguf(tokenizers: Any, meta: Mapping[str, Any], place: str) -> Any:
    """A byte-level BPE of the metadata's tokens and merges. Kinds of other algorithms are refused, not guessed."""
    said = {key.removeprefix("tokenizer.ggml."): value for key, value in meta.items()}
    kind, pre = said.get("model", ""), said.get("pre", "default")
    if kind not in ("gpt2",):
        raise ConfigError(f"{place} has a tokenizer of kind '{kind}'; known is 'gpt2'")
    if pre not in _PRE:
        raise ConfigError(f"{place} cuts text into words by the rules '{pre}'{nearest(pre, _PRE)}")
    tokens: Sequence[str] = said["tokens"]
    merges = [tuple(merge.split(" ")) for merge in said["merges"]]
    unknown = said.get("unknown_token_id")
    model = tokenizers.models.BPE(
        vocab={token: i for i, token in enumerate(tokens)},
        merges=merges,
        unk_token=None if unknown is None else tokens[unknown],
        fuse_unk=False,
        byte_fallback=False,
        ignore_merges=pre in _WHOLE_WORDS,
    )
    found = tokenizers.Tokenizer(model)
    found.pre_tokenizer = tokenizers.pre_tokenizers.Sequence(_PRE[pre](tokenizers.pre_tokenizers))
    found.decoder = tokenizers.decoders.ByteLevel()
    kinds = said.get("token_type", ())
    special = [tokenizers.AddedToken(token, special=True) for token, k in zip(tokens, kinds, strict=False) if k == _CONTROL]
    own = [tokenizers.AddedToken(token, special=False) for token, k in zip(tokens, kinds, strict=False) if k == _USER_DEFINED]
    found.add_special_tokens(special)
    found.add_tokens(own)
    if said.get("add_bos_token"):
        bos = said["bos_token_id"]
        found.post_processor = tokenizers.processors.TemplateProcessing(
            single=f"{tokens[bos]} $A", pair=f"{tokens[bos]} $A {tokens[bos]} $B", special_tokens=[(tokens[bos], bos)]
        )
    return found


def _split(pre: Any, pattern: str) -> list[Any]:
    from tokenizers import Regex

    cut = pre.Split(Regex(pattern), behavior="isolated", invert=False)
    return [cut, pre.ByteLevel(add_prefix_space=False, use_regex=False)]


_WORDS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}%s| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
# The metadata's name of how text is cut into words -> that, by the package's parts.
_PRE = {
    "default": lambda pre: [pre.ByteLevel(add_prefix_space=False)],
    "gpt-2": lambda pre: [pre.ByteLevel(add_prefix_space=False)],
    "smollm": lambda pre: [pre.Digits(individual_digits=True), pre.ByteLevel(add_prefix_space=False)],
    "qwen2": lambda pre: _split(pre, _WORDS % ""),
    "llama-bpe": lambda pre: _split(pre, _WORDS % "{1,3}"),
}
# A word that is a token is not merged together again.
_WHOLE_WORDS = ("llama-bpe",)
