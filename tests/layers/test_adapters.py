"""Adapters against NumPy and against the models that they are merged into, around models that know nothing of them."""

import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from adapted_models import (
    TOKENS,
    B,
    D,
    E,
    O,
    R,
    S,
    Scaled,
    around,
    dense,
    inputs,
    language_model,
    lora,
    root,
)
from flax.traverse_util import flatten_dict, unflatten_dict
from numpy_layers import close, compiled, draw
from numpy_routing import combine, softmax, top_k

from moejax import Adapted, Adapter, ConfigError, Context, LoRA, RowWise, TopK
from moejax.core.params import param
from moejax.experts import FFN, Residual
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
from moejax.routing.routers import Recurrent


def low_rank(params, e: int, x: np.ndarray) -> np.ndarray:
    """x A_e B_e."""
    return x @ np.asarray(params["a"], np.float64)[e] @ np.asarray(params["b"], np.float64)[e]


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
