"""Which mesh axis splits which dimension, of parameters, optimizer states and batches, and what is refused."""

import warnings

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import PartitionSpec as P

from moejax.core.errors import ConfigError
from moejax.parallel import Parallel, make_mesh, rules
from moejax.train.program import get_program
from moejax.train.settings import TrainSettings

NORM = {"kind": "rms_norm"}
MIXER = {"kind": "attention", "num_heads": 4, "num_kv_heads": 2, "head_dim": 4}
DENSE = {"kind": "transformer", "mixer": MIXER, "norm": NORM, "ffn": {"kind": "glu", "hidden": 24}}
MOE = {
    "kind": "moe",
    "num_experts": 4,
    "router": {"kind": "linear"},
    "select": {"kind": "top_k", "k": 2},
    "bank": {"kind": "glu", "hidden": 24},
    "shared": {"kind": "glu", "hidden": 24, "num_experts": 2},
}
BATCH = {name: jax.ShapeDtypeStruct((8, 4), "int32") for name in ("tokens", "targets", "segments", "positions")} | {
    "valid": jax.ShapeDtypeStruct((8, 4), "bool")
}


def config(optimizer=None, moe=None, **model):
    blocks = {"dense": DENSE, "moe": {**DENSE, "ffn": {**MOE, **(moe or {})}}}
    model = {"d_model": 16, "vocab_size": 12, **model}
    return {
        "model": {"kind": "decoder_lm", "num_layers": 4, "pattern": ("dense", "moe"), "blocks": blocks, **model},
        "task": {"kind": "next_token"},
        "optimizer": optimizer or {"kind": "adamw", "learning_rate": 1e-3},
    }


def program(mesh, batch=BATCH, accumulation=1, **changes):
    settings = TrainSettings(steps=2, accumulation=accumulation)
    return get_program(config(**changes), settings, batch, {}, parallel=Parallel(make_mesh(mesh)))


def specs(tree):
    return {jax.tree_util.keystr(p, simple=True, separator="/"): x.sharding.spec for p, x in jax.tree.leaves_with_path(tree)}


def test_parameters_follow_the_rules_and_moments_follow_parameters():
    state = program("fsdp=2,expert=2,tensor=2").state
    found = specs(state.params)
    moe = "stack/repeats/1_moe/ffn"
    expected = {
        "embedding": P("tensor", "fsdp"),
        "stack/repeats/0_dense/mixer/q/kernel": P(None, "fsdp", "tensor"),
        "stack/repeats/0_dense/mixer/k/kernel": P(None, "fsdp", "tensor"),
        "stack/repeats/0_dense/mixer/o/kernel": P(None, "tensor", "fsdp"),
        # A bank of one expert, and experts that every token uses, are not split by experts.
        "stack/repeats/0_dense/ffn/expert/w_gate": P(None, None, "fsdp", "tensor"),
        f"{moe}/shared/w_out": P(None, None, "tensor", "fsdp"),
        f"{moe}/bank/w_up": P(None, "expert", "fsdp", "tensor"),
        f"{moe}/bank/w_out": P(None, "expert", "tensor", "fsdp"),
        f"{moe}/router/w": P(None, "fsdp"),
        "final_norm/norm/scale": P(),
    }
    assert {name: found[name] for name in expected} == expected
    moments = specs(state.opt_state)
    for which in ("mu", "nu"):
        assert {name: moments[f"1/{which}/{name}"] for name in found} == found
    assert moments["1/count"] == P()
    assert {state.step.sharding.spec, state.key.sharding.spec, state.first_bad_step.sharding.spec} == {P()}


def test_a_state_that_lacks_dimensions_keeps_the_splits_of_those_it_has():
    params = {"a": {"w": np.zeros((2, 4, 6, 8))}, "b": np.zeros((8, 8))}
    split = {"a": {"w": P(None, "expert", "fsdp", "tensor")}, "b": P("fsdp")}
    tree = (
        {"a": {"w": np.zeros((2, 4, 6))}, "b": np.zeros(8)},  # factored
        {"a": {"w": np.zeros((2, 4, 1, 1))}, "b": np.zeros(())},  # a norm per slice; a number
        {"a": {"w": np.zeros(1)}, "b": np.zeros((3, 5))},  # a placeholder; something else
        np.zeros((2, 4, 6, 8)),
    )
    assert rules.follow_params(tree, params, split) == (
        {"a": {"w": P(None, "expert", "fsdp")}, "b": P("fsdp")},
        {"a": {"w": P(None, "expert")}, "b": P()},
        {"a": {"w": P()}, "b": P()},
        P(),
    )


