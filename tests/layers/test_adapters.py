"""Adapters against NumPy and against the models that they are merged into, around models that know nothing of them."""

import dataclasses
import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict, unflatten_dict
from numpy_layers import close, compiled, draw
from numpy_routing import combine, softmax, top_k

from moejax import Adapted, Adapter, Balance, ConfigError, Context, ExpertChoice, LoRA, MergePlan, RowWise, TopK
from moejax.core.params import param
from moejax.dispatch import dispatch
from moejax.experts import FFN, GLU, Residual
from moejax.layers.adapters import (
    LowRankAdapter,
    adapt,
    adapted_layers,
    adapted_table,
    init_adapters,
    join_adapters,
    linear_map,
    merge_adapters,
    split_adapters,
)
from moejax.layers.depth.mixture_of_depths import MixtureOfDepths
from moejax.layers.registry import adapters
from moejax.models import active_params, build, count_params, why_not_decodable
from moejax.parallel import Parallel, make_mesh, use
from moejax.routing.routers import Recurrent
from moejax.serve import generate

B, S, D, O, E, R = 2, 4, 5, 3, 4, 2


def inputs(rng: np.random.Generator) -> np.ndarray:
    return rng.normal(size=(B, S, D))


def around(layer: nn.Module, adapter: Adapter | None = None, **fields) -> Adapted:
    """One layer with an adapter."""
    return Adapted(layer, {"main": adapter or lora(**fields)})


def lora(**fields) -> LoRA:
    return LoRA(**{"rank": R, "scale": 2.0, "targets": ("*",), **fields})


def low_rank(params, e: int, x: np.ndarray) -> np.ndarray:
    """x A_e B_e."""
    return x @ np.asarray(params["a"], np.float64)[e] @ np.asarray(params["b"], np.float64)[e]


def dense(params, x: np.ndarray) -> np.ndarray:
    return x @ np.asarray(params["kernel"], np.float64) + np.asarray(params["bias"], np.float64)


