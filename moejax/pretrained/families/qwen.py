"""Qwen 2 and 3, dense and with experts."""

from collections.abc import Mapping
from typing import Any

from moejax.pretrained.families.decoder import OURS, THEIRS, Decoder, block_of, glu, glu_rows
from moejax.pretrained.families.sparse import SparseDecoder
from moejax.pretrained.family import Settings, families
from moejax.pretrained.table import ALONE_TRANSPOSE, Row


class _Qwen(Decoder):
    """No layer of a window: what the config says of one counts only where it turns them on."""

    def window(self, said: Settings) -> int | None:
        said.only("use_sliding_window", False)
        return None


class _Qwen2(_Qwen):
    """Biases on queries, keys and values, always."""

    def bias(self, said: Settings) -> Any:
        said.only("qkv_bias", True)
        return "qkv"

    def mixer_settings(self, model: Mapping[str, Any], mixer: Mapping[str, Any]) -> dict[str, Any]:
        found = super().mixer_settings(model, mixer)
        del found["attention_bias"], found["head_dim"]
        return found


@families.register("qwen2")
class Qwen2(_Qwen2):
    """Llama with biases (Yang et al. 2024)."""

    model_type = "qwen2"
    architecture = "Qwen2ForCausalLM"


@families.register("qwen3")
class Qwen3(_Qwen):
    """Llama with queries and keys normalised head by head (Yang et al. 2025)."""

    model_type = "qwen3"
    architecture = "Qwen3ForCausalLM"
    qk_norm = "head"


@families.register("qwen3_moe")
class Qwen3MoE(_Qwen, SparseDecoder):
    """Qwen3 with routed experts."""

    model_type = "qwen3_moe"
    architecture = "Qwen3MoeForCausalLM"
    qk_norm = "head"


@families.register("qwen2_moe")
class Qwen2MoE(_Qwen2, SparseDecoder):
    """Qwen2 with routed experts, and a shared one behind a sigmoid gate."""

    model_type = "qwen2_moe"
    architecture = "Qwen2MoeForCausalLM"

    def moe(self, said: Settings) -> dict[str, Any]:
        shared = {"kind": "sigmoid_gate", "bank": glu(said, "shared_expert_intermediate_size")}
        return {**super().moe(said), "shared": shared}

    def ffn_settings(self, model: Mapping[str, Any]) -> dict[str, Any]:
        hidden = block_of(model, "moe")["ffn"]["shared"]["bank"]["hidden"]
        return {**super().ffn_settings(model), "shared_expert_intermediate_size": hidden}

    def ffn_rows(self, model: Mapping[str, Any]) -> tuple[Row, ...]:
        theirs, ours = f"{THEIRS}.mlp.shared_expert", f"{OURS}/ffn/shared"
        gate = Row(f"{theirs}_gate.weight", f"{ours}/gate", ALONE_TRANSPOSE, ("moe",))
        return (*super().ffn_rows(model), *glu_rows(theirs, f"{ours}/bank", ("moe",)), gate)
