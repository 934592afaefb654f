"""BERT, MiniLM and kin, without the heads of their training."""

from collections.abc import Mapping
from typing import Any

from moejax.pretrained.families.decoder import block_of
from moejax.pretrained.family import Family, Settings, families, published
from moejax.pretrained.table import ALONE, ALONE_TRANSPOSE, TRANSPOSE, Row

LAYER = "encoder.layer.{layer}"


@families.register("bert")
class Bert(Family):
    """Post-norm blocks with learned positions (Devlin et al. 2019); also what sentence encoders are made of."""

    architecture = "BertModel"
    ignored = ("embeddings.position_ids",)

    def model(self, said: Settings) -> dict[str, Any]:
        """See the base class."""
        said.only("position_embedding_type", "absolute")
        said.only("is_decoder", False)
        made = block(said, "post_norm")
        return {
            "kind": "encoder",
            "vocab_size": said("vocab_size"),
            "d_model": said("hidden_size"),
            "num_layers": said("num_hidden_layers"),
            "max_length": said("max_position_embeddings", 512),
            "token_types": said("type_vocab_size", 2),
            "pooler": True,
            "embed_std": said("initializer_range", 0.02),
            "norm": made["norm"],
            "pattern": ("dense",),
            "blocks": {"dense": made},
        }

    def settings(self, model: Mapping[str, Any]) -> dict[str, Any]:
        """See the base class."""
        return {
            "architectures": [self.architecture],
            "model_type": "bert",
            "vocab_size": model["vocab_size"],
            "max_position_embeddings": model.get("max_length", 512),
            "type_vocab_size": model.get("token_types", 2),
            "initializer_range": model.get("embed_std", 0.02),
            **block_settings(model),
            "dtype": "float32",
        }

    def table(self, model: Mapping[str, Any]) -> tuple[Row, ...]:
        """See the base class."""
        ours, attention = "stack/{layer}", f"{LAYER}.attention"
        projections = {"self.query": "q", "self.key": "k", "self.value": "v", "output.dense": "o"}
        return (
            Row("embeddings.word_embeddings.weight", "embedding"),
            Row("embeddings.position_embeddings.weight", "position"),
            Row("embeddings.token_type_embeddings.weight", "token_type"),
            *norm_rows("embeddings.LayerNorm", "embedding_norm"),
            *(row for their, our in projections.items() for row in linear_rows(f"{attention}.{their}", f"{ours}/mixer/{our}")),
            *norm_rows(f"{attention}.output.LayerNorm", f"{ours}/mixer_norm"),
            *ffn_rows(f"{LAYER}.intermediate.dense", f"{LAYER}.output.dense", f"{ours}/ffn/expert"),
            *norm_rows(f"{LAYER}.output.LayerNorm", f"{ours}/ffn_norm"),
            *linear_rows("pooler.dense", "pooler"),
        )

    def key(self, name: str) -> str:
        """Models saved with a head say 'bert.' first; very old ones call a norm's arrays gamma and beta."""
        name = name.removeprefix("bert.")
        return name.replace("LayerNorm.gamma", "LayerNorm.weight").replace("LayerNorm.beta", "LayerNorm.bias")


def block(said: Settings, kind: str) -> dict[str, Any]:
    """A block with biases everywhere and layer norms, without rotary positions; `block_settings` is the way back."""
    attention = {"kind": "attention", "num_heads": said("num_attention_heads"), "rope_base": None, "use_bias": True}
    ffn = {"kind": "ffn", "hidden": said("intermediate_size"), "activation": said.activation(default="gelu"), "use_bias": True}
    return {
        "kind": kind,
        "norm": {"kind": "layer_norm", "epsilon": said("layer_norm_eps", 1e-12)},
        "mixer": attention,
        "ffn": ffn,
    }


def block_settings(model: Mapping[str, Any]) -> dict[str, Any]:
    """The keys of a stack of such blocks."""
    made = block_of(model)
    return {
        "hidden_size": model["d_model"],
        "num_hidden_layers": model["num_layers"],
        "num_attention_heads": made["mixer"]["num_heads"],
        "intermediate_size": made["ffn"]["hidden"],
        "hidden_act": published(made["ffn"].get("activation", "gelu")),
        "layer_norm_eps": made["norm"].get("epsilon", 1e-6),
    }


def norm_rows(theirs: str, ours: str) -> tuple[Row, ...]:
    """A layer norm."""
    return Row(f"{theirs}.weight", f"{ours}/norm/scale"), Row(f"{theirs}.bias", f"{ours}/norm/bias")


def linear_rows(theirs: str, ours: str) -> tuple[Row, ...]:
    """A linear map with a bias."""
    return Row(f"{theirs}.weight", f"{ours}/kernel", TRANSPOSE), Row(f"{theirs}.bias", f"{ours}/bias")


def ffn_rows(inner: str, outer: str, ours: str) -> tuple[Row, ...]:
    """A feed-forward layer of two matrices with biases, which is a bank of one expert."""
    return (
        Row(f"{inner}.weight", f"{ours}/w_in", ALONE_TRANSPOSE),
        Row(f"{inner}.bias", f"{ours}/b_in", ALONE),
        Row(f"{outer}.weight", f"{ours}/w_out", ALONE_TRANSPOSE),
        Row(f"{outer}.bias", f"{ours}/b_out", ALONE),
    )
