"""VQMoE against NumPy: both paths, the codes' loss and their gradients, straight through and blended, and codes that come back to life."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from controlled import train_call
from numpy_layers import close, draw
from numpy_routing import softmax

from moejax import models
from moejax.core.context import Context
from moejax.core.errors import ConfigError
from moejax.experts import FFN
from moejax.layers import VQMoE
from moejax.parallel import Parallel, make_mesh, use
from moejax.routing import ExpertChoice, Linear, TopK

B, S, D, E, F, K = 2, 5, 6, 3, 4, 7
VALID = np.arange(S)[None] < np.array([5, 3])[:, None]


def layer(**fields) -> VQMoE:
    fields = {
        "router": Linear(E),
        "select": TopK(k=1),
        "bank": FFN(F, num_experts=E, activation="relu"),
        "num_codes": K,
        **fields,
    }
    return VQMoE(**fields)


@functools.cache
def example() -> tuple:
    x = jax.random.normal(jax.random.key(0), (B, S, D))
    return draw(layer(), x), x


@functools.cache
def apply(vq: VQMoE, train: bool = False):
    ctx = Context(valid=jnp.asarray(VALID), train=train)
    run = functools.partial(train_call, vq, mutable=("losses", "stats"), rngs={"router": jax.random.key(1)})

    @jax.jit
    def call(variables: dict, x: jax.Array) -> tuple:
        """Output, and what was sown with the variables after the step (unchanged in evaluation)."""
        y, sown, after = run(variables, x, ctx)
        return y, {**sown, "after": after}

    return call


def norm(x: np.ndarray, p: dict) -> np.ndarray:
    return (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-6) * p["scale"] + p["bias"]


def numpy_layer(vq: VQMoE, variables: dict, x: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray, float]:
    """Both paths' outputs, the codes, and the loss, one token at a time."""
    p = jax.tree.map(lambda a: np.asarray(a, np.float64), variables["params"])
    x = np.asarray(x, np.float64)

    def expert(e: int, row: np.ndarray) -> np.ndarray:
        return np.maximum(row @ p["bank"]["w_in"][e], 0) @ p["bank"]["w_out"][e]

    routed, discrete, code, error = np.zeros_like(x), np.zeros_like(x), np.full((B, S), -1), []
    for i, t in np.argwhere(VALID):
        row, c = x[i, t], p["codebook"]
        far = ((row - c) ** 2).sum(-1) if vq.distance == "euclidean" else -(c @ row) / np.linalg.norm(c, axis=-1)
        code[i, t] = far.argmin()
        near = c[code[i, t]]
        error.append((1 + vq.commitment) * ((near - row) ** 2).mean())
        rows = near if vq.quantise == "straight_through" else (1 - vq.rho) * row + vq.rho * (near - row)
        discrete[i, t] = norm(expert(code[i, t] % E, norm(rows, p["code_norm"])), p["output_norm"])
        if vq.paths == "both":
            probs = softmax(row @ p["router"]["w"])
            routed[i, t] = probs.max() * expert(probs.argmax(), row)
    return routed, discrete, code, vq.coef * np.mean(error)


