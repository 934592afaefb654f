"""What an adapter is: a small trainable part that changes one layer of a frozen model, and what it is told of that layer.

A kind is one file of this folder, with a method for each form of layer that it can change:

    @adapters.register("scaled")
    class Scaled(Adapter, RowWise):                      # RowWise: a token's output depends on that token alone
        def weight(self, w, site, ctx=None):             # y = x (W diag(1 + s)): from here it is everywhere, and can be merged
            return w * (1 + param(self, "s", nn.initializers.zeros, (site.shape[-1],), (site.axes[-1],)))

`Adapted` puts it around the layers that its `targets` name.
"""

import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import Any

import flax.linen as nn
import jax
from jaxtyping import Array, Float

from moejax.core.context import Context
from moejax.core.errors import ConfigError
from moejax.core.layer import Layer
from moejax.layers.adapters.maps import LinearMap

# Forms of layers, by the method that changes them. A layer that has two is changed by the first that a kind has a method for.
FORMS = ("linear", "weight", "stack", "layer")

Call = Callable[[Array], Any]


@dataclasses.dataclass(frozen=True, eq=False)
class Site:
    """Where one adapter sits, as that adapter sees it.

    Attributes:
      path: of the layer, or of the matrix, in the model.
      kind: of the layer: 'dense', 'dense_general', 'einsum', 'conv', 'embed', 'matrix', 'bank', or its class's name.
      shape: of the layer's matrix: (d, o), from d inputs to o outputs; (vocabulary, width) of a table; (e, d, o) of a stack of experts;
        () where there is none.
      axes: logical axis names of that matrix.
      table: the matrix's rows are looked up, not summed: one for each token of a vocabulary, say.
      call: the layer's own function, with the adapters that came before: `call(x) -> y`. May be called with any x, and again.
      module: the layer itself, frozen; None where a matrix is changed by itself.
      map: how a linear layer's input, output and kernel are a matrix's.
      kernel: the matrix of a linear layer, frozen, with what adapters before this one made of it.
      bias: of a linear layer; None if it has none.
    """

    path: str
    kind: str
    shape: tuple[int, ...] = ()
    axes: tuple[str | None, ...] = ()
    table: bool = False
    call: Call | None = None
    module: nn.Module | None = None
    map: LinearMap | None = None
    kernel: Float[Array, "d o"] | None = None
    bias: Float[Array, "o"] | None = None

    @property
    def params(self) -> Mapping[str, Any]:
        """The layer's own parameters, as they are stored."""
        return self.module.variables["params"]

    def rows(self, x: Array) -> Float[Array, "*b d"]:
        """The vectors that the matrix of a linear layer multiplies."""
        return self.map.rows(x)

    def put(self, y: Float[Array, "*b o"]) -> Array:
        """What the matrix gave for `rows(x)`, in the shape of the layer's output."""
        return self.map.put(y)


