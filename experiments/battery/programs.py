"""What is compiled for a subject: few programs, each of which serves several properties.

    traced     shapes alone: a training pass in bfloat16, scanned and rematerialised
    oracle     a training step's objective and gradients: layer by layer, float32, `reference`, one device
    evaluate   a forward pass in evaluation
    layer      the subject's blocks alone, in evaluation, with gradients
    backends   its layers that dispatch, alone, on every backend that takes them
    together   a whole train step with everything at once: scan, remat, microbatches, eight devices

Parameters are drawn rather than initialised: none is zero, so that none can be ignored unnoticed. Every draw of a layer is from the
same key, so that no way of running a model changes what it draws.
"""

import contextlib
import dataclasses
import functools
from collections.abc import Callable, Iterator, Mapping
from typing import Any
from unittest import mock

import flax.linen as nn
import flax.traverse_util
import jax
import jax.numpy as jnp
import numpy as np

from experiments.battery.kinds import inside
from experiments.battery.subjects import VOCABULARY, WIDTH, Subject, build
from moejax import dispatch
from moejax.core.context import Context
from moejax.core.errors import ConfigError
from moejax.core.sowing import PARTS
from moejax.layers.adapters.adapted import adapt
from moejax.models import stack
from moejax.models.parts import Part, walk
from moejax.models.registry import network
from moejax.models.stack import Stack, pattern_blocks, to_scanned, to_unrolled
from moejax.optim.base import optimizers
from moejax.parallel import Parallel, make_mesh, use
from moejax.tasks.base import Task
from moejax.tasks.models import STREAMS, FrozenModel, LearningModel
from moejax.train.metrics import flatten
from moejax.train.program import Program, build_task
from moejax.train.readers import frozen_specs
from moejax.train.settings import plain
from moejax.train.step import STATE, begin_state

# One row a device.
ROWS, LENGTH, DEVICES = 8, 8, 8
# Large, so that what is subtracted from parameters is all gradient; a power of two, so that it is exactly that.
RATE = 1024.0
STEP = 3
# Of a layer, where tokens are vectors.
GROUPS = 2
LOCAL_BACKENDS = tuple(name for name in dispatch.BACKENDS if name != "expert_parallel")  # which needs a mesh

# Subjects whose programs are kept: they are looked at one after the other.
KEPT = 4

Tree = Any
Batch = dict[str, np.ndarray]


