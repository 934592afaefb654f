"""M6-T (Yang et al. 2021): expert prototyping, one expert of each of Z groups ("Z top-1") instead of the k best of all.

Byte language models in which every feed-forward layer is a mixture of 8 experts. At the same k, `proto2` and `top2` (`proto4` and
`top4`) have the same experts, active experts, router and slots: they differ in who may be chosen with whom, and in the weights, whose
sum is at most 1 under top-k and Z under prototyping. `proto2_mean` and `top2_normalised` tell these apart: in both a token's
weights sum to 1 at most, resp. exactly. Compute grows with k: `top1_wide` and `top1_wide4` (ablation `compute`) spend on one expert
what top2 and top4 spend on several, with the same parameters. Arms `..._1x` have only as many slots as top1.

Tokens compete for capacity across the batch, at one position each, since top-k with its first choices served first would leak the
future of a sequence; prototyping would not. The capacity factor 1.25 is exact for 32 sequences: 5, 10 and 20 slots.
"""

from configs import base_lm
from experiments.departures import Departures
from experiments.study import PAPER_LM, SMOKE, Arm, Preset, Study, higher, lower, within

MOE = "model.blocks.moe.ffn"
MIXER = "model.blocks.moe.mixer"
BPC = "eval/bits_per_byte"
GAMMA = 1.25


def top_k(k: int, factor: float | None = GAMMA, normalise: bool = False) -> dict:
    """GShard's order of service; weights from the softmax over all experts."""
    return {"kind": "top_k", "k": k, "normalise": normalise, "capacity_factor": factor, "priority": "choice"}


def prototypes(z: int, factor: float | None = GAMMA, scale: float = 1.0) -> dict:
    return {"kind": "one_per_group", "expert_groups": z, "scale": scale, "capacity_factor": factor, "priority": "choice"}


def select(rule: dict) -> dict:
    return {f"{MOE}.select": rule}


def base():
    """Four mixtures of 8 experts of width 256, and 32 sequences of 64 bytes, so that 32 tokens compete; GShard's balance loss."""
    config = base_lm.get_config()
    config.model.pattern = ("moe",)
    ffn = config.model.blocks.moe.ffn
    ffn.bank = {"kind": "ffn", "hidden": 256, "activation": "gelu"}
    ffn.select = prototypes(2)
    ffn.losses = {"balance": {"coef": 0.01, "over": "batch"}}
    ffn.group_by = "position"
    config.data.batch_size, config.data.seq_len = 32, 64
    config.train = {"steps": 1500, "accumulation": 1, "log_every": 50}
    config.eval = {"every": 150, "batches": 0, "split": "validation"}
    config.checkpoint = {"every": 0, "keep": 1, "asynchronous": True}
    return config


FREE = {f"{MOE}.losses.balance.coef": 0.0}
RULES = {"top1": (top_k, 1), "top2": (top_k, 2), "top4": (top_k, 4), "proto2": (prototypes, 2), "proto4": (prototypes, 4)}


def each(suffix: str, note: str, names=tuple(RULES), factor: float | None = GAMMA, one: bool = False, free: bool = False):
    """The arms `names` with another capacity factor (slots for `one` choice a token, not for k), and perhaps without their loss."""
    rules = {name: rule(k, factor / k if one else factor) for name, (rule, k) in RULES.items() if name in names}
    return tuple(Arm(f"{name}_{suffix}", {**select(rule), **(FREE if free else {})}, note) for name, rule in rules.items())


def attention(rule: dict) -> dict:
    """Queries, keys, values and outputs from mixtures of 8 linear experts each, routed as the feed-forward layer is."""
    mixer = {"kind": "routed_projections", "num_heads": 4, "num_kv_heads": 2, "num_experts": 8, "group_by": "position"}
    return {**select(rule), MIXER: {**mixer, "select": rule, "losses": {"balance": {"coef": 0.01, "over": "batch"}}}}


SEVERAL = ("top2", "top4", "proto2", "proto4")
WIDE = {2: "top1_wide", 4: "top1_wide4"}