class Adapter(Layer):
    """A small trainable part around one layer; `Adapted` makes a copy of it for every layer that it is put around.

    At the start it changes nothing, unless its kind says otherwise. Its parameters' initialisers may look at the frozen layer
    (`site.kernel`); `init_adapters` starts them beside parameters that are already trained. Its answers to a model's questions
    (`check_causal`, `decodable`) are about what it adds: derive a kind from `RowWise` too if that depends on one token alone.

    A kind has at least one of the methods below. A method declares parameters as in `nn.compact`.

    Attributes:
      targets: which layers: glob patterns of paths ('*/q', or '*/mixer' for all in it); roles of `moejax.core.roles` ('mixers',
        'experts', 'embeddings', ...); or kinds of layers, as in 'kind:dense'.
      on_routers: a pattern that matches a router means it; else it is refused, since what decides where tokens go is rarely meant.
    """

    role = "adapters"

    targets: str | tuple[str, ...] = dataclasses.field(kw_only=True)
    on_routers: bool = dataclasses.field(default=False, kw_only=True)

    def __post_init__(self) -> None:
        targets = (self.targets,) if isinstance(self.targets, str) else tuple(self.targets)
        if not targets or not all(isinstance(target, str) and target for target in targets):
            raise ConfigError(f"targets={self.targets!r} must name layers: patterns of paths such as '*/q', or roles")
        object.__setattr__(self, "targets", targets)
        super().__post_init__()

    @nn.compact
    def __call__(self, form: str, given: Any, site: Site, ctx: Context | None = None) -> Any:
        """What the method `form` makes of what it is given."""
        return getattr(self, form)(given, site, ctx)

    @classmethod
    def reaches(cls) -> tuple[str, ...]:
        """The forms of layers that this kind can change."""
        return tuple(form for form in FORMS if _written(cls, form) or (form in ("linear", "stack") and _written(cls, "weight")))

    def weight(self, w: Float[Array, "d o"], site: Site, ctx: Context | None = None) -> Float[Array, "d o"]:
        """The adapted matrix: of a linear layer, a table of embeddings, a head, one expert of a bank.

        A kind that has no such matrix, because what it adds depends on the token, leaves this out; it cannot be merged.
        """
        raise self.no_matrix(site)

    def linear(self, x: Array, site: Site, ctx: Context | None = None) -> Array:
        """The adapted output of a linear layer. A kind that has none but `weight` computes the layer with its adapted matrix."""
        raise NotImplementedError(f"{type(self).__name__} changes linear layers by their weight")

    def stack(self, w: Any, site: Site, ctx: Context | None = None) -> Any:
        """The adapted matrices `[e, d, o]` of a bank's experts, or a `LowRankSum` of them.

        Unless a kind knows a cheaper way: every expert's `weight`, with parameters of its own.
        """
        one = dataclasses.replace(site, shape=site.shape[1:], axes=site.axes[1:])
        each = nn.vmap(
            lambda adapter, matrix: adapter.weight(matrix, one, ctx),
            variable_axes={"params": 0, "router_state": 0},
            split_rngs={"params": True},
        )
        return each(self, w)

    def layer(self, x: Array, site: Site, ctx: Context | None = None) -> Array:
        """The adapted output of a layer of any kind, which is given x."""
        raise NotImplementedError(f"{type(self).__name__} cannot sit around a whole layer")

    def no_matrix(self, site: Site) -> ConfigError:
        """The error of a kind that has no `weight`, or has none as it is set up."""
        return ConfigError(
            f"{type(self).__name__} at '{site.path}' has no matrix of its own: what it adds depends on the token, so that it can neither "
            "be merged into the layer nor sit on a table or a bank of experts"
        )

    @classmethod
    def by_weight(cls, form: str) -> bool:
        """Whether this kind changes layers of this form through their matrix; such adapters come before all others."""
        return form == "weight" or (form in ("linear", "stack") and not _written(cls, form))


def as_tokens(rows: Float[Array, "*b d"], ctx: Context | None) -> tuple[Float[Array, "g n d"], Context]:
    """Rows of any rank as groups of tokens for a routed layer, with what the context says of those tokens.

    Rows are tokens `[b, s, d]`, or parts of tokens `[b, s, ..., d]` (heads, say), if the context's own arrays are `[b, s]`; otherwise
    the context says nothing of them but how it is called.
    """
    ctx = (ctx or Context()).replace(carried=None, shared=None)
    said = ctx.per_token()
    if rows.ndim >= 3 and all(value.shape == rows.shape[:2] for value in said.values()):
        parts = math.prod(rows.shape[2:-1])
        ctx = ctx if parts == 1 else ctx.map_tokens(lambda value: value.repeat(parts, axis=1))
        return rows.reshape(rows.shape[0], -1, rows.shape[-1]), ctx
    return (rows if rows.ndim == 3 else rows.reshape(1, -1, rows.shape[-1])), ctx.replace(**dict.fromkeys(said))


def _written(cls: type, method: str) -> bool:
    """Whether a kind has a method of its own."""
    return getattr(cls, method) is not getattr(Adapter, method)


def count(tree: Any) -> int:
    """Parameters of a tree of arrays or shapes."""
    return sum(leaf.size for leaf in jax.tree.leaves(tree))