@dataclasses.dataclass(eq=False)
class Programs:
    """The programs of a subject as a language model ('LM') or as one of images ('ViT')."""

    subject: Subject
    home: str
    # Whether a loss looks at the whole batch, and not at one token after the other: the oracle sees it while it is traced.
    _looks: bool = False
    # The streams that layers draw from: the first trace sees it.
    _drawn: set[str] = dataclasses.field(default_factory=set)

    @functools.cached_property
    def config(self) -> dict[str, Any]:
        """Plain config."""
        return plain(self.subject.place(self.home))

    @functools.cached_property
    def task(self) -> Task:
        """The task; domains are not told apart."""
        return build_task(self.config["task"], {})

    @functools.cached_property
    def model(self) -> nn.Module:
        """Layer by layer, in float32, with the backend that is the definition."""
        return build(self.config, {"backend": "reference"}, **self._fields(scan=False, remat="none"))

    @functools.cached_property
    def traced(self) -> tuple[Tree, Tree]:
        """Shapes of outputs and sown collections of a training pass under bfloat16, scan and rematerialisation."""
        own = {"scan": True, "remat": "full", "dtype": "bfloat16"}
        model = build(self.config, **{name: value for name, value in own.items() if name in self.config["model"]})
        with fixed_draws(self._drawn):
            return trace(model, *example(self.config))

    @functools.cached_property
    def rows(self) -> int:
        """Of a batch: as many as the oracle of a step of two microbatches is given, so that one oracle is compiled for all properties.

        Those of a microbatch if it has to be looked at by itself: where a layer draws, tokens of several rows compete, or a layer keeps
        state, which it may measure over what it is given, a whole batch would draw, admit and measure otherwise.
        """
        _, sown = self.traced
        compete = any(getattr(part, "group_by", "sequence") != "sequence" for part in inside(self.model))
        return ROWS if self._drawn or compete or sown.get("router_state") else 2 * ROWS

    @functools.cached_property
    def variables(self) -> dict[str, Tree]:
        """Drawn parameters, and state as the model starts it."""
        _, sown = self.traced
        if any(name in sown for name in STATE):
            return draw(functools.partial(self._init, self.model))
        # A pass has been traced already, if scanned: what parameters there are is known.
        empty = jax.tree.map(lambda like: np.empty(like.shape, like.dtype), sown["params"])
        return {"params": drawn(to_unrolled(empty))}

    @functools.cached_property
    def frozen(self) -> dict[str, tuple[nn.Module, dict[str, Tree]]]:
        """Models of the task's own, with drawn parameters."""
        specs = frozen_specs(self.task)
        made = {name: network(spec) for name, spec in specs.items()}
        return {name: (model, draw(functools.partial(self._init, model))) for name, model in made.items()}

    def batch(self, seed: int = 0, rows: int = 0) -> Batch:
        """A random batch of the task, without padding."""
        rng, rows = np.random.default_rng(seed), rows or self.rows
        if self.home == "LM":
            tokens = rng.integers(0, VOCABULARY, (2, rows, LENGTH)).astype(np.int32)
            ones = np.ones((rows, LENGTH), np.int32)
            places = np.broadcast_to(np.arange(LENGTH, dtype=np.int32), ones.shape)
            text = {"tokens": tokens[0], "targets": tokens[1], "segments": ones, "positions": places, "domain": 0 * ones}
            return {**text, "valid": ones == 1}
        model = self.config["model"]
        image = rng.normal(size=(rows, model["image_size"], model["image_size"], model["channels"]))
        label = rng.integers(0, model["num_classes"], rows)
        return {"image": image.astype(np.float32), "label": label.astype(np.int32), "valid": np.ones(rows, bool)}

    def oracle(self, batch: Batch, variables: dict[str, Tree] | None = None) -> dict[str, Tree]:
        """'objective', 'losses' (each, summed over layers), 'outputs' and 'gradients' of a step on a batch."""
        variables = variables or self.variables
        frozen = {name: variables for name, (_, variables) in self.frozen.items()}
        return host(self._oracle(variables["params"], without(variables, "params"), frozen, batch))

    def step_of(self, count: int) -> tuple[Batch, list[Batch]]:
        """The batch of a step of `count` microbatches, and the batches whose mean the step is: itself; or its microbatches, in which
        layers draw alike, see `rows`. Where a loss looks at the whole batch besides, these are all the same one.
        """
        one = self.batch()
        if count == 1 or self.rows == count * ROWS:
            return one, [one]
        self.oracle(one)
        if self._looks:
            return {name: np.repeat(x, count, axis=0) for name, x in one.items()}, [one]
        whole = self.batch(rows=count * ROWS)
        return whole, [{name: x[i::count] for name, x in whole.items()} for i in range(count)]

    def evaluate(self, batch: Batch, variables: dict[str, Tree] | None = None) -> np.ndarray:
        """The outputs for a batch in evaluation."""
        return np.asarray(self._evaluate(variables or self.variables, batch))

    def layer(self, x: np.ndarray, valid: np.ndarray) -> dict[str, Tree]:
        """'y', 'losses' and 'gradients' (in parameters and x) of one repeat of the blocks, in evaluation."""
        with fixed_draws():
            variables, run = self._layer
            return host(run(variables, x, valid))

    def backends(self, x: np.ndarray, valid: np.ndarray) -> tuple[dict[str, Tree], dict[str, str]]:
        """The same of the layers alone that have a backend, on every backend: name -> what came out, and name -> why it refused."""
        refused: dict[str, str] = {}
        layers = {name: self._with_backend(name) for name in LOCAL_BACKENDS}

        def run(variables: Tree, x: Any, valid: Any) -> Tree:
            out = {}
            for name in LOCAL_BACKENDS:
                try:
                    out[name] = _value_and_gradients(layers[name], variables, x, valid)
                except ConfigError as refusal:
                    refused[name] = " ".join(str(refusal).split())
            return out

        with fixed_draws():
            variables = draw(lambda keys: layers["reference"].init(keys, jnp.asarray(x), _layer_context(jnp.asarray(valid))))
            out = host(jax.jit(run)(variables, x, valid))
        return {name: out[name] for name in LOCAL_BACKENDS if name in out}, refused

    def together(self, parts: Mapping[str, Any]) -> dict[str, Tree]:
        """'losses' and 'gradients' of a step of two microbatches on a mesh.

        Args:
          parts: what to do: fields of the model ('scan', 'remat'), 'accumulation', 'mesh' and 'backend'.
        """
        own = {name: parts[name] for name in ("scan", "remat") if name in parts}
        scan = own.get("scan", False)
        model = build(self.config, {"backend": parts.get("backend", "reference")}, **self._fields(**{"scan": False, **own}))
        count = parts.get("accumulation", 1)
        mesh = Parallel(make_mesh(parts["mesh"], jax.devices()[:DEVICES])) if parts.get("mesh") else None
        batch, _ = self.step_of(count)
        optimizer = optimizers.build(
            {"kind": "sgd", "learning_rate": RATE, "schedule": "constant", "clip_norm": None}, "optimizer", steps=10
        )
        program = Program(
            model=model,
            task=self.task,
            optimizer=optimizer,
            accumulation=count,
            batch={name: jax.ShapeDtypeStruct(x.shape, x.dtype) for name, x in batch.items()},
            parallel=mesh,
            spec=self.config["model"],
            steps=10,
            frozen=frozen_specs(self.task),
        )
        variables = host({name: to_scanned(tree) for name, tree in self.variables.items()}) if scan else self.variables
        state = begin_state(variables, optimizer, jax.random.key(0)).replace(
            step=jnp.int32(STEP), frozen={name: variables for name, (_, variables) in self.frozen.items()}
        )
        with fixed_draws(), use(mesh):
            like = program.state
            state = jax.tree.map(lambda x, s: jax.device_put(x, s.sharding), state, like)
            after, metrics = program.train(state, self._on(batch, program.batch))
        gradients = jax.tree.map(lambda a, b: (np.asarray(a) - np.asarray(b)) / RATE, variables["params"], after.params)
        return {
            "losses": {name: np.asarray(x) for name, x in metrics.items() if name.startswith("losses/")},
            "gradients": to_unrolled(gradients) if scan else gradients,
        }

    @staticmethod
    def _on(batch: Batch, like: Mapping[str, Any]) -> Tree:
        return {name: jax.device_put(x, like[name].sharding) for name, x in batch.items()}

    @functools.cached_property
    def _oracle(self) -> Callable[..., Tree]:
        def objective(params: Tree, state: Tree, frozen: Tree, batch: Batch) -> tuple[Any, Tree]:
            models = {name: FrozenModel(model, frozen[name]) for name, (model, _) in self.frozen.items()}
            # It gathers what losses sum over the batch: with each its number of tokens, and more if it looks at the batch as one.
            run = _Watched(self.model, params, state, jax.random.key(0), models, gather=True)
            loss, _ = self.task.objective(run, batch, jnp.int32(STEP))
            entries = [flax.traverse_util.flatten_dict(sown.get(PARTS, {})) for sown in run.sown]
            self._looks = any(len(sums) > 1 for calls in entries for entry in calls.values() for sums in entry)
            losses = run.summed(lambda changed: flatten(changed.get("losses", {}), "losses", total=True))
            total = loss + sum(losses.values())
            return total, {"objective": total, "losses": losses, "outputs": run.outputs}

        def step(*args: Any) -> Tree:
            gradients, out = jax.grad(objective, has_aux=True)(*args)
            return {**out, "gradients": gradients}

        return _drawing(jax.jit(step))

    @functools.cached_property
    def _evaluate(self) -> Callable[..., Any]:
        def forward(variables: Tree, batch: Batch) -> Any:
            return self.model.apply(variables, *self.task.inputs(batch, jnp.int32(STEP), train=False), mutable=["stats"])[0]

        return _drawing(jax.jit(forward))

    @functools.cached_property
    def _layer(self) -> tuple[Tree, Callable[..., Tree]]:
        body = Stack(self.model.blocks, self.model.pattern, len(self.model.pattern), scan=False)
        layers = adapt(body, self.config.get("adapters"))
        x = jnp.zeros((GROUPS, LENGTH, WIDTH))
        variables = draw(lambda keys: layers.init(keys, x, _layer_context(jnp.ones(x.shape[:2], bool))))
        return variables, jax.jit(functools.partial(_value_and_gradients, layers))

    def _with_backend(self, backend: str) -> nn.Module:
        """The outermost layers of the subject that have a backend, side by side."""
        model = build(self.config, {"backend": backend}, **self._fields(scan=False))
        found: list[Part] = []
        for part in (part for block in pattern_blocks(model) for part in walk(block)):
            inner = any(part.where.startswith(f"{outer.where}.") for outer in found)
            if hasattr(part.value, "backend") and isinstance(part.value, nn.Module) and not inner:
                found.append(part)
        return _Side(tuple(part.value for part in found))

    def _init(self, model: nn.Module, keys: Mapping[str, Any]) -> Tree:
        batch = jax.tree.map(jnp.asarray, self.batch())
        return model.init(keys, *self.task.inputs(batch, jnp.int32(0), train=False), mutable=["params", *STATE])

    def _fields(self, **fields: Any) -> dict[str, Any]:
        """Those of the fields that this model has."""
        return {name: value for name, value in {"dtype": "float32", **fields}.items() if name in self.config["model"]}


