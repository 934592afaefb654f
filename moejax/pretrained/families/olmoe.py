"""OLMoE (Muennighoff et al. 2024)."""

from collections.abc import Mapping
from typing import Any

from moejax.pretrained.families.sparse import SparseDecoder
from moejax.pretrained.family import Settings, families


@families.register("olmoe")
class OLMoE(SparseDecoder):
    """Queries and keys are normalised over the whole projection, and experts weighted by the softmax over all of them."""

    model_type = "olmoe"
    architecture = "OlmoeForCausalLM"
    qk_norm = "projection"
    rms_norm_eps = 1e-5
    hidden = "intermediate_size"
    aux_coef = 0.01

    def model(self, said: Settings) -> dict[str, Any]:
        said.only("clip_qkv", None)
        return super().model(said)

    def mixer_settings(self, model: Mapping[str, Any], mixer: Mapping[str, Any]) -> dict[str, Any]:
        found = super().mixer_settings(model, mixer)
        del found["head_dim"]
        return found

    def layer_settings(self, dense: list[int]) -> dict[str, Any]:
        return {}