class TestLoRA:
    @pytest.mark.parametrize("select", [None, TopK(k=2, score="softmax_selected")], ids=["soft", "top_2"])
    def test_a_mixture_is_numpys(self, rng: np.random.Generator, select) -> None:
        x = inputs(rng)
        model = around(nn.Dense(O), num_experts=E, select=select, scale=2.5)
        variables = draw(model, jnp.asarray(x, jnp.float32))
        params = variables["params"]
        mixture = params["adapter_main"]["moe"]
        y = compiled(model)(variables, jnp.asarray(x, jnp.float32))
        logits = x @ np.asarray(mixture["router"]["w"], np.float64)
        for b in range(B):
            if select is None:
                weight = softmax(logits[b])  # every expert, as in MoLoRA
            else:
                weight = combine(*top_k(logits[b], 2, "softmax_selected"), np.ones((S, 2), bool), E)
            added = 2.5 * sum(weight[:, [e]] * low_rank(mixture["bank"], e, x[b]) for e in range(E))
            np.testing.assert_allclose(y[b], dense(params, x[b]) + added, rtol=1e-4, atol=1e-4)

    def test_one_expert_has_no_router(self, rng: np.random.Generator) -> None:
        x = inputs(rng)
        model = around(nn.Dense(O), scale=0.5)
        variables = draw(model, jnp.asarray(x, jnp.float32))
        ours = variables["params"]["adapter_main"]
        assert {name: leaf.shape for name, leaf in ours.items()} == {"a": (D, R), "b": (R, O)}
        a, b = (np.asarray(ours[name], np.float64) for name in "ab")
        expected = dense(variables["params"], x) + 0.5 * x @ a @ b
        np.testing.assert_allclose(compiled(model)(variables, jnp.asarray(x, jnp.float32)), expected, rtol=1e-4, atol=1e-5)
        flat = compiled(model)(variables, jnp.asarray(x[0, 0], jnp.float32))
        np.testing.assert_allclose(flat, expected[0, 0], rtol=1e-4, atol=1e-5)

    def test_gradients_are_those_of_the_formula(self, rng: np.random.Generator) -> None:
        x = jnp.asarray(inputs(rng), jnp.float32)
        model = around(nn.Dense(O, use_bias=False), num_experts=E)
        variables = draw(model, x)

        def formula(params, x):
            ours = params["adapter_main"]["moe"]
            weight = jax.nn.softmax(x @ ours["router"]["w"])
            added = jnp.einsum("bse,bsd,edr,ero->bso", weight, x, ours["bank"]["a"], ours["bank"]["b"])
            return x @ params["kernel"] + 2.0 * added

        def grad(f):
            return jax.jit(jax.grad(lambda p, x: jnp.sin(f(p, x)).sum(), argnums=(0, 1)))(variables["params"], x)

        close(grad(lambda p, x: model.apply({"params": p}, x)), grad(formula), 1e-3)

    @pytest.mark.parametrize("fields", [{}, {"num_experts": 2, "backend": "reference"}], ids=["plain", "mixture"])
    def test_dropout_is_on_the_way_in_and_in_training_only(self, rng: np.random.Generator, fields: dict) -> None:
        """So it changes no mean, and no choice of experts: the router sees all of x."""

        class Users(nn.Module):
            @nn.compact
            def __call__(self, x: jax.Array, ctx: Context) -> jax.Array:
                return nn.Dense(O, name="dense")(x)

        x = jnp.asarray(inputs(rng), jnp.float32)
        model, plain = around(Users(), dropout=0.5, **fields), around(Users(), **fields)
        variables = draw(model, x, Context())
        expected = compiled(plain)(variables, x, Context())
        np.testing.assert_array_equal(compiled(model)(variables, x, Context()), expected)
        draws = jax.random.split(jax.random.key(0), 2000)
        train = Context(train=True)
        runs = jax.jit(jax.vmap(lambda key: model.apply(variables, x, train, rngs={"dropout": key})))(draws)
        assert runs.std(0).min() > 0
        np.testing.assert_array_less(np.abs(runs.mean(0) - expected), 5 * runs.std(0) / np.sqrt(len(draws)) + 1e-6)

    def test_scale_rank_and_parts_that_do_not_fit_are_refused(self) -> None:
        with pytest.raises(ConfigError, match="needs a rank and a scale"):
            LoRA(rank=2, targets=("*",))
        with pytest.raises(ConfigError, match="num_experts=1 is plain LoRA, which has no select"):
            lora(select=TopK(k=1))
        with pytest.raises(ConfigError, match="rank and scale are those of the low-rank bank"):
            lora(num_experts=2, bank=FFN(hidden=3, num_experts=2))
        with pytest.raises(ConfigError, match="bank=Residual has no output width to choose"):
            LoRA(num_experts=2, bank=Residual(hidden=3, num_experts=2), targets=("*",))
        with pytest.raises(ConfigError, match="remembers what earlier layers left"):
            lora(num_experts=2, router=Recurrent(2))
        with pytest.raises(ConfigError, match="must name layers"):
            lora(targets=())

    def test_a_bank_of_another_kind(self, rng: np.random.Generator) -> None:
        x = jnp.asarray(inputs(rng), jnp.float32)
        adapter = LoRA(num_experts=2, bank=FFN(hidden=3, num_experts=2, activation="relu"), targets=("*",))
        model = around(nn.Dense(O), adapter)
        variables = draw(model, x)
        ours = variables["params"]["adapter_main"]["moe"]
        weight = softmax(np.asarray(x @ ours["router"]["w"]))
        hidden = np.maximum(np.einsum("bsd,edf->bsef", x, ours["bank"]["w_in"]), 0)
        each = np.einsum("bsef,efo->bseo", hidden, ours["bank"]["w_out"])
        expected = compiled(nn.Dense(O))({"params": split_adapters(variables["params"])[0]}, x) + np.einsum(
            "bse,bseo->bso", weight, each
        )
        np.testing.assert_allclose(compiled(model)(variables, x), expected, rtol=1e-4, atol=1e-5)


LINEAR = {
    "dense": (nn.Dense(3), (2, 4, 5)),
    "dense_general": (nn.DenseGeneral((3, 2), axis=(1, -1)), (2, 4, 3, 5)),
    "heads_out": (nn.DenseGeneral(3, axis=(-2, -1), use_bias=False), (2, 4, 2, 5)),
    "einsum": (nn.Einsum((2, 5, 3), "...hd,hdm->...m"), (2, 4, 2, 5)),
    "einsum_turned": (nn.Einsum((2, 5, 3), "bsd,hdm->bmhs"), (2, 4, 5)),
    "conv": (nn.Conv(3, (3, 2), strides=(2, 1), padding=((1, 0), (0, 1))), (2, 5, 4, 3)),
    "conv_dilated": (nn.Conv(4, 3, kernel_dilation=2, padding="SAME"), (2, 3, 7, 2)),
}


