"""What decoders of Llama's kind share: pre-norm blocks of rotary attention and a gated layer, RMS norms, a head."""

from collections.abc import Mapping
from typing import Any, ClassVar

from moejax.pretrained.family import Family, Settings, published
from moejax.pretrained.table import ALONE_TRANSPOSE, TRANSPOSE, Row

THEIRS, OURS = "model.layers.{layer}", "stack/{layer}"


class Decoder(Family):
    """A decoder whose layers are all dense and alike. A family says what differs.

    Attributes:
      model_type: transformers' name of it.
      bias: of the projections of attention: False, True, or 'qkv'.
      qk_norm: as `Attention.qk_norm`.
      rope_base: where the config does not say one.
      rms_norm_eps: where the config does not say one.
    """

    model_type: ClassVar[str]
    qk_norm: ClassVar[str] = "none"
    rope_base: ClassVar[float] = 10_000.0
    rms_norm_eps: ClassVar[float] = 1e-6
    tied: ClassVar[bool] = False

    def model(self, said: Settings) -> dict[str, Any]:
        """See the base class."""
        pattern, ffns = self.ffns(said)
        return {
            "kind": "decoder_lm",
            "vocab_size": said("vocab_size"),
            "d_model": said("hidden_size"),
            "num_layers": said("num_hidden_layers"),
            "tied": said("tie_word_embeddings", self.tied),
            "max_length": said("max_position_embeddings", 2048),
            "embed_std": said("initializer_range", 0.02),
            "norm": self.norm(said),
            "pattern": pattern,
            "blocks": {
                name: {"kind": "transformer", "norm": self.norm(said), "mixer": self.mixer(said), "ffn": ffn}
                for name, ffn in ffns.items()
            },
        }

    def settings(self, model: Mapping[str, Any]) -> dict[str, Any]:
        """See the base class."""
        mixer = block_of(model)["mixer"]
        rope = mixer.get("rope_base", 10_000.0)
        return {
            "architectures": [self.architecture],
            "model_type": self.model_type,
            "vocab_size": model["vocab_size"],
            "hidden_size": model["d_model"],
            "num_hidden_layers": model["num_layers"],
            "tie_word_embeddings": model.get("tied", True),
            "max_position_embeddings": model.get("max_length", 2048),
            "initializer_range": model.get("embed_std", 0.02),
            "rms_norm_eps": block_of(model)["norm"].get("epsilon", 1e-6),
            "rope_theta": rope,
            "rope_parameters": {"rope_type": "default", "rope_theta": rope},
            "dtype": "float32",
            **self.mixer_settings(model, mixer),
            **self.ffn_settings(model),
        }

    def table(self, model: Mapping[str, Any]) -> tuple[Row, ...]:
        """See the base class."""
        head = () if model.get("tied", True) else (Row("lm_head.weight", "head", TRANSPOSE),)
        return (
            Row("model.embed_tokens.weight", "embedding"),
            Row("model.norm.weight", "final_norm/norm/scale"),
            Row(f"{THEIRS}.input_layernorm.weight", f"{OURS}/mixer_norm/norm/scale"),
            Row(f"{THEIRS}.post_attention_layernorm.weight", f"{OURS}/ffn_norm/norm/scale"),
            *self.mixer_rows(model),
            *self.ffn_rows(model),
            *head,
        )

    def copies(self, model: Mapping[str, Any]) -> dict[str, str]:
        """A tied head is in some files and not in others."""
        return {"lm_head.weight": "model.embed_tokens.weight"} if model.get("tied", True) else {}

    # What a family may replace.

    def norm(self, said: Settings) -> dict[str, Any]:
        """Every norm of the model."""
        return {"kind": "rms_norm", "epsilon": said("rms_norm_eps", self.rms_norm_eps)}

    def bias(self, said: Settings) -> Any:
        """Which projections of attention have one."""
        return bool(said("attention_bias", False))

    def window(self, said: Settings) -> int | None:
        """Positions that a token sees."""
        return None

    def mixer(self, said: Settings) -> dict[str, Any]:
        """The attention of every block."""
        heads = said("num_attention_heads")
        normed = {"qk_norm_epsilon": said("rms_norm_eps", self.rms_norm_eps)} if self.qk_norm != "none" else {}
        return {
            "kind": "attention",
            "num_heads": heads,
            "num_kv_heads": said("num_key_value_heads", heads),
            "head_dim": said("head_dim", said("hidden_size") // heads),
            "rope_base": said.rope_base(self.rope_base),
            "use_bias": self.bias(said),
            "window": self.window(said),
            "qk_norm": self.qk_norm,
            **normed,
        }

    def mixer_settings(self, model: Mapping[str, Any], mixer: Mapping[str, Any]) -> dict[str, Any]:
        """The keys that `mixer` reads."""
        heads = mixer["num_heads"]
        return {
            "num_attention_heads": heads,
            "num_key_value_heads": mixer.get("num_kv_heads") or heads,
            "head_dim": mixer.get("head_dim") or model["d_model"] // heads,
            "attention_bias": bool(mixer.get("use_bias", False)),
        }

    def mixer_rows(self, model: Mapping[str, Any]) -> tuple[Row, ...]:
        """The tensors of attention."""
        mixer = block_of(model)["mixer"]
        biased = {True: "qkvo", "qkv": "qkv"}.get(mixer.get("use_bias", False), "")
        rows = [Row(f"{THEIRS}.self_attn.{x}_proj.weight", f"{OURS}/mixer/{x}/kernel", TRANSPOSE) for x in "qkvo"]
        rows += [Row(f"{THEIRS}.self_attn.{x}_proj.bias", f"{OURS}/mixer/{x}/bias") for x in biased]
        if mixer.get("qk_norm", "none") != "none":
            rows += [Row(f"{THEIRS}.self_attn.{x}_norm.weight", f"{OURS}/mixer/{x}_norm") for x in "qk"]
        return tuple(rows)

    def ffns(self, said: Settings) -> tuple[tuple[str, ...], dict[str, Any]]:
        """The pattern, and the feed-forward layer of each block that it names."""
        return ("dense",), {"dense": glu(said)}

    def ffn_settings(self, model: Mapping[str, Any]) -> dict[str, Any]:
        """The keys that `ffns` reads."""
        ffn = block_of(model)["ffn"]
        return {"intermediate_size": ffn["hidden"], "hidden_act": published(ffn.get("activation", "silu"))}

    def ffn_rows(self, model: Mapping[str, Any]) -> tuple[Row, ...]:
        """The tensors of the feed-forward layers."""
        return glu_rows()


def block_of(model: Mapping[str, Any], name: str | None = None) -> Mapping[str, Any]:
    """A block of a `config.model`, or the first that its pattern names."""
    return model["blocks"][name or model["pattern"][0]]


def glu(said: Settings, hidden: str = "intermediate_size") -> dict[str, Any]:
    """A dense gated layer."""
    return {"kind": "glu", "hidden": said(hidden), "activation": said.activation()}


def glu_rows(theirs: str = f"{THEIRS}.mlp", ours: str = f"{OURS}/ffn/expert", blocks: tuple[str, ...] = ()) -> tuple[Row, ...]:
    """The tensors of a dense gated layer, which is a bank of one expert."""
    names = {"gate_proj": "w_gate", "up_proj": "w_up", "down_proj": "w_out"}
    return tuple(Row(f"{theirs}.{their}.weight", f"{ours}/{our}", ALONE_TRANSPOSE, blocks) for their, our in names.items())
