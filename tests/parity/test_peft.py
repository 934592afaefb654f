"""LoRA adapters of peft, in and out: the same logits."""

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import peft
import pytest
import torch
from parity import beside
from parity.test_decoders import BASE

import moejax as mj
from moejax.core.errors import ConfigError


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> beside.Beside:
    return beside.make("LlamaForCausalLM", tmp_path_factory.mktemp("base"), **BASE)


@pytest.mark.parametrize("rooted", [False, True])
def test_logits(base: beside.Beside, tmp_path: Path, rooted: bool) -> None:
    mj.pretrained.save(base.found, tmp_path / "base")
    model = type(base.theirs).from_pretrained(tmp_path / "base")
    config = peft.LoraConfig(
        r=3, lora_alpha=7, use_rslora=rooted, task_type="CAUSAL_LM", target_modules=["q_proj", "v_proj", "o_proj", "down_proj"]
    )
    theirs = peft.get_peft_model(model, config).eval()
    torch.manual_seed(0)
    with torch.no_grad():
        for name, x in theirs.named_parameters():
            if "lora_" in name:
                x.normal_(std=0.3)
    theirs.save_pretrained(tmp_path / "lora")
    found = mj.pretrained.load_adapter(tmp_path / "lora", base.found)
    network = mj.models.network({"model": base.found.model, "adapters": found.adapters})
    params = mj.join_adapters(base.found.variables["params"], found.params)
    ids = beside.tokens(BASE["vocab_size"])
    with torch.no_grad():
        expected = theirs(torch.tensor(ids)).logits
    ours = jax.jit(network.apply)({"params": params}, jnp.asarray(ids))
    assert beside.distance(ours, expected) < 1e-5
    plain = jax.jit(base.model.apply)(base.found.variables, jnp.asarray(ids))
    assert beside.distance(plain, expected) > 1e-2

    mj.pretrained.save_adapter(found, base.found, tmp_path / "out")
    again = peft.PeftModel.from_pretrained(type(base.theirs).from_pretrained(tmp_path / "base"), tmp_path / "out").eval()
    with torch.no_grad():
        assert torch.equal(again(torch.tensor(ids)).logits, expected)
    back = mj.pretrained.load_adapter(tmp_path / "out", base.found)
    assert back.adapters == found.adapters
    jax.tree.map(np.testing.assert_array_equal, back.params, found.params)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"use_dora": True, "target_modules": ["q_proj"]},
            "adapter_config.json has use_dora=True, which moejax does not compute",
        ),
        ({"target_modules": ["q_proj"], "rank_pattern": {"q_proj": 2}}, "has rank_pattern={'q_proj': 2}"),
        ({"target_modules": ["q_proj"], "layers_to_transform": [1]}, r"has layers_to_transform=\[1\]"),
        ({"target_modules": ["embed_tokens"]}, "adapts .*|lora_embedding"),
    ],
)
def test_what_is_not_computed_is_refused(base: beside.Beside, tmp_path: Path, settings: dict[str, Any], message: str) -> None:
    mj.pretrained.save(base.found, tmp_path / "base")
    model = type(base.theirs).from_pretrained(tmp_path / "base")
    peft.get_peft_model(model, peft.LoraConfig(r=3, **settings)).save_pretrained(tmp_path / "lora")
    with pytest.raises(ConfigError, match=message):
        mj.pretrained.load_adapter(tmp_path / "lora", base.found)