class TestLinearMaps:
    @pytest.mark.parametrize("name", LINEAR)
    def test_a_layer_is_its_matrix(self, rng: np.random.Generator, name: str) -> None:
        layer, shape = LINEAR[name]
        x = jnp.asarray(rng.normal(size=shape), jnp.float32)
        variables = draw(layer, x)
        params = variables["params"]
        seen = linear_map(layer, x)
        y = seen.put(seen.rows(x) @ seen.matrix(params["kernel"]) + (seen.vector(params["bias"]) if "bias" in params else 0))
        np.testing.assert_allclose(y, compiled(layer)(variables, x), rtol=1e-4, atol=1e-5)
        np.testing.assert_array_equal(seen.kernel(seen.matrix(params["kernel"])), params["kernel"])

    @pytest.mark.parametrize("name", LINEAR)
    def test_merged_it_computes_the_same(self, rng: np.random.Generator, name: str) -> None:
        layer, shape = LINEAR[name]
        x = jnp.asarray(rng.normal(size=shape), jnp.float32)
        model = around(layer)
        variables = draw(model, x)
        y = compiled(model)(variables, x)
        plain = split_adapters(variables["params"])[0]
        assert np.abs(y - compiled(layer)({"params": plain}, x)).max() > 0.1
        merged = merge_adapters(model, variables["params"], x)
        assert jax.tree.map(jnp.shape, merged) == jax.tree.map(jnp.shape, plain)
        np.testing.assert_allclose(compiled(layer)({"params": merged}, x), y, rtol=1e-4, atol=1e-4)

    @pytest.mark.parametrize(
        ("layer", "shape"),
        [
            (nn.Conv(4, (3,), feature_group_count=2), (2, 5, 4)),
            (nn.Conv(4, (3,), padding="CAUSAL"), (2, 5, 4)),
            (nn.DenseGeneral(3, batch_dims=(0,)), (2, 4, 5)),
            (nn.Einsum((2, 5, 3), "bshd,hdm->bshm"), (2, 4, 2, 5)),
        ],
        ids=["grouped", "causal", "batch_dims", "per_head"],
    )
    def test_what_is_not_one_matrix_is_not_reached(self, layer: nn.Module, shape: tuple[int, ...]) -> None:
        with pytest.raises(ConfigError, match="matches no layer that LoRA can change; there are: none"):
            jax.eval_shape(around(layer).init, jax.random.key(0), jnp.zeros(shape))

    def test_a_mixture_sees_heads_as_tokens_with_their_context(self, rng: np.random.Generator) -> None:
        class Users(nn.Module):
            @nn.compact
            def __call__(self, x: jax.Array, ctx: Context) -> jax.Array:
                return nn.DenseGeneral(O, name="dense")(x)

        x = jnp.asarray(rng.normal(size=(B, S, 2, D)), jnp.float32)
        ctx = Context(valid=jnp.asarray([[True, False, True, True]] * B))
        model = around(Users(), num_experts=2)
        _, state = compiled(model, "routing")(draw(model, x, ctx), x, ctx)
        used = state["routing"]["dense"]["adapter_main"]["moe"]["plan"].used
        np.testing.assert_array_equal(used[..., 0], np.repeat(ctx.valid, 2, axis=1))


class Tied(nn.Module):
    """A user's model whose head is its embedding."""

    @nn.compact
    def __call__(self, tokens: jax.Array) -> jax.Array:
        embed = nn.Embed(7, D, name="embed")
        return embed.attend(jnp.tanh(embed(tokens)))


TOKENS = jnp.asarray(np.random.default_rng(0).integers(0, 7, (2, 5)))


