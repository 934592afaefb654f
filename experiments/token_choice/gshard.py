"""GShard (Lepikhin et al. 2020): top-2 experts, of which training uses the second only with probability 2 g2.

Byte language models, 8 experts in every other feed-forward layer, capacity factor 1.0: room for exactly all choices under
perfect balance, so what is spared on weak second choices goes to others. `top2` always dispatches both; `switch` computes half as
much per token, `switch_wide` (ablation `compute`) as much as `top2`.

GShard serves all first choices of a group before any second one, so a token's second choice depends on later tokens. In a
decoder that leaks the future; here tokens compete across the batch, at one position each (`group_by='position'`).
"""

from configs import base_lm
from experiments.departures import Departures
from experiments.study import PAPER_LM, SMOKE, Arm, Preset, Study, lower, within

MOE = "model.blocks.moe.ffn"
TOP_2 = {"kind": "top_k", "k": 2, "normalise": True, "capacity_factor": 1.0, "priority": "choice"}


def base():
    """Four layers of width 96 and 32 sequences, so that 32 tokens compete; the balance loss counts first choices, as in the paper."""
    config = base_lm.get_config()
    config.model.d_model = 96
    for block in config.model.blocks.values():
        block.mixer.num_heads, block.mixer.num_kv_heads = 2, 1
    config.model.blocks.dense.ffn = {"kind": "ffn", "hidden": 384, "activation": "relu"}
    ffn = config.model.blocks.moe.ffn
    ffn.bank = {"kind": "ffn", "hidden": 384, "activation": "relu"}
    ffn.select = {"kind": "gshard", "capacity_factor": 1.0}
    ffn.losses = {"balance": {"coef": 0.01, "count": "first"}}
    ffn.group_by = "position"
    config.data.batch_size, config.data.seq_len = 32, 64
    config.train = {"steps": 1500, "accumulation": 1, "log_every": 50}
    config.eval = {"every": 150, "batches": 0, "split": "validation"}
    config.checkpoint = {"every": 0, "keep": 1, "asynchronous": True}
    return config


SWITCH = {f"{MOE}.select": {"kind": "top_k", "k": 1, "capacity_factor": 1.0}}

STUDY = Study(
    slug="gshard",
    title="GShard: top-2 with a random second expert",
    arxiv="2006.16668",
    implements=("moejax.GShard", "moejax.Balance", "moejax.MoE"),
    departures=Departures(
        scale="bytes and a decoder instead of translation into English and an encoder-decoder; 8 experts instead of 128 and "
        "more",
        method="none",
        left_out="the main result (600 billion parameters, +13.5 BLEU over 100 languages) is one of scale; no arm stands for it",
        capacity="tokens compete across the batch, at one position each: GShard serves all first choices of a group before any "
        "second one, which within a sequence leaks its future. A factor of 1 is the paper's 2 S / E",
        optimizer="AdamW instead of Adafactor; a cosine here; steps of the paper preset are ours: the paper trains by time (4 days "
        "on 2,048 TPU v3 cores)",
        decay="0.1; Adafactor has none",
        init="the library's; the paper's is not known to us",
    ),
    base=base(),
    arms=(
        Arm("switch", SWITCH, note="one expert per token: half the expert compute"),
        Arm("gshard", note="8 experts, top-2, second expert with probability 2 g2 in training"),
        Arm("top2", {f"{MOE}.select": TOP_2}, note="both experts always: deterministic top-2"),
        Arm("top2_no_balance", {f"{MOE}.select": TOP_2, f"{MOE}.losses.balance.coef": 0.0}, note="top2 without its loss"),
    ),
    ablations={
        "capacity": (
            Arm("gshard_2.0", {f"{MOE}.select.capacity_factor": 2.0}, note="twice the room"),
            Arm("top2_2.0", {f"{MOE}.select": {**TOP_2, "capacity_factor": 2.0}}, note="twice the room"),
        ),
        "compute": (Arm("switch_wide", {**SWITCH, f"{MOE}.bank.hidden": 768}, note="as much expert compute as top2"),),
    },
    claims=(
        lower(
            "eval/bits_per_byte",
            "gshard",
            "switch",
            headline=True,
            text="GShard beats top-1 per step, at more compute",
            matched=("params",),
        ),
        within(
            "eval/bits_per_byte",
            "gshard",
            "top2",
            0.02,
            text="drawing the second expert costs next to nothing",
            matched=("flops", "params"),
        ),
        lower(
            "stats/experts_per_token",
            "gshard",
            "top2",
            text="drawing the second expert spares expert compute",
            matched=("flops", "params"),
        ),
        lower(
            "stats/drop_rate",
            "gshard",
            "top2",
            text="drawing the second expert leaves fewer choices without room",
            matched=("flops", "params"),
        ),
        lower("eval/bits_per_byte", "top2", "top2_no_balance", text="the balance loss pays", matched=("flops", "params")),
        lower("eval/bits_per_byte", "top2", "switch_wide", text="two experts beat one of twice the width", matched=("flops",)),
        within(
            "eval/bits_per_byte",
            "gshard_2.0",
            "gshard",
            0.02,
            text="capacity factor 1.0 is enough for GShard",
            matched=("params",),
        ),
    ),
    presets={
        "smoke": SMOKE,
        "cpu": Preset(),
        # The paper's smallest model with 12 layers, as a decoder.
        "paper": Preset(
            {
                **PAPER_LM,
                "model.d_model": 1024,
                "model.num_layers": 12,
                **{f"model.blocks.{b}.mixer.{key}": 16 for b in ("dense", "moe") for key in ("num_heads", "num_kv_heads")},
                "model.blocks.dense.ffn.hidden": 8192,
                f"{MOE}.bank.hidden": 8192,
                f"{MOE}.num_experts": 128,
                "data.seq_len": 1024,
                "data.batch_size": 4096,
                "train.steps": 100_000,
                "optimizer.warmup_steps": 10_000,
                "optimizer.schedule": "rsqrt",
            },
            arms={"switch_wide": {f"{MOE}.bank.hidden": 16384}},
        ),
    },
    metrics=("eval/stats/drop_rate", "eval/stats/max_violation"),
)
