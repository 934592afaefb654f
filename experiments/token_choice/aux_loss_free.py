"""Auxiliary-loss-free balancing (Wang et al. 2024, DeepSeek-V3): a bias on the selection takes the place of the balance loss.

Byte language models, 16 experts in every other feed-forward layer, two per token, normalised sigmoid gates, dropless. All
arms but `softmax` differ in nothing but what balances them. `max_violation` is (largest load - mean) / mean of a batch.
"""

from configs import small_lm
from experiments.departures import Departures
from experiments.study import PAPER_LM, SMOKE, Arm, Preset, Study, lower

MOE = "model.blocks.moe.ffn"


def base():
    """The small language model with 16 experts; loss-free balancing at speed 1e-2."""
    config = small_lm.get_config()
    ffn = config.model.blocks.moe.ffn
    ffn.num_experts = 16
    ffn.bank.hidden = 64
    ffn.select = {"kind": "top_k", "k": 2, "score": "sigmoid", "normalise": True}
    ffn.losses = {}
    ffn.balancer = {"kind": "loss_free", "speed": 1e-2, "rule": "sign"}
    return config


def loss(coef: float) -> dict:
    """A balance loss instead of the bias, on the whole batch as the bias is."""
    return {f"{MOE}.balancer": None, f"{MOE}.losses.balance": {"coef": coef, "over": "batch"}}


def speed(value: float) -> dict:
    return {f"{MOE}.balancer.speed": value}


STUDY = Study(
    slug="aux_loss_free",
    title="Auxiliary-loss-free load balancing",
    arxiv="2408.15664",
    implements=("moejax.LossFree", "moejax.TopK", "moejax.MoE"),
    departures=Departures(
        scale="bytes and one epoch instead of 100 billion tokens; every other layer a mixture, 16 experts instead of 64",
        method="the bias moves 10 times as fast, as there are so few steps; two experts a token and no shared ones, where the "
        "paper has six and two",
        left_out="the 3B model, the measure of the leak of expert choice, and DeepSeek-V3's small loss within each sequence",
        capacity="none",
        optimizer="rates and warm-up of the paper preset are ours, and a cosine throughout",
        decay="0.1, as in DeepSeekMoE; the paper's is not known to us",
        init="the library's; the paper's is not known to us",
    ),
    base=base(),
    arms=(
        Arm("none", {f"{MOE}.balancer": None}, note="nothing balances"),
        Arm("loss_free", note="bias on the selection, sign rule, speed 1e-2"),
        Arm("aux_1e-3", loss(1e-3), note="balance loss, the paper's baseline coefficient"),
        Arm("aux_1e-2", loss(1e-2), note="balance loss, 10 times that"),
    ),
    ablations={
        "speed": tuple(Arm(f"speed_{s:g}", speed(s)) for s in (1e-4, 1e-3, 1e-1)),
        "rule": (
            Arm("proportional", {f"{MOE}.balancer.rule": "proportional"}, note="b += speed * lack, as a share of the mean"),
            Arm("multiplied", {f"{MOE}.select.apply_bias": "multiply"}, note="ranked by s (1 + b)"),
        ),
        "gate": (
            Arm("softmax", {f"{MOE}.select.score": "softmax"}, note="normalised softmax scores, same bias"),
            Arm(
                "softmax_loss",
                {**loss(1e-2), f"{MOE}.select.score": "softmax"},
                note="normalised softmax scores and a balance loss: the usual mixture",
            ),
        ),
    },
    claims=(
        lower(
            "eval/stats/max_violation",
            "loss_free",
            "aux_1e-3",
            headline=True,
            text="the bias balances better than a balance loss of the usual weight",
            matched=("flops", "params"),
        ),
        lower(
            "eval/bits_per_byte",
            "loss_free",
            "aux_1e-2",
            text="and does not cost what a stronger loss costs",
            matched=("flops", "params"),
        ),
        lower(
            "eval/stats/max_violation",
            "loss_free",
            "none",
            text="without it the load is not balanced",
            matched=("flops", "params"),
        ),
        lower(
            "eval/bits_per_byte",
            "loss_free",
            "proportional",
            text="the sign rule is better than the proportional one",
            matched=("flops", "params"),
        ),
        lower(
            "eval/bits_per_byte",
            "loss_free",
            "multiplied",
            text="an added bias is better than a multiplied one",
            matched=("flops", "params"),
        ),
        lower(
            "eval/bits_per_byte",
            "loss_free",
            "aux_1e-3",
            text="better perplexity than the loss (9.50 against 9.56 at 1B)",
            matched=("flops", "params"),
        ),
        lower(
            "eval/stats/max_violation",
            "loss_free",
            "speed_0.1",
            text="too fast an update never settles",
            matched=("flops", "params"),
        ),
        lower(
            "eval/bits_per_byte",
            "loss_free",
            "softmax",
            text="sigmoid gates are better than softmax ones",
            matched=("flops", "params"),
        ),
    ),
    presets={
        "smoke": SMOKE,
        "cpu": Preset(),
        "paper": Preset(
            {
                **PAPER_LM,
                "model.d_model": 1280,
                "model.num_layers": 10,
                "model.pattern": ("moe",),
                **{f"model.blocks.{b}.mixer.{key}": 10 for b in ("dense", "moe") for key in ("num_heads", "num_kv_heads")},
                f"{MOE}.num_experts": 64,
                f"{MOE}.select.k": 6,
                f"{MOE}.bank.hidden": 896,
                f"{MOE}.shared": {"kind": "glu", "hidden": 1792},
                f"{MOE}.balancer.speed": 1e-3,
                "data.seq_len": 2048,
                "data.batch_size": 1152,
                "train.steps": 42_000,
                "optimizer.learning_rate": 1e-3,
                "optimizer.warmup_steps": 2_000,
            }
        ),
    },
    metrics=("eval/stats/entropy",),
)
