"""sigma-MoE (Csordas et al. 2023): a mixture that approximates the dense layer of equal parameters with a quarter of its arithmetic.

Byte language models whose every feed-forward layer has the parameters of a dense one of width 256 (ReLU, no biases): 16 experts
of width 16, four per token, sigmoid gates that do not compete, a loss that spreads the average use, and the dense layer's initialisation.
"""

from configs import small_lm
from experiments.departures import Departures
from experiments.study import SMOKE, Arm, Preset, Study, higher, lower, within

MOE = "model.blocks.moe.ffn"
TOP4 = {"kind": "top_k", "k": 4}


def base():
    """Four layers of width 64, all of them sigma-MoE."""
    config = small_lm.get_config()
    config.model.pattern = ("moe",)
    config.model.blocks.dense.ffn = {"kind": "ffn", "hidden": 256, "activation": "relu"}
    ffn = config.model.blocks.moe.ffn
    ffn.num_experts = 16
    ffn.router = {"kind": "equal_norm"}
    ffn.select = {"kind": "expert_dropout", "rate": 0.05, "select": {**TOP4, "score": "sigmoid"}}
    ffn.bank = {
        "kind": "ffn",
        "hidden": 16,
        "activation": "relu",
        "init_in": {"kind": "dense_matched"},
        "init_out": {"kind": "dense_matched", "fan_in": "all"},
    }
    ffn.losses = {"spread": {"coef": 1e-3}}
    return config


def scored(**select) -> dict:
    """The same layer with other gates."""
    return {f"{MOE}.select.select": {**TOP4, **select}}


def grain(num_experts: int, k: int, hidden: int) -> dict:
    """Equal parameters and arithmetic in other pieces."""
    return {f"{MOE}.num_experts": num_experts, f"{MOE}.select.select.k": k, f"{MOE}.bank.hidden": hidden}


def switch(num_experts: int, hidden: int) -> dict:
    """Switch without drops, as the authors ran it: one expert, softmax before selection, its own balance loss."""
    return {
        f"{MOE}.num_experts": num_experts,
        f"{MOE}.router": {"kind": "linear"},
        f"{MOE}.select": {"kind": "top_k", "k": 1},
        f"{MOE}.bank": {"kind": "ffn", "hidden": hidden, "activation": "relu"},
        f"{MOE}.losses": {"balance": {"coef": 1e-2, "over": "batch"}},
    }


def memory(num_keys: int, score: str) -> dict:
    """Product-key memory of as many parameters: 32 values per token."""
    fields = {"heads": 4, "k": 8, "query_dim": 32, "values_only": True, "query_norm": "none", "key_std": 0.1}
    return {MOE: {"kind": "product_keys", "num_keys": num_keys, "score": score, **fields}}


