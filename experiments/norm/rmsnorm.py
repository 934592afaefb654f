"""RMSNorm (Zhang and Sennrich 2019): layer norm without its mean is as good; and so is the RMS of a sixteenth of the features.

Byte language models of six dense layers; the norms before the mixers, before the feed-forward layers and at the end are all replaced.
"""

from configs import small_lm
from experiments.departures import Departures
from experiments.study import PAPER_LM, SMOKE, Arm, Preset, Study, within

RMS, LN = {"kind": "rms_norm"}, {"kind": "layer_norm"}


def normed(spec: dict, **more) -> dict:
    """All norms of the model."""
    return {"model.norm": spec, "model.blocks.dense.norm": spec, **more}


def partial(fraction: float) -> dict:
    return normed({"kind": "partial_rms_norm", "fraction": fraction})


def base():
    """Six dense layers."""
    config = small_lm.get_config()
    config.model.num_layers, config.model.pattern = 6, ("dense",)
    config.model.norm, config.model.embed_std = dict(RMS), 0.02
    return config


STUDY = Study(
    slug="rmsnorm",
    title="RMSNorm: root mean square layer normalization",
    arxiv="1910.07467",
    implements=("moejax.RMSNorm", "moejax.PartialRMSNorm"),
    departures=Departures(
        scale="a language model instead of translation (RNNSearch and Transformer), reading comprehension, retrieval and "
        "CIFAR-10",
        method="eps is 1e-6 instead of 1e-8; the pRMSNorm of width 64 measures 4 features; gated feed-forward layers here, the "
        "Transformer's ReLU in the paper preset",
        left_out="speed, the other half of the headline (7 to 64 % less time, by framework): studies compare nothing that a clock "
        "measured",
        capacity="none",
        optimizer="AdamW with a cosine here, the Transformer's inverse square root in the paper preset",
        decay="0.1 in both presets; the paper's is not known to us",
        init="embeddings start at 0.02, and 50 times as large in 'start'",
    ),
    base=base(),
    arms=(
        Arm("layer_norm", normed(LN), note="mean subtracted, gain and bias"),
        Arm("layer_norm_no_bias", normed({**LN, "use_bias": False}), note="mean subtracted, gain alone"),
        Arm("rms_norm", note="gain alone, no mean"),
        Arm("prms_norm", partial(0.0625), note="RMS of the first 6.25 % of the features"),
    ),
    ablations={
        "share": (
            Arm("prms_norm_25", partial(0.25), note="RMS of the first quarter"),
            Arm("prms_norm_100", partial(1.0), note="RMS of all: rms_norm by other code"),
        ),
        # Only the first norm sees the embedding alone; the residual stream carries its scale through all the others.
        "start": (
            Arm("layer_norm_start_1", normed(LN, **{"model.embed_std": 1.0}), note="the embedding starts 50 times as large"),
            Arm("rms_norm_start_1", {"model.embed_std": 1.0}, note="the embedding starts 50 times as large"),
        ),
    },
    claims=(
        within(
            "eval/bits_per_byte",
            "rms_norm",
            "layer_norm",
            0.02,
            headline=True,
            text="RMSNorm is as good as layer norm",
            matched=("flops", "params"),
        ),
        within(
            "eval/bits_per_byte",
            "prms_norm",
            "rms_norm",
            0.02,
            text="6.25 % of the features are enough",
            matched=("flops", "params"),
        ),
        within(
            "eval/bits_per_byte",
            "rms_norm",
            "layer_norm_no_bias",
            0.02,
            text="subtracting the mean is not what helps",
            matched=("flops", "params"),
        ),
        within(
            "eval/bits_per_byte",
            "prms_norm_25",
            "rms_norm",
            0.02,
            text="a quarter of the features is enough",
            matched=("flops", "params"),
        ),
        within(
            "eval/bits_per_byte",
            "rms_norm_start_1",
            "layer_norm_start_1",
            0.02,
            text="it bears a large start as layer norm does",
            matched=("flops", "params"),
        ),
    ),
    presets={
        "smoke": SMOKE,
        "cpu": Preset(),
        # Of the size of the paper's Transformer, as a decoder with as many layers as its encoder and decoder have together.
        "paper": Preset(
            {
                **PAPER_LM,
                "model.d_model": 1024,
                "model.num_layers": 12,
                **{f"model.blocks.dense.mixer.{key}": 16 for key in ("num_heads", "num_kv_heads")},
                "model.blocks.dense.ffn": {"kind": "ffn", "hidden": 4096, "activation": "relu"},
                "data.seq_len": 1024,
                "data.batch_size": 128,
                "train.steps": 300_000,
                "optimizer.learning_rate": 5e-4,
                "optimizer.schedule": "rsqrt",
                "optimizer.warmup_steps": 4_000,
            }
        ),
    },
    metrics=("eval/loss",),
    notes="The paper finds pRMSNorm's own gain in speed inconsistent: a slice costs what it saves.",
)
