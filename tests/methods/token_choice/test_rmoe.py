"""The recurrent router against NumPy's GRU over depth; its state through scan, remat, depth routing and decoding."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from numpy_layers import close, draw
from numpy_routing import sigmoid

from moejax import ConfigError, Context
from moejax.core.carried import Carried
from moejax.layers.depth.mixture_of_depths import MixtureOfDepths
from moejax.layers.routed import group_tokens
from moejax.models import Stack, build, to_scanned, to_unrolled
from moejax.models.parts import NamedBlock
from moejax.routing import Linear, Recurrent, ResidualLogits, Witnessed

V, B, S, D, E, P, LAYERS = 19, 2, 6, 8, 4, 3, 3
NORM = {"kind": "rms_norm"}


class Routed(nn.Module):
    """A block that is little more than its router, since what is compiled here is the stack."""

    router: nn.Module

    @nn.compact
    def __call__(self, x: jax.Array, ctx: Context) -> jax.Array:
        logits = self.router(x, ctx)
        self.sow("stats", "logits", logits, reduce_fn=lambda _, new: new, init_fn=lambda: None)
        return x + jnp.tanh(logits) @ self.param("mix", nn.initializers.lecun_normal(), (E, D))


def stack(scan: bool = True, remat: str = "none", router: nn.Module | None = None, **fields) -> Stack:
    block = NamedBlock("a", "blocks.a", Routed(router or Recurrent(E, width=P, **fields)))
    return Stack((block,), ("a",), LAYERS, scan, remat)


@functools.cache
def tokens() -> jax.Array:
    return jnp.asarray(np.random.default_rng(0).normal(size=(B, S, D)), jnp.float32)


@functools.cache
def step(model: Stack):
    """Output, logits of all layers, and the gradient of a sum over both."""

    def total(variables):
        y, sown = model.apply(variables, tokens(), Context(), mutable=["stats"])
        return jnp.sin(y).sum() + sum(jnp.cos(a).sum() for a in jax.tree.leaves(sown)), (y, sown["stats"])

    return jax.jit(jax.value_and_grad(total, has_aux=True))


def block_spec(router: dict) -> dict:
    """A routed block of a decoder."""
    ffn = {"kind": "moe", "num_experts": E, "router": {"kind": "recurrent", "width": P} | router}
    ffn |= {"select": {"kind": "top_k", "k": 2}, "bank": {"kind": "glu", "hidden": 4}}
    return {"kind": "transformer", "mixer": {"kind": "attention", "num_heads": 2}, "norm": NORM, "ffn": ffn}


def shapes(**blocks_) -> dict:
    sizes = {"vocab_size": V, "d_model": D, "num_layers": LAYERS * len(blocks_), "pattern": tuple(blocks_)}
    model = build({"kind": "decoder_lm", **sizes, "blocks": blocks_})
    return jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((B, S), int))["params"]["stack"]


def numpy_gru(w: dict, x: np.ndarray, h: np.ndarray) -> np.ndarray:
    """PyTorch's GRUCell, one token."""
    part = lambda name, i: np.asarray(w[name], np.float64)[..., i * P : (i + 1) * P]  # noqa: E731
    gate = lambda i: x @ part("w_in", i) + part("b_in", i)  # noqa: E731
    state = lambda i: h @ part("w_state", i) + part("b_state", i)  # noqa: E731
    r, z = sigmoid(gate(0) + state(0)), sigmoid(gate(1) + state(1))
    n = np.tanh(gate(2) + r * state(2))
    return (1 - z) * n + z * h


def test_one_router_is_numpys_gru(rng: np.random.Generator) -> None:
    """Three routers one after the other, each with its own projectors, all with one cell."""
    x = rng.normal(size=(LAYERS, 1, 4, D))
    router = Recurrent(E, width=P)
    own = [
        {"projector": jnp.asarray(rng.normal(size=(D, P))), "w": jnp.asarray(rng.normal(size=(P, E)))} for _ in range(LAYERS)
    ]
    cell = {k: jnp.asarray(rng.normal(size=s[1]), jnp.float32) for k, s in router.shares(D)["recurrent_router"].items()}
    carried = Carried(router.carries(1, 4))
    ctx = Context(shared={"recurrent_router": cell}, carried=carried)
    h = np.zeros((4, P))
    for layer in range(LAYERS):
        logits = router.apply({"params": own[layer]}, jnp.asarray(x[layer], jnp.float32), ctx)
        h = np.stack([numpy_gru(cell, x[layer, 0, t] @ np.asarray(own[layer]["projector"]), h[t]) for t in range(4)])
        np.testing.assert_allclose(logits[0], h @ own[layer]["w"], rtol=2e-4, atol=1e-5)


