"""LoRA mixtures against NumPy (Hu et al. 2021; Zadouri et al. 2023), and around the Dense layers of models that know nothing of them."""

import functools

import flax.linen as nn
import flax.traverse_util
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from numpy_layers import close, compiled, draw
from numpy_routing import combine, softmax, top_k

from moejax import Balance, ConfigError, Context, LoRAMixture, TopK, WithLoRA
from moejax.layers import adapted_layers
from moejax.layers.depth.mixture_of_depths import MixtureOfDepths
from moejax.models import build

B, S, D, O, E, R = 2, 4, 5, 3, 4, 2


def inputs(rng: np.random.Generator) -> np.ndarray:
    return rng.normal(size=(B, S, D))


def low_rank(params, e: int, x: np.ndarray) -> np.ndarray:
    """x A_e B_e."""
    return x @ np.asarray(params["bank"]["a"], np.float64)[e] @ np.asarray(params["bank"]["b"], np.float64)[e]


@pytest.mark.parametrize("select", [None, TopK(k=2, score="softmax_selected")], ids=["soft", "top_2"])
def test_the_mixture_is_numpys(rng: np.random.Generator, select) -> None:
    x = inputs(rng)
    layer = LoRAMixture(O, E, R, scale=2.5, select=select)
    variables = draw(layer, jnp.asarray(x, jnp.float32))
    params = variables["params"]
    y = compiled(layer)(variables, jnp.asarray(x, jnp.float32))
    logits = x @ np.asarray(params["router"]["w"], np.float64)
    for b in range(B):
        if select is None:
            weight = softmax(logits[b])  # every expert, as in MoLoRA
        else:
            weight = combine(*top_k(logits[b], 2, "softmax_selected"), np.ones((S, 2), bool), E)
        expected = 2.5 * sum(weight[:, [e]] * low_rank(params, e, x[b]) for e in range(E))
        np.testing.assert_allclose(y[b], expected, rtol=1e-4, atol=1e-5)


def test_one_expert_is_plain_lora_without_a_router(rng: np.random.Generator) -> None:
    x = inputs(rng)
    layer = LoRAMixture(O, 1, R, scale=0.5)
    variables = draw(layer, jnp.asarray(x, jnp.float32))
    assert {path: leaf.shape for path, leaf in flax.traverse_util.flatten_dict(variables["params"]).items()} == {
        ("bank", "a"): (1, D, R),
        ("bank", "b"): (1, R, O),
    }
    y = layer.apply(variables, jnp.asarray(x, jnp.float32))
    np.testing.assert_allclose(y, 0.5 * low_rank(variables["params"], 0, x), rtol=1e-4, atol=1e-5)
    flat = layer.apply(variables, jnp.asarray(x[0, 0], jnp.float32))
    np.testing.assert_allclose(flat, y[0, 0], rtol=1e-5)


def test_gradients_are_those_of_the_formula(rng: np.random.Generator) -> None:
    x = jnp.asarray(inputs(rng), jnp.float32)
    layer = LoRAMixture(O, E, R, scale=2.0)
    variables = draw(layer, x)

    def formula(params, x):
        weight = jax.nn.softmax(x @ params["router"]["w"])
        return 2.0 * jnp.einsum("bse,bsd,edr,ero->bso", weight, x, params["bank"]["a"], params["bank"]["b"])

    actual = jax.jit(jax.grad(lambda p, x: jnp.sin(layer.apply({"params": p}, x)).sum(), argnums=(0, 1)))(
        variables["params"], x
    )
    expected = jax.jit(jax.grad(lambda p, x: jnp.sin(formula(p, x)).sum(), argnums=(0, 1)))(variables["params"], x)
    close(actual, expected, 1e-3)


NORM, MIXER = dict(kind="rms_norm"), dict(kind="attention", num_heads=2)
DENSE = dict(kind="transformer", mixer=MIXER, norm=NORM, ffn=dict(kind="glu", hidden=6))
TOKENS = jnp.asarray(np.random.default_rng(0).integers(0, 7, (2, 5)))


