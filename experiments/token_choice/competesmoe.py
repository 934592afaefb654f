"""CompeteSMoE (Pham et al. 2024, Nguyen et al. 2025): experts compete now and then, and the router learns who would win.

Byte language models with 8 experts, two per token, in every other feed-forward layer. In 7 % of the steps, after the first 15, a
layer runs all experts, keeps the two with the strongest responses and teaches its router to predict them; inference uses the router.
All arms have equal parameters and equal active compute at inference. `agreement` is the share of held-out tokens' winners that
the router chose, `similarity` the mean cosine of the two winners' outputs.
"""

from configs import small_lm
from experiments.departures import Departures
from experiments.study import PAPER_LM, SMOKE, Arm, Preset, Study, higher, lower, trend

MOE = "model.blocks.moe.ffn"
AFFINITIES = ("norm", "sigmoid", "relu", "silu")


def base():
    """small_lm with a competing mixture."""
    config = small_lm.get_config()
    block = config.model.blocks.moe
    bank = block.ffn.bank
    block.ffn = {
        "kind": "competition",
        "num_experts": 8,
        "k": 2,
        "rate": 0.07,
        "warmup": 15,
        "affinity": "softplus",
        "gate": "share",
        "target": "all",
        "winners_coef": 0.1,
        "router_coef": 1.0,
        "diversity_coef": 0.01,
        "balance_coef": 0.01,
        "watch": True,
        "router": {"kind": "linear"},
        "bank": bank,
        "losses": {"balance": {"coef": 1e-2, "over": "batch"}, "z": {"coef": 1e-3}},
    }
    return config


def ffn(**fields) -> dict:
    return {f"{MOE}.{name}": value for name, value in fields.items()}


PLAIN = ffn(rate=0.0)
FIRST = ffn(affinity="norm", gate="softmax", target="winners", winners_coef=0.0, router_coef=5.0, diversity_coef=0.0)

STUDY = Study(
    slug="competesmoe",
    title="CompeteSMoE: training mixtures by competition",
    arxiv="2402.02526",
    implements=("moejax.Competition",),
    departures=Departures(
        scale="bytes and one epoch; 8 experts instead of the second version's 4 of an upcycled Phi-3.5-mini, or the first's 16",
        method="the router's loss weighs 1 here and 0.01 in the paper: a mean of squared differences of probabilities, it "
        "teaches nothing in 20 competition steps; layers draw independently, without the cap on how many compete in one "
        "step, which bounds memory and not what is learnt",
        left_out="XMoE, StableMoE and SMoE-Dropout as baselines, fine-tuning, and the vision-language model",
        capacity="none",
        optimizer="training from scratch at the base's rates; those of the paper preset are ours",
        decay="0.1 in both presets; the paper's is not known to us",
        init="from scratch, where the second version upcycles a dense model",
    ),
    base=base(),
    arms=(
        Arm("smoe", PLAIN, note="never competes: a softmax top-2 mixture with balance and z losses"),
        Arm("compete", note="second version: softplus affinity, router, diversity and balance losses"),
        Arm("compete_first", FIRST, note="first version: norm affinity, the winners' softmax as target, router loss 5"),
        Arm("random", {**PLAIN, f"{MOE}.router": {"kind": "random"}}, note="routing that does not look at the token"),
    ),
    ablations={
        "affinity": tuple(Arm(f"affinity_{name}", ffn(affinity=name)) for name in AFFINITIES),
        "losses": (
            Arm("no_router_loss", ffn(router_coef=0.0), note="competition without distillation"),
            Arm("no_diversity", ffn(diversity_coef=0.0)),
            Arm("no_winners", ffn(winners_coef=0.0), note="no extra weight for the winners"),
        ),
        "router_coef": tuple(Arm(f"router_coef_{c:g}", ffn(router_coef=c)) for c in (0.01, 0.1, 10.0)),
        "rate": (
            *(Arm(f"rate_{r:g}", ffn(rate=r)) for r in (0.03, 0.2, 1.0)),
            Arm("rate_decaying", ffn(rate=1.0, schedule="decaying"), note="first version: 2 / (2 + sqrt(step + 1))"),
        ),
    },
    claims=(
        lower(
            "eval/bits_per_byte",
            "compete",
            "smoe",
            headline=True,
            text="competition trains better mixtures",
            matched=("params",),
        ),
        higher("eval/stats/agreement", "compete", "smoe", by=0.02, text="the router learns who would win", matched=()),
        lower("eval/stats/similarity", "compete", "smoe", text="winners' outputs are less alike", matched=()),
        lower(
            "eval/bits_per_byte",
            "compete",
            "compete_first",
            text="the second version is better than the first",
            matched=("flops", "params"),
        ),
        lower("eval/bits_per_byte", "compete", "random", text="better than routing at random", matched=("params",)),
        lower(
            "eval/bits_per_byte",
            "compete",
            "affinity_norm",
            text="softplus is a better affinity than the norm",
            matched=("flops", "params"),
        ),
        higher(
            "eval/stats/agreement",
            "compete",
            "no_router_loss",
            by=0.02,
            text="it is the router's loss that teaches it",
            matched=("flops", "params"),
        ),
        trend(
            "eval/stats/agreement",
            {0.01: "router_coef_0.01", 0.1: "router_coef_0.1", 1.0: "compete", 10.0: "router_coef_10"},
            low=0,
            log=True,
            text="the router's loss is tiny, and has to be weighed up to teach it",
            matched=("flops", "params"),
        ),
        lower(
            "eval/bits_per_byte",
            "compete",
            "rate_1",
            by=-0.02,
            text="competing in 7 % of the steps is enough",
            matched=("params",),
        ),
    ),
    presets={
        "smoke": Preset({**SMOKE.overrides, f"{MOE}.warmup": 1, f"{MOE}.rate": 0.5}),
        "cpu": Preset(),
        "paper": Preset(
            {
                **PAPER_LM,
                "model.d_model": 3072,
                "model.num_layers": 32,
                "model.pattern": ("moe",),
                "model.vocab_size": 32_064,
                "model.tied": False,
                **{f"model.blocks.{b}.mixer.{key}": 32 for b in ("dense", "moe") for key in ("num_heads", "num_kv_heads")},
                f"{MOE}.num_experts": 4,
                f"{MOE}.bank.hidden": 8192,
                f"{MOE}.warmup": 500,
                f"{MOE}.router_coef": 0.01,
                f"{MOE}.watch": False,
                "data.seq_len": 2048,
                "data.batch_size": 256,
                "train.steps": 10_000,
                "optimizer.learning_rate": 1e-4,
                "optimizer.warmup_steps": 300,
                "eval.every": 1_000,
            }
        ),
    },
    metrics=("eval/stats/agreement", "eval/stats/similarity", "eval/stats/max_violation"),
    notes=(
        "The first version's authors say that its published numbers do not come out of its published code. A competition step "
        "costs a dense one, e / k times the experts' FLOPs; 7 % of them are 21 % more of the mixtures' training compute."
    ),
)