@functools.lru_cache(maxsize=KEPT)
def programs(subject: Subject, home: str = "") -> Programs:
    """The programs of a subject, where it is at home unless another place is named; compiled once while it is looked at."""
    return Programs(subject, home or subject.home)


class _Side(nn.Module):
    """Layers that are all given the same; the sum of what they give."""

    layers: tuple[nn.Module, ...]

    @nn.compact
    def __call__(self, x: Any, ctx: Context) -> Any:
        return sum(layer.copy(name=f"layer_{i}")(x, ctx) for i, layer in enumerate(self.layers))


class _Watched(LearningModel):
    """A model that keeps what it gave last."""

    outputs: Any = None

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        found = super().__call__(*args, **kwargs)
        self.outputs = found[0] if isinstance(found, tuple) else found
        return found


@contextlib.contextmanager
def fixed_draws(drawn: set[str] | None = None) -> Iterator[None]:
    """While a model is traced in here, each of its layers draws from the same key; notes the streams in `drawn`."""

    def make_rng(_: nn.Module, name: str = "params") -> Any:
        if drawn is not None and name in STREAMS:
            drawn.add(name)
        return jax.random.key(1 + STREAMS.index(name) if name in STREAMS else 0)

    with mock.patch.object(nn.Module, "make_rng", make_rng):
        yield