def test_the_cell_is_shared_and_the_projectors_are_not() -> None:
    own = shapes(a=block_spec({}), b=block_spec({}))
    assert {name: leaf.shape for name, leaf in own["shared"].items()} == {
        "recurrent_router_w_in": (P, 3 * P), "recurrent_router_w_state": (P, 3 * P),
        "recurrent_router_b_in": (3 * P,), "recurrent_router_b_state": (3 * P,),
    }  # fmt: skip
    for name in ("0_a", "1_b"):
        router = own["repeats"][name]["ffn"]["router"]
        assert {name: leaf.shape for name, leaf in router.items()} == {"projector": (LAYERS, D, P), "w": (LAYERS, P, E)}
    shared = shapes(a=block_spec({"projector": "shared"}))
    assert shared["shared"]["recurrent_router_projector"].shape == (D, P)
    assert set(shared["repeats"]["0_a"]["ffn"]["router"]) == {"w"}


def test_the_state_goes_through_a_stack_however_it_is_run() -> None:
    """Scanned, and unrolled with rematerialisation: the same values, and the same gradients through all layers."""
    variables = draw(stack(), tokens(), Context())
    (_, (y, stats)), grads = step(stack())(variables)
    unrolled = {"params": to_unrolled(variables["params"])}
    (_, (other, other_stats)), other_grads = step(stack(scan=False, remat="full"))(unrolled)
    close(other, y)
    close(to_scanned(other_stats), stats)
    close(to_scanned(other_grads["params"]), grads["params"], 1e-3)
    assert min(np.abs(leaf).max() for leaf in jax.tree.leaves(grads)) > 1e-3
    # No cache is needed to decode: a token's state comes from that token alone.
    alone = jax.jit(stack().apply)(variables, tokens()[:, 2:3], Context(decode=True))
    close(alone, y[:, 2:3])


def of_the_first_projector(passing: str) -> tuple[np.ndarray, np.ndarray]:
    """The last layer's logits, and their gradient in the first layer's projector by the routers alone: blocks add nothing."""
    model = stack(passing=passing)
    variables = draw(model, tokens(), Context())
    variables["params"]["repeats"]["0_a"]["mix"] *= 0

    def last(variables):
        _, sown = model.apply(variables, tokens(), Context(), mutable=["stats"])
        logits = sown["stats"]["repeats"]["0_a"]["logits"][-1]
        return jnp.sin(logits).sum(), logits

    (_, logits), grads = jax.jit(jax.value_and_grad(last, has_aux=True))(variables)
    return np.asarray(logits), np.asarray(grads["params"]["repeats"]["0_a"]["router"]["projector"][0])


def test_detached_has_the_values_and_none_of_the_gradient() -> None:
    through, detached, none = (of_the_first_projector(passing) for passing in ("through", "detached", "none"))
    np.testing.assert_allclose(through[0], detached[0], rtol=1e-5)
    assert np.abs(through[1]).max() > 1e-3
    assert not detached[1].any()
    assert not none[1].any()
    assert np.abs(none[0] - through[0]).max() > 1e-3


@pytest.mark.parametrize("by", ["sequence", "position", "batch"])
def test_grouped_tokens_find_their_own_memory_and_leave_it_in_its_place(by: str) -> None:
    carried = Carried({"x": tokens()})
    grouped, ctx = group_tokens(tokens(), Context(carried=carried), by)
    np.testing.assert_array_equal(ctx.recall("x", None), grouped)
    ctx.remember("x", grouped + 1)
    np.testing.assert_array_equal(carried["x"], tokens() + 1)


@pytest.mark.parametrize("train", [True, False])
def test_tokens_that_skip_a_block_keep_their_state(train: bool) -> None:
    """Mixture-of-depths around a routed block: only the chosen tokens' states change, and they come back to their places."""
    depth = MixtureOfDepths(Routed(Recurrent(E, width=P)), capacity_factor=0.5)
    start = jnp.asarray(np.random.default_rng(3).normal(size=(B, S, P)), jnp.float32)
    variables = draw(depth, tokens())

    @jax.jit
    def run(variables, start):
        carried = Carried({"recurrent_router": start})
        _, sown = depth.apply(variables, tokens(), Context(carried=carried, train=train), mutable=["routing"])
        return carried["recurrent_router"], sown["routing"]["plan"].assigned()

    state, assigned = run(variables, start)
    chosen = np.asarray(assigned)[..., 0] > 0
    alone = Carried({"recurrent_router": start})
    inner = {"params": variables["params"]["block"]["router"]}
    Recurrent(E, width=P).apply(inner, tokens(), Context(carried=alone))
    np.testing.assert_allclose(state, np.where(chosen[..., None], alone["recurrent_router"], start), rtol=1e-4, atol=1e-6)
    assert 0 < chosen.sum() < chosen.size


