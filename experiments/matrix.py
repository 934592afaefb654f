"""What each method can do, found out by doing it: method x (backends, experts split, LM, ViT, causal, decode with cache).

    python -m experiments.run --list --matrix
    python -m experiments.run --list --matrix --study=remoe     # one row, and why what fails fails

A method is the headline arm of its study at the smoke scale. Every cell builds it and tries: LM, ViT and backends by tracing a
whole train step (bfloat16, scan over layers, full rematerialisation); the split over eight simulated devices likewise; causality
and decoding by running a small model.
"""

import dataclasses
from collections.abc import Callable, Iterable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from configs import base_vit, small_lm
from experiments import overrides
from experiments.study import Study, resolve
from experiments.tables import Table
from moejax import dispatch, models
from moejax.aot.ahead import batch_shapes
from moejax.core.context import Context
from moejax.core.errors import ConfigError
from moejax.models import DecoderLM, ViT
from moejax.parallel import Parallel, make_mesh
from moejax.serve import generate
from moejax.tasks.base import tasks
from moejax.train.program import get_program
from moejax.train.settings import TrainSettings, plain, section

DEVICES = 8
MESH = "data=4,expert=2"
ROWS, LENGTH, NEW = 4, 16, 3
Forward = Callable[[Any, np.ndarray, bool], np.ndarray]  # variables, tokens, train -> logits
COLUMNS = ("LM", "ViT", "backends", "8 devices", "causal", "decode")


@dataclasses.dataclass(frozen=True)
class Cell:
    """What came of a try. `why` is the library's own refusal where there is one."""

    text: str
    why: str = ""


def matrix(studies: Iterable[Study], tell: Callable[[str], None] = lambda _: None) -> dict[str, dict[str, Cell]]:
    """Slug -> column -> cell, for every study; `tell` is given what is being tried.

    Needs `DEVICES` devices, simulated ones as well as real ones.
    """
    found = {}
    for study in studies:
        tell(study.slug)
        found[study.slug] = examine(study)
    return found


def examine(study: Study) -> dict[str, Cell]:
    """The row of one study's headline arm. An error that is no refusal is raised: it is a bug."""
    config = _small(resolve(study, "smoke", study.headline.arm))
    homes = {"LM": _in(small_lm.get_config(), config), "ViT": _in(base_vit.get_config(), config)}
    home = homes["LM" if config.model.kind == "decoder_lm" else "ViT"]
    return {
        **{name: _try(lambda place=place: _trace(place)) for name, place in homes.items()},
        "backends": _backends(home),
        "8 devices": _split(home),
        **_run(homes["LM"]),
    }


def table(found: dict[str, dict[str, Cell]]) -> Table:
    """The matrix as a table."""
    rows = tuple((slug, *(cells[column].text for column in COLUMNS)) for slug, cells in found.items())
    return Table("What was tried", ("method", *COLUMNS), rows)


def reasons(cells: dict[str, Cell]) -> list[str]:
    """Why a row's cells are not 'yes', in the library's words."""
    return [f"{column}: {cell.why}" for column, cell in cells.items() if cell.why]


def _try(attempt: Callable[[], str]) -> Cell:
    try:
        return Cell(attempt())
    except ConfigError as refusal:
        return Cell("no", " ".join(str(refusal).split()))


def _small(config: ConfigDict) -> ConfigDict:
    """Few layers and rows; everything that makes the method stays."""
    config = overrides.copy(config)
    model = config.model
    model.num_layers = min(model.num_layers, 2 * len(model.pattern))
    config.data.batch_size = 2 * DEVICES
    return config


def _in(base: ConfigDict, config: ConfigDict) -> ConfigDict:
    """The config's blocks in the base's model, on its data; the config itself if it is of that kind already."""
    if config.model.kind == base.model.kind:
        return config
    shared = {f.name for f in dataclasses.fields(DecoderLM)} & {f.name for f in dataclasses.fields(ViT)}
    for key in shared & set(config.model) - {"kind"}:
        base.model[key] = config.model[key]
    if config.get("adapters"):
        base.adapters = config.adapters
    base.data.batch_size = config.data.batch_size
    base.train = config.train
    base.optimizer = config.optimizer
    return base


def _trace(config: ConfigDict, parallel: Parallel | None = None, **context: Any) -> str:
    """Traces a train step under bfloat16, scan and rematerialisation."""
    bare = overrides.copy(config)
    bare.model.update(scan=True, remat="full", dtype="bfloat16")
    built = models.network(plain(bare), **context)
    settings = section(TrainSettings, config, "train")
    # The traced program is what counts the FLOPs.
    assert get_program(plain(config), settings, batch_shapes(config), {}, built, parallel).flops > 0
    return "yes"


