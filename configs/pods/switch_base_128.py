"""Switch-Base with 128 experts (Fedus et al. 2021): width 768, every other feed-forward layer a mixture, one expert per token.

    python -m experiments.run --config=configs/pods/switch_base_128.py --compile_for=v5e:16x16

One expert a chip on 128 chips; on 256 there are two copies of everything. The paper's network is an encoder-decoder of 12 and 12
layers trained by Adafactor, this one a decoder of 24 layers trained by AdamW. `data.tokenizer` is a file that you provide.
"""

from typing import Any

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    """The config; every section can be overridden by dotted keys."""
    return ConfigDict(
        dict(
            mesh="dp x ep=128",
            model=dict(
                kind="decoder_lm",
                vocab_size=32_128,
                d_model=768,
                num_layers=24,
                tied=True,
                scan=True,
                remat="full",
                dtype="bfloat16",
                pattern=("dense", "moe"),
                blocks=dict(
                    dense=_block(dict(kind="ffn", hidden=3072, activation="relu")),
                    moe=_block(
                        dict(
                            kind="moe",
                            num_experts=128,
                            router=dict(kind="linear", init_w=dict(kind="fan_in", scale=0.1), jitter=0.01),
                            select=dict(kind="top_k", k=1, capacity_factor=1.25, eval_capacity_factor=2.0),
                            bank=dict(kind="ffn", hidden=3072, activation="relu"),
                            losses=dict(balance=dict(coef=0.01)),
                        ),
                    ),
                ),
            ),
            data=dict(name="c4", batch_size=2048, seq_len=512, tokenizer="tokenizer.json"),
            task=dict(kind="next_token"),
            optimizer=dict(
                kind="adamw",
                learning_rate=1e-2,
                warmup_steps=10_000,
                schedule="rsqrt",
                weight_decay=0.0,
                b1=0.9,
                b2=0.95,
                clip_norm=1.0,
            ),
            train=dict(steps=500_000, accumulation=1, log_every=100),
            eval=dict(every=5_000, batches=16, split="validation"),
            checkpoint=dict(every=1_000, keep=2, asynchronous=True),
        )
    )


def _block(ffn: dict[str, Any]) -> dict[str, Any]:
    """A block around `ffn`, with parts of its own: a ConfigDict would keep two uses of one dict as one."""
    return dict(kind="transformer", norm=dict(kind="rms_norm"), mixer=dict(kind="attention", num_heads=12), ffn=ffn)
