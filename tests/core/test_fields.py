"""What fields may hold: types and ranges by annotation, checked whoever makes the object, and told in one line."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Annotated, Any, Literal

import flax.linen as nn
import jax.numpy as jnp
import numpy as np
import pytest

import moejax as mj
from moejax.core.errors import ConfigError
from moejax.core.fields import Count, DType, Fraction, In, NonNegative, Positive, Rate, Whole, checked, described, fits
from moejax.core.registry import Registry

NAN, INF = float("nan"), float("inf")


@pytest.mark.parametrize(
    ("hint", "good", "bad"),
    [
        (int, (0, -3, np.int64(4)), (True, 1.0, "1", None, np.float32(1))),
        (float, (0, 1.5, -2, np.float32(1)), (True, NAN, INF, -INF, "1", 1j)),
        (bool, (True, False), (0, 1, "true", None)),
        (Count, (1, 10**9), (0, -1, 1.0)),
        (Whole, (0, 7), (-1,)),
        (Positive, (1e-9, 3), (0, 0.0, -1)),
        (NonNegative, (0, 3.0), (-1e-9, INF)),
        (Fraction, (0, 0.5, 1), (-0.1, 1.1)),
        (Rate, (0, 0.99), (1, 1.0, 3.7)),
        (Annotated[float, In(above=0, most=0.5)], (0.5,), (0, 0.51)),
        (Count | None, (None, 2), (0, "x")),
        (Literal["a", "b"] | Positive, ("a", 2.0), ("c", 0, ["a"], {})),
        # Of collections every item counts: a checker that looks at one of them would take these, sometimes.
        (tuple[Count, ...], ((), (1, 2)), ((1, 2, 3, 4, 5, 6, 7, 0), [1], 1, (1, "2"))),
        (tuple[int, int], ((1, 2),), ((1,), (1, 2, 3), (1, 2.5))),
        (Mapping[str, Fraction], ({}, {"a": 1}), ({"a": 1, "b": 2}, {3: 1}, [("a", 1)])),
        (DType, ("float32", "bfloat16", jnp.float16), ("float33", "int32", None, 3, ["float32"], {"kind": "x"})),
        (Callable[..., Any], (len, nn.initializers.zeros), (3, "len")),
        (Any, (3, None, {}), ()),
    ],
)  # fmt: skip
def test_types_and_ranges(hint: Any, good: tuple[Any, ...], bad: tuple[Any, ...]) -> None:
    assert all(fits(value, hint) for value in good)
    assert [value for value in bad if fits(value, hint)] == []
    for _ in range(20):  # nothing is drawn at random
        assert not any(fits(value, hint) for value in bad)


@pytest.mark.parametrize(
    ("hint", "words"),
    [
        (Count | None, "a whole number of at least 1, or None"),
        (Rate, "a number of at least 0 and below 1"),
        (Fraction, "a number between 0 and 1"),
        (bool, "true or false"),
        (Literal["a", "b"], "'a' or 'b'"),
        (tuple[Positive, ...], "a tuple of items, each a number above 0"),
        (tuple[int, int], "a tuple of 2 items, each a whole number"),
        (Mapping[str, float], "a mapping whose values are each a number"),
        (Callable[..., Any], "a function"),
        (mj.Loss, "a Loss"),
    ],
)
def test_words(hint: Any, words: str) -> None:
    assert described(hint) == words


def test_arguments_are_checked_before_anything_looks_at_them() -> None:
    @checked
    @dataclasses.dataclass(frozen=True)
    class Wheel:
        size: Count
        spokes: int = 3

        def __post_init__(self) -> None:
            self.size + 1

    assert Wheel(2).size == dataclasses.replace(Wheel(1), size=2).size == 2
    for given, message in (
        (((0,), {}), r"^size=0 must be a whole number of at least 1$"),
        ((("big",), {}), r"^size='big' must be a whole number of at least 1$"),
        (((1,), {"spoke": 2}), r"^unknown key 'spoke' in Wheel; did you mean 'spokes'\?$"),
        (((), {}), r"^Wheel: missing a required argument: 'size'$"),
        (((1, 2, 3), {}), r"^Wheel: too many positional arguments$"),
    ):
        with pytest.raises(ConfigError, match=message):
            Wheel(*given[0], **given[1])


def test_a_registered_kind_is_checked_in_configs_and_in_python_and_names_its_place() -> None:
    gears = Registry("gear")

    @gears.register("gear")
    class Gear(nn.Module):
        teeth: Count = 12
        dtype: DType = "float32"

    assert gears.build({"kind": "gear", "teeth": 4}, "box.gear").teeth == 4
    with pytest.raises(ConfigError, match=r"^box\.gear\.teeth=0 must be a whole number of at least 1$"):
        gears.build({"kind": "gear", "teeth": 0}, "box.gear")
    with pytest.raises(ConfigError, match=r"^teeth=-3 must be a whole number of at least 1 \(in box\.gear\)$"):
        gears.build({"kind": "gear"}, "box.gear", teeth=-3)
    with pytest.raises(ConfigError, match=r"^dtype='float33' must be a floating-point type"):
        Gear(dtype="float33")
    with pytest.raises(ConfigError, match=r"^teeth=0 must"):
        Gear().copy(teeth=0)
    for part in (3, 0.5, "gear", [1], True, None):
        with pytest.raises(ConfigError, match=r"^box\.gear=.* must be a mapping such as \{'kind': 'gear'\}$"):
            gears.build(part, "box.gear")
    for kind in (["gear"], {"a": 1}, 3, None):
        with pytest.raises(ConfigError, match=r"^unknown gear kind .* in box\.gear\.kind"):
            gears.build({"kind": kind}, "box.gear")


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: mj.AdamW(steps=1, learning_rate=-1.0), "learning_rate=-1.0 must be a number of at least 0"),
        (lambda: mj.AdamW(steps=1, learning_rate="fast"), "learning_rate='fast' must be a number"),
        (lambda: mj.AdamW(steps=1, learning_rate=1.0, b1=3.7), "b1=3.7 must be a number of at least 0 and below 1"),
        (lambda: mj.AdamW(steps=1, learning_rate=1.0, weight_decay=-0.1), "weight_decay=-0.1 must be"),
        (
            lambda: mj.AdamW(steps=1, learning_rate=1.0, final_fraction=INF),
            "final_fraction=inf must be a number between 0 and 1",
        ),
        (lambda: mj.TopK(k=2, normalise="no"), "normalise='no' must be true or false"),
        (lambda: mj.TopK(kk=2), "unknown key 'kk' in TopK; did you mean 'k'"),
        (lambda: mj.GLU(hidden=True), "hidden=True must be a whole number"),
        (lambda: mj.GLU(hidden=8, activation="gilu"), "activation='gilu' is unknown; did you mean 'silu'"),
        (lambda: mj.Attention(num_heads=0), "num_heads=0 must be a whole number of at least 1"),
        (lambda: mj.Attention(num_heads=2, dtype="float33"), "dtype='float33' must be a floating-point type"),
        (lambda: mj.Transformer(mixer=3, ffn=mj.DenseFFN(hidden=3), norm=mj.RMSNorm()), "mixer=3 must be a Module"),
        (lambda: mj.TextConfig(name="prose", batch_size=2, packing="no"), "packing='no' must be true or false"),
    ],
)
def test_nonsense_is_refused(make: Callable[[], Any], message: str) -> None:
    with pytest.raises(ConfigError, match=f"^{message}"):
        make()


def test_ones_own_rules_losses_and_optimizers_are_checked_without_being_registered() -> None:
    @dataclasses.dataclass(frozen=True)
    class Half(mj.TokenChoice):
        k: Count = 1

    @dataclasses.dataclass(frozen=True)
    class Size(mj.Loss):
        power: Positive = 2.0

    for make in (lambda: Half(k=0), lambda: Size(power=-1.0), lambda: Size("big")):
        with pytest.raises(ConfigError, match=r"^(k=0|power=-1\.0|coef='big') must be a"):
            make()