STUDY = Study(
    slug="sigma_moe",
    title="sigma-MoE: approximating two-layer feed-forward networks",
    arxiv="2310.10837",
    implements=("moejax.ExpertDropout", "moejax.EqualNorm", "moejax.Spread", "moejax.DenseMatched", "moejax.TopK"),
    departures=Departures(
        scale="bytes and one epoch, rotary attention instead of Transformer-XL; 16 experts of 16",
        method="gamma is 1e-3, since 1e-4 acts over 100k steps; no dropout but that of experts (0.05, as on enwik8; 0.1 in the "
        "paper preset)",
        left_out="top-K of the dense layer's own activations, which saves half of the arithmetic at most; S-BASE",
        capacity="none",
        optimizer="AdamW instead of Adam; gradients are clipped at 1 here and at the paper's 0.25 in the paper preset",
        decay="0.1 in both presets, where Adam has none",
        init="none",
    ),
    base=base(),
    arms=(
        Arm("dense", {"model.pattern": ("dense",)}, note="width 256: equal parameters, four times the arithmetic"),
        Arm("sigma", note="16 experts of 16, four per token, sigmoid gates, expert dropout 0.05, gamma 1e-3"),
        Arm("softmax_after", scored(score="softmax_selected"), note="softmax over the four selected: gates sum to 1"),
        Arm("softmax_before", scored(score="softmax"), note="softmax over all experts, not normalised"),
        Arm("switch", switch(4, 64), note="4 experts of 64, one per token, balance 1e-2: equal parameters and arithmetic"),
    ),
    ablations={
        "gamma": tuple(Arm(f"gamma_{g:g}", {f"{MOE}.losses.spread.coef": g}) for g in (0.0, 1e-4, 1e-2)),
        "expert_dropout": tuple(Arm(f"delta_{d:g}", {f"{MOE}.select.rate": d}) for d in (0.0, 0.1)),
        "dropout": (
            Arm(
                "inner_dropout", {f"{MOE}.bank.dropout": 0.1, f"{MOE}.select.rate": 0.0}, note="ordinary dropout inside experts"
            ),
        ),
        "init": (
            Arm("init_expert", {f"{MOE}.bank.init_out.fan_in": "expert"}, note="W_out by the fan-in of one expert"),
            Arm(
                "init_router",
                {f"{MOE}.router": {"kind": "linear", "init_w": {"kind": "fan_in", "scale": 1.0}}},
                note="router vectors of any length",
            ),
        ),
        "granularity": (
            Arm("k1", grain(4, 1, 64), note="4 experts of 64, one per token"),
            Arm("k2", grain(8, 2, 32), note="8 experts of 32, two per token"),
            Arm("k8", grain(32, 8, 8), note="32 experts of 8, eight per token"),
        ),
        "memory": (
            Arm("pkm_relu", memory(19, "relu"), note="product-key memory of equal parameters, ReLU on scores"),
            Arm("pkm_softmax", memory(19, "softmax"), note="the usual softmax"),
        ),
    },
    claims=(
        within(
            "eval/bits_per_byte",
            "sigma",
            "dense",
            0.03,
            headline=True,
            text="sigma-MoE is within 1 % of the dense model of equal parameters, at a quarter of its arithmetic",
            matched=("params",),
        ),
        lower(
            "eval/bits_per_byte",
            "sigma",
            "switch",
            text="sigma-MoE beats Switch of equal parameters and arithmetic",
            matched=("flops", "params"),
        ),
        lower(
            "eval/bits_per_byte",
            "sigma",
            "softmax_after",
            text="sigmoid beats softmax after the selection",
            matched=("flops", "params"),
        ),
        lower(
            "eval/bits_per_byte",
            "softmax_after",
            "softmax_before",
            text="which beats softmax before it",
            matched=("flops", "params"),
        ),
        higher(
            "eval/stats/load_entropy",
            "sigma",
            "gamma_0",
            text="the loss spreads the use of experts",
            matched=("flops", "params"),
        ),
        lower(
            "eval/bits_per_byte",
            "sigma",
            "init_expert",
            text="the dense layer's initialisation is better",
            matched=("flops", "params"),
        ),
        lower("eval/bits_per_byte", "sigma", "inner_dropout", text="dropout inside experts hurts", matched=("flops", "params")),
        lower("eval/bits_per_byte", "sigma", "k1", text="four small experts beat one large one", matched=("flops", "params")),
        lower(
            "eval/bits_per_byte",
            "pkm_relu",
            "pkm_softmax",
            text="product-key memory prefers ReLU to softmax",
            matched=("flops", "params"),
        ),
        lower("eval/bits_per_byte", "dense", "pkm_relu", text="and still loses to the dense layer", matched=("params",)),
        lower(
            "eval/bits_per_byte",
            "sigma",
            "delta_0",
            text="expert dropout helps larger models",
            needs="262 million parameters: at 47 million the paper does without it",
            matched=("flops", "params"),
        ),
    ),
    presets={
        "smoke": SMOKE,
        "cpu": Preset(),
        "paper": Preset(
            {
                "model.d_model": 1024,
                "model.num_layers": 18,
                **{f"model.blocks.{b}.mixer.{key}": 16 for b in ("dense", "moe") for key in ("num_heads", "num_kv_heads")},
                "model.blocks.dense.ffn.hidden": 4096,
                f"{MOE}.num_experts": 32,
                f"{MOE}.bank.hidden": 128,
                f"{MOE}.select.rate": 0.1,
                "model.dtype": "bfloat16",
                "model.remat": "full",
                "data.name": "wiki40b",
                "data.domains": None,
                "data.seq_len": 512,
                "data.batch_size": 64,
                "train.steps": 100_000,
                "train.log_every": 100,
                "optimizer.learning_rate": 2.5e-4,
                "optimizer.warmup_steps": 4_000,
                "optimizer.clip_norm": 0.25,
                "eval.every": 5_000,
                "checkpoint.every": 1_000,
            },
            arms={
                "switch": {f"{MOE}.num_experts": 8, f"{MOE}.bank.hidden": 512},
                "k1": grain(8, 1, 512),
                "k2": grain(16, 2, 256),
                "k8": grain(64, 8, 64),
                "pkm_relu": {f"{MOE}.num_keys": 90},
                "pkm_softmax": {f"{MOE}.num_keys": 90},
            },
        ),
    },
    metrics=("eval/stats/load_entropy", "eval/stats/max_violation"),
    notes="The headline is one of equivalence: a model that beats the dense one by more than 1 % counts against it as a worse one does.",
)
