"""The registry: what a spec becomes, and errors that name the place, the value and the nearest valid name."""

import dataclasses
from typing import Any

import pytest
from ml_collections import ConfigDict

from moejax.core.errors import ConfigError, nearest
from moejax.core.registry import Given, Many, Registry

wheels, engines, cars = Registry("wheel"), Registry("engine"), Registry("car")


@wheels.register("round")
@dataclasses.dataclass(frozen=True)
class Round:
    size: int
    spokes: tuple[int, ...] = ()


@wheels.register("square")
@dataclasses.dataclass(frozen=True)
class Square:
    size: int = 1


@engines.register("diesel")
@dataclasses.dataclass(frozen=True)
class Diesel:
    power: float
    size: int = 0

    def __post_init__(self) -> None:
        if self.power <= 0:
            raise ConfigError(f"power={self.power} must be positive")


@cars.register("saloon", slots={"wheel": wheels, "spare": Given(wheels, {"size": 2}), "engines": Many(engines)})
@dataclasses.dataclass(frozen=True)
class Saloon:
    wheel: Any
    spare: Any = None
    engines: tuple[Any, ...] = ()
    size: int | None = None
    wheels: int = 4


@cars.register("trailer", slots={"car": cars})
@dataclasses.dataclass(frozen=True)
class Trailer:
    car: Any
    spare: str = "none"


def saloon(**fields: Any) -> dict[str, Any]:
    return dict(kind="saloon", wheel=dict(kind="square"), **fields)


def test_a_spec_becomes_an_object_with_its_parts() -> None:
    spec = saloon(engines=dict(diesel=dict(power=3.0)), wheels=3)
    expected = Saloon(Square(), engines=(Diesel(3.0),), wheels=3)
    assert cars.build(spec, where="car") == expected
    assert cars.build(ConfigDict(spec), where="car") == expected
    assert cars.build(expected, where="car") is expected
    assert cars.build(dict(kind="saloon", wheel=Round(9)), where="car") == Saloon(Round(9))