class TestEmbeddings:
    def test_a_table_is_changed_where_it_is_read_and_where_it_is_the_head(self) -> None:
        model = around(Tied(), targets=("embeddings",))
        variables = draw(model, TOKENS)
        params = variables["params"]["embed"]
        ours = params["adapter_main"]
        changed = np.asarray(params["embedding"] + 2.0 * ours["a"] @ ours["b"])
        y = np.tanh(changed[TOKENS]) @ changed.T
        np.testing.assert_allclose(compiled(model)(variables, TOKENS), y, rtol=1e-4, atol=1e-4)
        merged = merge_adapters(model, variables["params"], TOKENS)
        np.testing.assert_allclose(compiled(Tied())({"params": merged}, TOKENS), y, rtol=1e-4, atol=1e-4)

    def test_it_starts_as_it_was_with_a_gradient_into_what_is_zero(self) -> None:
        model = around(Tied())
        base = jax.jit(Tied().init)(jax.random.key(0), TOKENS)
        variables = init_adapters(model, base, jax.random.key(1), TOKENS)
        np.testing.assert_array_equal(compiled(model)(variables, TOKENS), compiled(Tied())(base, TOKENS))
        ours = variables["params"]["embed"]["adapter_main"]
        assert not ours["a"].any()
        assert np.abs(ours["b"]).min() > 0
        grads = jax.jit(jax.grad(lambda p: jnp.sin(model.apply({"params": p}, TOKENS)).sum()))(variables["params"])
        assert np.abs(grads["embed"]["adapter_main"]["a"]).max() > 0


NORM, MIXER = dict(kind="rms_norm"), dict(kind="attention", num_heads=2)
DENSE = dict(kind="transformer", mixer=MIXER, norm=NORM, ffn=dict(kind="glu", hidden=6))
MOE = dict(
    kind="moe", num_experts=E, router=dict(kind="linear"), select=dict(kind="top_k", k=2), bank=dict(kind="glu", hidden=6),
    backend="reference",  # the quickest to compile
)  # fmt: skip


def spec(scan: bool = True, remat: str = "full", dtype: str = "float32", pattern=("dense",)) -> dict:
    blocks = dict(dense=DENSE, moe={**DENSE, "ffn": MOE})
    return dict(
        kind="decoder_lm", vocab_size=7, d_model=8, num_layers=2 * len(pattern), pattern=pattern, blocks=blocks, scan=scan, remat=remat,
        dtype=dtype, max_length=16,
    )  # fmt: skip


@functools.cache
def language_model(*args, **fields) -> nn.Module:
    return build(spec(*args, **fields))


def mixture(model: nn.Module, targets: tuple[str, ...] = ("*/q", "*/v"), **fields) -> Adapted:
    return around(model, **{"targets": targets, "num_experts": 3, **fields})


def root(scan: bool) -> tuple[str, ...]:
    return ("stack", "repeats", "0_dense") if scan else ("stack", "repeat_0", "0_dense")


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


class TestTargets:
    def refused(self, message: str, model: nn.Module, **fields) -> None:
        with pytest.raises(ConfigError, match=message):
            jax.eval_shape(around(model, **fields).init, jax.random.key(0), TOKENS)

    def test_a_target_that_matches_nothing_lists_the_layers(self) -> None:
        layers = r"embedding \(embed\), " + ", ".join(
            rf"{'/'.join(root(True))}/ffn/expert/w_{n} \(bank\)" for n in ("gate", "out", "up")
        )
        layers += ", " + ", ".join(rf"{'/'.join(root(True))}/mixer/{n} \(dense\)" for n in "koqv")
        self.refused(
            rf"targets='\*/query' of adapter 'main' matches no layer that LoRA can change; the nearest are [^;]*; there are: {layers}(\n|$)",
            language_model(),
            targets=("*/q", "*/query"),
        )
        self.refused("the nearest are embedding, ", language_model(), targets=("embeding",))

    def test_a_router_by_accident_is_refused(self) -> None:
        model = language_model(pattern=("moe",))
        self.refused(r"targets='\*' of adapter 'main' matches the router at stack/repeats/0_moe/ffn/router/w", model)
        for fields in (dict(on_routers=True), dict(targets=("routers",))):
            paths = {layer.path for layer in adapted_layers(around(model, **fields), TOKENS)}
            assert "stack/repeats/0_moe/ffn/router/w" in paths

        class Users(nn.Module):
            @nn.compact
            def __call__(self, x: jax.Array) -> jax.Array:
                return nn.Dense(O, name="router")(x)

        with pytest.raises(ConfigError, match="matches the router at router"):
            jax.eval_shape(around(Users()).init, jax.random.key(0), jnp.zeros((B, D)))

    def test_roles_and_kinds(self) -> None:
        model = language_model(pattern=("dense", "moe"))

        def found(*targets: str) -> list[str]:
            return [layer.path.split("repeats/")[-1] for layer in adapted_layers(around(model, targets=targets), TOKENS)]

        attention = [f"{block}/mixer/{name}" for block in ("0_dense", "1_moe") for name in "qkvo"]
        assert found("mixers") == found("kind:dense") == attention
        assert found("experts") == [f"1_moe/ffn/bank/w_{name}" for name in ("gate", "up", "out")]
        assert found("*/0_dense/ffn") == [f"0_dense/ffn/expert/w_{name}" for name in ("gate", "up", "out")]
        assert found("ffns") == found("*/0_dense/ffn") + found("experts")
        assert found("embeddings") == found("head") == ["embedding"]
        assert found("*/w_up", "embeddings") == ["embedding", "0_dense/ffn/expert/w_up", "1_moe/ffn/bank/w_up"]

    def test_the_table_says_what_was_adapted(self) -> None:
        model = language_model(pattern=("dense", "moe"))
        ours = Adapted(model, {"a": lora(targets=("1*", "*/1_moe/mixer/q")), "b": lora(rank=1, targets=("*/bank/w_out",))})
        ours = Adapted(model, {"a": lora(targets=("*/1_moe/mixer/q",)), "b": lora(rank=1, targets=("*/bank/w_out",))})
        rows = adapted_layers(ours, TOKENS)
        assert [dataclasses.astuple(row) for row in rows] == [
            ("a", "LoRA", "stack/repeats/1_moe/mixer/q", "dense", (2, 8, 8), 2 * R * 16),
            ("b", "LoRA", "stack/repeats/1_moe/ffn/bank/w_out", "bank", (2, E, 6, 8), 2 * E * 14),
        ]
        lines = adapted_table(rows).splitlines()
        assert len({len(line) for line in lines}) == 1
        assert lines[1].split("  ")[0] == "a"
        assert lines[-1].split()[-1] == "176"