STUDY = Study(
    slug="m6_t",
    title="M6-T: expert prototyping",
    arxiv="2105.15082",
    implements=("moejax.OnePerGroup", "moejax.RoutedProjections", "moejax.Balance", "moejax.MoE"),
    departures=Departures(
        scale="bytes and a text decoder instead of images and Chinese text; 8 experts instead of 960; sequence, batch and steps "
        "of the paper preset are ours",
        method="raw probabilities as the weights of top-k, and 0.01 for the balance loss: the paper's text, as far as it was at "
        "hand, says neither",
        left_out="speed: it is no metric of a run, and top-k is one sort here instead of k argmaxes; the speed-up of the largest "
        "model over one of 100 billion parameters",
        capacity="tokens compete across the batch, at one position each: top-k with its first choices served first would leak the "
        "future of a sequence",
        optimizer="AdamW throughout, which stands for Adafactor in the largest model; rates of the paper preset are ours",
        decay="0.1 in both presets; the paper's is not known to us",
        init="the library's here; the paper's small standard deviation of 0.002 in the paper preset",
    ),
    base=base(),
    arms=(
        Arm("top1", select(top_k(1)), note="one expert of 8"),
        Arm("top2", select(top_k(2)), note="the two best of 8, raw probabilities"),
        Arm("top4", select(top_k(4)), note="the four best of 8"),
        Arm("proto2", select(prototypes(2)), note="2 top-1: the best of each of two groups of 4"),
        Arm("proto4", select(prototypes(4)), note="4 top-1: the best of each of four groups of 2"),
        Arm("proto2_mean", select(prototypes(2, scale=0.5)), note="proto2 with half the weights: at most 1 in sum"),
        Arm("top2_normalised", select(top_k(2, normalise=True)), note="top2 with weights that sum to 1"),
    ),
    ablations={
        "balance": each("free", "without the balance loss", free=True),
        "capacity": (
            *each("1x", "as many slots as top1", SEVERAL, one=True),
            *each("1x_free", "as many slots as top1, without the balance loss", SEVERAL, one=True, free=True),
        ),
        "dropless": (
            *each("dropless", "room for all", factor=None),
            *each("dropless_free", "room for all, without the balance loss", factor=None, free=True),
        ),
        "compute": tuple(
            Arm(
                WIDE[k],
                {**select(top_k(1)), f"{MOE}.num_experts": 8 // k, f"{MOE}.bank.hidden": 256 * k},
                note=f"one of {8 // k} experts of {k} times the width: the compute of top{k}, the parameters of all",
            )
            for k in WIDE
        ),
        "attention": (
            Arm("top2_attention", attention(top_k(2)), note="top2, attention's projections too"),
            Arm("proto2_attention", attention(prototypes(2)), note="proto2, attention's projections too"),
        ),
    },
    claims=(
        lower(BPC, "proto2", "top2", headline=True, text="2 top-1 beats top-2 at equal compute", matched=("flops", "params")),
        lower(BPC, "proto4", "top4", text="4 top-1 beats top-4 at equal compute", matched=("flops", "params")),
        lower(
            BPC,
            "proto2_mean",
            "top2",
            text="so it does with weights that sum to no more than top-2's",
            matched=("flops", "params"),
        ),
        lower(BPC, "proto2", "top2_normalised", text="and it beats top-2 whose weights sum to 1", matched=("flops", "params")),
        lower(BPC, "top2", "top1", text="two experts beat one", matched=("params",)),
        lower(BPC, "top4", "top2", text="four beat two", matched=("params",)),
        lower(
            BPC,
            "proto2",
            "top1_wide",
            text="2 top-1 beats one expert of the same compute and parameters",
            matched=("flops", "params"),
        ),
        lower(BPC, "proto4", "top1_wide4", text="and so does 4 top-1", matched=("flops", "params")),
        lower(
            BPC,
            "proto2_1x",
            "top2_1x",
            text="with no more slots than top-1 has, 2 top-1 beats top-2",
            matched=("flops", "params"),
        ),
        lower(BPC, "proto2_1x", "top1", text="and top-1, at equal expert compute", matched=("flops",)),
        lower(BPC, "proto2", "proto2_1x", text="more capacity is better", matched=("params",)),
        lower(
            "eval/stats/max_violation",
            "top1",
            "top1_free",
            text="the balance loss balances the load",
            matched=("flops", "params"),
        ),
        lower(
            BPC, "top1_free", "top1", text="and costs quality (2.694 against 2.645 in the paper)", matched=("flops", "params")
        ),
        within(
            BPC,
            "proto2_dropless_free",
            "proto2_dropless",
            0.02,
            text="with room for all, nothing is lost without it",
            matched=("flops", "params"),
        ),
        lower(
            BPC,
            "proto2_1x",
            "proto2_1x_free",
            text="where choices are dropped for lack of room, it pays",
            matched=("flops", "params"),
        ),
        higher(BPC, "top2_attention", "top2", text="mixtures for attention's projections hurt top-2", matched=()),
        higher(BPC, "proto2_attention", "proto2", text="and prototyping", matched=()),
        lower(
            BPC,
            "proto4",
            "top4",
            by=0.05,
            text="the gain over top-k grows with the model",
            needs="paper scale because gains of models from 1.4 to 1,000 billion parameters are compared",
            matched=("flops", "params"),
        ),
    ),
    presets={
        "smoke": SMOKE,
        "cpu": Preset(),
        # The model of 1,000 billion parameters: 960 experts of width 21,248 in each of 24 layers, whose weights start small.
        "paper": Preset(
            {
                **PAPER_LM,
                "model.d_model": 1024,
                "model.num_layers": 24,
                **{f"model.blocks.{b}.mixer.{key}": 16 for b in ("dense", "moe") for key in ("num_heads", "num_kv_heads")},
                **{f"{MIXER}.{key}": {"kind": "normal", "std": 0.002} for key in ("init_qkv", "init_out")},
                **{f"{MOE}.bank.{key}": {"kind": "normal", "std": 0.002} for key in ("init_in", "init_out")},
                f"{MOE}.num_experts": 960,
                f"{MOE}.bank.hidden": 21_248,
                "data.seq_len": 512,
                "data.batch_size": 4096,
                "train.steps": 100_000,
                "optimizer.learning_rate": 1e-4,
                "optimizer.warmup_steps": 2_000,
            },
            arms={
                **{WIDE[k]: {f"{MOE}.num_experts": 960 // k, f"{MOE}.bank.hidden": 21_248 * k} for k in WIDE},
                **{
                    name: {
                        f"{MIXER}.num_heads": 16,
                        f"{MIXER}.num_kv_heads": 16,
                        f"{MIXER}.num_experts": 960,
                        **{f"{MIXER}.{key}": {"kind": "normal", "std": 0.002} for key in ("init_qkv", "init_out")},
                    }
                    for name in ("top2_attention", "proto2_attention")
                },
            },
        ),
    },
    metrics=("eval/stats/drop_rate", "eval/stats/max_violation", "eval/stats/load_entropy"),
    notes="The paper's own losses are log-perplexities of text given images. That the gain of more experts diminishes compares two "
    "differences, and is to be read off top1, top2 and top4.",
)
