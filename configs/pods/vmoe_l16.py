"""V-MoE-L/16 (Riquelme et al. 2021): a ViT-L/16 with 32 experts in every other feed-forward layer, two per patch.

    python -m experiments.run --config=configs/pods/vmoe_l16.py --compile_for=v5e:16x16

One expert a chip along 32 chips, and as many copies as that leaves room for. The paper trains on JFT-300M, which is not public;
this trains on ImageNet.
"""

from typing import Any

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    """The config; every section can be overridden by dotted keys."""
    return ConfigDict(
        dict(
            mesh="dp x ep=32",
            model=dict(
                kind="vit",
                image_size=224,
                channels=3,
                patch_size=16,
                num_classes=1000,
                d_model=1024,
                num_layers=24,
                positions="learned",
                pooling="cls",
                scan=True,
                remat="full",
                dtype="bfloat16",
                pattern=("dense", "moe"),
                blocks=dict(
                    dense=_block(dict(kind="ffn", hidden=4096)),
                    moe=_block(
                        dict(
                            kind="moe",
                            num_experts=32,
                            router=dict(kind="linear", noise_std=1 / 32),
                            select=dict(kind="top_k", k=2, capacity_factor=1.05, priority="choice"),
                            bank=dict(kind="ffn", hidden=4096),
                            losses=dict(importance=dict(coef=0.005)),
                        ),
                    ),
                ),
            ),
            data=dict(name="imagenet2012", batch_size=4096, image_size=224, shift=16, flip=True),
            task=dict(kind="classify"),
            optimizer=dict(
                kind="adamw",
                learning_rate=4e-4,
                warmup_steps=10_000,
                schedule="linear",
                final_fraction=0.0,
                weight_decay=0.1,
                b1=0.9,
                b2=0.999,
                clip_norm=1.0,
            ),
            train=dict(steps=90_000, accumulation=1, log_every=100),
            eval=dict(every=5_000, batches=0, split="validation"),
            checkpoint=dict(every=1_000, keep=2, asynchronous=True),
        )
    )


def _block(ffn: dict[str, Any]) -> dict[str, Any]:
    """A block around `ffn`, with parts of its own: a ConfigDict would keep two uses of one dict as one."""
    return dict(kind="transformer", norm=dict(kind="layer_norm"), mixer=dict(kind="attention", num_heads=16), ffn=ffn)
