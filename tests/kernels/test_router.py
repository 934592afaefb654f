"""The fused router: one body that every implementation inherits, against NumPy in float64 and against moejax's select rule."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from kernels.gpu import lower_for, triton_kernels

from moejax.core.context import Context
from moejax.routing.select import TopK
from pallas_kernels.implementations import target
from pallas_kernels.router import AUTO, IMPLEMENTATIONS, gpu, route, tpu
from pallas_kernels.router.selection import Routed, Rule, float32_parts
from pallas_kernels.router.xla import top_k

compiled_route = jax.jit(route, static_argnames=("k", "score", "normalise", "implementation"))
RUNNABLE = [name for name in IMPLEMENTATIONS if name not in ("tpu", "gpu")]
TOLERANCE = dict(rtol=1e-5, atol=1e-5)


def numpy_route(x, w, k, score, bias, normalise, valid) -> dict[str, np.ndarray]:
    logits = np.asarray(x, np.float64) @ np.asarray(w, np.float64)
    z = np.log(np.exp(logits).sum(1))
    scores = np.exp(logits - z[:, None]) if score == "softmax" else 1 / (1 + np.exp(-logits))
    expert = np.argsort(-(logits if bias is None else scores + bias), axis=1, kind="stable")[:, :k]
    weight = np.take_along_axis(scores, expert, 1)
    if normalise:
        weight /= weight.sum(1, keepdims=True)
    counts = np.bincount(expert[valid].reshape(-1), minlength=w.shape[1])
    return Routed(expert, weight, logits, counts, scores[valid].sum(0), z)._asdict()


def assert_no_race() -> None:
    from jax._src.pallas.mosaic.interpret import interpret_pallas_call

    assert not interpret_pallas_call.races.races_found


CASES = {
    "softmax": dict(n=21, d=12, e=8, k=2, score="softmax", bias=False, normalise=False),
    "softmax_selected": dict(n=37, d=7, e=5, k=5, score="softmax", bias=False, normalise=True),
    "sigmoid_biased": dict(n=33, d=20, e=20, k=3, score="sigmoid", bias=True, normalise=True),
    "one_token": dict(n=1, d=3, e=3, k=1, score="softmax", bias=True, normalise=False),
}


@pytest.mark.parametrize("implementation", RUNNABLE)
class TestRoute:
    @pytest.mark.parametrize(("case", "dtype"), [*((case, jnp.float32) for case in CASES), ("sigmoid_biased", jnp.bfloat16)])
    def test_values_and_gradients(self, implementation: str, case: str, dtype: jnp.dtype, rng: np.random.Generator) -> None:
        n, d, e, k, score, has_bias, normalise = CASES[case].values()
        x, w = jnp.asarray(rng.normal(size=(n, d)), dtype), jnp.asarray(rng.normal(size=(d, e)), jnp.float32)
        bias = jnp.asarray(rng.normal(size=e), jnp.float32) if has_bias else None
        valid = rng.random(n) < 0.7
        cotangent = {
            name: jnp.asarray(rng.normal(size=shape), jnp.float32)
            for name, shape in dict(weight=(n, k), logits=(n, e), importance=(e,), z=(n,)).items()
        }

        def loss(x: jax.Array, w: jax.Array, implementation: str) -> tuple[jax.Array, Routed]:
            routed = route(x, w, k, score, bias, normalise, jnp.asarray(valid), implementation)
            return sum((routed._asdict()[name] * c).sum() for name, c in cotangent.items()), routed

        (_, routed), (dx, dw) = jax.jit(jax.value_and_grad(lambda x, w: loss(x, w, implementation), (0, 1), True))(x, w)
        if implementation == "interpret_tpu":
            assert_no_race()
        expected = numpy_route(x, w, k, score, bias, normalise, valid)
        for name, value in expected.items():
            np.testing.assert_allclose(getattr(routed, name), value, **TOLERANCE, err_msg=name)
        assert dx.dtype == dtype
        # The derivative that JAX finds of the definition, in float32 also for bfloat16 tokens.
        plain = jax.jit(
            jax.grad(lambda x, w: autodiff_loss(x, w, expected["expert"], cotangent, score, normalise, valid), (0, 1))
        )
        expected_dx, expected_dw = plain(x.astype(jnp.float32), w)
        np.testing.assert_allclose(dw, expected_dw, rtol=1e-4, atol=1e-4)
        loose = dict(rtol=1e-2, atol=1e-2) if dtype == jnp.bfloat16 else dict(rtol=1e-4, atol=1e-4)  # 8 bits of mantissa
        np.testing.assert_allclose(dx.astype(jnp.float32), expected_dx, **loose)

    def test_agrees_with_the_select_rule_with_ties_and_padding(self, implementation: str, rng: np.random.Generator) -> None:
        """Small integers make equal logits the rule; -inf biases forbid experts."""
        n, d, e, k = 40, 4, 12, 4
        x, w = (jnp.asarray(rng.integers(-1, 2, shape), jnp.float32) for shape in ((n, d), (d, e)))
        valid = jnp.asarray(rng.random(n) < 0.5)
        forbidden = jnp.where(jnp.arange(e) < 9, -jnp.inf, 0)
        for score, bias, normalise in (("softmax", None, False), ("sigmoid", forbidden, True)):
            routed = compiled_route(x, w, k, score, bias, normalise, valid, implementation=implementation)
            assert np.mean(np.diff(np.sort(routed.logits, 1)) == 0) > 0.2
            plan = TopK(k=k, score=score, normalise=normalise)(routed.logits[None], Context(valid=valid[None]), bias=bias)
            np.testing.assert_array_equal(routed.expert[valid], plan.expert[0][valid])
            np.testing.assert_allclose(routed.weight[valid], plan.weight[0][valid], rtol=1e-6, atol=1e-7)
            np.testing.assert_array_equal(routed.counts, plan.assigned().sum((0, 1)))

    def test_no_valid_token(self, implementation: str) -> None:
        routed = compiled_route(jnp.ones((5, 2)), jnp.ones((2, 3)), 2, valid=jnp.zeros(5, bool), implementation=implementation)
        assert not routed.counts.any()
        assert not routed.importance.any()
        np.testing.assert_array_equal(routed.expert, [[0, 1]] * 5)

    def test_nan_stays_in_its_row_and_in_range(self, implementation: str) -> None:
        x = jnp.ones((4, 2)).at[1].set(jnp.nan)
        routed = compiled_route(x, jnp.eye(2, 6), 3, valid=jnp.array([1, 0, 1, 1], bool), implementation=implementation)
        assert bool((routed.expert >= 0).all())
        assert bool((routed.expert < 6).all())
        np.testing.assert_array_equal(routed.counts, [3, 3, 3, 0, 0, 0])
        assert np.isfinite(routed.importance).all()


def autodiff_loss(x, w, expert, cotangent, score, normalise, valid) -> jax.Array:
    """The definition as a function of x and w, given who is chosen."""
    logits = jnp.dot(x, w, precision="highest")
    scores = jax.nn.softmax(logits) if score == "softmax" else jax.nn.sigmoid(logits)
    weight = jnp.take_along_axis(scores, expert, 1)
    if normalise:
        weight = weight / weight.sum(1, keepdims=True)
    outputs = dict(weight=weight, logits=logits, importance=scores[valid].sum(0), z=jax.nn.logsumexp(logits, 1))
    return sum((outputs[name] * c).sum() for name, c in cotangent.items())


@pytest.mark.parametrize("normalise", [False, True])
@pytest.mark.parametrize("score", ["softmax", "sigmoid"])
def test_gradient_is_the_slope(score: str, normalise: bool, rng: np.random.Generator) -> None:
    """Central differences in float64, in NumPy, along random directions; none of them changes who is chosen."""
    n, d, e, k = 6, 5, 7, 3
    x, w, u, v = (rng.normal(size=shape) for shape in ((n, d), (d, e), (n, d), (d, e)))
    valid, cotangent = np.arange(n) != 2, [rng.normal(size=shape) for shape in ((n, k), (n, e), e, n)]

    def numpy_loss(t: float) -> float:
        out = numpy_route(x + t * u, w + t * v, k, score, None, normalise, valid)
        return sum((out[name] * c).sum() for name, c in zip(("weight", "logits", "importance", "z"), cotangent, strict=True))

    def loss(t: jax.Array) -> jax.Array:
        r = compiled_route(jnp.asarray(x + t * u), jnp.asarray(w + t * v), k, score, None, normalise, jnp.asarray(valid))
        return sum((a * c).sum() for a, c in zip((r.weight, r.logits, r.importance, r.z), cotangent, strict=True))

    np.testing.assert_allclose(jax.grad(loss)(jnp.float32(0)), (numpy_loss(1e-5) - numpy_loss(-1e-5)) / 2e-5, rtol=1e-4)


def test_bias_gets_no_gradient() -> None:
    w = jnp.arange(12.0).reshape(3, 4)
    gradient = jax.grad(lambda b: route(jnp.ones((2, 3)), w, 2, "sigmoid", b).weight.sum())(jnp.zeros(4))
    np.testing.assert_array_equal(gradient, np.zeros(4))


def test_float32_logits_choose_as_float64_does_and_bfloat16_logits_do_not(rng: np.random.Generator) -> None:
    n, d, e, k = 1024, 64, 64, 8
    x = jnp.asarray(rng.normal(size=(n, d)), jnp.bfloat16)
    w = jnp.asarray(rng.normal(size=(d, e)) / 8, jnp.float32)
    exact = np.asarray(x, np.float64) @ np.asarray(w, np.float64)
    order = np.sort(exact, axis=1)
    clear = np.min(np.diff(order[:, -k - 1 :]), axis=1) > 1e-4
    assert clear.mean() > 0.97
    expected = np.argsort(-exact, axis=1)[:, :k]
    for name in ("reference", "xla", "interpret_gpu"):
        np.testing.assert_array_equal(np.asarray(compiled_route(x, w, k, implementation=name).expert)[clear], expected[clear])
    rounded = jnp.dot(x, w.astype(jnp.bfloat16))
    changed = np.any(np.sort(jax.lax.top_k(rounded, k)[1], 1) != np.sort(expected, 1), axis=1)
    assert changed[clear].mean() > 0.01


def test_three_bfloat16_parts_make_a_float32_matrix(rng: np.random.Generator) -> None:
    w = jnp.asarray(rng.normal(size=(64, 8)), jnp.float32)
    parts = jax.jit(lambda w: float32_parts(jnp.ones((1, 64), jnp.bfloat16), w))(w)
    assert parts.dtype == jnp.bfloat16
    np.testing.assert_array_equal(np.asarray(parts, np.float64).sum(0), w)
    assert float32_parts(jnp.ones((1, 64)), w).shape[0] == 1


class TestTiles:
    """Tiles smaller than the operands, with ragged ends on every side."""

    @pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
    def test_tpu(self, dtype: jnp.dtype, rng: np.random.Generator) -> None:
        self.check(lambda *a: tpu.route(*a, interpret=True, tiles=(128, 128)), dtype, rng)
        assert_no_race()

    def test_tpu_takes_wide_tiles_in_steps(self, rng: np.random.Generator) -> None:
        assert tpu.step_of(1280) == 640
        self.check(lambda *a: tpu.route(*a, interpret=True, tiles=(128, 1280)), jnp.float32, rng, d=1280)

    @pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
    def test_gpu(self, dtype: jnp.dtype, rng: np.random.Generator) -> None:
        self.check(lambda *a: gpu.route(*a, interpret=True, tiles=(32, 64, 4)), dtype, rng)

    def check(self, run, dtype: jnp.dtype, rng: np.random.Generator, d: int = 200) -> None:
        n, e, k = 150, 10, 2
        x, w = jnp.asarray(rng.normal(size=(n, d)), dtype), jnp.asarray(rng.normal(size=(d, e)) / d**0.5, jnp.float32)
        valid, bias = rng.random(n) < 0.7, rng.normal(size=e).astype(np.float32)
        routed = jax.jit(lambda *a: run(*a, Rule(k, "sigmoid", True)))(x, w, jnp.asarray(bias), jnp.asarray(valid))
        for name, value in numpy_route(x, w, k, "sigmoid", bias, True, valid).items():
            np.testing.assert_allclose(getattr(routed, name), value, rtol=1e-4, atol=1e-4, err_msg=name)

    def test_chosen_tiles_fit_and_cover(self) -> None:
        with target("tpu7x"):
            assert tpu.choose_tiles(4096, 4096, 64, 2, 6) == (512, 4096)
            rows, width = tpu.choose_tiles(4096, 16384, 512, 4, 4)
            assert (rows, width) == (128, 4096)
            assert tpu.choose_tiles(3, 5000, 8, 4, 4) == (3, 4096)
        for e in (1, 8, 100, 1024):
            rows, width, warps = gpu.choose_tiles(e)
            assert rows >= 16
            assert width >= 16
            assert rows * e <= warps * 32 * 64


@pytest.mark.parametrize(("e", "k"), [(8, 3), (40, 1), (300, 8)])
def test_top_k_equals_lax(e: int, k: int, rng: np.random.Generator) -> None:
    scores = jnp.asarray(rng.integers(-5, 6, (2, 50, e)), jnp.float32)
    values, index = top_k(scores, k)
    expected_values, expected_index = jax.lax.top_k(scores, k)
    np.testing.assert_array_equal(values, expected_values)
    np.testing.assert_array_equal(index, expected_index)
    assert ("topk" in jax.jit(lambda s: top_k(s, k)).lower(scores).as_text().lower().replace("_", "")) == (e == 300)


def test_many_experts_are_not_sorted() -> None:
    """XLA makes a full sort of `lax.top_k` when its results are taken apart, ten times slower, unless it is kept from that."""
    compiled = compiled_route.lower(jnp.ones((64, 8)), jnp.ones((8, 256)), k=8, implementation="xla").compile().as_text()
    assert "TopK" in compiled
    assert " sort(" not in compiled


def test_top_k_takes_each_index_once_also_among_infinities() -> None:
    _, index = top_k(jnp.full((1, 4), -jnp.inf).at[0, 2].set(1), 4)
    np.testing.assert_array_equal(index, [[2, 0, 1, 3]])


def test_errors_name_value_and_bounds() -> None:
    x, w = jnp.ones((2, 3)), jnp.ones((3, 4))
    with pytest.raises(ValueError, match="k=5 of route must be between 1 and the number of experts, 4"):
        route(x, w, 5)
    with pytest.raises(ValueError, match="score='relu' of route is unknown; valid names: softmax, sigmoid"):
        route(x, w, 1, "relu")
    with pytest.raises(ValueError, match="implementation='interpret_gpu' of route cannot run: 4096 experts"):
        route(x, jnp.ones((3, 4096)), 1, implementation="interpret_gpu")
    with target("h100"):
        assert jax.eval_shape(lambda: route(x, jnp.ones((3, 4096)), 1)).logits.shape == (2, 4096)  # auto falls back


def test_auto_runs_the_kernel_where_there_is_one() -> None:
    assert AUTO["cpu"] == ("xla",)
    for kind in ("v5e", "h100"):
        with target(kind):
            jaxpr = str(jax.make_jaxpr(lambda x, w: route(x, w, 2))(jnp.ones((32, 8)), jnp.ones((8, 4))))
        assert "pallas_call" in jaxpr


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_lowers_to_triton_forward_and_backward(dtype: jnp.dtype) -> None:
    x, w = jax.ShapeDtypeStruct((1000, 512), dtype), jax.ShapeDtypeStruct((512, 60), jnp.float32)
    bias = jax.ShapeDtypeStruct((60,), jnp.float32)

    def loss(x: jax.Array, w: jax.Array, bias: jax.Array) -> jax.Array:
        return route(x, w, 4, "sigmoid", bias, implementation="gpu").weight.sum()

    for function in (loss, jax.grad(loss, (0, 1))):
        [kernel] = triton_kernels(lower_for("h100", function, x, w, bias))
        assert kernel.name == "route"
        name = "f32" if dtype == jnp.float32 else "bf16"
        assert kernel.dots == {(name, name, "f32")}
        assert "tf32" not in kernel.precisions
