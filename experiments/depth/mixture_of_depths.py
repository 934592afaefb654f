"""Mixture-of-depths (Raposo et al. 2024): every other block processes a share of the tokens, the rest skip it.

Byte language models of 8 blocks. All numbers are causal ones: at evaluation a token goes through a routed block when the block's
predictor, which sees that token alone, says so. `leaky` is the same model evaluated by top-k over the sequence, and measures the leak.
"""

from configs import base_lm
from experiments.departures import Departures
from experiments.study import PAPER_LM, SMOKE, Arm, Preset, Study, below, changes_less, lower, within

MOD = "model.blocks.mod"


def base():
    """Eight layers of width 64, alternating full and routed blocks, a quarter of the tokens in the routed ones."""
    config = base_lm.get_config()
    config.model.d_model = 64
    config.model.num_layers = 8
    dense = config.model.blocks.dense
    dense.mixer.num_heads, dense.mixer.num_kv_heads = 2, 1
    dense.ffn.hidden = 192
    config.model.blocks = {
        "dense": dense.to_dict(),
        "mod": {"kind": "mixture_of_depths", "capacity_factor": 0.25, "block": dense.to_dict()},
    }
    config.model.pattern = ("dense", "mod")
    config.data.seq_len, config.data.batch_size = 128, 8
    config.train = {"steps": 3000, "accumulation": 1, "log_every": 100}
    config.eval = {"every": 500, "batches": 0, "split": "validation"}
    config.checkpoint = {"every": 0, "keep": 1, "asynchronous": True}
    return config


STUDY = Study(
    slug="mixture_of_depths",
    title="Mixture-of-depths: a block for some of the tokens",
    arxiv="2404.02258",
    implements=("moejax.MixtureOfDepths",),
    full_size=1e9,
    departures=Departures(
        scale="bytes, 8 blocks and one epoch; the paper's models have up to 3 billion parameters and are compared along isoFLOP "
        "curves",
        method="a predictor decides at evaluation in all arms but those that say otherwise",
        left_out="isoFLOP curves, mixtures of experts within (MoDE), and the sigmoid in the weight's place, a common port",
        capacity="a quarter of the tokens in a routed block here, an eighth in the paper: small models want more",
        optimizer="the base's rates here; those of the paper preset are ours",
        decay="0.1 in both presets; the paper's is not known to us",
        init="the library's; the paper's is not known to us",
    ),
    base=base(),
    arms=(
        Arm("dense8", {"model.pattern": ("dense",)}, note="all tokens in all 8 blocks"),
        Arm("dense5", {"model.pattern": ("dense",), "model.num_layers": 5}, note="equal compute to mod25"),
        Arm("mod25", note="every other block takes 25 % of the tokens; predictor at evaluation"),
        Arm(
            "random",
            {f"{MOD}.router": {"kind": "random"}, f"{MOD}.gate": "one", f"{MOD}.eval_select": "top_k"},
            note="25 % of the tokens at random",
        ),
        Arm("leaky", {f"{MOD}.eval_select": "top_k"}, note="mod25 evaluated by top-k over the sequence: sees the future"),
    ),
    ablations={
        "capacity": (
            Arm("mod12", {f"{MOD}.capacity_factor": 0.125}),
            Arm("mod50", {f"{MOD}.capacity_factor": 0.5}),
            Arm("dense6", {"model.pattern": ("dense",), "model.num_layers": 6}, note="equal compute to mod50"),
        ),
        "placement": (
            Arm(
                "every_block",
                {"model.pattern": ("mod",), f"{MOD}.capacity_factor": 0.63},
                note="all blocks routed: equal compute to mod25",
            ),
        ),
        "remedy": (Arm("remedy_router", {f"{MOD}.remedy": "router"}, note="the router's own sigmoid decides"),),
    },
    claims=(
        lower(
            "eval/bits_per_byte",
            "mod25",
            "dense5",
            headline=True,
            text="at equal compute, mixture-of-depths beats the shallower model",
            matched=("flops",),
        ),
        lower(
            "eval/bits_per_byte",
            "mod25",
            "random",
            text="learning which tokens to process beats choosing at random",
            matched=("flops", "params"),
        ),
        within(
            "eval/bits_per_byte",
            "mod25",
            "dense8",
            0.03,
            text="mixture-of-depths comes close to the full model with fewer FLOPs",
            matched=(),
        ),
        within(
            "eval/bits_per_byte",
            "mod25",
            "leaky",
            0.03,
            text="the causal predictor loses about 1 % against top-k",
            matched=("flops", "params"),
        ),
        below(
            "eval/stats/experts_per_token",
            "mod25",
            0.35,
            text="the predictor keeps about the share of tokens it was trained on",
        ),
        changes_less(
            "eval/bits_per_byte",
            ("dense5", "mod25"),
            ("dense6", "mod50"),
            text="for its compute, a small share of the tokens is better than half of them",
            matched=(),
        ),
        lower(
            "eval/bits_per_byte",
            "mod25",
            "every_block",
            text="at equal compute, every other block is better than all of them",
            matched=("flops",),
        ),
        within(
            "eval/bits_per_byte",
            "remedy_router",
            "mod25",
            0.03,
            text="a loss on the router itself costs little (0.2 to 0.3 % in the paper)",
            matched=("steps",),
        ),
    ),
    presets={
        "smoke": SMOKE,
        "cpu": Preset(),
        "paper": Preset(
            {
                **PAPER_LM,
                "model.d_model": 2048,
                "model.num_layers": 24,
                "model.blocks.dense.mixer.num_heads": 16,
                "model.blocks.dense.mixer.num_kv_heads": 16,
                "model.blocks.dense.ffn.hidden": 5504,
                f"{MOD}.capacity_factor": 0.125,
                f"{MOD}.block.mixer.num_heads": 16,
                f"{MOD}.block.mixer.num_kv_heads": 16,
                f"{MOD}.block.ffn.hidden": 5504,
                "data.seq_len": 2048,
                "data.batch_size": 512,
                "train.steps": 50_000,
                "optimizer.learning_rate": 3e-4,
                "optimizer.warmup_steps": 1_000,
            },
            arms={
                "dense5": {"model.num_layers": 13},
                "mod12": {f"{MOD}.capacity_factor": 0.125},
                "mod50": {f"{MOD}.capacity_factor": 0.5},
                "dense6": {"model.num_layers": 18},
                "every_block": {f"{MOD}.capacity_factor": 0.5625},
            },
        ),
    },
    metrics=("eval/stats/predictor_accuracy",),
)
