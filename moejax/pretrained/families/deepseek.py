"""DeepSeek-V3 (2024): latent attention, experts chosen by sigmoid scores within groups, a balancer's bias, a shared expert."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from moejax.pretrained.families.decoder import OURS, THEIRS, block_of, glu, glu_rows
from moejax.pretrained.families.sparse import SparseDecoder
from moejax.pretrained.family import Settings, families
from moejax.pretrained.table import TRANSPOSE, Change, Row
from moejax.routing.balancers import STATE


@families.register("deepseek_v3")
class DeepSeekV3(SparseDecoder):
    """See the module. Its positions must not be stretched (no YaRN), and there are no extra layers that predict later tokens."""

    model_type = "deepseek_v3"
    architecture = "DeepseekV3ForCausalLM"

    def mixer(self, said: Settings) -> dict[str, Any]:
        """Latent attention."""
        return {
            "kind": "latent_attention",
            "num_heads": said("num_attention_heads"),
            "rank": said("kv_lora_rank"),
            "head_dim": said("qk_nope_head_dim"),
            "rope_dim": said("qk_rope_head_dim"),
            "value_dim": said("v_head_dim"),
            "query_rank": said("q_lora_rank", None),
            "rope_base": said.rope_base(self.rope_base),
            "use_bias": bool(said("attention_bias", False)),
        }

    def model(self, said: Settings) -> dict[str, Any]:
        """See the base class."""
        said.only("rope_interleave", True)
        said.only("norm_topk_prob", True)
        return super().model(said)

    def mixer_settings(self, model: Mapping[str, Any], mixer: Mapping[str, Any]) -> dict[str, Any]:
        return {
            "num_attention_heads": mixer["num_heads"],
            "num_key_value_heads": mixer["num_heads"],
            "kv_lora_rank": mixer["rank"],
            "qk_nope_head_dim": mixer["head_dim"],
            "qk_rope_head_dim": mixer["rope_dim"],
            "v_head_dim": mixer["value_dim"],
            "q_lora_rank": mixer.get("query_rank"),
            "attention_bias": mixer.get("use_bias", False),
            "rope_interleave": True,
        }

    def mixer_rows(self, model: Mapping[str, Any]) -> tuple[Row, ...]:
        mixer = block_of(model)["mixer"]
        theirs, ours, turned = f"{THEIRS}.self_attn", f"{OURS}/mixer", mixer["rope_dim"]
        query = _halves(mixer["head_dim"], turned, mixer["num_heads"])
        key = _halves(mixer["rank"], turned, 1)
        rows = [
            Row(f"{theirs}.kv_a_proj_with_mqa.weight", f"{ours}/kv_down/kernel", key.then(TRANSPOSE)),
            Row(f"{theirs}.kv_a_layernorm.weight", f"{ours}/kv_norm"),
            Row(f"{theirs}.kv_b_proj.weight", f"{ours}/kv_up/kernel", TRANSPOSE),
            Row(f"{theirs}.o_proj.weight", f"{ours}/o/kernel", TRANSPOSE),
        ]
        biased = mixer.get("use_bias", False)
        if biased:
            rows += [Row(f"{theirs}.kv_a_proj_with_mqa.bias", f"{ours}/kv_down/bias", key)]
            rows += [Row(f"{theirs}.o_proj.bias", f"{ours}/o/bias")]
        if mixer.get("query_rank") is None:
            return (*rows, Row(f"{theirs}.q_proj.weight", f"{ours}/q/kernel", query.then(TRANSPOSE)))
        rows += [
            Row(f"{theirs}.q_a_proj.weight", f"{ours}/q_down/kernel", TRANSPOSE),
            Row(f"{theirs}.q_a_layernorm.weight", f"{ours}/q_norm"),
            Row(f"{theirs}.q_b_proj.weight", f"{ours}/q_up/kernel", query.then(TRANSPOSE)),
        ]
        return (*rows, *([Row(f"{theirs}.q_a_proj.bias", f"{ours}/q_down/bias")] if biased else []))

    def sparse_layers(self, said: Settings) -> list[bool]:
        return [i >= said("first_k_dense_replace", 0) for i in range(said("num_hidden_layers"))]

    def layer_settings(self, dense: list[int]) -> dict[str, Any]:
        return {"first_k_dense_replace": len(dense)}

    def moe(self, said: Settings) -> dict[str, Any]:
        select = {
            "kind": "top_k",
            "k": said("num_experts_per_tok"),
            "score": "sigmoid",
            "normalise": True,
            "scale": said("routed_scaling_factor", 1.0),
            "expert_groups": said("n_group", 1),
            "groups_kept": said("topk_group", None),
            "group_score": "best_two",
        }
        width = said("moe_intermediate_size")
        return {
            "kind": "moe",
            "num_experts": said("n_routed_experts"),
            "router": {"kind": "linear"},
            "select": select,
            "bank": {"kind": "glu", "hidden": width, "activation": said.activation()},
            "shared": {**glu(said, "moe_intermediate_size"), "hidden": width * said("n_shared_experts", 1)},
            "balancer": {"kind": "loss_free"},
        }

    def ffn_settings(self, model: Mapping[str, Any]) -> dict[str, Any]:
        moe = block_of(model, "moe")["ffn"]
        found, select = super().ffn_settings(model), moe["select"]
        del found["num_experts"], found["router_aux_loss_coef"]
        return {
            **found,
            "n_routed_experts": moe["num_experts"],
            "n_shared_experts": moe["shared"]["hidden"] // moe["bank"]["hidden"],
            "routed_scaling_factor": select.get("scale", 1.0),
            "n_group": select.get("expert_groups", 1),
            "topk_group": select.get("groups_kept") or select.get("expert_groups", 1),
        }

    def ffn_rows(self, model: Mapping[str, Any]) -> tuple[Row, ...]:
        shared = glu_rows(f"{THEIRS}.mlp.shared_experts", f"{OURS}/ffn/shared", ("moe",))
        bias = Row(f"{THEIRS}.mlp.gate.e_score_correction_bias", f"router_state/{OURS}/ffn/{STATE}", blocks=("moe",))
        return (*super().ffn_rows(model), *shared, bias)


def _halves(still: int, turned: int, heads: int) -> Change:
    """Of each head's rows, the last `turned` from neighbours in a rotary plane to the order of two halves, and back."""
    order = np.arange(still + turned)
    order[still:] = still + np.concatenate([np.arange(0, turned, 2), np.arange(1, turned, 2)])
    undone = np.argsort(order)

    def reordered(w: np.ndarray, by: np.ndarray) -> np.ndarray:
        return w.reshape(heads, still + turned, *w.shape[1:])[:, by].reshape(w.shape)

    return Change(lambda w: reordered(w, order), lambda w: reordered(w, undone))
