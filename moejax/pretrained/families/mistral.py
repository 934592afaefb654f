"""Mistral 7B (Jiang et al. 2023)."""

from collections.abc import Mapping
from typing import Any

from moejax.pretrained.families.decoder import Decoder
from moejax.pretrained.family import Settings, families


@families.register("mistral")
class Mistral(Decoder):
    """Llama with a window of attention."""

    model_type = "mistral"
    architecture = "MistralForCausalLM"

    def bias(self, said: Settings) -> Any:
        return False

    def window(self, said: Settings) -> int | None:
        return said("sliding_window", None)

    def mixer_settings(self, model: Mapping[str, Any], mixer: Mapping[str, Any]) -> dict[str, Any]:
        found = super().mixer_settings(model, mixer)
        del found["attention_bias"]
        return {**found, "sliding_window": mixer.get("window")}
