"""Adapters around whole models: scanned and not, rematerialised, on meshes, decoding."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from adapted_models import (
    DENSE,
    TOKENS,
    B,
    D,
    O,
    R,
    S,
    Scaled,
    around,
    dense,
    inputs,
    language_model,
    lora,
    mixture,
    root,
)
from flax.traverse_util import flatten_dict
from numpy_layers import close, compiled, draw

from moejax import Adapted, Adapter, Balance, ConfigError, Context, ExpertChoice, LoRA, RowWise, TopK
from moejax.layers.adapters import (
    adapted_layers,
    init_adapters,
    join_adapters,
    merge_adapters,
    split_adapters,
)
from moejax.layers.depth.mixture_of_depths import MixtureOfDepths
from moejax.models import active_params, build, count_params, why_not_decodable
from moejax.serve import generate

VIT = dict(
    kind="vit",
    image_size=4,
    channels=1,
    patch_size=2,
    num_classes=3,
    d_model=8,
    num_layers=1,
    pattern=("dense",),
    blocks=dict(dense=DENSE),
)


class TestModels:
    @pytest.mark.parametrize("scan", [True, False])
    def test_the_tree_is_the_models_with_adapters_beside_the_kernels(self, scan: bool) -> None:
        model = language_model(scan)
        plain = jax.eval_shape(model.init, jax.random.key(0), TOKENS)["params"]
        ours = jax.eval_shape(mixture(model).init, jax.random.key(0), TOKENS)["params"]
        base, added = split_adapters(ours)
        assert base == plain
        assert join_adapters(base, added) == ours
        leading = (2,) if scan else ()
        flat = flatten_dict(ours)
        assert flat[(*root(scan), "mixer", "q", "adapter_main", "moe", "bank", "a")].shape == (*leading, 3, 8, R)
        assert flat[(*root(scan), "mixer", "q", "adapter_main", "moe", "router", "w")].shape == (*leading, 8, 3)

    def test_at_the_start_a_pretrained_model_computes_what_it_computed(self) -> None:
        """Scanned and rematerialised; bit for bit, with every form of layer adapted."""
        model = language_model(pattern=("moe",))
        pretrained = draw(model, TOKENS)
        ours = Adapted(
            model, {"routed": lora(num_experts=3, targets=("*/q",)), "plain": lora(targets=("experts", "*/v", "embedding"))}
        )
        variables = init_adapters(ours, pretrained, jax.random.key(1), TOKENS)
        base, added = split_adapters(variables["params"])
        jax.tree.map(np.testing.assert_array_equal, base, pretrained["params"])
        assert count_params(added) == sum(layer.added for layer in adapted_layers(ours, TOKENS))
        np.testing.assert_array_equal(compiled(ours)(variables, TOKENS), compiled(model)(pretrained, TOKENS))

    @pytest.mark.slow
    def test_scan_and_remat_change_nothing_and_losses_have_a_layers_axis(self) -> None:
        losses = (Balance(0.5),)
        scanned = mixture(language_model(), losses=losses)
        plain = mixture(language_model(scan=False, remat="none"), losses=losses)
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

        def loss(repeat):
            return repeat["0_dense"]["mixer"]["q"]["adapter_main"]["moe"]["balance_loss"]

        each = [loss(expected_sown["stack"][f"repeat_{i}"]) for i in range(2)]
        assert loss(sown["stack"]["repeats"]).shape == (2,)
        np.testing.assert_allclose(loss(sown["stack"]["repeats"]), each, rtol=1e-5)
        stacked = jax.tree.map(
            lambda *leaves: jnp.stack(leaves), *(expected_grads["params"]["stack"][f"repeat_{i}"] for i in range(2))
        )
        close(grads["params"]["stack"]["repeats"], stacked, 1e-3)

    @pytest.mark.parametrize("fields", [{"num_experts": 3}, {}], ids=["mixture", "plain"])
    def test_the_output_has_the_layers_dtype(self, fields: dict) -> None:
        x = jnp.ones((B, S, D), jnp.float32)
        model = around(nn.Dense(O, dtype=jnp.bfloat16), **fields)
        assert compiled(model)(draw(model, x), x).dtype == jnp.bfloat16
        whole = around(language_model(dtype="bfloat16"), targets=("mixers", "ffns", "embedding"), **fields)
        if not fields:
            jax.eval_shape(whole.init, jax.random.key(0), TOKENS)  # a scan's carry keeps its type

    def test_merged_a_scanned_model_computes_the_same_without_adapters(self) -> None:
        model = language_model(pattern=("moe",))
        ours = Adapted(model, {"a": lora(targets=("*/q", "*/w_*", "embedding")), "b": lora(rank=1, targets=("*/q", "*/w_out"))})
        params = draw(ours, TOKENS)["params"]
        y = compiled(ours)({"params": params}, TOKENS)
        assert np.abs(y - compiled(model)({"params": params}, TOKENS)).max() > 0.1
        one = merge_adapters(ours, params, TOKENS, names=("b",))
        assert not split_adapters(one, "b")[1]
        assert split_adapters(one, "a")[1]
        close(compiled(ours.using("a"))({"params": one}, TOKENS), y, 1e-3, 1e-4)
        both = merge_adapters(ours, params, TOKENS)
        assert jax.tree.structure(both) == jax.tree.structure(split_adapters(params)[0])
        close(compiled(model)({"params": both}, TOKENS), y, 1e-3, 1e-4)
        with pytest.raises(ConfigError, match="depends on the token, so that it can neither be merged"):
            merge_adapters(mixture(model), draw(mixture(model), TOKENS)["params"], TOKENS)
        with pytest.raises(ConfigError, match="no adapter 'c' to merge"):
            merge_adapters(ours, params, TOKENS, names=("c",))

    def test_adapters_by_name_and_by_row(self) -> None:
        """What `using` switches for a call, the context switches for each token."""
        model = language_model()
        ours = Adapted(
            model, {"a": lora(targets=("*/q",)), "b": mixture(model).adapters[0].adapter, "c": Scaled(targets=("*/q",))}
        )
        variables = draw(ours, TOKENS)
        each = [compiled(ours.using(name))(variables, TOKENS) for name in ("a", "b", "c")]
        none = compiled(ours.using())(variables, TOKENS)
        np.testing.assert_array_equal(none, compiled(model)(variables, TOKENS))
        assert min(np.abs(y - none).max() for y in each) > 0.1
        for rows in ((0, 1), (2, -1)):
            ctx = Context(adapter=jnp.broadcast_to(jnp.asarray(rows)[:, None], TOKENS.shape))
            y = compiled(ours)(variables, TOKENS, ctx)
            for row, number in enumerate(rows):
                close(y[row], (none if number < 0 else each[number])[row], 1e-4, 1e-5)
        with pytest.raises(ConfigError, match=r"no adapter 'd'"):
            ours.using("d")
        banks = around(model, targets=("ffns",))
        with pytest.raises(ConfigError, match="is one matrix for all tokens"):
            jax.eval_shape(banks.init, jax.random.key(0), TOKENS, ctx)

    def test_the_context_is_that_of_the_tokens_the_layer_sees(self, rng: np.random.Generator) -> None:
        """A block inside mixture-of-depths gets fewer tokens than the model: padding must be that of its own tokens."""

        class Block(RowWise):
            @nn.compact
            def __call__(self, x: jax.Array, ctx: Context) -> jax.Array:
                return x + nn.Dense(D, name="dense")(x)

        x = jnp.asarray(inputs(rng), jnp.float32)
        valid = jnp.array([[True, True, False, True], [True, True, True, True]])
        ctx = Context(valid=valid, train=True)
        model = mixture(MixtureOfDepths(Block(), capacity_factor=0.5), ("*/dense",))
        variables = draw(model, x, ctx)
        _, state = compiled(model, "stats")(variables, x, ctx)
        stats = state["stats"]["block"]["dense"]["adapter_main"]["moe"]
        np.testing.assert_allclose(stats["experts_per_token"], 3)
        r = np.asarray(x @ variables["params"]["router"]["w"])[..., 0]
        rows = jnp.stack([x[b, np.sort(np.argsort(-np.where(valid[b], r[b], -np.inf))[:2])] for b in range(B)])
        plain = mixture(nn.Dense(D), ("*",))
        _, alone = compiled(plain, "stats")({"params": variables["params"]["block"]["dense"]}, rows)
        np.testing.assert_allclose(stats["importance"], alone["stats"]["adapter_main"]["moe"]["importance"], rtol=1e-5)

    def test_three_lines_around_any_model(self, rng: np.random.Generator) -> None:
        """Not ours, without a context, on rows of any rank, with a layer that is used twice."""

        class Users(nn.Module):
            @nn.compact
            def __call__(self, x: jax.Array) -> jax.Array:
                shared = nn.Dense(D, name="shared")
                return nn.Dense(O, name="out")(jnp.tanh(shared(jnp.tanh(shared(x)))))

        x = inputs(rng)[:, 0]
        pretrained = draw(Users(), jnp.asarray(x, jnp.float32))
        model = Adapted(Users(), {"main": LoRA(rank=R, scale=3.0, targets=("*",))})
        variables = init_adapters(model, pretrained, jax.random.key(0), jnp.asarray(x, jnp.float32))
        y = compiled(model)(variables, jnp.asarray(x, jnp.float32))
        np.testing.assert_array_equal(y, compiled(Users())(pretrained, jnp.asarray(x, jnp.float32)))

        params = draw(model, jnp.asarray(x, jnp.float32))["params"]

        def layer(name: str, x: np.ndarray) -> np.ndarray:
            a, b = (np.asarray(params[name]["adapter_main"][key], np.float64) for key in "ab")
            return dense(params[name], x) + 3.0 * x @ a @ b

        expected = layer("out", np.tanh(layer("shared", np.tanh(layer("shared", x)))))
        actual = compiled(model)({"params": params}, jnp.asarray(x, jnp.float32))
        np.testing.assert_allclose(actual, expected, rtol=1e-4, atol=1e-5)


class TestDecoders:
    def test_an_adapter_that_looks_at_later_tokens_is_refused(self) -> None:
        with pytest.raises(ConfigError, match=r"adapters\.main\.select \(ExpertChoice\) selects over later tokens"):
            mixture(language_model(), select=ExpertChoice())

        class Silent(Adapter):
            def linear(self, x, site, ctx=None):
                return site.call(x)

        with pytest.raises(ConfigError, match=r"adapters\.main \(Silent\) does not say whether its tokens see later ones"):
            around(language_model(), Silent(targets=("*/q",)))
        limited = mixture(language_model(), select=TopK(k=1, capacity_factor=1.0))
        assert why_not_decodable(limited).startswith("adapters.main: TopK plans several tokens together")
        assert why_not_decodable(limited.using()) is None
        mixture(
            build(VIT),
            select=ExpertChoice(),
        )

    def test_decoding_with_a_cache_is_the_whole_pass(self) -> None:
        model = language_model(pattern=("moe",))
        routed = lora(num_experts=3, select=TopK(k=2), targets=("*/q",))
        ours = Adapted(model, {"routed": routed, "plain": lora(targets=("*/w_out", "embedding"))})
        variables = draw(ours, TOKENS)
        made = generate(ours, variables["params"], TOKENS, max_new_tokens=3, keep_logits=True)
        whole = compiled(ours)(variables, jnp.concatenate([TOKENS, made.tokens], 1))
        np.testing.assert_allclose(made.logits, whole[:, TOKENS.shape[1] - 1 : -1], rtol=1e-3, atol=1e-3)

    def test_rows_decode_with_adapters_of_their_own(self) -> None:
        model = language_model()
        ours = Adapted(model, {"a": lora(targets=("*/q",)), "b": lora(targets=("*/v",))})
        params = draw(ours, TOKENS)["params"]
        mixed = generate(ours, params, TOKENS, max_new_tokens=2, keep_logits=True, adapter=np.array([1, -1]))
        alone = [generate(m, params, TOKENS, max_new_tokens=2, keep_logits=True) for m in (ours.using("b"), ours.using())]
        for row, other in enumerate(alone):
            np.testing.assert_array_equal(mixed.tokens[row], other.tokens[row])
            np.testing.assert_allclose(mixed.logits[row], other.logits[row], rtol=1e-3, atol=1e-4)

    def test_active_parameters_count_the_experts_that_run(self) -> None:
        model = language_model(pattern=("dense", "moe"))
        params = jax.eval_shape(model.init, jax.random.key(0), TOKENS)["params"]
        ours = mixture(model, num_experts=4, select=TopK(k=1))
        adapted = jax.eval_shape(ours.init, jax.random.key(0), TOKENS)["params"]
        layers = 4 * 2  # of both blocks twice, q and v
        added = layers * (4 * R * 16 + 8 * 4)
        assert count_params(adapted) - count_params(params) == added
        assert active_params(ours, adapted) == active_params(model, params) + layers * (R * 16 + 8 * 4)
