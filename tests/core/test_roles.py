"""Roles and axes of parameters: found by tracing, for the library's models and for anybody's."""

import flax.linen as nn
import flax.traverse_util
import jax.numpy as jnp
import pytest

import moejax as mj
from moejax.core.roles import describe
from moejax.layers.adapters.adapted import adapt
from moejax.models import build

NORM, MIXER = {"kind": "rms_norm"}, {"kind": "attention", "num_heads": 2, "qk_norm": "head"}
MOE = {
    "kind": "moe",
    "num_experts": 4,
    "router": {"kind": "linear", "use_bias": True},
    "select": {"kind": "top_k", "k": 2},
    "bank": {"kind": "glu", "hidden": 6},
    "shared": {"kind": "glu", "hidden": 3},
}
FFNS = {"dense": {"kind": "ffn", "hidden": 6, "use_bias": True}, "moe": MOE}
BLOCKS = {name: {"kind": "transformer", "mixer": MIXER, "norm": NORM, "ffn": ffn} for name, ffn in FFNS.items()}


def language_model(**fields):
    spec = {"kind": "decoder_lm", "vocab_size": 7, "d_model": 8, "num_layers": 4, "pattern": ("dense", "moe"), "blocks": BLOCKS}
    return build({**spec, **fields})


def described(model, *args):
    return {p.name: p for p in flax.traverse_util.flatten_dict(describe(model, *args)).values()}


@pytest.mark.parametrize("remat", ["none", "full"])
@pytest.mark.parametrize("scan", [True, False])
def test_every_parameter_of_a_language_model_has_its_roles(scan, remat):
    found = described(language_model(scan=scan, remat=remat, tied=False, learned_positions=True), jnp.zeros((1, 4), jnp.int32))
    root = "stack/repeats" if scan else "stack/repeat_0"
    expected = {
        "embedding": {"embeddings"},
        "position": {"embeddings"},
        "head": {"head"},
        "final_norm/norm/scale": {"norms"},
        f"{root}/0_dense/mixer_norm/norm/scale": {"norms"},
        f"{root}/0_dense/mixer/q/kernel": {"mixers"},
        f"{root}/0_dense/ffn/expert/w_in": {"ffns"},
        f"{root}/0_dense/ffn/expert/b_in": {"ffns", "biases"},
        f"{root}/1_moe/ffn/router/w": {"ffns", "routers"},
        f"{root}/1_moe/ffn/router/b": {"ffns", "routers", "biases"},
        f"{root}/1_moe/ffn/bank/w_gate": {"ffns", "experts"},
        f"{root}/1_moe/ffn/shared/w_gate": {"ffns"},
    }
    for name, roles in expected.items():
        assert found[name].roles == roles, name
    assert all(parameter.roles for parameter in found.values())
    norms = {name for name in found if "norm" in name.split("/")[-1] + name}
    assert {name for name, p in found.items() if "norms" in p.roles} == norms


def test_a_tied_embedding_is_the_head_too():
    assert described(language_model(), jnp.zeros((1, 4), jnp.int32))["embedding"].roles == {"embeddings", "head"}


def test_axes_say_which_dimensions_stack_layers_and_experts():
    found = described(language_model(), jnp.zeros((1, 4), jnp.int32))
    axes = {name: p.axes for name, p in found.items()}
    assert axes["embedding"] == ("vocab", "embed")
    assert axes["stack/repeats/1_moe/ffn/bank/w_gate"] == ("layers", "expert", "embed", "mlp")
    # No mesh splits shared experts, and all the same they are one after the other.
    assert axes["stack/repeats/1_moe/ffn/shared/w_gate"] == ("layers", "expert", "embed", "mlp")
    # Flax's own norm names no axis, and its scale is a vector for each layer.
    assert axes["stack/repeats/1_moe/ffn_norm/norm/scale"] == ("layers", None)
    assert axes["final_norm/norm/scale"] == (None,)


def test_adapters_keep_the_roles_of_what_they_are_made_of():
    spec = {"kind": "lora", "targets": ("*/q",), "num_experts": 2, "rank": 3, "scale": 1.0, "router": {"kind": "linear"}}
    adapted = adapt(language_model(), {"extra": spec})
    found = described(adapted, jnp.zeros((1, 4), jnp.int32))
    new = set(found) - set(described(language_model(), jnp.zeros((1, 4), jnp.int32)))
    assert {name for name, p in found.items() if "adapters" in p.roles} == new
    router = next(p for name, p in found.items() if name in new and "router" in name)
    assert {"adapters", "routers"} <= router.roles


class Scale(nn.Module):
    role = "norms"

    @nn.compact
    def __call__(self, x):
        return x * self.param("gain", nn.initializers.ones, (x.shape[-1],))


class Body(nn.Module):
    @nn.compact
    def __call__(self, x, _):
        return nn.Dense(4, name="mix")(Scale(name="scale")(x)), None


class Theirs(nn.Module):
    """A user's network: Flax's layers, a class of theirs that says what it is, and a scan."""

    @nn.compact
    def __call__(self, tokens):
        x = nn.Embed(5, 4, name="words")(tokens)
        x, _ = nn.scan(Body, variable_axes={"params": 0}, split_rngs={"params": True}, length=3)(name="body")(x, None)
        return nn.Dense(5, name="out")(nn.LayerNorm(name="last")(x))


def test_users_modules_have_roles_and_layers_without_declaring_axes():
    found = described(Theirs(), jnp.zeros((2, 3), jnp.int32))
    roles = {name: set(p.roles) for name, p in found.items()}
    assert roles == {
        "words/embedding": {"embeddings"},
        "body/scale/gain": {"norms"},
        "body/mix/kernel": set(),
        "body/mix/bias": {"biases"},
        "last/scale": {"norms"},
        "last/bias": {"norms", "biases"},
        "out/kernel": set(),
        "out/bias": {"biases"},
    }
    assert found["body/mix/kernel"].axes == ("layers", None, None)
    assert found["body/scale/gain"].axes == ("layers", None)
    assert found["out/kernel"].axes == (None, None)


def test_a_registered_class_may_say_its_role_itself():
    from moejax.core.registry import Registry

    registry = Registry("thing", role="norms")

    @registry.register("plain")
    class Plain:
        pass

    @registry.register("own")
    class Own:
        role = "routers"

    assert (Plain.role, Own.role) == ("norms", "routers")
    assert mj.RMSNorm.role == "norms"
