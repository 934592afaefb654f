"""The small byte language model that the studies of single methods start from: two minutes a run on one core.

    python -m experiments.run --config=configs/small_lm.py

`base_lm` at width 64 with sequences of 64 bytes, every other feed-forward layer a dropless mixture of 8 experts, two per token.
"""

from ml_collections import ConfigDict

from configs import base_lm


def get_config() -> ConfigDict:
    """The config; a study replaces what its method is about."""
    config = base_lm.get_config()
    config.model.d_model = 64
    for block in config.model.blocks.values():
        block.mixer.num_heads, block.mixer.num_kv_heads = 4, 2
    config.model.blocks.dense.ffn.hidden = 128
    ffn = config.model.blocks.moe.ffn
    ffn.bank.hidden = 64
    ffn.select = {"kind": "top_k", "k": 2, "normalise": True}
    ffn.losses = {"balance": {"coef": 1e-2, "over": "batch"}}
    config.data.seq_len = 64
    # One epoch of the embedded text, and all of what is held out: a dense model ends at 2.13 bits a byte, where trigrams have 2.84.
    # Rate and warm-up by trying: 2e-3 ends at 2.17, 8e-3 at 2.14; 1,500 steps of twice the batch at 2.14.
    config.optimizer.learning_rate, config.optimizer.warmup_steps = 4e-3, 100
    config.train = {"steps": 3000, "accumulation": 1, "log_every": 100}
    config.eval = {"every": 0, "batches": 0, "split": "validation"}
    config.checkpoint = {"every": 0, "keep": 1, "asynchronous": True}
    return config