@adapters.register("test_scaled")
class Scaled(Adapter, RowWise):
    """W diag(1 + s): all that a kind needs is what it makes of a matrix."""

    def weight(self, w, site, ctx=None):
        return w * (1 + param(self, "s", nn.initializers.zeros, (site.shape[-1],), (site.axes[-1],)))


class DoRA(LowRankAdapter):
    """A kind that needs the frozen matrix, at the start and later (Liu et al. 2024)."""

    linear, stack = Adapter.linear, Adapter.stack

    def weight(self, w, site, ctx=None):
        v = super().weight(w, site, ctx)
        start = lambda key, shape, dtype: jnp.linalg.norm(w, axis=0)  # noqa: E731
        m = param(self, "m", start, (site.shape[-1],), (site.axes[-1],))
        return v * m / jax.lax.stop_gradient(jnp.linalg.norm(v, axis=0))


class RsLoRA(LowRankAdapter):
    """A kind with another rule for the scale."""

    def multiplier(self, site):
        return self.scale / self.rank_at(site) ** 0.5


class TopRanks(LowRankAdapter):
    """A kind in which each token uses its own ranks."""

    def gate(self, h, rows, site, ctx):
        return jnp.abs(h) >= jnp.sort(jnp.abs(h), axis=-1)[..., -1:]


class Reflected(Adapter, RowWise):
    """A kind that changes a layer's input, and calls the layer twice."""

    def linear(self, x, site, ctx=None):
        u = param(self, "u", nn.initializers.normal(1.0), (site.shape[0],), (site.axes[0],))
        u = u / jnp.linalg.norm(u)
        return 0.5 * (site.call(x - 2 * (x @ u)[..., None] * u) + site.call(x))


class Beside(Adapter, RowWise):
    """A kind around a layer of any kind."""

    def layer(self, x, site, ctx=None):
        return site.call(x) + site.call(jnp.zeros_like(x)) + nn.Dense(x.shape[-1], kernel_init=nn.initializers.zeros)(x)


