"""Decoders, small and random: the same logits, hidden states, routing, losses and gradients as in transformers."""

import tempfile
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from parity import beside

import moejax as mj

BASE: dict[str, Any] = {
    "vocab_size": 61,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "tie_word_embeddings": False,
    "pad_token_id": None,
    "bos_token_id": None,
    "eos_token_id": None,
}
EXPERTS = {"num_experts": 8, "num_experts_per_tok": 3}
DECODERS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("LlamaForCausalLM", {**BASE, "rope_parameters": {"rope_type": "default", "rope_theta": 5e3}}),
    "llama_biased": ("LlamaForCausalLM", {**BASE, "attention_bias": True, "head_dim": 6, "tie_word_embeddings": True}),
    "mistral": ("MistralForCausalLM", {**BASE, "sliding_window": 5}),
    "qwen2": ("Qwen2ForCausalLM", BASE),
    "qwen3": ("Qwen3ForCausalLM", {**BASE, "head_dim": 16}),
    "mixtral": ("MixtralForCausalLM", {**BASE, "num_local_experts": 8, "num_experts_per_tok": 2}),
    "olmoe": ("OlmoeForCausalLM", {**BASE, **EXPERTS}),
    "qwen3_moe": (
        "Qwen3MoeForCausalLM",
        {**BASE, **EXPERTS, "moe_intermediate_size": 20, "head_dim": 16, "norm_topk_prob": True, "mlp_only_layers": [1]},
    ),
    "qwen2_moe": (
        "Qwen2MoeForCausalLM",
        {**BASE, **EXPERTS, "moe_intermediate_size": 20, "shared_expert_intermediate_size": 36, "num_hidden_layers": 4,
         "decoder_sparse_step": 2},
    ),
    "deepseek_v3": (
        "DeepseekV3ForCausalLM",
        {**BASE, "num_key_value_heads": 4, "n_routed_experts": 8, "num_experts_per_tok": 3, "moe_intermediate_size": 20,
         "n_group": 4, "topk_group": 2, "first_k_dense_replace": 1, "kv_lora_rank": 12, "q_lora_rank": 10, "qk_rope_head_dim": 6,
         "qk_nope_head_dim": 8, "v_head_dim": 10, "n_shared_experts": 2, "attention_bias": True},
    ),
    "deepseek_v3_plain_queries": (
        "DeepseekV3ForCausalLM",
        {**BASE, "num_key_value_heads": 4, "n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 20,
         "n_group": 1, "topk_group": 1, "first_k_dense_replace": 0, "kv_lora_rank": 12, "q_lora_rank": None, "qk_rope_head_dim": 6,
         "qk_nope_head_dim": 8, "v_head_dim": 16, "n_shared_experts": 1, "num_hidden_layers": 2},
    ),
}  # fmt: skip
# DeepSeek's router ranks by more than its logits; that its logits agree to the last block says that its choices do.
ROUTED = [name for name, (_, settings) in DECODERS.items() if {"num_experts", "num_local_experts"} & settings.keys()]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Each model once."""
    found: dict[str, beside.Beside] = {}

    def get(name: str) -> beside.Beside:
        if name not in found:
            architecture, settings = DECODERS[name]
            found[name] = beside.make(architecture, tmp_path_factory.mktemp(name), **settings)
        return found[name]

    return get


@pytest.mark.parametrize("name", DECODERS)
def test_logits_hidden_states_and_export(name: str, made: Any, tmp_path: Path) -> None:
    one = made(name)
    ids = beside.tokens(BASE["vocab_size"])
    with torch.no_grad():
        theirs = one.theirs(torch.tensor(ids), output_hidden_states=True)
    assert beside.distance(jax.jit(one.model.apply)(one.found.variables, ids), theirs.logits) < 1e-5
    # Theirs has the final norm on the last one, which the logits have covered.
    given = beside.blocks_of(one, ids)
    assert len(given) == len(theirs.hidden_states) - 1
    for ours, hidden in zip(given[:-1], theirs.hidden_states[1:-1], strict=True):
        assert beside.distance(ours, hidden) < 1e-5
    again = beside.back(one, tmp_path)
    with torch.no_grad():
        assert torch.equal(again(torch.tensor(ids)).logits, theirs.logits)


@pytest.mark.parametrize("name", ROUTED)
def test_routing_is_identical(name: str, made: Any) -> None:
    one = made(name)
    ids = beside.tokens(BASE["vocab_size"])
    with torch.no_grad():
        theirs = one.theirs(torch.tensor(ids), output_router_logits=True)
    _, sown = jax.jit(lambda v, x: one.model.apply(v, x, mutable=["routing"]))(one.found.variables, ids)
    blocks = sown["routing"]["stack"]["repeats"]
    plans = [blocks[block]["ffn"]["plan"] for block in sorted(blocks, key=lambda name: int(name.partition("_")[0]))]
    chosen = np.concatenate([np.asarray(plan.expert) for plan in plans])
    logits = np.concatenate(
        [np.asarray(blocks[b]["ffn"]["logits"]) for b in sorted(blocks, key=lambda n: int(n.split("_")[0]))]
    )
    assert len(theirs.router_logits) == len(chosen)
    for layer, expected in enumerate(theirs.router_logits):
        expected = expected.reshape(*ids.shape, -1)
        k = chosen.shape[-1]
        np.testing.assert_array_equal(np.sort(chosen[layer], -1), np.sort(expected.topk(k).indices.numpy(), -1))
        if name != "mixtral":
            assert beside.distance(logits[layer], expected) < 1e-5


@pytest.mark.parametrize("name", ["mixtral", "olmoe"])
def test_gradients_of_a_training_step_with_the_balance_loss(name: str, made: Any) -> None:
    """With padding: what is padded counts neither in the cross entropy nor in the balance loss."""
    one = made(name)
    ids = beside.tokens(BASE["vocab_size"], seed=3)
    mask = np.ones(ids.shape, bool)
    mask[1, 9:] = False
    coef = one.theirs.router_aux_loss_coef = 0.3
    labels = torch.tensor(np.where(mask, ids, -100)).long()
    one.theirs.zero_grad()
    out = one.theirs(torch.tensor(ids), torch.tensor(mask).long(), labels=labels, output_router_logits=True)
    out.loss.backward()
    model = {**one.found.model}
    moe = model["blocks"]["moe"]["ffn"]
    balance = {"coef": coef * moe["select"]["k"], "over": "layers"}
    model["blocks"] = {"moe": {**model["blocks"]["moe"], "ffn": {**moe, "losses": {"balance": balance}}}}
    network = mj.models.build(model)

    def loss(variables: Any) -> Any:
        logits, sown = network.apply(
            variables, jnp.asarray(ids), mj.Context(valid=jnp.asarray(mask), train=True), mutable=["losses"]
        )
        nll = -jnp.take_along_axis(jax.nn.log_softmax(logits[:, :-1]), ids[:, 1:, None], -1)[..., 0]
        counts = mask[:, 1:]
        aux = sum(x.sum() for x in jax.tree.leaves(sown["losses"]))
        return jnp.where(counts, nll, 0).sum() / counts.sum() + aux, aux

    (value, aux), grads = jax.jit(jax.value_and_grad(loss, has_aux=True))(one.found.variables)
    assert float(aux) == pytest.approx(coef * float(out.aux_loss), rel=1e-5)
    assert float(value) == pytest.approx(float(out.loss), rel=1e-5)
    for key, far in apart(one, grads).items():
        assert far < 1e-4, key


def apart(one: beside.Beside, grads: Any) -> dict[str, float]:
    """Of each of their parameters, the distance of the gradients, by writing ours out as if they were parameters."""
    with tempfile.TemporaryDirectory() as folder:
        mj.pretrained.save(one.found._replace(variables=jax.tree.map(np.asarray, grads)), folder)
        again = type(one.theirs).from_pretrained(folder)
    expected = {name: x.grad for name, x in one.theirs.named_parameters()}
    assert all(x is not None for x in expected.values())
    return {name: beside.distance(x.detach(), expected[name]) for name, x in again.named_parameters()}
