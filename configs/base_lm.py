"""Byte language model on the embedded text: the base of the language studies.

    python -m experiments.run --config=configs/base_lm.py
    python -m experiments.run --config=configs/base_lm.py --config.train.steps=50 --config.model.blocks.moe.ffn.select.k=2

Four pre-norm blocks of width 128, every other feed-forward layer a mixture of 8 experts with top-1 routing (Switch, Fedus et
al. 2021: capacity factor 1.25, balance coefficient 0.01, z-loss 1e-3 as in ST-MoE). A token computes what it would compute
in the dense model of the same width: `--config.model.pattern=dense,dense`. Minutes on a laptop's CPU.
"""

from typing import Any

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    """The config; every section can be overridden by dotted keys."""
    hidden = 256
    return ConfigDict(
        dict(
            model=dict(
                kind="decoder_lm",
                vocab_size=256,
                d_model=128,
                num_layers=4,
                tied=True,
                scan=True,
                remat="none",
                dtype="float32",
                pattern=("dense", "moe"),
                blocks=dict(
                    dense=_block(dict(kind="glu", hidden=hidden)),
                    moe=_block(
                        dict(
                            kind="moe",
                            num_experts=8,
                            router=dict(kind="linear"),
                            select=dict(kind="top_k", k=1, capacity_factor=1.25),
                            bank=dict(kind="glu", hidden=hidden),
                            losses=dict(balance=dict(coef=0.01), z=dict(coef=1e-3)),
                        ),
                    ),
                ),
            ),
            data=dict(
                name="embedded_text",
                batch_size=16,
                seq_len=256,
                domains=("code", "reference", "literature"),
                shuffle=True,
                packing=True,
                tokenizer="bytes",
            ),
            task=dict(kind="next_token"),
            optimizer=dict(
                kind="adamw",
                learning_rate=3e-3,
                warmup_steps=20,
                schedule="cosine",
                final_fraction=0.1,
                weight_decay=0.1,
                b1=0.9,
                b2=0.95,
                clip_norm=1.0,
            ),
            train=dict(steps=300, accumulation=1, log_every=20),
            eval=dict(every=100, batches=8, split="validation"),
            checkpoint=dict(every=100, keep=2, asynchronous=True),
        )
    )


def _block(ffn: dict[str, Any]) -> dict[str, Any]:
    """A block around `ffn`, with parts of its own: a ConfigDict would keep two uses of one dict as one."""
    return dict(
        kind="transformer",
        norm=dict(kind="rms_norm"),
        mixer=dict(kind="attention", num_heads=4, num_kv_heads=2),
        ffn=ffn,
    )