@pytest.mark.parametrize("cell", ["lstm", "rnn"])
def test_other_cells_are_numpys(rng: np.random.Generator, cell: str) -> None:
    router = Recurrent(E, width=P, cell=cell)
    weights = {k: jnp.asarray(rng.normal(size=s[1]), jnp.float32) for k, s in router.shares(D)["recurrent_router"].items()}
    own = {"projector": jnp.asarray(rng.normal(size=(D, P))), "w": jnp.asarray(rng.normal(size=(P, E)))}
    carried = Carried(router.carries(1, 2))
    ctx, h, c = Context(shared={"recurrent_router": weights}, carried=carried), np.zeros((2, P)), np.zeros((2, P))
    for _ in range(2):
        x = rng.normal(size=(1, 2, D))
        logits = router.apply({"params": own}, jnp.asarray(x, jnp.float32), ctx)
        a = x[0] @ own["projector"] @ weights["w_in"] + weights["b_in"] + h @ weights["w_state"] + weights["b_state"]
        if cell == "lstm":
            i, f, n, o = np.split(a, 4, axis=-1)
            c = sigmoid(f) * c + sigmoid(i) * np.tanh(n)
            h = sigmoid(o) * np.tanh(c)
        else:
            h = np.tanh(a)
        np.testing.assert_allclose(logits[0], h @ own["w"], rtol=1e-4, atol=1e-5)


def test_logits_of_the_layer_below_are_added() -> None:
    model = stack(router=ResidualLogits(E, Linear(E)))
    variables = draw(model, tokens(), Context())
    _, sown = jax.jit(functools.partial(model.apply, mutable=["stats"]))(variables, tokens(), Context())
    block = jax.tree.map(np.asarray, variables["params"]["repeats"]["0_a"])
    x, logits = np.asarray(tokens(), np.float64), 0.0
    for i in range(LAYERS):
        logits = logits + x @ block["router"]["router"]["w"][i]
        np.testing.assert_allclose(sown["stats"]["repeats"]["0_a"]["logits"][i], logits, rtol=1e-4, atol=1e-4)
        x = x + np.tanh(logits) @ block["mix"][i]


def test_mutual_information_is_numpys(rng: np.random.Generator) -> None:
    router = Witnessed(E, Linear(E))
    carried = Carried(router.carries(2, 40))
    valid = rng.random((2, 40)) < 0.7
    ctx = Context(carried=carried, valid=jnp.asarray(valid))
    x, seen = rng.normal(size=(2, 40, E)), []
    for i in range(2):
        w = jnp.asarray(np.eye(E) + i * 0.5 * rng.normal(size=(E, E)))
        x = x + 0.3 * rng.normal(size=x.shape)
        logits, sown = router.apply({"params": {"router": {"w": w}}}, jnp.asarray(x, jnp.float32), ctx, mutable=["stats"])
        seen.append((np.asarray(logits).argmax(-1), {k: float(v) for k, v in sown["stats"].items()}))
    joint = np.zeros((E, E))
    for a, b in zip(seen[0][0][valid], seen[1][0][valid], strict=True):
        joint[a, b] += 1 / valid.sum()
    terms = [p * np.log(p / (joint[i].sum() * joint[:, j].sum())) for (i, j), p in np.ndenumerate(joint) if p]
    assert seen[0][1] == {"mutual_information": 0.0, "same_choice": 0.0}
    np.testing.assert_allclose(seen[1][1]["mutual_information"], sum(terms), rtol=1e-4)
    np.testing.assert_allclose(seen[1][1]["same_choice"], np.trace(joint), rtol=1e-5)
    assert sum(terms) > 0.1


def test_bad_settings_raise() -> None:
    for fields, message in (
        ({"cell": "grü"}, "cell='grü'"),
        ({"passing": "back"}, "passing='back'"),
        ({"width": 0}, "width=0"),
    ):
        with pytest.raises(ConfigError, match=message):
            Recurrent(E, **fields)
    wrong = r"blocks\.b\.ffn\.router carries 'recurrent_router' as .* give all layers the same"
    with pytest.raises(ConfigError, match=wrong.replace("carries", "(carries|shares)")):
        shapes(a=block_spec({}), b=block_spec({"width": P + 1}))
    with pytest.raises(ConfigError, match="remembers 'x', which no layer's carries"):
        Context(carried=Carried({})).remember("x", tokens())
