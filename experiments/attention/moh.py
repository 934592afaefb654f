"""MoH (Jin et al. 2024): attention heads are experts, and a token takes some of them.

Byte language models of four dense layers with 8 heads of 8 channels. `moh` has 2 shared heads and takes 4 of the other 6, so three
quarters of the heads are on; `mha6` has that many heads from the start. All heads are computed here, on or off, so `mha6` spends what
it saves on wider feed-forward layers.
"""

from configs import small_lm
from experiments.departures import Departures
from experiments.study import PAPER_LM, SMOKE, Arm, Preset, Study, lower, within

MIXER = "model.blocks.dense.mixer"
LAYERS, HEADS = 4, 8


def select(k: int) -> dict:
    """Weights of k heads that sum to k."""
    return {"kind": "top_k", "k": k, "normalise": True, "scale": float(k)}


def moh(shared: int, k: int, kind: str = "mixture_of_heads", heads: int = HEADS, layers: int = LAYERS, **fields) -> dict:
    """`shared` heads that are always on and `k` of the others."""
    values = {
        "kind": kind,
        "num_heads": heads,
        "num_kv_heads": heads,
        "shared_heads": shared,
        "select": select(k),
        "losses": {"balance": {"coef": 0.01 / layers, "share": "tokens", "over": "batch"}},
    }
    return {MIXER: {**values, **fields}}


def mha(heads: int, head_dim: int, **fields) -> dict:
    """Plain attention."""
    return {MIXER: {"kind": "attention", "num_heads": heads, "num_kv_heads": heads, "head_dim": head_dim, **fields}}


def base():
    """Four dense layers."""
    config = small_lm.get_config()
    config.model.pattern, config.model.num_layers = ("dense",), LAYERS
    return config


def llama(shared: int, k: int, **fields) -> dict:
    """The arm at LLaMA3-8B's size: 32 heads, 8 key-value heads."""
    return moh(shared, k, heads=32, layers=32, **{"num_kv_heads": 8, "rope_base": 500_000.0, **fields})


STUDY = Study(
    slug="moh",
    title="MoH: multi-head attention as mixture-of-head attention",
    arxiv="2410.11842",
    implements=("moejax.MixtureOfHeads", "moejax.QueryNormHeads"),
    departures=Departures(
        scale="a decoder from scratch on bytes, where the paper trains vision models and continues LLaMA3-8B",
        method="8 heads of which 2 are shared, where LLaMA3-8B has 32 and 16; `query_norm` trains the continued-tuning router "
        "from scratch",
        left_out="continued tuning of a pretrained model, whose weights it needs; vision and diffusion; savings of time: all heads "
        "are computed here, on or off",
        capacity="none",
        optimizer="rates of training from scratch here, of continued tuning in the paper preset",
        decay="0.1 in both presets; the paper's is not known to us",
        init="the library's; the paper's is not known to us",
    ),
    base=base(),
    arms=(
        Arm("mha8", mha(8, 8), note="8 heads, all on"),
        Arm(
            "mha6",
            mha(6, 8) | {"model.blocks.dense.ffn.hidden": 156},
            note="6 heads, as many as moh has on, and what is saved in a wider feed-forward layer",
        ),
        Arm("moh", moh(2, 4), note="2 shared heads and 4 of 6"),
        Arm("no_shared", moh(0, 6), note="6 of 8 heads, none shared"),
        Arm("no_balance", moh(2, 4, losses={}), note="moh without its balance loss"),
    ),
    ablations={
        "stages": (Arm("one_stage", moh(2, 4, two_stage=False), note="no weights between shared and routed heads"),),
        "active": (Arm("moh50", moh(2, 2), note="half of the heads on"), Arm("moh88", moh(2, 5), note="7 of 8 heads on")),
        "shared": (Arm("shared_1", moh(1, 5)), Arm("shared_4", moh(4, 2))),
        "router": (
            Arm("query_norm", moh(4, 2, "query_norm_heads"), note="no router: 4 shared heads and 2 of 4, by query norm"),
            Arm("random", moh(4, 2, router={"kind": "random", "num_experts": 4}), note="shared_4 with random heads"),
        ),
        "grouped": (
            Arm("gqa8", mha(8, 8, num_kv_heads=2), note="8 heads on 2 key-value heads"),
            Arm("moh_gqa", moh(2, 4, num_kv_heads=2), note="moh on 2 key-value heads"),
        ),
        "factors": (
            Arm(
                "unscaled", moh(2, 4, select={**select(4), "scale": 1.0}), note="routed weights sum to 1, as the equations say"
            ),
        ),
    },
    claims=(
        within(
            "eval/bits_per_byte",
            "moh",
            "mha8",
            0.02,
            headline=True,
            text="three quarters of the heads match all of them",
            matched=("flops", "params"),
        ),
        lower(
            "eval/bits_per_byte",
            "moh",
            "mha6",
            text="choosing heads beats having fewer of them, at equal compute",
            matched=("flops",),
        ),
        lower("eval/bits_per_byte", "moh", "no_shared", text="shared heads help", matched=("flops", "params")),
        lower(
            "eval/bits_per_byte",
            "moh",
            "one_stage",
            text="weighing shared against routed heads helps",
            matched=("flops", "params"),
        ),
        lower(
            "eval/stats/max_violation",
            "moh",
            "no_balance",
            text="the balance loss balances the heads",
            matched=("flops", "params"),
        ),
        lower("eval/bits_per_byte", "shared_4", "random", text="chosen heads beat random ones", matched=("flops", "params")),
        within(
            "eval/bits_per_byte",
            "moh50",
            "mha8",
            0.02,
            text="half of the heads match all of them (84.7 against 84.8 % in vision)",
            matched=("flops", "params"),
        ),
        within(
            "eval/bits_per_byte",
            "moh_gqa",
            "gqa8",
            0.02,
            text="so do three quarters on grouped key-value heads, as in LLaMA3-8B",
            matched=("flops", "params"),
        ),
        lower(
            "eval/bits_per_byte",
            "moh",
            "unscaled",
            text="weights that sum to 1 shrink attention, and slow training",
            matched=("flops", "params"),
        ),
    ),
    presets={
        "smoke": SMOKE,
        "cpu": Preset(),
        "paper": Preset(
            {
                **PAPER_LM,
                "model.d_model": 4096,
                "model.num_layers": 32,
                "model.blocks.dense.ffn.hidden": 14336,
                "data.seq_len": 8192,
                "data.batch_size": 512,
                "train.steps": 100_000,
                "optimizer.learning_rate": 2e-5,
                "optimizer.warmup_steps": 1_000,
            },
            arms={
                "mha8": mha(32, 128, num_kv_heads=8),
                "mha6": mha(24, 128, num_kv_heads=8) | {"model.blocks.dense.ffn.hidden": 16_640},
                "moh": llama(16, 8),
                "no_shared": llama(0, 24),
                "no_balance": llama(16, 8, losses={}),
                "one_stage": llama(16, 8, two_stage=False),
                "moh50": llama(8, 8),
                "moh88": llama(16, 12),
                "shared_1": llama(1, 23),
                "shared_4": llama(16, 8),
                "query_norm": llama(16, 8, kind="query_norm_heads"),
                "random": llama(16, 8, router={"kind": "random", "num_experts": 16}),
                "gqa8": mha(32, 128, num_kv_heads=8),
                "moh_gqa": llama(16, 8),
                "unscaled": llama(16, 8, select={**select(8), "scale": 1.0}),
            },
        ),
    },
    metrics=("eval/stats/max_violation", "eval/stats/entropy"),
)
