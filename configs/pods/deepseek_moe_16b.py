"""DeepSeekMoE 16B (Dai et al. 2024): 28 layers of width 2048, 64 narrow experts of 1408, six per token, and two shared ones.

    python -m experiments.run --config=configs/pods/deepseek_moe_16b.py --compile_for=v5e:16x16

Experts are split over one axis of the mesh and tokens travel to them, at most twice as many to a chip as on average; the other axis
splits the rest (fsdp). The paper's first layer is dense, here all layers are alike. `data.tokenizer` is a file that you provide.
"""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    """The config; every section can be overridden by dotted keys."""
    return ConfigDict(
        dict(
            mesh="fsdp x ep=8",
            exchange=dict(kind="auto", bound=2.0),
            model=dict(
                kind="decoder_lm",
                vocab_size=102_400,
                d_model=2048,
                num_layers=28,
                tied=False,
                scan=True,
                remat="full",
                dtype="bfloat16",
                pattern=("moe",),
                blocks=dict(
                    moe=dict(
                        kind="transformer",
                        norm=dict(kind="rms_norm"),
                        mixer=dict(kind="attention", num_heads=16),
                        ffn=dict(
                            kind="moe",
                            num_experts=64,
                            router=dict(kind="linear"),
                            select=dict(kind="top_k", k=6),
                            bank=dict(kind="glu", hidden=1408),
                            shared=dict(kind="glu", hidden=1408, num_experts=2),
                            losses=dict(balance=dict(coef=0.001)),
                        ),
                    ),
                ),
            ),
            data=dict(name="c4", batch_size=256, seq_len=4096, tokenizer="tokenizer.json"),
            task=dict(kind="next_token"),
            optimizer=dict(
                kind="adamw",
                learning_rate=4.2e-4,
                warmup_steps=2000,
                schedule="cosine",
                final_fraction=0.1,
                weight_decay=0.1,
                b1=0.9,
                b2=0.95,
                clip_norm=1.0,
            ),
            train=dict(steps=106_000, accumulation=1, log_every=100),
            eval=dict(every=5_000, batches=16, split="validation"),
            checkpoint=dict(every=1_000, keep=2, asynchronous=True),
        )
    )
