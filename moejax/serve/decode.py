"""Generating text: one forward pass over the prompts fills the caches, then one token at a time."""

import functools
from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jaxtyping import Array, Bool, Float, Int, Key

from moejax.core.context import Context
from moejax.core.errors import ConfigError
from moejax.models.inspection import why_not_decodable
from moejax.serve.sampling import Greedy, Sampler

# Byte prompts are padded to a multiple of this, so that a handful of programs serves every length.
_PROMPT_STEP = 32


@struct.dataclass
class Generated:
    """What `generate` returns.

    Attributes:
      tokens: the new tokens; `stop_token` from a row's first stop token on.
      lengths: new tokens of each row, the stop token included.
      logits: what each of those tokens was drawn from, if `keep_logits`.
    """

    tokens: Int[Array, "b new"]
    lengths: Int[Array, "b"]
    logits: Float[Array, "b new v"] | None = None


def generate(
    model: nn.Module,
    params: Mapping[str, Any],
    prompt: Int[Array, "b s"] | Int[np.ndarray, "b s"],
    lengths: Int[Array, "b"] | Int[np.ndarray, "b"] | None = None,
    max_new_tokens: int = 64,
    sampler: Sampler = Greedy(),  # noqa: B008 (a frozen value)
    key: Key[Array, ""] | None = None,
    stop_token: int | None = None,
    keep_logits: bool = False,
    adapter: Int[Array, "b"] | Int[np.ndarray, "b"] | None = None,
) -> Generated:
    """Continues each prompt. The result is that of running the whole sequence again for every token, at less cost.

    Compiled once for each model, shape and sampler.

    Args:
      model: a decoder; `model(tokens, ctx) -> logits` with caches in the collection 'cache'.
      params: its parameters, or all its variables: {'params': ..., 'router_state': ..., 'interventions': ...}.
      prompt: token ids, padded on the right.
      lengths: tokens of each prompt, at least 1. None means that no prompt is padded.
      max_new_tokens: how many to add.
      sampler: how a token is drawn.
      key: randomness for the sampler; key 0 if left out.
      stop_token: ends a row; decoding ends when every row has.
      keep_logits: also return the logits.
      adapter: of an adapted model, the number of the adapter that each row uses, -1 for none; see `Context.adapter`.

    Raises:
      ConfigError: the cache is too short, a layer cannot be decoded token by token, or a length is out of range.
    """
    b, s = prompt.shape
    if max_new_tokens < 1:
        raise ConfigError(f"max_new_tokens={max_new_tokens} must be at least 1")
    if s + max_new_tokens > model.max_length:
        raise ConfigError(
            f"a prompt of {s} tokens and max_new_tokens={max_new_tokens} exceed model.max_length={model.max_length}; "
            "shorten one of them or raise max_length"
        )
    reason = why_not_decodable(model)
    if reason is not None:
        raise ConfigError(f"this model cannot be decoded token by token: {reason}")
    lengths = np.full(b, s) if lengths is None else np.asarray(lengths)
    if lengths.min() < 1 or lengths.max() > s:
        raise ConfigError(f"lengths={lengths.tolist()} must lie in 1..{s}, the padded length of the prompts")
    variables = params if "params" in params else {"params": params}
    key = jax.random.key(0) if key is None else key
    prompt, lengths = jnp.asarray(prompt, jnp.int32), jnp.asarray(lengths, jnp.int32)
    adapter = None if adapter is None else jnp.asarray(adapter, jnp.int32)
    return _generate(model, max_new_tokens, sampler, stop_token, keep_logits, variables, prompt, lengths, key, adapter)


def complete(
    model: nn.Module,
    params: Mapping[str, Any],
    text: str,
    max_new_tokens: int = 64,
    sampler: Sampler = Greedy(),  # noqa: B008
    key: Key[Array, ""] | None = None,
) -> str:
    """The continuation of `text` by a model of bytes; bytes that are not UTF-8 show as the replacement character.

    Raises:
      ConfigError: the text is empty, the vocabulary has no room for bytes, or anything that `generate` refuses.
    """
    data = np.frombuffer(text.encode(), np.uint8)
    if model.vocab_size < 256:
        raise ConfigError(f"vocab_size={model.vocab_size} cannot hold 256 bytes; complete() is for byte models")
    if not data.size:
        raise ConfigError("complete() needs at least one byte of text to continue")
    room = max(model.max_length - max_new_tokens, data.size)
    padded = min(-(-data.size // _PROMPT_STEP) * _PROMPT_STEP, room)
    prompt = np.pad(data.astype(np.int32), (0, padded - data.size))[None]
    out = generate(model, params, prompt, np.array([data.size]), max_new_tokens, sampler, key)
    tokens = np.asarray(out.tokens[0])
    return bytes(tokens[tokens < 256].astype(np.uint8)).decode(errors="replace")


@struct.dataclass
class _State:
    """The loop's carry: how many tokens are drawn, the last of them, which rows have ended, and the caches."""

    step: Int[Array, ""]
    token: Int[Array, "b"]
    done: Bool[Array, "b"]
    cache: Any
    out: Generated


@functools.partial(jax.jit, static_argnums=(0, 1, 2, 3, 4))
def _generate(
    model: nn.Module,
    new: int,
    sampler: Sampler,
    stop_token: int | None,
    keep_logits: bool,
    variables: Mapping[str, Any],
    prompt: Int[Array, "b s"],
    lengths: Int[Array, "b"],
    key: Key[Array, ""],
    adapter: Int[Array, "b"] | None,
) -> Generated:
    b, s = prompt.shape

    def forward(cache: Any, tokens: Array, positions: Array, valid: Array) -> tuple[Array, Any]:
        chosen = None if adapter is None else jnp.broadcast_to(adapter[:, None], tokens.shape)
        ctx = Context(valid=valid, positions=positions, decode=True, adapter=chosen)
        return model.apply({**variables, **cache}, tokens, ctx, mutable=["cache"])

    def draw(i: Array, logits: Array, done: Array, cache: Any, out: Generated) -> _State:
        token = sampler(logits, jax.random.fold_in(key, i))
        if stop_token is not None:
            token = jnp.where(done, stop_token, token)
        out = Generated(
            tokens=out.tokens.at[:, i].set(token),
            lengths=out.lengths + ~done,
            logits=None if out.logits is None else out.logits.at[:, i].set(logits),
        )
        if stop_token is not None:
            done = done | (token == stop_token)
        return _State(i + 1, token, done, cache, out)

    def going(state: _State) -> Array:
        return (state.step < new) & ~state.done.all()

    def step(state: _State) -> _State:
        # Tokens of ended rows are padding: they leave no trace in the caches and take nobody's place in an expert.
        positions = (lengths + state.step - 1)[:, None]
        logits, cache = forward(state.cache, state.token[:, None], positions, ~state.done[:, None])
        return draw(state.step, logits[:, 0], state.done, cache, state.out)

    positions = jnp.broadcast_to(jnp.arange(s, dtype=jnp.int32), (b, s))
    logits, cache = forward({}, prompt, positions, positions < lengths[:, None])
    last = jnp.take_along_axis(logits, (lengths - 1)[:, None, None], axis=1)[:, 0]
    out = Generated(
        tokens=jnp.full((b, new), 0 if stop_token is None else stop_token, jnp.int32),
        lengths=jnp.zeros(b, jnp.int32),
        logits=jnp.zeros((b, new, last.shape[-1]), last.dtype) if keep_logits else None,
    )
    start = draw(jnp.zeros((), jnp.int32), last, jnp.zeros(b, bool), cache, out)
    return jax.lax.while_loop(going, step, start).out