def _backends(config: ConfigDict) -> Cell:
    """Names of the backends that execute the method's plans, by tracing a forward pass with each."""
    if not _has_backend(config):
        return Cell("-")
    local = [name for name in dispatch.BACKENDS if name != "expert_parallel"]  # which is a column of its own
    cells = {name: _try(lambda name=name: _forward(config, name)) for name in local}
    able = [name for name, cell in cells.items() if cell.text == "yes"]
    return Cell(", ".join(able) or "none", "" if able else cells["reference"].why)


def _split(config: ConfigDict) -> Cell:
    """'experts' if they are split and tokens travel; 'parameters' if XLA splits the layer by its parameters' names.

    Experts whose number no mesh of eight divides keep together: their parameters are then split within, and the cell says why.
    """

    def on(mesh: str, **context: Any) -> Cell:
        return _try(lambda: _trace(config, Parallel(make_mesh(mesh, jax.devices()[:DEVICES])), **context))

    if _has_backend(config) and on(MESH, backend="expert_parallel").text == "yes":
        return Cell("experts")
    split = on(MESH)
    if split.text == "yes":
        return Cell("parameters")
    whole = on("fsdp")
    return Cell("parameters", split.why) if whole.text == "yes" else whole


def _has_backend(config: ConfigDict) -> bool:
    """Whether anything in the model takes a backend: a wrong name is refused only there."""
    return _try(lambda: _forward(config, "no such backend")).text == "no"


def _forward(config: ConfigDict, backend: str) -> str:
    """Traces a forward pass in training with a named backend."""
    model = models.network(plain(config), backend=backend)
    task = tasks.build(plain(config.task), "task")

    def run(batch: Any) -> Any:
        x, ctx = task.inputs(batch, jnp.int32(0), True)
        return model.init({name: jax.random.key(0) for name in ("params", "router", "dropout")}, x, ctx)

    jax.eval_shape(run, batch_shapes(config))
    return "yes"


def _run(config: ConfigDict) -> dict[str, Cell]:
    """The cells that a small decoder has to run for."""
    try:
        made = _decoder(config)
    except ConfigError as refusal:
        return {"causal": Cell("no", " ".join(str(refusal).split())), "decode": Cell("no")}
    return {"causal": _try(lambda: _causal(*made)), "decode": _try(lambda: _decode(*made))}


def _causal(model: Any, variables: Any, forward: Forward) -> str:
    """Two texts that end differently: what the decoder says before that must be the same."""
    draw = np.random.default_rng(0)
    tokens = draw.integers(0, model.vocab_size, (ROWS, LENGTH)).astype(np.int32)
    other = tokens.copy()
    other[:, LENGTH // 2 :] = draw.integers(0, model.vocab_size, (ROWS, LENGTH - LENGTH // 2))

    def before(tokens: np.ndarray, train: bool) -> np.ndarray:
        return forward(variables, tokens, train)[:, : LENGTH // 2]

    same = {train: np.allclose(before(tokens, train), before(other, train), atol=1e-4) for train in (True, False)}
    return "yes" if all(same.values()) else "at inference" if same[False] else "no"


def _decode(model: Any, variables: Any, forward: Forward) -> str:
    """A few tokens decoded with a cache: their logits must be those of the whole text at once."""
    prompt = np.random.default_rng(1).integers(0, model.vocab_size, (ROWS, LENGTH - NEW)).astype(np.int32)
    made = generate(model, variables, prompt, max_new_tokens=NEW, keep_logits=True)
    whole = forward(variables, np.concatenate([prompt, np.asarray(made.tokens)], 1), False)
    np.testing.assert_allclose(made.logits, whole[:, LENGTH - NEW - 1 : -1], rtol=1e-3, atol=1e-3)
    return "yes"


def _decoder(config: ConfigDict) -> tuple[Any, Any, Forward]:
    """A small float32 decoder, its variables, and a compiled forward pass."""
    bare = overrides.copy(config)
    bare.model.update(dtype="float32", remat="none")
    model = models.network(plain(bare))

    def context(tokens: Any, train: bool) -> Context:
        positions = jnp.broadcast_to(jnp.arange(tokens.shape[1], dtype=jnp.int32), tokens.shape)
        return Context(positions=positions, token_ids=tokens, domain=jnp.zeros_like(tokens), step=jnp.int32(0), train=train)

    def forward(variables: Any, tokens: Any, train: bool) -> Any:
        rngs = {"router": jax.random.key(1), "dropout": jax.random.key(2)}
        mutable = ["losses", "stats", "router_state", "control"]
        return model.apply(variables, tokens, context(tokens, train), rngs=rngs, mutable=mutable)[0]

    tokens = jnp.zeros((ROWS, LENGTH), jnp.int32)
    keys = {"params": jax.random.key(0), "router": jax.random.key(1), "dropout": jax.random.key(2)}
    variables = dict(jax.jit(lambda: model.init(keys, tokens, context(tokens, False)))())
    kept = {name: value for name, value in variables.items() if name in ("params", "router_state")}
    compiled = jax.jit(forward, static_argnums=2)
    return model, kept, lambda variables, tokens, train: np.asarray(compiled(variables, jnp.asarray(tokens), train))