def test_lists_become_tuples() -> None:
    built = wheels.build(ConfigDict(dict(kind="round", size=1, spokes=[1, 2])), where="wheel")
    assert built == Round(1, (1, 2))
    hash(built)


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        (dict(kind="saloom"), r"unknown car kind 'saloom' in garage\.car\.kind; did you mean 'saloon'\?"),
        (dict(kind="ship"), r"unknown car kind 'ship' in garage\.car\.kind; valid names: saloon, trailer"),
        (saloon(wheals=3), r"unknown key 'wheals' in garage\.car \(car 'saloon'\); did you mean 'wheels'\?"),
        (dict(kind="saloon"), r"garage\.car \(car 'saloon'\) needs 'wheel'"),
        (dict(wheels=3), r"garage\.car has no 'kind'; valid car kinds: saloon, trailer"),
        ("saloon", r"garage\.car='saloon' must be a mapping such as \{'kind': 'saloon'\}"),
        (dict(kind="saloon", wheel=dict(kind="rund")), r"unknown wheel kind 'rund' in garage\.car\.wheel\.kind; did you mean 'round'\?"),
        (dict(kind="saloon", wheel="square"), r"garage\.car\.wheel='square' must be a mapping"),
        (saloon(engines=dict(disel=dict(power=1))), r"unknown engine kind 'disel' in garage\.car\.engines\.disel\.kind; did you mean 'diesel'\?"),
        (saloon(engines=dict(diesel=dict(power=-1))), r"power=-1 must be positive \(in garage\.car\.engines\.diesel\)"),
        (saloon(engines=dict(diesel=0.5)), r"garage\.car\.engines\.diesel=0\.5 must be a mapping of fields, or None to leave it out"),
        (saloon(name="x"), r"unknown key 'name' in garage\.car"),
    ],
)  # fmt: skip
def test_errors(spec: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        cars.build(spec, where="garage.car")


class TestContext:
    def test_it_fills_fields_that_the_class_has_and_the_spec_leaves_out(self) -> None:
        assert wheels.build(dict(kind="round"), where="w", size=5, colour="red") == Round(5)
        assert wheels.build(dict(kind="round", size=7), where="w", size=5) == Round(7)

    def test_what_is_not_handed_down_stays_where_it_is_said(self) -> None:
        """A field of a part that has the same name by chance is its own."""
        built = cars.build(saloon(size=3, engines=dict(diesel=dict(power=1.0))), where="car", size=9)
        assert built == Saloon(Square(9), engines=(Diesel(1.0, size=9),), size=3)

    def test_what_is_handed_down_reaches_all_parts(self) -> None:
        inner, outer = Registry("inner"), Registry("outer")

        @inner.register("in")
        @dataclasses.dataclass(frozen=True)
        class In:
            num_experts: int = 1
            coef: float = 0.5

        @outer.register("out", slots={"part": inner, "parts": Many(inner)})
        @dataclasses.dataclass(frozen=True)
        class Out:
            part: Any
            parts: tuple[Any, ...] = ()
            num_experts: int = 2
            coef: float = 1.0

        spec = dict(kind="out", part=dict(kind="in"), parts={"in": {}}, num_experts=7, coef=3.0)
        assert outer.build(spec, where="x") == Out(In(7), (In(7),), 7, 3.0)

    def test_a_slot_may_give_its_parts_other_values(self) -> None:
        built = cars.build(saloon(size=3, spare=dict(kind="square")), where="car", size=9)
        assert (built.wheel, built.spare) == (Square(9), Square(2))
        assert cars.build(saloon(size=3, spare=dict(kind="square", size=8)), where="car").spare == Square(8)

    def test_a_slot_is_filled_only_where_it_is_written(self) -> None:
        """`spare` of the trailer is a name, `spare` of the car inside is a wheel."""
        built = cars.build(dict(kind="trailer", spare="rope", car=saloon()), where="car")
        assert built == Trailer(Saloon(Square()), "rope")


def test_many_leaves_out_none_and_takes_ready_items() -> None:
    assert cars.build(saloon(engines=dict(diesel=None)), where="car").engines == ()
    assert cars.build(saloon(engines=(Diesel(2.0), dict(kind="diesel", power=1.0))), where="car").engines == (
        Diesel(2.0),
        Diesel(1.0),
    )
    with pytest.raises(ConfigError, match=r"unknown engine kind 'steam' in car\.engines\[1\]\.kind"):
        cars.build(saloon(engines=(Diesel(2.0), dict(kind="steam"))), where="car")


def test_names_and_classes() -> None:
    assert cars.kinds() == ["saloon", "trailer"]
    assert dict(wheels.items()) == {"round": Round, "square": Square}
    assert wheels["round"] is Round
    assert wheels.kind_of(Square()) == "square"
    with pytest.raises(ConfigError, match="unknown wheel kind 'sqare'; did you mean 'square'"):
        wheels["sqare"]
    with pytest.raises(ConfigError, match="Diesel is not a registered wheel; valid kinds: round, square"):
        wheels.kind_of(Diesel(1.0))
    with pytest.raises(ValueError, match="wheel kind 'round' is registered twice"):
        wheels.register("round")(Square)


def test_nearest() -> None:
    assert nearest("swich", ["switch", "gshard"]) == "; did you mean 'switch'?"
    assert nearest("xyz", ["switch", "gshard"]) == "; valid names: gshard, switch"
    assert nearest("xyz", []) == "; valid names: (none)"


def test_no_field_of_a_module_hides_a_method_of_flax() -> None:
    """A field called `init` builds from a config, and breaks `module.init`."""
    import dataclasses

    import flax.linen as nn

    from moejax.experts import banks
    from moejax.layers.registry import blocks, ffns, mixers, norms
    from moejax.models import models
    from moejax.routing.routers.base import routers

    own = {"name", "parent"}
    hidden = {
        f"{cls.__name__}.{field.name}"
        for registry in (banks, blocks, ffns, mixers, models, norms, routers)
        for _, cls in registry.items()
        for field in dataclasses.fields(cls)
        if issubclass(cls, nn.Module) and field.name not in own and hasattr(nn.Module, field.name)
    }
    assert not hidden
