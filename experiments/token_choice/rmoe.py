"""RMoE (Qiu et al. 2024): a router with a recurrent state that goes up through the layers with each token.

Byte language models of six layers, all mixtures of 8 experts, two per token, weights renormalised in every arm. `mlp` is a router of
two layers and about the parameters of the recurrent one; `no_passing` has all of its parameters and no memory, `detached` has the
memory and no gradient through it. All arms report the mutual information of neighbouring layers' first choices.
"""

from configs import small_lm
from experiments.departures import Departures
from experiments.study import PAPER_LM, SMOKE, Arm, Preset, Study, higher, lower, within

MOE = "model.blocks.moe.ffn"
ROUTER = f"{MOE}.router.router"


def base():
    """Six layers of width 64, all mixtures, with recurrent routers that a witness looks at."""
    config = small_lm.get_config()
    config.model.pattern, config.model.num_layers = ("moe",), 6
    ffn = config.model.blocks.moe.ffn
    ffn.bank.hidden = 32
    ffn.router = {"kind": "witnessed", "router": {"kind": "recurrent", "width": 32}}
    return config


def router(kind: str, **fields) -> dict:
    """Another router for all layers."""
    return {ROUTER: {"kind": kind, **fields}}


STUDY = Study(
    slug="rmoe",
    title="RMoE: a layerwise recurrent router",
    arxiv="2408.06793",
    implements=("moejax.Recurrent", "moejax.ResidualLogits", "moejax.Witnessed"),
    departures=Departures(
        scale="bytes, one epoch, six layers and a state of 32; the expert width of the paper preset is a guess from 0.91 "
        "billion parameters",
        method="two experts a token instead of four; the balance loss is each layer's own, where the paper pools all layers'",
        left_out="other routers with a recurrence below them (XMoE, hyper networks), and fine-tuning with frozen routers",
        capacity="none",
        optimizer="the base's rates here; schedule and warm-up of the paper preset are ours",
        decay="0.1 in both presets; the paper's is not known to us",
        init="the library's; the paper's is not known to us",
    ),
    base=base(),
    arms=(
        Arm("linear", router("linear"), note="the usual router"),
        Arm("mlp", router("recurrent", width=32, cell="rnn", passing="none"), note="two layers, no memory"),
        Arm("no_passing", {f"{ROUTER}.passing": "none"}, note="gru with a state of zeros in every layer"),
        Arm("detached", {f"{ROUTER}.passing": "detached"}, note="gru without the gradient through its state"),
        Arm("gru", note="the recurrent router"),
    ),
    ablations={
        "cell": (Arm("lstm", {f"{ROUTER}.cell": "lstm"}), Arm("rnn", {f"{ROUTER}.cell": "rnn"})),
        "projector": (Arm("shared_projector", {f"{ROUTER}.projector": "shared"}, note="one projector for all layers"),),
        "width": (Arm("width_128", {f"{ROUTER}.width": 128}, note="a state four times as wide"),),
        "residual": (
            Arm("residual_logits", router("residual_logits", router={"kind": "linear"})),
            Arm("residual_detached", router("residual_logits", router={"kind": "linear"}, detached=True)),
        ),
        "init": (Arm("small_init", {f"{ROUTER}.init_scale": 0.01}, note="logits start ten times smaller"),),
    },
    claims=(
        lower(
            "eval/bits_per_byte", "gru", "linear", headline=True, text="the recurrent router beats the linear one", matched=()
        ),
        lower(
            "eval/bits_per_byte", "gru", "no_passing", text="it is the recurrence and not the parameters", matched=("params",)
        ),
        lower(
            "eval/bits_per_byte",
            "no_passing",
            "detached",
            text="a state without gradient is worse than none",
            matched=("flops", "params"),
        ),
        lower("eval/bits_per_byte", "gru", "mlp", text="a deeper router without memory is no substitute", matched=("params",)),
        higher(
            "eval/stats/mutual_information",
            "gru",
            "linear",
            text="routings of neighbouring layers tell more about each other",
            matched=(),
        ),
        lower(
            "eval/bits_per_byte",
            "gru",
            "shared_projector",
            text="a projector for each layer beats a shared one",
            matched=("flops",),
        ),
        lower("eval/bits_per_byte", "gru", "rnn", text="the gated cell beats the plain one", matched=("params",)),
        lower(
            "eval/bits_per_byte",
            "gru",
            "width_128",
            by=-0.01,
            text="a state four times as wide is no better (512 against 128 in the paper)",
            matched=("steps",),
        ),
        within(
            "eval/bits_per_byte",
            "residual_logits",
            "no_passing",
            0.02,
            text="handing on logits is like handing on nothing",
            matched=("steps",),
        ),
        lower(
            "eval/bits_per_byte",
            "residual_logits",
            "residual_detached",
            text="and worse without their gradient",
            matched=("flops", "params"),
        ),
        lower(
            "eval/bits_per_byte",
            "gru",
            "small_init",
            text="logits that start ten times smaller slow routing",
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
                "model.num_layers": 24,
                "model.blocks.moe.mixer.num_heads": 20,
                "model.blocks.moe.mixer.num_kv_heads": 20,
                f"{MOE}.num_experts": 16,
                f"{MOE}.select.k": 4,
                f"{MOE}.bank.hidden": 448,
                f"{ROUTER}.width": 128,
                "data.seq_len": 2048,
                "data.batch_size": 512,
                "train.steps": 20_000,
                "optimizer.learning_rate": 4.2e-4,
                "optimizer.warmup_steps": 2_000,
            },
            arms={
                "mlp": {f"{ROUTER}.width": 128},
                "width_128": {f"{ROUTER}.width": 512},
            },
        ),
    },
    metrics=("eval/stats/mutual_information", "eval/stats/same_choice", "eval/stats/entropy"),
    notes="Expected effect 0.5 to 1 %: at the limit of what a few seeds tell apart.",
)