@contextlib.contextmanager
def blocks_traced_once() -> Iterator[None]:
    """While a model is initialised for its shapes alone, a block that has been traced with inputs of the same shapes is not traced again:
    a pattern of 25 blocks is traced as the two or three that it is made of, and what several arms share, once.
    """
    call = stack._call

    def once(block: nn.Module, x: Any, carried: dict[str, Any], ctx: Context) -> Any:
        leaves, structure = jax.tree.flatten((x, carried, ctx))
        key = _fields_of(block), structure, tuple((jnp.shape(leaf), jnp.result_type(leaf)) for leaf in leaves)
        if key not in _shapes_of_blocks:
            out = call(block, x, carried, ctx)
            _shapes_of_blocks[key] = jax.tree.map(jax.typeof, (out, block.variables))
            return out
        out, variables = jax.tree.map(lambda like: jnp.zeros(like.shape, like.dtype), _shapes_of_blocks[key])
        for collection, tree in variables.items():
            for name, value in tree.items():
                block.put_variable(collection, name, value)
        return out

    with mock.patch.object(stack, "_call", once):
        yield


# What blocks give: their outputs and the variables that they make.
_shapes_of_blocks: dict[Any, Tree] = {}


def _fields_of(thing: Any) -> Any:
    """What tells a part of a model from another: its classes and fields, but not its name and place."""
    if isinstance(thing, Mapping):
        return tuple((name, _fields_of(part)) for name, part in thing.items())
    if isinstance(thing, tuple | list):
        return tuple(map(_fields_of, thing))
    if not dataclasses.is_dataclass(thing) or isinstance(thing, type):
        return thing
    names = [field.name for field in dataclasses.fields(thing) if field.init and field.name not in ("parent", "name")]
    return type(thing), tuple(_fields_of(getattr(thing, name)) for name in names)


