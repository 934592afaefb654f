"""Switch Transformers (Fedus et al. 2021): one expert per token, at the compute of the dense model.

Byte language models, 8 experts in every other feed-forward layer. Every arm but `top2` and those of more room computes per token what
`dense` computes. Steps are fixed, so `faster` reads off how many steps an arm saves.
"""

from configs import base_lm
from experiments.departures import Departures
from experiments.quantities import lowest
from experiments.study import PAPER_LM, SMOKE, Arm, Preset, Study, below, faster, lower, trend, within

MOE = "model.blocks.moe.ffn"
NO_BALANCE = {f"{MOE}.losses.balance.coef": 0.0}


def base():
    """Four layers of width 96; capacity factor 1 in training and 2 in evaluation, jitter 1e-2, as in the paper."""
    config = base_lm.get_config()
    config.model.d_model = 96
    for block in config.model.blocks.values():
        block.mixer.num_heads, block.mixer.num_kv_heads = 2, 1
    config.model.blocks.dense.ffn = {"kind": "ffn", "hidden": 384, "activation": "relu"}
    ffn = config.model.blocks.moe.ffn
    ffn.bank = {"kind": "ffn", "hidden": 384, "activation": "relu"}
    ffn.router = {"kind": "linear", "init_w": {"kind": "fan_in", "scale": 0.1}, "jitter": 0.01}
    ffn.select = {"kind": "top_k", "k": 1, "capacity_factor": 1.0, "eval_capacity_factor": 2.0}
    ffn.losses = {"balance": {"coef": 0.01}}
    config.data.seq_len = 128
    config.train = {"steps": 1500, "accumulation": 1, "log_every": 50}
    config.eval = {"every": 150, "batches": 0, "split": "validation"}
    config.checkpoint = {"every": 0, "keep": 1, "asynchronous": True}
    return config


def capacity(factor: float) -> dict:
    return {f"{MOE}.select.capacity_factor": factor}


STUDY = Study(
    slug="switch",
    title="Switch Transformers: one expert per token",
    arxiv="2101.03961",
    implements=("moejax.TopK", "moejax.Balance", "moejax.MoE"),
    full_size=7e9,
    departures=Departures(
        scale="bytes and a decoder instead of C4 and T5; 8 experts instead of 64 and more",
        method="none",
        left_out="expert dropout in fine-tuning, distillation, 101 languages, and models of up to 1.6 trillion parameters",
        capacity="tokens of one sequence compete, in their order, which is causal; in the paper those of a device",
        optimizer="AdamW instead of Adafactor; a cosine from 3e-3 here, the paper's inverse square root in the paper preset",
        decay="0.1; Adafactor has none",
        init="routers alone start with the scale 0.1; the paper scales all weights",
    ),
    base=base(),
    arms=(
        Arm("dense", {"model.pattern": ("dense", "dense")}, note="equal compute per token"),
        Arm("switch", note="8 experts, top-1, capacity factor 1, balance 0.01, init scale 0.1, jitter 0.01"),
        Arm("no_balance", NO_BALANCE, note="switch without its balance loss"),
        Arm(
            "top2",
            {f"{MOE}.select.k": 2, f"{MOE}.select.normalise": True},
            note="two experts per token at capacity factor 1.0: twice the expert compute",
        ),
    ),
    ablations={
        "capacity": (Arm("capacity_1.25", capacity(1.25)), Arm("capacity_2.0", capacity(2.0)), Arm("dropless", capacity(None))),
        "init": (Arm("init_1.0", {f"{MOE}.router.init_w.scale": 1.0}, note="the usual initialisation, 10 times larger"),),
        "alpha": tuple(Arm(f"alpha_{a:g}", {f"{MOE}.losses.balance.coef": a}) for a in (1e-1, 1e-3, 1e-4)),
        "exploration": (Arm("argmax", {f"{MOE}.router.jitter": 0.0}, note="no input jitter"),),
        "experts": tuple(Arm(f"experts_{e}", {f"{MOE}.num_experts": e}) for e in (2, 4, 16)),
        "precision": (Arm("bfloat16", {"model.dtype": "bfloat16"}, note="selective precision: only the router in float32"),),
    },
    claims=(
        lower(
            "eval/bits_per_byte",
            "switch",
            "dense",
            headline=True,
            text="Switch beats the dense model of equal compute",
            matched=("flops",),
        ),
        faster(
            "eval/bits_per_byte",
            "switch",
            "dense",
            by=1.3,
            text="Switch reaches the dense model's quality in 1.3 times fewer steps",
            matched=("flops",),
        ),
        lower(
            "eval/stats/max_violation",
            "switch",
            "no_balance",
            text="without the balance loss the load collapses",
            matched=("flops", "params"),
        ),
        below("eval/stats/drop_rate", "switch", 0.01, text="fewer than 1 % of the tokens are dropped"),
        lower("eval/bits_per_byte", "switch", "top2", text="Switch beats top-2 at low capacity, per step", matched=("params",)),
        faster(
            "eval/bits_per_byte",
            "switch",
            "dense",
            by=7.0,
            text="up to 7 times faster pre-training at equal FLOPs per token",
            needs="64 experts and 100,000 steps on C4",
            matched=("flops",),
        ),
        lower(
            "eval/bits_per_byte",
            "capacity_1.25",
            "switch",
            text="room beyond an even share is worth it (-1.553 against -1.561)",
            matched=("params",),
        ),
        within(
            "eval/bits_per_byte",
            "capacity_2.0",
            "capacity_1.25",
            0.02,
            text="but more of it is not (-1.554)",
            matched=("params",),
        ),
        lower(
            "eval/bits_per_byte",
            "switch",
            "init_1.0",
            text="a tenth of the usual scale at the start is better early on (-2.72 against -3.60)",
            matched=("flops", "params"),
        ),
        lower(
            "eval/bits_per_byte",
            "switch",
            lowest("alpha_0.1", "alpha_0.001", "alpha_0.0001"),
            text="of coefficients of the balance loss 0.01 is best",
            matched=("flops", "params"),
        ),
        lower(
            "eval/bits_per_byte",
            "switch",
            "argmax",
            text="jitter is better than no exploration",
            matched=("flops", "params"),
        ),
        trend(
            "eval/bits_per_byte",
            {2: "experts_2", 4: "experts_4", 8: "switch", 16: "experts_16"},
            high=0,
            log=True,
            text="more experts are better",
            matched=("flops",),
        ),
        within(
            "eval/bits_per_byte",
            "bfloat16",
            "switch",
            0.02,
            text="a router in float32 is all the precision that is needed (-1.716 against -1.718)",
            matched=("flops", "params"),
        ),
    ),
    presets={
        "smoke": SMOKE,
        "cpu": Preset(),
        "paper": Preset(
            {
                **PAPER_LM,
                "model.d_model": 768,
                "model.num_layers": 24,
                **{f"model.blocks.{b}.mixer.{key}": 12 for b in ("dense", "moe") for key in ("num_heads", "num_kv_heads")},
                "model.blocks.dense.ffn.hidden": 3072,
                f"{MOE}.bank.hidden": 3072,
                f"{MOE}.num_experts": 128,
                "data.seq_len": 512,
                "data.batch_size": 2048,
                "train.steps": 100_000,
                "optimizer.learning_rate": 1e-2,
                "optimizer.schedule": "rsqrt",
                "optimizer.warmup_steps": 10_000,
            }
        ),
    },
    metrics=("eval/stats/entropy",),
)
