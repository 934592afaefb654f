"""Surgeries alone: pure functions of checkpoints, and the check that nothing is missing or left over."""

import jax
import numpy as np
import pytest

from moejax.core.errors import ConfigError
from moejax.core.paths import find, matches
from moejax.core.roles import Parameter
from moejax.surgery.base import Checkpoint, Target, spelt, surgeries
from moejax.surgery.sources.base import sources
from moejax.train.starts import check_fit, parse_init


def checkpoint(scale=1.0, **more):
    leaves = {"enc/a/w": np.arange(6.0).reshape(2, 3), "enc/b/w": np.ones((2, 3)), "head": np.full(3, 7.0), **more}
    arrays = {("params", *name.split("/")): np.asarray(scale * x, np.float32) for name, x in leaves.items()}
    return Checkpoint({"model": {}}, {}).with_leaves({**arrays, ("router_state", "enc", "load"): np.float32([scale])})


def target(like, others=None):
    """A target with the arrays of `like`; fresh ones count from 100."""
    shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), dict(like.variables))
    fresh = lambda paths: {path: np.full(like.leaves[path].shape, 100.0, np.float32) for path in paths}  # noqa: E731
    return Target({}, shapes, {}, jax.random.key(0), others or {}, fresh, lambda count: [])


def operate(spec, before=None, after=None, others=None):
    before = checkpoint() if before is None else before
    return surgeries.build(spec, "init.surgeries.x")(before, target(after or before, others))


def by_name(found):
    return {spelt(path): x for path, x in found.leaves.items()}


def test_patterns_stand_for_paths_and_for_all_that_is_inside():
    assert matches("stack/1_moe/bank/w_in", "stack")
    assert matches("stack/1_moe/bank/w_in", "*/bank")
    assert matches("stack/1_moe/bank/w_in", "*/w_*")
    assert not matches("stack/1_moe/bank/w_in", "bank")
    assert not matches("heads/kernel", "head")
    assert find("*/w_*", ["a/w_in", "a/b"], "x") == ["a/w_in"]
    with pytest.raises(
        ConfigError, match="'*/w_inn' in here matches no parameter; the nearest are a/w_in, a/b".replace("*", r"\*")
    ):
        find("*/w_inn", ["a/b", "a/w_in"], "here")


def test_rename_moves_whole_branches_and_leaves_the_rest():
    found = by_name(
        operate({"kind": "rename", "paths": {"enc/*/w": "dec/*/kernel", "router_state/enc/*": "router_state/dec/*"}})
    )
    before = by_name(checkpoint())
    assert set(found) == {"dec/a/kernel", "dec/b/kernel", "head", "router_state/dec/load"}
    np.testing.assert_array_equal(found["dec/a/kernel"], before["enc/a/w"])
    np.testing.assert_array_equal(found["head"], before["head"])


def test_keep_takes_out_what_goes():
    assert set(by_name(operate({"kind": "keep", "without": ("head", "router_state")}))) == {"enc/a/w", "enc/b/w"}
    assert set(by_name(operate({"kind": "keep", "paths": ("enc",), "without": ("*/b",)}))) == {"enc/a/w"}


def test_extend_adds_what_is_missing_and_touches_nothing_else():
    after = checkpoint(**{"enc/c/w": np.zeros((4, 4)), "neck": np.zeros(2)})
    found = by_name(operate({"kind": "extend", "paths": ("*/c", "neck", "router_state")}, after=after, before=_without_state()))
    before = by_name(checkpoint())
    np.testing.assert_array_equal(found["enc/c/w"], np.full((4, 4), 100.0))
    np.testing.assert_array_equal(found["neck"], np.full(2, 100.0))
    np.testing.assert_array_equal(found["router_state/enc/load"], [100.0])
    for name in ("enc/a/w", "enc/b/w", "head"):
        np.testing.assert_array_equal(found[name], before[name])


def _without_state():
    return operate({"kind": "keep", "without": ("router_state",)})


def test_average_weighs_models_in_float32_and_keeps_router_state():
    others = {"code": checkpoint(2.0), "prose": checkpoint(4.0)}
    even = by_name(operate({"kind": "average"}, others=others))
    uneven = by_name(operate({"kind": "average", "weights": {"code": 0.25, "prose": -0.5}}, others=others))
    for name, x in by_name(checkpoint()).items():
        if name.startswith("router_state"):
            np.testing.assert_array_equal(even[name], x)
            continue
        np.testing.assert_allclose(even[name], x * 7 / 3, rtol=1e-6)
        np.testing.assert_allclose(uneven[name], x * (0.25 * 2 - 0.5 * 4), rtol=1e-6)


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        (
            {"kind": "rename", "paths": {"enk/*": "dec/*"}},
            r"'enk/\*' in rename.paths matches no parameter; the nearest are enc/",
        ),
        ({"kind": "rename", "paths": {"enc": "dec"}}, r"'enc' in rename.paths must match whole paths; add /\*"),
        ({"kind": "rename", "paths": {"enc/*": "dec"}}, r"must have the same number of \*"),
        ({"kind": "rename", "paths": {"enc/a/*": "enc/b/*"}}, r"two arrays would be called 'enc/b/w'"),
        ({"kind": "rename", "paths": {"enc/*": "x/*", "*/a/w": "y/*"}}, r"'enc/a/w' is matched by two patterns"),
        ({"kind": "keep", "without": ("haed",)}, r"'haed' in keep.without matches no parameter; the nearest are head"),
        ({"kind": "extend", "paths": ("nekc",)}, r"'nekc' in extend.paths matches no parameter"),
        (
            {"kind": "extend", "paths": ("head",)},
            r"'head' in extend.paths \(of what the checkpoint lacks\) matches no parameter",
        ),
        ({"kind": "average", "weights": {"cod": 1.0}}, r"unknown model 'cod' in average.weights; did you mean 'code'"),
        ({"kind": "avrage"}, r"unknown surgery kind 'avrage' .*did you mean 'average'"),
    ],
)
def test_what_does_not_fit_is_named(spec, message):
    with pytest.raises(ConfigError, match=message):
        operate(spec, others={"code": checkpoint()})