def _drawing(function: Callable[..., Any]) -> Callable[..., Any]:
    def call(*args: Any) -> Any:
        with fixed_draws():
            return function(*args)

    return call


def draw(init: Callable[[Mapping[str, Any]], Tree]) -> dict[str, Tree]:
    """Variables like those that `init(keys)` gives: drawn parameters, none of them zero; state as it is there."""

    def made() -> Tree:
        return init(_keys())

    out = dict(jax.jit(made).trace().out_info)
    params = drawn(out.pop("params", {}))
    # Of the initialisation only the state is compiled; most models have none.
    state = jax.jit(lambda: without(made(), "params"))() if any(name in out for name in STATE) else {}
    # NumPy's: a step that is given its state for good must not take it from the next one.
    return {"params": params, **host({name: tree for name, tree in state.items() if name in STATE})}


def drawn(like: Tree) -> Tree:
    """Parameters of these shapes, none of them zero."""
    rng = np.random.default_rng(0)

    def leaf(like: Any) -> Any:
        fan_in = like.shape[-2] if len(like.shape) > 1 else 4
        value = rng.normal(size=like.shape) / np.sqrt(fan_in)
        return value.astype(like.dtype)

    return jax.tree.map(leaf, like)


def trace(model: nn.Module, inputs: jax.ShapeDtypeStruct, ctx: Context) -> tuple[Tree, Tree]:
    """Shapes of outputs and of variables and sown collections of a training pass that makes its own variables."""
    ctx = ctx.replace(train=True)
    mutable = ["params", "router_state", "losses", "stats", "measured", "routing"]
    return jax.eval_shape(lambda x: model.init_with_output(_keys(), x, ctx, mutable=mutable), inputs)


def example(config: Mapping[str, Any], rows: int = ROWS) -> tuple[jax.ShapeDtypeStruct, Context]:
    """Shape of a model's input, and a context in evaluation."""
    model = config["model"]
    if "image_size" in model:
        side = model["image_size"]
        return jax.ShapeDtypeStruct((rows, side, side, model["channels"]), jnp.float32), Context(step=jnp.int32(STEP))
    shape = (rows, config["data"]["seq_len"])
    ctx = Context(domain=jnp.zeros(shape, jnp.int32), step=jnp.int32(STEP))
    return jax.ShapeDtypeStruct(shape, jnp.int32), ctx


def _keys() -> dict[str, Any]:
    return {name: jax.random.key(i) for i, name in enumerate(("params", *STREAMS))}


def _value_and_gradients(layers: nn.Module, variables: Mapping[str, Tree], x: Any, valid: Any) -> Tree:
    """'y', 'losses', and 'gradients' of a projection of y and of the losses, in parameters and x."""

    def objective(params: Tree, x: Any) -> tuple[Any, Tree]:
        y, sown = layers.apply({**variables, "params": params}, x, _layer_context(valid), mutable=["losses", "stats"])
        losses = flatten(sown.get("losses", {}), "losses", total=True)
        y = jnp.where(valid[..., None], y, 0)
        return (y * jnp.cos(jnp.arange(y.shape[-1]))).sum() + sum(losses.values()), {"y": y, "losses": losses}

    gradients, out = jax.grad(objective, argnums=(0, 1), has_aux=True)(variables["params"], x)
    return {**out, "gradients": gradients}


def _layer_context(valid: Any) -> Context:
    """Of vectors without a text: ids are made up."""
    # Counts the valid tokens, so that padding between them changes no position.
    positions = jnp.maximum(jnp.cumsum(valid, 1) - 1, 0).astype(jnp.int32)
    return Context(
        valid=valid,
        positions=positions,
        segments=valid.astype(jnp.int32),
        token_ids=(5 * positions + 3) % VOCABULARY,
        domain=jnp.zeros_like(positions),
        step=jnp.int32(STEP),
    )


def without(tree: Mapping[str, Any], *names: str) -> dict[str, Any]:
    return {name: value for name, value in tree.items() if name not in names}


def host(tree: Tree) -> Tree:
    return jax.tree.map(np.asarray, tree)