@functools.cache
def language_model(scan: bool = True, remat: str = "full") -> nn.Module:
    return build(
        dict(kind="decoder_lm", vocab_size=7, d_model=8, num_layers=2, pattern=("dense",), blocks=dict(dense=DENSE), scan=scan, remat=remat)
    )  # fmt: skip


def adapted(model: nn.Module, targets: tuple[str, ...] = ("*/q", "*/v"), **fields) -> WithLoRA:
    return WithLoRA(model, targets, **{"num_experts": 3, "rank": R, "scale": 2.0, **fields})


def without_lora(params) -> dict:
    flat = flax.traverse_util.flatten_dict(params)
    return flax.traverse_util.unflatten_dict({path: leaf for path, leaf in flat.items() if "lora" not in path})


class TestAdapter:
    @pytest.mark.parametrize("scan", [True, False])
    def test_the_tree_is_the_models_with_lora_beside_the_kernels(self, scan: bool) -> None:
        model = language_model(scan)
        plain = jax.eval_shape(model.init, jax.random.key(0), TOKENS)["params"]
        ours = jax.eval_shape(adapted(model).init, jax.random.key(0), TOKENS)["params"]
        assert without_lora(ours) == plain
        layers = ["stack/repeats/0_dense"] if scan else ["stack/repeat_0/0_dense", "stack/repeat_1/0_dense"]
        assert adapted_layers(ours) == sorted(f"{layer}/mixer/{name}" for layer in layers for name in "qv")
        assert adapted_layers(plain) == []
        leading = (2,) if scan else ()
        added = flax.traverse_util.flatten_dict(ours)
        root = tuple(layers[0].split("/"))
        assert added[(*root, "mixer", "q", "lora", "bank", "a")].shape == (*leading, 3, 8, R)
        assert added[(*root, "mixer", "q", "lora", "router", "w")].shape == (*leading, 8, 3)

    def test_at_the_start_a_pretrained_model_computes_what_it_computed(self) -> None:
        """Scanned and rematerialised; bit for bit, with any A and any router, since B starts at zero."""
        model = language_model()
        pretrained = draw(model, TOKENS)
        fresh = draw(adapted(model), TOKENS)["params"]
        tree = flax.traverse_util.flatten_dict(fresh) | flax.traverse_util.flatten_dict(pretrained["params"])
        tree = {path: jnp.zeros_like(leaf) if path[-2:] == ("bank", "b") else leaf for path, leaf in tree.items()}
        variables = {"params": flax.traverse_util.unflatten_dict(tree)}
        before = compiled(model)(pretrained, TOKENS)
        np.testing.assert_array_equal(compiled(adapted(model))(variables, TOKENS), before)

    @pytest.mark.slow
    def test_scan_and_remat_change_nothing_and_losses_have_a_layers_axis(self) -> None:
        losses = (Balance(0.5),)
        scanned = adapted(language_model(), losses=losses)
        plain = adapted(language_model(scan=False, remat="none"), losses=losses)
        variables = draw(scanned, TOKENS)
        repeats = variables["params"]["stack"]["repeats"]
        stack = {f"repeat_{i}": jax.tree.map(lambda leaf, i=i: leaf[i], repeats) for i in range(2)}
        unrolled = {"params": {**variables["params"], "stack": stack}}

        def objective(model):
            def run(variables):
                y, sown = model.apply(variables, TOKENS, mutable=["losses", "stats"])
                return jnp.sin(y).sum() + sum(leaf.sum() for leaf in jax.tree.leaves(sown["losses"])), sown["losses"]

            return jax.jit(jax.value_and_grad(run, has_aux=True))

        (value, sown), grads = objective(scanned)(variables)
        (expected, expected_sown), expected_grads = objective(plain)(unrolled)
        np.testing.assert_allclose(value, expected, rtol=1e-5)
        mixture = sown["stack"]["repeats"]["0_dense"]["mixer"]["q"]["lora"]["moe"]["balance_loss"]
        assert mixture.shape == (2,)
        each = [expected_sown["stack"][f"repeat_{i}"]["0_dense"]["mixer"]["q"]["lora"]["moe"]["balance_loss"] for i in range(2)]
        np.testing.assert_allclose(mixture, each, rtol=1e-5)
        stacked = jax.tree.map(
            lambda *leaves: jnp.stack(leaves), *(expected_grads["params"]["stack"][f"repeat_{i}"] for i in range(2))
        )
        close(grads["params"]["stack"]["repeats"], stacked, 1e-3)

    def test_a_target_that_matches_nothing_lists_the_layers(self) -> None:
        model = adapted(language_model(), targets=("*/q", "*/query"))
        layers = ", ".join(f"stack/repeats/0_dense/mixer/{name}" for name in "koqv")
        with pytest.raises(ConfigError, match=rf"targets='\*/query' matches no Dense layer; there are: {layers}(\n|$)"):
            jax.eval_shape(model.init, jax.random.key(0), TOKENS)

    def test_any_model_with_dense_layers(self, rng: np.random.Generator) -> None:
        """Not ours, without a context, on rows of any rank, with a layer that is used twice."""

        class Users(nn.Module):
            @nn.compact
            def __call__(self, x: jax.Array) -> jax.Array:
                shared = nn.Dense(D, name="shared")
                return nn.Dense(O, name="out")(jnp.tanh(shared(jnp.tanh(shared(x)))))

        x = inputs(rng)[:, 0]
        model = WithLoRA(Users(), ("*",), num_experts=1, rank=R, scale=3.0)
        variables = draw(model, jnp.asarray(x, jnp.float32))
        params = variables["params"]
        assert adapted_layers(params) == ["out", "shared"]

        def dense(name: str, x: np.ndarray) -> np.ndarray:
            kernel, bias = (np.asarray(params[name][key], np.float64) for key in ("kernel", "bias"))
            return x @ kernel + bias + 3.0 * low_rank(params[name]["lora"], 0, x)

        expected = dense("out", np.tanh(dense("shared", np.tanh(dense("shared", x)))))
        np.testing.assert_allclose(model.apply(variables, jnp.asarray(x, jnp.float32)), expected, rtol=1e-4, atol=1e-5)

    def test_the_context_is_that_of_the_tokens_the_layer_sees(self, rng: np.random.Generator) -> None:
        """A block inside mixture-of-depths gets fewer tokens than the model: padding must be that of its own tokens."""

        class Block(nn.Module):
            @nn.compact
            def __call__(self, x: jax.Array, ctx: Context) -> jax.Array:
                return x + nn.Dense(D, name="dense")(x)

        x = jnp.asarray(inputs(rng), jnp.float32)
        valid = jnp.array([[True, True, False, True], [True, True, True, True]])
        ctx = Context(valid=valid, train=True)
        model = WithLoRA(MixtureOfDepths(Block(), capacity_factor=0.5), ("*/dense",), num_experts=3, rank=R)
        variables = draw(model, x, ctx)
        _, state = compiled(model, "stats")(variables, x, ctx)
        stats = state["stats"]["block"]["dense"]["lora"]["moe"]
        np.testing.assert_allclose(stats["experts_per_token"], 3)
        plain = LoRAMixture(D, 3, R)
        lora = {"params": variables["params"]["block"]["dense"]["lora"]}
        r = np.asarray(x @ variables["params"]["router"]["w"])[..., 0]
        rows = jnp.stack([x[b, np.sort(np.argsort(-np.where(valid[b], r[b], -np.inf))[:2])] for b in range(B)])
        _, alone = compiled(plain, "stats")(lora, rows)
        np.testing.assert_allclose(stats["importance"], alone["stats"]["moe"]["importance"], rtol=1e-5)
