"""Task arithmetic, TIES and DARE: the papers entry by entry in NumPy, what they refuse, and what they leave alone."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import unflatten_dict

from moejax.core.errors import ConfigError
from moejax.core.roles import Parameter
from moejax.surgery.base import Checkpoint, Target, spelt, surgeries

SHAPES = {"embedding": (5, 3), "stack/norm/scale": (2, 3), "stack/ffn/w_in": (2, 3, 4), "stack/ffn/w_out": (2, 4, 3)}
NAMES = ("code", "manual", "prose")


def model(rng: np.random.Generator, like: Checkpoint | None = None, size: float = 0.1, **more) -> Checkpoint:
    """A start, or one fine-tuned from it."""
    shapes = {**SHAPES, **more}
    arrays = {("params", *name.split("/")): rng.normal(size=shape) for name, shape in shapes.items()}
    if like is not None:
        arrays = {path: like.leaves[path] + size * x if path in like.leaves else x for path, x in arrays.items()}
    state = {("router_state", "stack", "load"): rng.normal(size=2)}
    return Checkpoint({}, {}).with_leaves({path: np.float32(x) for path, x in (arrays | state).items()})


def merge(start: Checkpoint, others: dict, kind: str = "task_arithmetic", seed: int = 0, roles: tuple = (), **fields) -> dict:
    known = {
        p: Parameter(p[1:], x.shape, (None,) * x.ndim, frozenset(roles)) for p, x in start.leaves.items() if p[0] == "params"
    }
    shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), dict(start.variables))
    parameters = unflatten_dict(known)["params"]
    target = Target({}, shapes, parameters, jax.random.key(seed), others, lambda paths: {}, lambda count: [])
    found = surgeries.build({"kind": kind, **fields}, "init.surgeries.x")(start, target)
    return {spelt(path): np.asarray(x) for path, x in found.leaves.items()}


def flat(checkpoint: Checkpoint) -> dict[str, np.ndarray]:
    return {spelt(path): np.asarray(x, np.float64) for path, x in checkpoint.leaves.items()}


@pytest.fixture
def start(rng: np.random.Generator) -> Checkpoint:
    return model(rng)


@pytest.fixture
def others(rng: np.random.Generator, start: Checkpoint) -> dict[str, Checkpoint]:
    return {name: model(rng, start) for name in NAMES}


@pytest.mark.parametrize(
    ("scale", "each"),
    [
        (0.4, (0.4, 0.4, 0.4)),
        (1.0, (1.0, 1.0, 1.0)),
        ({"code": -0.7}, (-0.7, 0.0, 0.0)),
        ({"code": -1.0, "manual": 1.0, "prose": 0.5}, (-1.0, 1.0, 0.5)),
    ],
    ids=str,
)
def test_vectors_are_added_subtracted_and_compared(start: Checkpoint, others: dict, scale, each: tuple) -> None:
    found, zero, tuned = merge(start, others, scale=scale), flat(start), {name: flat(one) for name, one in others.items()}
    for name in SHAPES:
        expected = zero[name] + sum(c * (tuned[t][name] - zero[name]) for c, t in zip(each, NAMES, strict=True))
        np.testing.assert_allclose(found[name], expected, rtol=1e-5, atol=1e-6)
    np.testing.assert_array_equal(found["router_state/stack/load"], start.variables["router_state"]["stack"]["load"])


def test_no_scale_is_the_start_one_model_is_itself_and_shares_are_the_average(start: Checkpoint, others: dict) -> None:
    for name, x in merge(start, others, scale=0.0).items():
        np.testing.assert_array_equal(x, flat(start)[name])
    alone, mean = merge(start, {"code": others["code"]}, scale=1.0), merge(start, others, scale=1 / 3)
    for name in SHAPES:
        np.testing.assert_allclose(alone[name], flat(others["code"])[name], rtol=1e-6, atol=1e-6)
        np.testing.assert_allclose(mean[name], np.mean([flat(one)[name] for one in others.values()], 0), rtol=1e-5, atol=1e-6)


def test_small_changes_survive_bfloat16_storage(start: Checkpoint, others: dict) -> None:
    """Each change is below what bfloat16 can add to 1; three of them together are not."""
    rough = start.map(lambda _, x: jnp.ones(x.shape, jnp.bfloat16))
    tuned = {name: rough.map(lambda _, x: np.full(x.shape, 1.003, np.float32)) for name in NAMES}
    found = merge(rough, tuned, scale=1.0)
    assert found["embedding"].dtype == jnp.bfloat16
    np.testing.assert_array_equal(found["embedding"], jnp.asarray(1.009, jnp.bfloat16))


def test_only_what_is_named_is_merged(start: Checkpoint, others: dict) -> None:
    found = merge(start, others, scale=1.0, paths=("stack",), without=("*/norm",))
    for name in SHAPES:
        assert np.array_equal(found[name], flat(start)[name]) == (name in ("embedding", "stack/norm/scale"))


def ties_of(vectors: np.ndarray, keep: float, combine: str) -> np.ndarray:
    """TIES-Merging, entry after entry."""
    vectors = vectors.copy()
    for vector in vectors:
        stays = sorted(range(len(vector)), key=lambda i: (-abs(vector[i]), i))[: round(keep * len(vector))]
        vector[[i for i in range(len(vector)) if i not in set(stays)]] = 0.0
    signs = [np.sign(sum(column)) for column in vectors.T]
    out = np.zeros(vectors.shape[1])
    for i, column in enumerate(vectors.T):
        sign = signs[i] or np.sign(sum(signs))
        agree = [x for x in column if x and np.sign(x) == sign]
        if agree:
            out[i] = {"mean": np.mean(agree), "sum": sum(agree), "max": sign * max(map(abs, agree))}[combine]
    return out


def vectors_of(start: Checkpoint, others: dict) -> np.ndarray:
    zero, tuned = flat(start), [flat(one) for one in others.values()]
    return np.stack([np.concatenate([(one[name] - zero[name]).ravel() for name in sorted(SHAPES)]) for one in tuned])


@pytest.mark.parametrize("combine", ["mean", "sum", "max"])
@pytest.mark.parametrize("keep", [0.2, 0.7, 1.0])
def test_ties_is_numpys(start: Checkpoint, others: dict, keep: float, combine: str) -> None:
    found = merge(start, others, "ties", keep=keep, combine=combine, scale=0.8)
    moved = np.concatenate([(found[name] - flat(start)[name]).ravel() for name in sorted(SHAPES)])
    expected = 0.8 * ties_of(vectors_of(start, others), keep, combine)
    assert (expected != 0).mean() > 0.1
    np.testing.assert_allclose(moved, expected, rtol=1e-4, atol=1e-6)


def test_the_threshold_is_one_for_the_whole_model_and_equal_entries_do_not_add_to_it(start: Checkpoint) -> None:
    """A tensor of large changes survives whole, another goes; of entries that are all equal as many stay as asked."""
    one = start.map(lambda name, x: x + (1.0 if name == "embedding" else 0.01))
    found = merge(start, {"code": one}, "ties", keep=15 / 69)
    np.testing.assert_allclose(found["embedding"] - flat(start)["embedding"], 1.0, rtol=1e-5)
    np.testing.assert_array_equal(found["stack/ffn/w_in"], flat(start)["stack/ffn/w_in"])
    zero = start.map(lambda _, x: np.zeros_like(x))
    equal = merge(zero, {"code": zero.map(lambda _, x: np.ones_like(x))}, "ties", keep=0.5)
    assert sum(int(equal[name].sum()) for name in SHAPES) == round(0.5 * 69)


def test_a_tie_of_signs_goes_to_the_majority_of_entries() -> None:
    zero = Checkpoint({}, {}).with_leaves({("params", "w"): np.zeros(4, np.float32)})
    others = {
        name: zero.with_leaves({("params", "w"): np.float32(x)}) for name, x in (("a", [1, -1, -2, 1]), ("b", [-1, -3, -1, 3]))
    }
    np.testing.assert_array_equal(merge(zero, others, "ties", keep=1.0)["w"], [-1.0, -2.0, -1.5, 2.0])


@pytest.mark.parametrize("rescale", [True, False])
def test_dare_drops_entries_and_keeps_the_mean(start: Checkpoint, others: dict, rescale: bool) -> None:
    fields = {"scale": 1.0, "drop": 0.75, "rescale": rescale, "paths": ("stack/ffn",)}
    tau = (flat(others["code"])["stack/ffn/w_in"] - flat(start)["stack/ffn/w_in"]).ravel()
    draws = np.stack(
        [
            (
                merge(start, {"code": others["code"]}, seed=seed, **fields)["stack/ffn/w_in"] - flat(start)["stack/ffn/w_in"]
            ).ravel()
            for seed in range(60)
        ]
    )
    kept = np.abs(draws) > 1e-6
    factor = 4.0 if rescale else 1.0
    np.testing.assert_allclose(np.where(kept, draws, 0), np.where(kept, factor * tau, 0), rtol=1e-3, atol=1e-5)
    assert kept.mean() == pytest.approx(0.25, abs=0.05)
    assert np.abs(draws.mean(0) @ tau / (tau @ tau) - 0.25 * factor) < 0.15


def test_each_model_draws_for_itself_and_ties_takes_what_is_left(start: Checkpoint, others: dict) -> None:
    twins = {"code": others["code"], "prose": others["code"]}
    apart = merge(start, twins, scale={"code": 1.0, "prose": -1.0}, drop=0.5)
    assert any(np.abs(apart[name] - flat(start)[name]).max() > 1e-3 for name in SHAPES)
    again = merge(start, twins, scale={"code": 1.0, "prose": -1.0}, drop=0.5)
    jax.tree.map(np.testing.assert_array_equal, apart, again)
    thin = merge(start, others, "ties", keep=1.0, drop=0.9)
    unmoved = np.mean([np.mean(np.abs(thin[name] - flat(start)[name]) < 1e-7) for name in SHAPES])
    assert 0.5 < unmoved < 0.95


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"scale": {"cod": 1.0}}, "unknown model 'cod' in task_arithmetic.scale; did you mean 'code'"),
        ({"paths": ("*/attention",)}, r"'\*/attention' in TaskArithmetic.paths matches no parameter"),
        ({"drop": 1.0}, r"init.surgeries.x.drop=1.0 must be a number of at least 0 and below 1"),
        ({"kind": "ties", "keep": 0.0}, r"keep=0.0 must be a number above 0 and of at most 1"),
        ({"kind": "ties", "combine": "median"}, "median"),
        ({"roles": ("adapters",)}, r"TaskArithmetic: embedding, .* are an adapter's factors.*merge adapters"),
    ],
)
def test_what_does_not_fit_is_named(start: Checkpoint, others: dict, fields: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        merge(start, others, **fields)


def test_models_of_another_make_are_refused(rng: np.random.Generator, start: Checkpoint) -> None:
    with pytest.raises(ConfigError, match=r"no task vector without init\.others"):
        merge(start, {})
    with pytest.raises(ConfigError, match=r"'code' of init\.others is no fine-tuned source: it differs in embedding"):
        merge(start, {"code": model(rng, embedding=(6, 3))})
    headed = model(rng, start, head=(3,))
    with pytest.raises(ConfigError, match="it differs in head"):
        merge(start, {"code": headed})
    found = merge(start, {"code": headed}, without=("head",), scale=1.0)
    np.testing.assert_allclose(found["embedding"], flat(headed)["embedding"], rtol=1e-5)
    with pytest.raises(ConfigError, match=r"'haed' in TaskArithmetic.without matches no parameter"):
        merge(start, {"code": headed}, without=("haed",))
