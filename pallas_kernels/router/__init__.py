"""Fused router: logits, scores, exact top-k, counts and what the losses need, in one pass over the tokens.

Contract, for every implementation:

- Logits are float32 products of float32 accuracy, also for bfloat16 tokens: rounding them changes who is chosen.
- The k experts with the largest logits are chosen (with a `bias`: the largest score + bias), in falling order. The choice is
  exact and ties go to the lowest index. A token's experts are distinct, also where logits are -inf.
- Invalid tokens get experts, weights, logits and z like the others, to be masked by the caller; they are in neither `counts`
  nor `importance`.
- NaN logits choose some expert in range.

`tpu` and `gpu` read x once and never re-read logits. The derivative is closed form and plain XLA in all implementations: elementwise
work on [n, e] and two matmuls, which a kernel would do no better. It needs no second softmax over saved scores: only x, w,
logits and the choice are kept.
"""

from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from pallas_kernels.implementations import resolve
from pallas_kernels.router import gpu, tpu, xla
from pallas_kernels.router.selection import SCORES, Routed, Rule

AUTO = {"cpu": ("xla",), "tpu": ("tpu", "xla"), "gpu": ("gpu", "xla")}


def route(
    x: Float[Array, "n d"],
    w: Float[Array, "d e"],
    k: int,
    score: str = "softmax",
    bias: Float[Array, "e"] | None = None,
    normalise: bool = False,
    valid: Bool[Array, "n"] | None = None,
    implementation: str = "auto",
) -> Routed:
    """The k experts of each token, their weights, and what the routing losses need.

    Args:
      x: tokens.
      w: router weights.
      k: experts per token.
      score: what weights and importance are made of: 'softmax' over all experts, or the 'sigmoid' of each logit.
      bias: added to the scores for selection only (loss-free balancing, Wang et al. 2024); gets no gradient.
      normalise: divide a token's weights by their sum. With 'softmax' this is the softmax over the chosen experts.
      valid: False for padding; None if there is none.
      implementation: 'auto' picks by platform; a name runs that one or raises.

    Returns:
      `Routed`. Gradients flow from weight, logits, importance and z to x and w.

    Raises:
      ValueError: unknown score or implementation, k outside 1..e, or a size that the named implementation cannot do.
    """
    e = w.shape[1]
    if score not in SCORES:
        raise ValueError(f"score='{score}' of route is unknown; valid names: {', '.join(SCORES)}")
    if not 1 <= k <= e:
        raise ValueError(f"k={k} of route must be between 1 and the number of experts, {e}")
    limits = {"tpu": tpu.refuses, "interpret_tpu": tpu.refuses, "gpu": gpu.refuses, "interpret_gpu": gpu.refuses}
    name = resolve(
        "route",
        implementation,
        tuple(IMPLEMENTATIONS),
        AUTO,
        lambda name: limits[name](k, e) if name in limits else None,
    )
    valid = jnp.ones(x.shape[0], jnp.bool_) if valid is None else valid
    bias = None if bias is None else jax.lax.stop_gradient(bias.astype(jnp.float32))
    return _route(x, w, bias, valid, Rule(k, score, normalise), name)


@partial(jax.custom_vjp, nondiff_argnums=(4, 5))
def _route(x: Array, w: Array, bias: Array | None, valid: Array, rule: Rule, name: str) -> Routed:
    return IMPLEMENTATIONS[name](x, w, bias, valid, rule)


def _fwd(x: Array, w: Array, bias: Array | None, valid: Array, rule: Rule, name: str) -> tuple[Routed, tuple[Array, ...]]:
    routed = _route(x, w, bias, valid, rule, name)
    return routed, (x, w, valid, routed.logits, routed.expert)


def _bwd(rule: Rule, name: str, residuals: tuple[Array, ...], d: Routed) -> tuple[Array, Array, None, None]:
    x, w, valid, logits, expert = residuals
    chosen = expert[..., None] == jnp.arange(logits.shape[1])  # [n, k, e], fused away
    score = SCORES[rule.score]
    scores = score.of(logits)
    weight = jnp.where(chosen, scores[:, None], 0).sum(-1)
    dscore = jnp.where(chosen, _unnormalise(weight, d.weight, rule)[..., None], 0).sum(1)
    dscore += jnp.where(valid[:, None], d.importance, 0)
    dlogits = d.logits + score.gradient(scores, dscore) + d.z[:, None] * jax.nn.softmax(logits)
    highest = partial(jnp.dot, precision=jax.lax.Precision.HIGHEST)
    dx = highest(dlogits, w.astype(jnp.float32).T)
    dw = highest(x.astype(jnp.float32).T, dlogits)
    return dx.astype(x.dtype), dw.astype(w.dtype), None, None


def _unnormalise(weight: Array, dweight: Array, rule: Rule) -> Array:
    """Gradient to the chosen scores (`weight`) from the gradient to the weights made of them."""
    if not rule.normalise:
        return dweight
    total = weight.sum(-1, keepdims=True) + 1e-20
    return (dweight - (dweight * weight).sum(-1, keepdims=True) / total) / total


_route.defvjp(_fwd, _bwd)


def _reference(x: Array, w: Array, bias: Array | None, valid: Array, rule: Rule) -> Routed:
    logits = jnp.dot(x.astype(jnp.float32), w.astype(jnp.float32), precision=jax.lax.Precision.HIGHEST)
    scores = jax.nn.softmax(logits) if rule.score == "softmax" else jax.nn.sigmoid(logits)
    _, expert = jax.lax.top_k(logits if bias is None else scores + bias, rule.k)
    weight = jnp.take_along_axis(scores, expert, axis=1)
    if rule.normalise:
        weight = weight / (weight.sum(1, keepdims=True) + 1e-20)
    counts = (jax.nn.one_hot(expert, w.shape[1], dtype=jnp.int32) * valid[:, None, None]).sum((0, 1))
    importance = jnp.where(valid[:, None], scores, 0).sum(0)
    return Routed(expert, weight, logits, counts, importance, jax.nn.logsumexp(logits, axis=1))


IMPLEMENTATIONS: dict[str, Callable[[Array, Array, Array | None, Array, Rule], Routed]] = {
    "reference": _reference,
    "xla": xla.route,
    "tpu": tpu.route,
    "gpu": gpu.route,
    "interpret_tpu": partial(tpu.route, interpret=True),
    "interpret_gpu": partial(gpu.route, interpret=True),
}

__all__ = ["AUTO", "IMPLEMENTATIONS", "Routed", "Rule", "route"]
