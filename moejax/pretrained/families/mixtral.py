"""Mixtral (Jiang et al. 2024)."""

from collections.abc import Mapping
from typing import Any

from moejax.pretrained.families.decoder import THEIRS, block_of
from moejax.pretrained.families.mistral import Mistral
from moejax.pretrained.families.sparse import balance, balance_settings, moe_rows
from moejax.pretrained.family import Settings, families, published
from moejax.pretrained.table import Row


@families.register("mixtral")
class Mixtral(Mistral):
    """Mistral's attention, and in every layer experts weighted by the softmax over the chosen ones."""

    model_type = "mixtral"
    architecture = "MixtralForCausalLM"
    rope_base = 1e6
    rms_norm_eps = 1e-5

    def ffns(self, said: Settings) -> tuple[tuple[str, ...], dict[str, Any]]:
        experts, k, jitter = said("num_local_experts"), said("num_experts_per_tok"), said("router_jitter_noise", 0.0)
        moe = {
            "kind": "moe",
            "num_experts": experts,
            "router": {"kind": "linear", "jitter": jitter},
            "select": {"kind": "top_k", "k": k, "score": "softmax_selected"},
            "bank": {"kind": "glu", "hidden": said("intermediate_size"), "activation": said.activation()},
            "losses": balance(said, k, 0.001),
        }
        return ("moe",), {"moe": moe}

    def ffn_settings(self, model: Mapping[str, Any]) -> dict[str, Any]:
        moe = block_of(model)["ffn"]
        return {
            "num_local_experts": moe["num_experts"],
            "num_experts_per_tok": moe["select"]["k"],
            "intermediate_size": moe["bank"]["hidden"],
            "hidden_act": published(moe["bank"].get("activation", "silu")),
            "router_jitter_noise": moe["router"].get("jitter", 0.0),
            **balance_settings(moe),
        }

    def ffn_rows(self, model: Mapping[str, Any]) -> tuple[Row, ...]:
        place = f"{THEIRS}.block_sparse_moe"
        return moe_rows(place, {"w1": "w_gate", "w3": "w_up", "w2": "w_out"})
