"""Derivatives that are written by hand go backward: who asks for them forward is told what can, in place of JAX's own words."""

from functools import partial
from typing import Any, NoReturn

import jax
import jax.numpy as jnp
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir
from jaxtyping import Array

from moejax.core.errors import ConfigError


def backward_only(tree: Any, reason: str) -> Any:
    """The same values and gradients; in forward mode (`jax.jvp`, `jax.linearize`, Hessian-vector products) a `ConfigError` with this reason.

    `jax.jacfwd` of a compiled function is the exception: its `vmap` meets JAX's own refusal first.

    A tangent passes through a linear operation that can be transposed, as reverse mode does, and cannot be computed. Each array has its own,
    so that what has no tangent gets none.
    """
    return jax.tree.map(
        lambda leaf: _marked(leaf, reason) if jnp.issubdtype(jnp.result_type(leaf), jnp.inexact) else leaf, tree
    )


@partial(jax.custom_jvp, nondiff_argnums=(1,))
def _marked(x: Array, reason: str) -> Array:
    return x


@_marked.defjvp
def _(reason: str, primals: tuple[Array], tangents: tuple[Array]) -> tuple[Array, Array]:
    # Marked again: in a derivative of a derivative the next one goes through here too.
    return _marked(primals[0], reason), _tangent.bind(tangents[0], reason=reason)


_tangent = Primitive("backward_only")


def _refuse(*args: Any, reason: str) -> NoReturn:
    raise ConfigError(reason)


_tangent.def_impl(_refuse)
_tangent.def_abstract_eval(lambda x, *, reason: x)
mlir.register_lowering(_tangent, lambda ctx, *args, reason: _refuse(reason=reason))
ad.deflinear2(_tangent, lambda cotangent, x, *, reason: [cotangent])
batching.defvectorized(_tangent)
