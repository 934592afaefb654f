"""Runs of adapted models from a config: what they start with, what of them learns, and what makes them the same run."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict
from training_harness import Info, TinyText, registered, tiny_config

from moejax import Adapter, RowWise, adapted_layers, split_adapters
from moejax.core.errors import ConfigError
from moejax.core.params import param
from moejax.layers.registry import adapters
from moejax.models import network
from moejax.train import fit, load

BLOCK = {
    "kind": "transformer",
    "mixer": {"kind": "attention", "num_heads": 2},
    "norm": {"kind": "rms_norm"},
    "ffn": {
        "kind": "moe", "num_experts": 3, "router": {"kind": "linear"}, "select": {"kind": "top_k", "k": 2},
        "bank": {"kind": "glu", "hidden": 4}, "backend": "reference",
    },
}  # fmt: skip
MODEL = {
    "kind": "decoder_lm", "vocab_size": 11, "d_model": 8, "num_layers": 2, "pattern": ("moe",), "blocks": {"moe": BLOCK},
}  # fmt: skip
LORA = {"kind": "lora", "targets": ("*/q", "experts"), "rank": 2, "scale": 2.0}
ROUTED = {
    "kind": "lora", "targets": ("*/o",), "rank": 2, "scale": 2.0, "num_experts": 3, "router": {"kind": "linear"},
    "select": {"kind": "top_k", "k": 2}, "losses": {"balance": {"coef": 0.1}}, "balancer": {"kind": "loss_free"},
    "backend": "reference",
}  # fmt: skip


class Norms(Adapter, RowWise):
    """Columns of a frozen matrix with lengths of their own, which start as they are."""

    def weight(self, w, site, ctx=None):
        length = jnp.linalg.norm(w, axis=0)
        return w / length * param(self, "m", lambda *_: length, (site.shape[-1],), (site.axes[-1],))


@pytest.fixture(autouse=True, scope="module")
def _kind():
    with registered(adapters, "test_norms", Norms):
        yield


def config(**changes):
    made = tiny_config(model=MODEL, optimizer__kind="sgd", optimizer__learning_rate=0.1, eval__every=0, checkpoint__every=0)
    made = {**made.to_dict(), **changes}
    made["optimizer"] = {"kind": "sgd", "learning_rate": 0.1, "schedule": "constant"}
    return {**made, "train": {"steps": 2, "log_every": 2, **changes.get("train", {})}}


def run(workdir, **changes):
    return fit(config(**changes), 0, workdir, make_iterator=TinyText, info=Info())


@pytest.fixture(scope="module")
def dense(tmp_path_factory):
    """A trained model, and the section that starts from it."""
    workdir = tmp_path_factory.mktemp("dense")
    return run(workdir), {"source": {"kind": "checkpoint", "path": str(workdir)}}


def test_an_adapted_run_starts_as_what_it_adapts(dense, tmp_path):
    trained, init = dense
    specs = {"plain": LORA, "routed": ROUTED, "norms": {"kind": "test_norms", "targets": ("*/v",)}}
    start = run(tmp_path, init=init, adapters=specs, train={"steps": 0})
    base, ours = split_adapters(start.variables["params"])
    jax.tree.map(np.testing.assert_array_equal, base, trained.variables["params"])
    np.testing.assert_allclose(start.metrics["eval/loss"], trained.metrics["eval/loss"], rtol=1e-5)
    # Not those of an untrained kernel.
    value = base["stack"]["repeats"]["0_moe"]["mixer"]["v"]["kernel"]
    lengths = ours["stack"]["repeats"]["0_moe"]["mixer"]["v"]["adapter_norms"]["m"]
    np.testing.assert_allclose(lengths, np.linalg.norm(value, axis=1), rtol=1e-6)
    layers = adapted_layers(network(config(adapters=specs)), jnp.zeros((1, 4), jnp.int32))
    added = dict.fromkeys(specs, 0)
    for layer in layers:
        added[layer.adapter] += layer.added
    assert added == {"plain": 2 * (32 + 3 * 3 * 2 * 12), "routed": 2 * (3 * 32 + 24), "norms": 2 * 8}
    assert start.params - trained.params == sum(added.values())
    assert start.active_params - trained.active_params == sum(added.values()) - 2 * 32 - 2 * 72  # a third of all experts rests


def test_only_adapters_learn_where_only_they_may(dense, tmp_path):
    trained, init = dense
    changes = dict(init=init, adapters={"plain": LORA, "routed": ROUTED}, trainable={"adapters": {}})
    result = run(tmp_path, **changes)
    base, ours = split_adapters(result.variables["params"])
    jax.tree.map(np.testing.assert_array_equal, base, trained.variables["params"])
    for path, leaf in flatten_dict(ours).items():
        if path[-1] == "b":
            assert np.abs(leaf).max() > 0, path
    assert any(name.startswith("losses/balance") for name in result.history[-1])
    assert jnp.abs(jax.tree.leaves(split_adapters(result.variables["router_state"])[1])[0]).max() > 0
    _, saved, _ = load(tmp_path)
    jax.tree.map(np.testing.assert_array_equal, saved["params"], result.variables["params"])
    # What sits around a model is part of what makes a run.
    with pytest.raises(ConfigError, match=r"adapters\.plain\.scale=2.0, not 1.0"):
        run(tmp_path, **{**changes, "adapters": {"plain": {**LORA, "scale": 1.0}, "routed": ROUTED}})


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ({**LORA, "kind": "lorra"}, r"unknown adapter kind 'lorra' in adapters\.main\.kind; did you mean 'lora'"),
        ({**LORA, "rang": 2}, r"unknown key 'rang' in adapters\.main"),
        ({"kind": "lora", "targets": ("*/q",), "rank": 2}, r"LoRA needs a rank and a scale.*adapters\.main"),
        ({"kind": "lora", "rank": 2, "scale": 1.0}, r"adapters\.main \(adapter 'lora'\) needs 'targets'"),
        ({**LORA, "targets": ("*/wq",)}, r"targets='\*/wq' of adapter 'main' matches no layer"),
        ({**LORA, "targets": ("*",)}, "matches the router at stack/repeats/0_moe/ffn/router/w"),
        ({**ROUTED, "select": {"kind": "expert_choice"}}, r"adapters\.main\.select \(ExpertChoice\) selects over later tokens"),
    ],
)
def test_what_is_wrong_is_said_with_its_place(tmp_path, spec, message):
    with pytest.raises(ConfigError, match=message):
        run(tmp_path, adapters={"main": spec})