class TestKinds:
    """A kind is one class with what it does; the rest comes from the contract."""

    def test_a_kind_that_changes_a_matrix_reaches_everything_and_merges(self) -> None:
        model = language_model(pattern=("moe",))
        ours = adapt(model, {"main": {"kind": "test_scaled", "targets": ("mixers", "embedding", "experts")}})
        params = draw(ours, TOKENS)["params"]
        bank = params["stack"]["repeats"]["0_moe"]["ffn"]["bank"]
        assert bank["adapter_main"]["w_gate"]["s"].shape == (2, E, 6)
        y = compiled(ours)({"params": params}, TOKENS)
        close(compiled(model)({"params": merge_adapters(ours, params, TOKENS)}, TOKENS), y, 1e-3, 1e-4)
        assert np.abs(y - compiled(model)({"params": params}, TOKENS)).max() > 0.1
        start = init_adapters(ours, {"params": split_adapters(params)[0]}, jax.random.key(0), TOKENS)
        np.testing.assert_array_equal(compiled(ours)(start, TOKENS), compiled(model)(start, TOKENS))

    def test_a_kind_that_starts_from_the_frozen_matrix(self, rng: np.random.Generator) -> None:
        model = language_model(pattern=("moe",))
        pretrained = draw(model, TOKENS)
        ours = around(model, DoRA(rank=R, scale=2.0, targets=("*/q", "*/bank/*", "embedding")))
        variables = init_adapters(ours, pretrained, jax.random.key(0), TOKENS)
        repeats = variables["params"]["stack"]["repeats"]
        query = repeats["0_moe"]["mixer"]["q"]
        np.testing.assert_allclose(query["adapter_main"]["m"], np.linalg.norm(query["kernel"], axis=1), rtol=1e-5)
        close(compiled(ours)(variables, TOKENS), compiled(model)(pretrained, TOKENS), 1e-3, 1e-4)
        x = inputs(rng)
        one = around(nn.Dense(O), DoRA(rank=R, scale=2.0, targets=("*",)))
        params = draw(one, jnp.asarray(x, jnp.float32))["params"]
        w, a, b, m = (
            np.asarray(leaf, np.float64) for leaf in (params["kernel"], *(params["adapter_main"][name] for name in "abm"))
        )
        v = w + 2.0 * a @ b
        expected = x @ (m * v / np.linalg.norm(v, axis=0)) + np.asarray(params["bias"])
        np.testing.assert_allclose(
            compiled(one)({"params": params}, jnp.asarray(x, jnp.float32)), expected, rtol=1e-4, atol=1e-4
        )

    def test_kinds_of_scale_rank_mask_and_input(self, rng: np.random.Generator) -> None:
        x = inputs(rng)
        given = jnp.asarray(x, jnp.float32)

        def run(adapter: Adapter):
            model = around(nn.Dense(O), adapter)
            params = draw(model, given)["params"]
            return {**params, **params["adapter_main"]}, compiled(model)({"params": params}, given), model

        params, y, _ = run(RsLoRA(rank=4, scale=2.0, targets=("*",)))
        np.testing.assert_allclose(
            y, dense(params, x) + x @ np.asarray(params["a"]) @ np.asarray(params["b"]), rtol=1e-4, atol=1e-4
        )
        params, y, model = run(TopRanks(rank=4, scale=2.0, targets=("*",)))
        h = x @ np.asarray(params["a"])
        h = np.where(np.abs(h) == np.abs(h).max(-1, keepdims=True), h, 0)
        np.testing.assert_allclose(y, dense(params, x) + 2.0 * h @ np.asarray(params["b"]), rtol=1e-4, atol=1e-4)
        with pytest.raises(ConfigError, match="TopRanks at '' has no matrix of its own"):
            merge_adapters(model, draw(model, given)["params"], given)
        params, y, _ = run(Reflected(targets=("*",)))
        u = np.asarray(params["u"], np.float64)
        u /= np.linalg.norm(u)
        np.testing.assert_allclose(y, dense(params, x - x @ np.outer(u, u)), rtol=1e-4, atol=1e-4)

    def test_a_kind_around_whole_layers(self) -> None:
        """What lies inside is adapted as ever, and layers that make their parts when they are called find their parameters."""
        model = language_model(pattern=("dense", "moe"))
        ours = Adapted(model, {"main": Beside(targets=("*/ffn",)), "inner": lora(targets=("experts",))})
        rows = adapted_layers(ours, TOKENS)
        assert [(row.path[-11:], row.layer, row.shape) for row in rows if row.adapter == "main"] == [
            ("0_dense/ffn", "DenseGLU", ()), ("s/1_moe/ffn", "MoE", ())
        ]  # fmt: skip
        params = draw(ours, TOKENS)["params"]
        start = init_adapters(ours, {"params": split_adapters(params)[0]}, jax.random.key(0), TOKENS)
        np.testing.assert_allclose(compiled(ours)(start, TOKENS), compiled(model)(start, TOKENS), rtol=1e-4, atol=1e-5)
        assert np.abs(compiled(ours)({"params": params}, TOKENS) - compiled(model)(start, TOKENS)).max() > 0.1
        with pytest.raises(ConfigError, match="sits around all of"):
            merge_adapters(ours, params, TOKENS)

    def test_what_changes_a_matrix_comes_before_what_is_added(self, rng: np.random.Generator) -> None:
        x = inputs(rng)
        both = {"low": lora(), "scaled": Scaled(targets=("*",))}
        model = Adapted(nn.Dense(O), both)
        params = draw(model, jnp.asarray(x, jnp.float32))["params"]
        a, b = (np.asarray(params["adapter_low"][name], np.float64) for name in "ab")
        s = np.asarray(params["adapter_scaled"]["s"], np.float64)
        expected = x @ (np.asarray(params["kernel"], np.float64) * (1 + s) + 2.0 * a @ b) + np.asarray(
            params["bias"], np.float64
        )
        np.testing.assert_allclose(
            compiled(model)({"params": params}, jnp.asarray(x, jnp.float32)), expected, rtol=1e-4, atol=1e-4
        )
        merged = merge_adapters(model, params, jnp.asarray(x, jnp.float32))
        np.testing.assert_allclose(dense(merged, x), expected, rtol=1e-4, atol=1e-4)


