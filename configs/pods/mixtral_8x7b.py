"""Mixtral 8x7B (Jiang et al. 2024): 32 layers of width 4096, 8 experts of 14336, two per token, dropless. 46.7 billion parameters.

    python -m experiments.run --config=configs/pods/mixtral_8x7b.py --compile_for=v5e:16x16
    python -m experiments.run --config=configs/pods/mixtral_8x7b.py --compile_for=v5e:16x16 --config.mesh='fsdp x ep=8'

Every chip stores an equal share of all parameters and gathers a layer when it comes to it (fsdp); a chip of 256 has one sequence.
The published model's training data, schedule and balance coefficient are not known; these are usual ones. `data.tokenizer` is a
file that you provide.
"""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    """The config; every section can be overridden by dotted keys."""
    return ConfigDict(
        dict(
            mesh="fsdp",
            model=dict(
                kind="decoder_lm",
                vocab_size=32000,
                d_model=4096,
                num_layers=32,
                tied=False,
                scan=True,
                remat="full",
                dtype="bfloat16",
                pattern=("moe",),
                blocks=dict(
                    moe=dict(
                        kind="transformer",
                        norm=dict(kind="rms_norm"),
                        mixer=dict(kind="attention", num_heads=32, num_kv_heads=8, rope_base=1e6),
                        ffn=dict(
                            kind="moe",
                            num_experts=8,
                            router=dict(kind="linear"),
                            select=dict(kind="top_k", k=2, score="softmax_selected"),
                            bank=dict(kind="glu", hidden=14336),
                            losses=dict(balance=dict(coef=0.02)),
                        ),
                    ),
                ),
            ),
            data=dict(name="c4", batch_size=256, seq_len=2048, tokenizer="tokenizer.json"),
            task=dict(kind="next_token"),
            optimizer=dict(
                kind="adamw",
                learning_rate=3e-4,
                warmup_steps=2000,
                schedule="cosine",
                final_fraction=0.1,
                weight_decay=0.1,
                b1=0.9,
                b2=0.95,
                clip_norm=1.0,
            ),
            train=dict(steps=500_000, accumulation=1, log_every=100),
            eval=dict(every=5_000, batches=16, split="validation"),
            checkpoint=dict(every=1_000, keep=2, asynchronous=True),
        )
    )
