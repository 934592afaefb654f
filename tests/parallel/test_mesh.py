"""Mesh specs: sizes, presets, their products, and what is said of wrong ones."""

import jax
import pytest

from moejax.core.errors import ConfigError
from moejax.parallel import MESH_AXES, make_mesh, parse_mesh
from moejax.parallel.mesh import batch_ways, describe


def sizes(spec, devices):
    return tuple(parse_mesh(spec, devices).values())


@pytest.mark.parametrize(
    ("spec", "devices", "expected"),
    [
        ("data=2,expert=4", 8, (2, 1, 4, 1)),
        ("data=2, expert=-1", 8, (2, 1, 4, 1)),
        ("single", 1, (1, 1, 1, 1)),
        ("dp", 8, (8, 1, 1, 1)),
        ("dp", 1, (1, 1, 1, 1)),
        ("fsdp", 256, (1, 256, 1, 1)),
        ("ep", 6, (1, 1, 6, 1)),
        ("tp", 8, (1, 1, 1, 8)),
        ("fsdp x ep", 8, (1, 4, 2, 1)),
        ("ep x fsdp", 8, (1, 2, 4, 1)),
        ("fsdp x ep", 256, (1, 16, 16, 1)),
        ("fsdp x ep=4", 64, (1, 16, 4, 1)),
        ("ep=4 x tp=2", 8, (1, 1, 4, 2)),
        ("dp x fsdp x tp", 64, (4, 4, 1, 4)),
        ("dp x fsdp x ep x tp", 2, (2, 1, 1, 1)),
        ("fsdp x ep", 12, (1, 4, 3, 1)),
        ("data,tensor=2", 8, (4, 1, 1, 2)),
    ],
)
def test_specs_become_sizes(spec, devices, expected):
    assert sizes(spec, devices) == expected


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("data=2,experts=4", "unknown axis or preset 'experts'; did you mean 'expert'"),
        ("fdsp", "unknown axis or preset 'fdsp'; did you mean 'fsdp'"),
        ("data=2,dp=4", "names axis 'data' twice"),
        ("ep=four", "ep='four' is not a number of devices; write ep=2, or ep for what is left"),
        ("data=0", "data='0' is not a number"),
        ("", "unknown axis or preset ''"),
        ("data=2,expert=2", "needs 4 devices, and there are 8; change a size, or leave one out"),
        ("data=3,expert", "needs 3 devices or a multiple, and there are 8"),
        ("data=16", "needs 16 devices, and there are 8"),
    ],
)
def test_wrong_specs_are_named(spec, message):
    with pytest.raises(ConfigError, match=message):
        parse_mesh(spec, 8)


def test_a_mesh_has_all_axes_and_neighbours_share_a_layer():
    mesh = make_mesh("data=2,tensor=4")
    assert mesh.axis_names == MESH_AXES
    assert [d.id for d in mesh.devices[1, 0, 0]] == [4, 5, 6, 7]
    assert all(kind == jax.sharding.AxisType.Auto for kind in mesh.axis_types)
    assert (batch_ways(mesh), describe(mesh)) == (2, "data=2,tensor=4")
    assert make_mesh("single").size == 1
    assert make_mesh("dp", jax.devices()[:4]).shape["data"] == 4