class Routed(nn.Module):
    """A bank under a plan."""

    bank: nn.Module
    backend: str
    merged: bool = False

    @nn.compact
    def __call__(self, x: jax.Array, logits: jax.Array) -> jax.Array:
        plan = MergePlan(jax.nn.softmax(logits.mean(1))) if self.merged else TopK(k=2)(logits)
        return dispatch(plan, self.bank(x.shape[-1]), x, self.backend)


@functools.cache
def value_and_grads(model: nn.Module):
    def run(params, x, logits):
        return jnp.sin(model.apply({"params": params}, x, logits)).sum()

    return jax.jit(jax.value_and_grad(run, argnums=(0, 1)))


class TestBanks:
    ADAPTER = LoRA(rank=3, scale=2.0, ranks=(3, 1, 0, 2), targets=("bank/w_*",))

    def effective(self, params) -> dict:
        """The bank's matrices with each expert's low-rank product, of its own rank, multiplied out in NumPy."""
        bank = dict(params["bank"])
        for name, factors in bank.pop("adapter_main").items():
            a, b = (np.asarray(factors[key], np.float64) for key in "ab")
            added = [2.0 * a[e, :, :r] @ b[e, :r] for e, r in enumerate(self.ADAPTER.ranks)]
            bank[name] = jnp.asarray(np.asarray(bank[name], np.float64) + added, jnp.float32)
        return {"bank": bank}

    def expected(self, model: Adapted, params, x: jax.Array, logits: jax.Array) -> tuple:
        """Value and gradient of the oracle, on matrices multiplied out."""
        plain = Routed(model.bank, "reference", model.merged)
        return value_and_grads(plain)(self.effective(params), x, logits)

    @pytest.mark.parametrize("backend", ["reference", "einsum", "capacity", "grouped", "gather", "merged"])
    @pytest.mark.parametrize(
        "bank", [GLU(hidden=6, num_experts=E), FFN(hidden=6, num_experts=E, use_bias=True)], ids=["glu", "ffn"]
    )
    def test_every_backend_computes_the_adapted_matrices(self, bank, backend: str) -> None:
        rng = np.random.default_rng(0)
        x, logits = (jnp.asarray(rng.normal(size=(B, S, n)), jnp.float32) for n in (D, E))
        model = around(Routed(bank, backend, backend == "merged"), self.ADAPTER)
        params = draw(model, x, logits)["params"]
        value, (dp, dx) = value_and_grads(model)(params, x, logits)
        value_, (dp_, dx_) = self.expected(model, params, x, logits)
        np.testing.assert_allclose(value, value_, rtol=1e-4)
        close(dx, dx_, 1e-3, 1e-4)
        for name, factors in dp["bank"].pop("adapter_main").items():
            a, b = (np.asarray(params["bank"]["adapter_main"][name][key], np.float64) for key in "ab")
            dw = 2.0 * np.asarray(dp_["bank"][name], np.float64)
            mask = np.arange(3) < np.array(self.ADAPTER.ranks)[:, None]
            np.testing.assert_allclose(factors["a"], dw @ b.swapaxes(1, 2) * mask[:, None], rtol=1e-3, atol=1e-3)
            np.testing.assert_allclose(factors["b"], (a * mask[:, None]).swapaxes(1, 2) @ dw, rtol=1e-3, atol=1e-3)
        close(dp, dp_, 1e-3, 1e-4)

    @pytest.mark.slow
    @pytest.mark.parametrize("mesh", ["expert=4,data=2", "expert=2,tensor=2,data=2"])
    @pytest.mark.parametrize("merged", [False, True], ids=["top_2", "merged"])
    def test_so_do_eight_devices(self, mesh: str, merged: bool) -> None:
        rng = np.random.default_rng(0)
        x, logits = (jnp.asarray(rng.normal(size=(8, S, n)), jnp.float32) for n in (D, E))
        model = around(Routed(GLU(hidden=6, num_experts=E), "auto", merged), self.ADAPTER)
        params = draw(model, x, logits)["params"]
        value, (dp, dx) = self.expected(model, params, x, logits)
        with use(Parallel(make_mesh(mesh))):
            value_, (dp_, dx_) = value_and_grads.__wrapped__(model)(params, x, logits)
        np.testing.assert_allclose(value_, value, rtol=1e-4)
        close(dx_, dx, 1e-3, 1e-3)
        del dp_["bank"]["adapter_main"]
        close(dp_, dp, 1e-3, 1e-3)

    def test_a_wrapped_bank_keeps_its_adapter(self, rng: np.random.Generator) -> None:
        x = jnp.asarray(rng.normal(size=(B, S, D)), jnp.float32)
        weight = jax.nn.softmax(jnp.asarray(rng.normal(size=(B, E)), jnp.float32))

        class Wrapped(nn.Module):
            @nn.compact
            def __call__(self, x: jax.Array) -> jax.Array:
                experts = GLU(hidden=6, num_experts=E, name="bank")(x.shape[-1]).wrap(before=jnp.tanh, after=jnp.sin)
                return dispatch(MergePlan(weight), experts, x)

        model = around(Wrapped(), self.ADAPTER)
        params = draw(model, x)["params"]
        close(compiled(model)({"params": params}, x), compiled(Wrapped())({"params": self.effective(params)}, x), 1e-4)

    def test_ranks_by_projection_and_by_expert(self) -> None:
        x, logits = jnp.zeros((B, S, D)), jnp.zeros((B, S, E))
        layer = Routed(GLU(hidden=6, num_experts=E), "auto")

        def shapes(**fields) -> dict:
            return jax.eval_shape(around(layer, **fields).init, jax.random.key(0), x, logits)["params"]["bank"]["adapter_main"]

        found = shapes(rank={"*/w_out": 1, "*": 4})
        assert {name: factors["a"].shape for name, factors in found.items()} == {
            "w_gate": (E, D, 4), "w_up": (E, D, 4), "w_out": (E, 6, 1)
        }  # fmt: skip
        with pytest.raises(ConfigError, match="gives no rank for bank/w_gate"):
            shapes(rank={"*/w_out": 1})
        with pytest.raises(ConfigError, match="must be 4 numbers from 0 to rank=2"):
            shapes(ranks=(3, 1, 1, 1))
        with pytest.raises(ConfigError, match="nor sit on a table or a bank"):
            shapes(num_experts=2)


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


def test_trees_come_apart_and_together() -> None:
    model = Adapted(nn.Dense(O), {"a": lora(), "b": lora()})
    variables = draw(model, jnp.zeros((B, D)))
    base, ours = split_adapters(variables, "b")
    assert set(flatten_dict(ours)) == {("params", "adapter_b", "a"), ("params", "adapter_b", "b")}
    assert {path[1] for path in flatten_dict(base)} == {"kernel", "bias", "adapter_a"}
    jax.tree.map(np.testing.assert_array_equal, join_adapters(base, ours), variables)
    with pytest.raises(ConfigError, match="params/adapter_b/a is there already"):
        join_adapters(variables, ours)
    with pytest.raises(ConfigError, match="params/kernel is no adapter's parameter"):
        join_adapters(ours, unflatten_dict({("params", "kernel"): 0}))