@pytest.mark.parametrize(
    "fields",
    [{}, {"quantise": "blend", "rho": 0.3, "combine": "mean"}, {"paths": "discrete", "distance": "cosine"}],
    ids=["both", "blend", "discrete"],
)
def test_it_is_numpys(fields: dict) -> None:
    vq = layer(**fields)
    variables, x = example()
    y, sown = apply(vq)(variables, x)
    routed, discrete, code, loss = numpy_layer(vq, variables, x)
    a = softmax(np.asarray(x, np.float64) @ np.asarray(variables["params"]["gate"], np.float64))
    expected = {"both": a[..., :1] * routed + a[..., 1:] * discrete, "mean": (routed + discrete) / 2, "discrete": discrete}
    name = "mean" if vq.combine == "mean" else vq.paths
    np.testing.assert_allclose(y, expected[name], rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(sown["losses"]["vq_loss"], loss, rtol=1e-5)
    share = np.bincount(code[VALID], minlength=K) / VALID.sum()
    entropy = -(share[share > 0] * np.log(share[share > 0])).sum()
    np.testing.assert_allclose(sown["stats"]["code_perplexity"], np.exp(entropy), rtol=1e-5)
    experts = (
        code[VALID] % E
        if vq.paths == "discrete"
        else (np.asarray(x) @ np.asarray(variables["params"]["router"]["w"])).argmax(-1)[VALID]
    )
    np.testing.assert_allclose(sown["stats"]["load"], np.bincount(experts, minlength=E) / VALID.sum(), rtol=1e-5)


def test_gradients_pass_straight_through_and_codes_learn_from_their_loss_alone() -> None:
    vq = layer(paths="discrete")
    variables, x = example()
    ctx = Context(valid=jnp.asarray(VALID))
    codes = np.asarray(variables["params"]["codebook"])
    _, _, code, _ = numpy_layer(vq, variables, x)
    nearest = jnp.asarray(np.where(VALID[..., None], codes[code], 0))

    def after_quantising(params: dict, rows: jax.Array) -> jax.Array:
        def layer_norm(v: jax.Array, p: dict) -> jax.Array:
            return (v - v.mean(-1, keepdims=True)) / jnp.sqrt(v.var(-1, keepdims=True) + 1e-6) * p["scale"] + p["bias"]

        w_in, w_out = (params["bank"][name][code % E] for name in ("w_in", "w_out"))
        h = jax.nn.relu(jnp.einsum("bsd,bsdf->bsf", layer_norm(rows, params["code_norm"]), w_in))
        y = layer_norm(jnp.einsum("bsf,bsfd->bsd", h, w_out), params["output_norm"])
        return jnp.sin(jnp.where(VALID[..., None], y, 0)).sum()

    def output(params: dict, x: jax.Array) -> jax.Array:
        return jnp.sin(vq.apply({"params": params}, x, ctx)).sum()

    def loss(params: dict, x: jax.Array) -> jax.Array:
        return vq.apply({"params": params}, x, ctx, mutable=["losses"])[1]["losses"]["vq_loss"]

    both = jax.jit(lambda p, x: (jax.grad(output, (0, 1))(p, x), jax.grad(loss, (0, 1))(p, x)))
    (of_output, by_token), (of_loss, pull) = both(variables["params"], x)
    expected, through = jax.jit(jax.grad(after_quantising, (0, 1)))(variables["params"], nearest)
    close(by_token, jnp.where(VALID[..., None], through, 0))
    close(of_output["bank"], expected["bank"])
    np.testing.assert_array_equal(of_output["codebook"], 0)
    away = np.where(VALID[..., None], codes[code] - np.asarray(x), 0) * 2 * vq.coef / (VALID.sum() * D)
    np.testing.assert_allclose(pull, -vq.commitment * away, rtol=1e-4, atol=1e-7)
    wanted = np.zeros_like(codes)
    np.add.at(wanted, code[VALID], away[VALID])
    np.testing.assert_allclose(of_loss["codebook"], wanted, rtol=1e-4, atol=1e-7)


def test_codes_that_nobody_uses_move_to_tokens_in_training() -> None:
    vq = layer(paths="discrete", revive_below=0.1)
    variables, x = example()
    far = variables["params"]["codebook"].at[2].set(100.0)
    use = jnp.full(K, 1 / K).at[2].set(0.1 / K - 1e-3)
    variables = {"params": {**variables["params"], "codebook": far}, "router_state": {"use": use}}
    _, same = apply(vq)(variables, x)
    close(same["after"], variables, 0, 0)
    _, changed = apply(vq, True)(variables, x)
    codes, now = np.asarray(changed["after"]["params"]["codebook"]), np.asarray(changed["after"]["router_state"]["use"])
    tokens = np.asarray(x)[VALID]
    assert np.abs(tokens - codes[2]).max(-1).min() < 1e-6
    stay = [0, 1, 3, 4, 5, 6]
    np.testing.assert_array_equal(codes[stay], np.asarray(far)[stay])
    code = numpy_layer(vq, variables, x)[2]
    share = np.bincount(code[VALID], minlength=K) / VALID.sum()
    np.testing.assert_allclose(now, np.where(np.arange(K) == 2, 1 / K, 0.99 / K + 0.01 * share), rtol=1e-4)
    # It is the moved code that tokens are compared with from now on.
    _, after = apply(vq)(changed["after"], x)
    assert after["stats"]["code_perplexity"] >= changed["stats"]["code_perplexity"]


def test_averaged_codes_are_the_running_means_of_their_tokens() -> None:
    """NumPy, two steps: use and sums decay by 0.99; no parameter and no gradient of a code; evaluation leaves them."""
    vq, x = layer(paths="discrete", codebook="averaged"), example()[1]
    variables = draw(vq, x)
    assert "codebook" not in variables["params"]
    rng = np.random.default_rng(0)
    use, total = rng.random(K) / K, rng.normal(size=(K, D)) / K
    for train in (True, True, False):
        state = {"total": jnp.asarray(total, jnp.float32), "use": jnp.asarray(use, jnp.float32)}
        _, sown = apply(vq, train)({"params": variables["params"], "router_state": state}, x)
        codes, rows = total / use[:, None], np.asarray(x, np.float64)[VALID]
        code = ((rows[:, None] - codes) ** 2).sum(-1).argmin(-1)
        np.testing.assert_allclose(
            sown["losses"]["vq_loss"], vq.coef * vq.commitment * ((rows - codes[code]) ** 2).mean(), rtol=1e-5
        )
        if train:
            one_hot = np.eye(K)[code]
            use, total = 0.99 * use + 0.01 * one_hot.mean(0), 0.99 * total + 0.01 * one_hot.T @ rows / len(rows)
        kept = sown["after"]["router_state"]
        np.testing.assert_allclose(kept["use"], use, rtol=1e-5)
        np.testing.assert_allclose(kept["total"], total, rtol=1e-4, atol=1e-6)


@pytest.mark.slow
def test_a_mesh_computes_the_same() -> None:
    vq = layer()
    variables, x = example()

    def loss(params: dict, x: jax.Array) -> jax.Array:
        y, sown = vq.apply({"params": params}, x, Context(valid=jnp.asarray(VALID)), mutable=["losses"])
        return jnp.sin(y).sum() + sown["losses"]["vq_loss"]

    def step(params: dict, x: jax.Array) -> tuple:
        return jax.value_and_grad(loss)(params, x)

    expected = jax.jit(lambda *args: step(*args))(variables["params"], x)
    with use(Parallel(make_mesh("data=2,expert=4"))):
        close(jax.jit(lambda *args: step(*args))(variables["params"], x), expected)


def test_it_is_a_layer_of_a_decoder() -> None:
    ffn = dict(
        kind="vq_moe", num_experts=4, router=dict(kind="linear"), select=dict(kind="top_k", k=1), bank=dict(kind="ffn", hidden=3),
        losses=dict(balance=dict(coef=0.01)), revive_below=0.1,
    )  # fmt: skip
    block = dict(kind="transformer", mixer=dict(kind="attention", num_heads=1), norm=dict(kind="rms_norm"), ffn=ffn)
    spec = dict(kind="decoder_lm", vocab_size=9, d_model=4, num_layers=2, pattern=("a",), blocks={"a": block}, remat="full")
    model, tokens = models.build(spec), jnp.zeros((2, 4), jnp.int32)
    variables = jax.eval_shape(model.init, jax.random.key(0), tokens)
    parts = variables["params"]["stack"]["repeats"]["0_a"]["ffn"]
    assert sorted(parts) == ["bank", "code_norm", "codebook", "gate", "output_norm", "router"]
    assert parts["bank"]["w_in"].shape == (2, 4, 4, 3)
    streams, ctx = {"router": jax.random.key(0)}, Context(train=True)
    _, sown = jax.eval_shape(lambda v: model.apply(v, tokens, ctx, rngs=streams, mutable=["losses", "router_state"]), variables)
    assert sorted(sown["losses"]["stack"]["repeats"]["0_a"]["ffn"]) == ["balance_loss", "vq_loss"]
    assert model.blocks[0].module.ffn.active_fraction() == 2 / 4


def test_settings() -> None:
    for fields, message in (
        ({"quantise": "round"}, "quantise='round'"),
        ({"revive_below": 1.0}, r"revive_below=1\.0"),
        ({"revive_below": 0.1, "codebook": "averaged"}, "take codebook='learned'"),
    ):
        with pytest.raises(ConfigError, match=message):
            layer(**fields)
    leaky = {"select": ExpertChoice(1.0)}
    with pytest.raises(ConfigError, match=r"ffn\.select"):
        layer(**leaky).check_causal("ffn")
    layer(**leaky, paths="discrete").check_causal("ffn")
    assert layer(**leaky, paths="discrete").decodable() is None
    assert layer(paths="discrete").active_fraction() == 1 / E
