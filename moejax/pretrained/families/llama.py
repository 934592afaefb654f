"""Llama 1 and 2, SmolLM and kin."""

from collections.abc import Callable, Collection, Mapping
from typing import Any

import numpy as np

from moejax.pretrained.families.decoder import THEIRS, Decoder
from moejax.pretrained.family import Settings, families


@families.register("llama")
class Llama(Decoder):
    """Grouped rotary attention and SwiGLU (Touvron et al. 2023)."""

    model_type = "llama"
    architecture = "LlamaForCausalLM"
    gguf = "llama"

    def model(self, said: Settings) -> dict[str, Any]:
        """See the base class."""
        said.only("mlp_bias", False)
        return super().model(said)

    def gguf_settings(self, meta: Mapping[str, Any], keys: Collection[str]) -> dict[str, Any]:
        """See the base class."""
        heads = meta["attention.head_count"]
        found = {
            "vocab_size": meta.get("vocab_size") or len(meta["tokenizer.ggml.tokens"]),
            "hidden_size": meta["embedding_length"],
            "intermediate_size": meta["feed_forward_length"],
            "num_hidden_layers": meta["block_count"],
            "num_attention_heads": heads,
            "num_key_value_heads": meta.get("attention.head_count_kv", heads),
            "head_dim": meta.get("attention.key_length"),
            "max_position_embeddings": meta["context_length"],
            # Stored as float32, meant as what was written.
            "rms_norm_eps": float(f"{meta['attention.layer_norm_rms_epsilon']:.6g}"),
            "rope_theta": float(meta.get("rope.freq_base", 10_000.0)),
            "tie_word_embeddings": "output.weight" not in keys,
            "hidden_act": "silu",
        }
        if meta.get("rope.scaling.type", "none") != "none":
            found["rope_scaling"] = {"rope_type": meta["rope.scaling.type"]}
        return {name: value for name, value in found.items() if value is not None}

    def gguf_names(self, settings: Mapping[str, Any]) -> dict[str, Any]:
        """See the base class."""
        heads = {"q": settings["num_attention_heads"], "k": settings["num_key_value_heads"]}
        return {
            "token_embd.weight": "model.embed_tokens.weight",
            "output_norm.weight": "model.norm.weight",
            "output.weight": "lm_head.weight",
            "blk.{layer}.attn_norm.weight": f"{THEIRS}.input_layernorm.weight",
            "blk.{layer}.ffn_norm.weight": f"{THEIRS}.post_attention_layernorm.weight",
            **{f"blk.{{layer}}.attn_{x}.weight": (f"{THEIRS}.self_attn.{x}_proj.weight", halves(heads[x])) for x in "qk"},
            "blk.{layer}.attn_v.weight": f"{THEIRS}.self_attn.v_proj.weight",
            "blk.{layer}.attn_output.weight": f"{THEIRS}.self_attn.o_proj.weight",
            **{f"blk.{{layer}}.ffn_{x}.weight": f"{THEIRS}.mlp.{x}_proj.weight" for x in ("gate", "up", "down")},
        }


def halves(heads: int) -> Callable[[np.ndarray], np.ndarray]:
    """From GGUF's order of a head's rows, in which those of a rotary plane are neighbours, to that of two halves."""
    return lambda w: w.reshape(heads, -1, 2, *w.shape[1:]).swapaxes(1, 2).reshape(w.shape)