def test_layers_get_names_of_their_own_and_back():
    def stacked():
        leaves = {("params", "stack", "repeats", "0_a", "w"): np.arange(6.0).reshape(2, 3), ("params", "head"): np.ones(3)}
        return Checkpoint({}, {}).with_leaves({**leaves, ("router_state", "stack", "repeats", "0_a", "load"): np.arange(2.0)})

    unrolled = operate({"kind": "unroll"}, stacked())
    found = by_name(unrolled)
    assert set(found) == {
        "stack/repeat_0/0_a/w", "stack/repeat_1/0_a/w", "head",
        "router_state/stack/repeat_0/0_a/load", "router_state/stack/repeat_1/0_a/load",
    }  # fmt: skip
    np.testing.assert_array_equal(found["stack/repeat_1/0_a/w"], [3, 4, 5])
    back = by_name(operate({"kind": "roll"}, unrolled))
    for name, x in by_name(stacked()).items():
        np.testing.assert_array_equal(back[name], x)


def test_models_of_another_shape_are_not_averaged():
    with pytest.raises(ConfigError, match=r"'head' \[3\] of the source has no like in code"):
        operate({"kind": "average"}, others={"code": checkpoint(head=np.zeros(4)), "prose": checkpoint()})


def test_arrays_that_are_not_the_models_are_listed():
    wanted = checkpoint(**{"new": np.zeros((2, 2)), "head": np.zeros(5)}).leaves
    found = checkpoint(**{"old": np.zeros(1)})
    message = (
        r"init: the arrays are not those of the model: 1 missing \(new float32\[2,2\]\); 1 left over \(old float32\[1\]\); "
        r"1 of another shape \(head float32\[3\], where the model has float32\[5\]\); do this"
    )
    with pytest.raises(ConfigError, match=message):
        check_fit(found, wanted, "init", "do this")
    check_fit(found, found.leaves, "init", "do this")


def test_surgeries_are_in_the_order_that_the_config_says():
    spec = {"surgeries": {"b": {"kind": "keep"}, "keep": {}, "a": {"kind": "rename", "paths": {}}, "gone": None}}
    assert [name for name, _ in parse_init({**spec, "order": ("keep", "a", "b")}).surgeries] == ["keep", "a", "b"]
    with pytest.raises(ConfigError, match=r"init.surgeries has b, keep, a; say in init.order which comes first"):
        parse_init(spec)
    with pytest.raises(ConfigError, match=r"init.order=\('a', 'b'\) must name each of init.surgeries once"):
        parse_init({**spec, "order": ("a", "b")})
    with pytest.raises(ConfigError, match=r"init.order names 'kepe', not in init.surgeries; did you mean 'keep'"):
        parse_init({**spec, "order": ("kepe", "a", "b")})


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ({"sorce": {}}, "unknown key 'sorce' in init; did you mean 'source'"),
        ({"source": {"kind": "chekpoint"}}, r"unknown source kind 'chekpoint' in init.source.kind; did you mean 'checkpoint'"),
        ({"source": {"kind": "checkpoint"}}, r"init.source \(source 'checkpoint'\) needs 'path'"),
        ({"others": {"a": {"kind": "run"}}}, r"init.others.a \(source 'run'\) needs 'config'"),
        (
            {"source": {"kind": "run", "config": {}, "seed": "mine"}},
            r"init.source.seed='mine' must be a whole number between 0 and 4294967295, or 'own'",
        ),
        ({"surgeries": {"keep": 3}}, r"init.surgeries.keep=3 must be a mapping"),
        ({"source": {"kind": "checkpoint", "path": "x/checkpoints/3", "step": 2}}, r"give one of them .*init.source"),
    ],
)
def test_init_sections_that_do_not_fit_are_named(spec, message):
    with pytest.raises(ConfigError, match=message):
        parse_init(spec)


def test_a_checkpoint_may_be_named_by_its_run_or_by_itself():
    assert sources.build({"kind": "checkpoint", "path": "runs/x"}, "s").place == ("runs/x", None)
    assert sources.build({"kind": "checkpoint", "path": "runs/x", "step": 3}, "s").place == ("runs/x", 3)
    assert sources.build({"kind": "checkpoint", "path": "runs/x/checkpoints/30"}, "s").place == ("runs/x", 30)


def test_parameters_are_leaves_of_trees():
    assert jax.tree.leaves({"a": Parameter(("a",), (2,), (None,))}) == [Parameter(("a",), (2,), (None,))]