def test_factored_moments_are_split():
    params = {"w": jnp.zeros((4, 256, 384))}
    split = {"w": P("expert", "fsdp", "tensor")}
    state = optax.scale_by_factored_rms().init(params)
    found = rules.follow_params(state, params, split)
    assert {state.v_row["w"].shape: found.v_row["w"], state.v_col["w"].shape: found.v_col["w"]} == {
        (4, 256): P("expert", "fsdp"),
        (4, 384): P("expert", "tensor"),
    }


def test_names_of_two_dimensions_take_a_mesh_axis_once():
    axes = {("w",): ("embed", "embed"), ("v",): ("mlp", "heads")}
    params = {"w": np.zeros((4, 4)), "v": np.zeros((3, 4)), "plain": np.zeros((4, 4))}
    with pytest.raises(ConfigError, match=r"'mlp' of size 3|hidden"):
        rules.param_specs(params, axes, make_mesh("fsdp=4,tensor=2"))
    params["v"] = np.zeros((6, 4))
    found = rules.param_specs(params, axes, make_mesh("fsdp=4,tensor=2"))
    assert found == {"w": P("fsdp"), "v": P("tensor"), "plain": P()}


@pytest.mark.parametrize(
    ("mesh", "changes", "message"),
    [
        (
            "fsdp",
            {"d_model": 20},
            r"model.d_model=20 does not divide among fsdp=8 of mesh='fsdp=8' \(parameter embedding, dimension 1 of size 20\); "
            r"take 16 or 24, or another size of fsdp",
        ),
        (
            "expert=4,data=2",
            {"moe": {"num_experts": 6}},
            r"model.blocks.moe.ffn.num_experts=6 does not divide among expert=4 .*1_moe/ffn/bank/w_gate, dimension 1 of size 6\); "
            r"take 4 or 8",
        ),
        (
            "ep",
            {},
            r"model.blocks.moe.ffn.num_experts=4 is fewer than the expert=8 shards of mesh='expert=8' .*take at least 8 "
            r"experts, or fewer shards, such as mesh='data,expert=4'",
        ),
        (
            "tensor=4,data=2",
            {"moe": {"bank": {"kind": "glu", "hidden": 22}}},
            r"model.blocks.moe.ffn.bank.hidden=22 does not divide among tensor=4 .*take 20 or 24",
        ),
    ],
)
def test_sizes_that_do_not_divide_are_refused_before_compiling(mesh, changes, message):
    with pytest.raises(ConfigError, match=message):
        _ = program(mesh, **changes).state


def test_heads_are_not_cut():
    with pytest.raises(ConfigError, match=r"num_heads=4 in .*mixer does not divide among tensor=8 of the mesh; take 8"):
        program("tp").lower_train()


def test_a_vocabulary_that_does_not_divide_stays_whole_and_says_so():
    with pytest.warns(rules.StaysWhole, match="'vocab' of size 11 stays whole on every device: tensor=2 does not divide it"):
        found = specs(program("data=4,tensor=2", vocab_size=11).state.params)
    assert found["embedding"] == P()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert specs(program("data=4,tensor=2").state.params)["embedding"] == P("tensor")


@pytest.mark.parametrize(
    ("mesh", "rows", "accumulation", "message"),
    [
        ("data=2,expert=4", 12, 1, r"batch_size=12 does not divide among the 8 parts \(data=2 \* expert=4\) .*take 8 or 16"),
        ("data=2,tensor=4", 6, 2, r"among the 2 parts \(data=2\) .* in 2 microbatches \(train.accumulation=2\); take 4 or 8"),
        ("dp", 4, 1, r"batch_size=4 does not divide among the 8 parts .*take 8$"),
    ],
)
def test_batches_that_do_not_divide_are_refused(mesh, rows, accumulation, message):
    batch = {name: jax.ShapeDtypeStruct((rows, *x.shape[1:]), x.dtype) for name, x in BATCH.items()}
    with pytest.raises(ConfigError, match=message):
        program(mesh, batch, accumulation)
