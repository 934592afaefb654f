"""The vision transformer, as an image classifier."""

from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from moejax.core.errors import ConfigError
from moejax.pretrained.families.bert import block, block_settings, ffn_rows, linear_rows, norm_rows
from moejax.pretrained.family import Family, Settings, families
from moejax.pretrained.table import Change, Row

LAYER = "vit.encoder.layer.{layer}"


@families.register("vit")
class ViTFamily(Family):
    """Pre-norm blocks on patches, a class token and a linear head (Dosovitskiy et al. 2021).

    Ours gives the class token no position: what theirs adds there is part of our class token, and written back as 0.
    """

    architecture = "ViTForImageClassification"

    def model(self, said: Settings) -> dict[str, Any]:
        """See the base class."""
        if not isinstance(said("image_size"), int) or not isinstance(said("patch_size"), int):
            raise ConfigError(f"{said.place} has image_size={said('image_size')!r}; images and patches must be square")
        said.only("qkv_bias", True)
        made = block(said, "transformer")
        return {
            "kind": "vit",
            "image_size": said("image_size"),
            "channels": said("num_channels", 3),
            "patch_size": said("patch_size"),
            "num_classes": len(said("id2label", {})) or said("num_labels", 2),
            "d_model": said("hidden_size"),
            "num_layers": said("num_hidden_layers"),
            "positions": "learned",
            "pooling": "cls",
            "norm": made["norm"],
            "pattern": ("dense",),
            "blocks": {"dense": made},
        }

    def settings(self, model: Mapping[str, Any]) -> dict[str, Any]:
        """See the base class."""
        classes = model["num_classes"]
        return {
            "architectures": [self.architecture],
            "model_type": "vit",
            "image_size": model["image_size"],
            "num_channels": model["channels"],
            "patch_size": model["patch_size"],
            "id2label": {str(i): f"LABEL_{i}" for i in range(classes)},
            "label2id": {f"LABEL_{i}": i for i in range(classes)},
            **block_settings(model),
            "qkv_bias": True,
            "dtype": "float32",
        }

    def table(self, model: Mapping[str, Any]) -> tuple[Row, ...]:
        """See the base class."""
        ours, attention, embeddings = "stack/{layer}", f"{LAYER}.attention", "vit.embeddings"
        projections = {"attention.query": "q", "attention.key": "k", "attention.value": "v", "output.dense": "o"}
        patch = f"{embeddings}.patch_embeddings.projection"
        return (
            Row((f"{embeddings}.cls_token", f"{embeddings}.position_embeddings"), ("cls", "position"), _CLS),
            Row(f"{patch}.weight", "patch/kernel", _convolution(model["patch_size"], model["channels"])),
            Row(f"{patch}.bias", "patch/bias"),
            *norm_rows(f"{LAYER}.layernorm_before", f"{ours}/mixer_norm"),
            *(row for their, our in projections.items() for row in linear_rows(f"{attention}.{their}", f"{ours}/mixer/{our}")),
            *norm_rows(f"{LAYER}.layernorm_after", f"{ours}/ffn_norm"),
            *ffn_rows(f"{LAYER}.intermediate.dense", f"{LAYER}.output.dense", f"{ours}/ffn/expert"),
            *norm_rows("vit.layernorm", "final_norm"),
            *linear_rows("classifier", "head"),
        )

    def example(self, model: nn.Module) -> tuple[Array, ...]:
        """An image."""
        return (jnp.zeros((1, model.image_size, model.image_size, model.channels)),)


def _cls_there(cls: np.ndarray, positions: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    return cls[0, 0] + positions[0, 0], positions[0, 1:]


def _cls_back(cls: np.ndarray, positions: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    return cls[None, None], np.concatenate([np.zeros_like(cls)[None], positions])[None]


_CLS = Change(_cls_there, _cls_back)


def _convolution(size: int, channels: int) -> Change:
    """A convolution `[d, channel, row, column]` whose stride is its size is a matrix of flattened patches `[row column channel, d]`."""
    return Change(
        lambda w: w.transpose(2, 3, 1, 0).reshape(-1, w.shape[0]),
        lambda w: w.reshape(size, size, channels, -1).transpose(3, 2, 0, 1),
    )
