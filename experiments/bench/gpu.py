"""What the GPU at hand can tell in some minutes: are our kernels right, what do they cost, a layer, and a training step.

values  every kernel of `pallas_kernels`, with its derivatives, against float32 products of full precision; nothing is timed
small   the kernels that `kernels --chip=gpu` leaves out, against XLA's way of doing the same
layer   a routed layer in bfloat16 against the dense layer of equal active FLOPs, and against padded slots
train   a training step of a mixture of 100 million active parameters against its dense twin

The grouped products themselves are timed by `python -m experiments.bench kernels --chip=gpu`.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from configs import small_lm
from experiments.bench.table import BACKWARD, FORWARD, Outcome
from experiments.bench.timing import backward, race
from moejax import models
from moejax.dispatch import dispatch
from moejax.dispatch.layout import Batched
from moejax.experts import GLU
from moejax.optim.base import optimizers
from moejax.routing import TopK
from moejax.tasks.base import tasks
from moejax.train.settings import plain
from moejax.train.step import init_state, make_train_step
from pallas_kernels.grouped_glu import grouped_glu
from pallas_kernels.grouped_matmul import grouped_matmul
from pallas_kernels.low_rank import low_rank_grouped_matmul
from pallas_kernels.permute import permute, unpermute
from pallas_kernels.product_keys import product_key_top_k
from pallas_kernels.rank_one import rank_one_experts

# Largest error that rounding explains, as a share of the largest value.
LIMIT = {"float32": 2e-4, "bfloat16": 2e-2}
STEP = "train step"


@dataclass(frozen=True)
class Kernel:
    """An operation with everything but its implementation: `call(implementation)(*floats)`."""

    call: Callable[[str], Callable[..., Array]]
    floats: tuple[Array, ...]


def kernels(size: int, dtype: str) -> dict[str, Kernel]:
    """The operations at sizes that are multiples of nothing, times `size`; groups end anywhere, one is empty, rows are left over."""
    rng = np.random.default_rng(0)
    e, k, n, d, f, r = 8, 2, 200 * size + 5, 64 * size, 48 * size + 8, 16
    m = n * k
    share = rng.dirichlet(np.ones(e - 1))
    sizes = jnp.asarray(np.insert(rng.multinomial(m - m // 10, share), 3, 0), jnp.int32)
    order = jnp.asarray(rng.permutation(m), jnp.int32)
    inverse = jnp.argsort(order).astype(jnp.int32)
    picks = jnp.asarray(rng.integers(0, 500 * size, (n, 4)), jnp.int32)

    def draw(*shape: int) -> Array:
        return jnp.asarray(rng.normal(size=shape) / shape[-1] ** 0.5, dtype)

    x, rows = draw(n, d), draw(m, d)
    return {
        "grouped_matmul": Kernel(lambda i: lambda x, w: grouped_matmul(x, w, sizes, i), (rows, draw(e, d, f))),
        "grouped_glu": Kernel(
            lambda i: lambda x, a, b: grouped_glu(x, a, b, sizes, implementation=i), (rows, draw(e, d, f), draw(e, d, f))
        ),
        "low_rank": Kernel(
            lambda i: lambda x, a, b: low_rank_grouped_matmul(x, a, b, sizes, 2.0, i), (rows, draw(e, d, r), draw(e, r, d))
        ),
        "permute": Kernel(lambda i: lambda x: permute(x, order, inverse, k, i), (x,)),
        "unpermute": Kernel(lambda i: lambda rows, w: unpermute(rows, w, order, inverse, i), (rows, draw(n, k))),
        "product_keys": Kernel(
            lambda i: lambda query, keys: product_key_top_k(query, keys, 8, i)[0], (draw(n, 2, 2, 32), draw(2, 2, 64, 32))
        ),
        "rank_one": Kernel(
            lambda i: lambda x, w, u, v: rank_one_experts(x, picks, w, u, v, jax.nn.gelu, i),
            (x, draw(n, 4), draw(500 * size, d), draw(500 * size, d)),
        ),
    }


def values(implementation: str = "gpu", sizes: tuple[int, ...] = (1, 4)) -> list[str]:
    """A line for each operation, size and type: the largest error of its value and of each gradient; prints them as they come."""
    lines = []
    for dtype in LIMIT:
        for size in sizes:
            for name, kernel in kernels(size, dtype).items():
                try:
                    errors = _errors(kernel, implementation)
                    verdict = "ok" if max(errors) <= LIMIT[dtype] else "WRONG"
                    line = f"{name:<16}{dtype:<10}size {size}  {verdict:<6}" + " ".join(f"{error:.1e}" for error in errors)
                except Exception as error:  # the next kernel may run
                    line = f"{name:<16}{dtype:<10}size {size}  FAILED {type(error).__name__}: {str(error)[:600]}"
                print(line, flush=True)
                lines.append(line)
    return lines


def _errors(kernel: Kernel, implementation: str) -> list[float]:
    """Of the value and of each gradient, as a share of the largest entry."""

    def both(call: Callable[..., Array], floats: tuple[Array, ...]) -> list[np.ndarray]:
        def run(*floats: Array) -> tuple[Array, ...]:
            y, pull = jax.vjp(call, *floats)
            return y, *pull(jnp.cos(jnp.arange(y.size, dtype=jnp.float32)).reshape(y.shape).astype(y.dtype))

        return [np.asarray(a, np.float64) for a in jax.jit(run)(*floats)]

    with jax.default_matmul_precision("highest"):
        exact = both(kernel.call("reference"), tuple(a.astype(jnp.float32) for a in kernel.floats))
    found = both(kernel.call(implementation), kernel.floats)
    return [float(np.abs(a - b).max() / max(np.abs(b).max(), 1e-30)) for a, b in zip(found, exact, strict=True)]


def small(repeats: int, size: int = 16) -> Iterator[Outcome]:
    """The kernels that are no grouped product, against `xla`."""
    for name, kernel in kernels(size, "bfloat16").items():
        if name.startswith("grouped"):
            continue
        contestants = {i: (kernel.call(i), kernel.floats) for i in ("xla", "gpu")}
        argnums = tuple(range(len(kernel.floats)))
        timings = {FORWARD: race(contestants, repeats), BACKWARD: race(backward(contestants, argnums), repeats)}
        yield Outcome(name, f"size {size}", "xla", timings)


@dataclass(frozen=True)
class Size:
    """A gated layer: n tokens of width d, e experts of hidden width f, k per token."""

    n: int
    d: int
    f: int
    e: int
    k: int


LAYERS = {
    "olmoe": Size(n=8192, d=2048, f=1024, e=64, k=8),
    "mixtral": Size(n=8192, d=4096, f=14336, e=8, k=2),
    "few": Size(n=64, d=2048, f=1024, e=64, k=8),
}


def layers(repeats: int, sizes: dict[str, Size] = LAYERS) -> Iterator[Outcome]:
    """A routed layer in bfloat16, parameters too, on a plan without drops and on slots of capacity factor 1.25."""
    for name, size in sizes.items():
        title = f"n={size.n} d={size.d} f={size.f} e={size.e} k={size.k} bfloat16"
        contestants = _layer(size)
        timings = {FORWARD: race(contestants, repeats), BACKWARD: race(backward(contestants), repeats)}
        yield Outcome(name, title, "dense", timings)


def _layer(s: Size) -> dict[str, tuple[Callable[..., Array], tuple[Any, ...]]]:
    bank = GLU(hidden=s.f, num_experts=s.e)
    single = bank.clone(num_experts=1)
    key = jax.random.split(jax.random.key(0), 3)
    x = jax.random.normal(key[0], (1, s.n, s.d), jnp.bfloat16)
    params = jax.jit(lambda key: jax.tree.map(lambda p: p.astype(jnp.bfloat16), bank.init(key, s.d)))(key[1])
    w = jax.random.normal(key[2], (s.d, s.e)) / s.d**0.5

    def dense(params: Any, x: Array) -> Array:
        return single.apply(params, s.d).run(x, Batched())

    def routed(backend: str, factor: float | None) -> Callable[..., Array]:
        def layer(params: Any, x: Array) -> Array:
            plan = TopK(k=s.k, capacity_factor=factor)(x.astype(jnp.float32) @ w)
            return dispatch(plan, bank.apply(params, s.d), x, backend)

        return layer

    return {
        "dense": (dense, (jax.tree.map(lambda p: p[:1], params), jnp.repeat(x, s.k, 1))),
        "grouped": (routed("grouped", None), (params, x)),
        "capacity at 1.25": (routed("capacity", 1.25), (params, x)),
    }


def train(
    repeats: int, rows: int = 16, length: int = 1024, width: int = 768, layers: int = 12, vocabulary: int = 32768
) -> Iterator[Outcome]:
    """A step of a decoder whose every feed-forward layer is a mixture (2 of 16 experts of half the width), and of its dense twin."""
    hidden = 4 * width
    mixture = dict(
        kind="moe",
        num_experts=16,
        router=dict(kind="linear"),
        select=dict(kind="top_k", k=2),
        bank=dict(kind="glu", hidden=hidden // 2),
        losses=dict(balance=dict(coef=0.01)),
    )
    contestants = {}
    for name, ffn in {"dense": dict(kind="glu", hidden=hidden), "mixture": mixture}.items():
        config = plain(small_lm.get_config())
        block = dict(
            kind="transformer", norm=dict(kind="rms_norm"), mixer=dict(kind="attention", num_heads=width // 64), ffn=ffn
        )
        config["model"] |= dict(
            vocab_size=vocabulary, d_model=width, num_layers=layers, pattern=("one",), blocks=dict(one=block), dtype="bfloat16",
            max_length=length, scan=True, remat="none",
        )  # fmt: skip
        batch = _text(rows, length, vocabulary)
        model, task = models.build(config["model"]), tasks.build(config["task"], "task", domains=(), bytes_per_token=1.0)
        optimizer = optimizers.build(config["optimizer"], "optimizer", steps=100)
        state = jax.jit(partial(init_state, model, task, optimizer, batch))(jax.random.key(0))
        contestants[name] = (make_train_step(model, task, optimizer, jit=False), (state, batch))
    timings = race(contestants, repeats)
    size = rows * length
    notes = tuple(f"{name}: {size / t.median:,.0f} tokens a second" for name, t in timings.items())
    yield Outcome(
        "mixture", f"{rows} texts of {length} tokens, {layers} layers of {width}", "dense", {STEP: timings}, notes=notes
    )


def _text(rows: int, length: int, vocabulary: int) -> dict[str, Array]:
    tokens = jax.random.randint(jax.random.key(0), (2, rows, length), 0, vocabulary, jnp.int32)
    ones = jnp.ones((rows, length), jnp.int32)
    positions = jnp.broadcast_to(jnp.arange(length, dtype=jnp.int32), ones.shape)
    return {
        "tokens": tokens[0], "targets": tokens[1], "segments": ones, "positions": positions, "domain": 0 * ones, "valid": ones == 1
    }  # fmt: skip


CASES: dict[str, Callable[..., Any]] = {"values": values, "small": small, "layer": layers, "train": train}
