"""Compiling a config's train step for devices that are not there: a slice of a TPU pod, or simulated ones.

    where = topology("v5e:16x16")
    program = program_for(config, where)      # shapes and shardings only: nothing is allocated
    compiled = compile_lowered(lower_train(program, where), where)  # the real compiler of that chip

libtpu has the compiler and needs no TPU (`pip install "jax[tpu]"`). 'cpu:8' is this machine's processor as 8 devices.
"""

import contextlib
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from ml_collections import ConfigDict

from moejax.core.errors import ConfigError, nearest
from moejax.core.fields import Count, described, fits, short
from moejax.data.config import TextConfig, parse
from moejax.parallel.mesh import make_mesh
from moejax.parallel.scope import Exchange, Parallel
from moejax.train.program import Program, get_program
from moejax.train.settings import TrainSettings, normalized, plain, section
from pallas_kernels.ahead import devices_of
from pallas_kernels.chips import GIB, TPUS, Tpu
from pallas_kernels.implementations import target

DEFAULT_MESH = "fsdp"  # of a config that names none

# Slices of pods that clouds offer, by chip. libtpu describes more (any multiple of a host's 2x2 chips), and so does `topology`.
_FLAT = ("2x2", "2x4", "4x4", "4x8", "8x8", "8x16", "16x16")
_CUBES = ("2x2x1", "2x2x2", "2x2x4", "2x4x4", "4x4x4", "4x4x8", "4x8x8", "8x8x8", "8x8x16", "8x16x16")
SLICES = {"v5e": _FLAT, "v6e": _FLAT, "v5p": _CUBES, "tpu7x": _CUBES}


class DoesNotFit(ConfigError):
    """A program that needs more memory than a chip has."""


@dataclass(frozen=True)
class Topology:
    """Devices to compile for.

    Attributes:
      name: 'v5e:16x16'.
      kind: of chip, 'v5e'; 'cpu' for simulated devices.
      devices: as JAX counts them; of tpu7x two a chip.
      chip: what one of them can do; None of a CPU.
    """

    name: str
    kind: str
    devices: tuple[jax.Device, ...]
    chip: Tpu | None


def topology(name: str) -> Topology:
    """The devices of `'<chip>:<slice>'`, such as 'v5e:16x16' or 'v5p:4x4x8', or of 'cpu:8'.

    Raises:
      ConfigError: no such chip or slice; lists those that there are.
    """
    kind, _, slice_ = name.partition(":")
    if kind == "cpu":
        return Topology(name, kind, _simulated(name, slice_), None)
    if kind not in SLICES:
        raise ConfigError(f"'{name}': unknown chip '{kind}'{nearest(kind, [*SLICES, 'cpu'])}")
    if not re.fullmatch(r"\d+(x\d+)+", slice_):
        raise ConfigError(f"'{name}' names no slice; write {kind}:{SLICES[kind][-1]}; common ones: {', '.join(SLICES[kind])}")
    try:
        devices = devices_of(name)
    except jax.errors.JaxRuntimeError as error:
        reason = str(error).split("\n")[0]
        known = ", ".join(f"{kind}:{s}" for s in SLICES[kind])
        raise ConfigError(f"the TPU compiler knows no slice '{name}'; common ones: {known} ({reason})") from None
    return Topology(name, kind, devices, TPUS[kind])


def program_for(config: Mapping[str, Any] | ConfigDict, where: Topology) -> Program:
    """The program of a config over all devices of a topology, with the mesh and exchange that it names.

    Raises:
      ConfigError: the config is wrong, or its sizes do not divide as the mesh asks; names the key to change.
    """
    config = normalized(config)
    mesh = make_mesh(config.get("mesh") or DEFAULT_MESH, where.devices)
    parallel = Parallel(mesh, section(Exchange, config, "exchange"))
    data = parse(config.data)
    domains = (data.domains or (data.base,)) if isinstance(data, TextConfig) else ()
    context = {"domains": tuple(domains), "bytes_per_token": 1.0}
    return get_program(plain(config), section(TrainSettings, config, "train"), batch_shapes(config), context, parallel=parallel)


def program_of(config: Mapping[str, Any] | ConfigDict) -> Program:
    """The program of a config on one device, for questions about its shapes: nothing is read but the config."""
    config = normalized(config)
    return get_program(plain(config), section(TrainSettings, config, "train"), batch_shapes(config), {})


def lower_train(program: Program, where: Topology) -> jax.stages.Lowered:
    """The train step, traced with the kernels of the topology's chip."""
    with target(where.kind):
        return program.lower_train()


def compiler_options(program: Program, where: Topology) -> dict[str, str]:
    """What the topology's compiler is told."""
    with target(where.kind):
        return program.compiler_options()


def compile_lowered(
    lowered: jax.stages.Lowered, where: Topology, options: Mapping[str, str] | None = None
) -> jax.stages.Compiled:
    """The program for the topology, by the chip's compiler.

    Args:
      lowered: from `lower_train`.
      where: what it was lowered for.
      options: of the compiler, such as those of `compiler_options`.

    Raises:
      DoesNotFit: the compiler found no way to stay within the chip's memory; says by how much.
      ConfigError: it refuses the program for another reason; says which.
    """
    try:
        return lowered.compile(compiler_options=dict(options or {}) or None)
    except jax.errors.JaxRuntimeError as error:
        if where.chip is None:
            raise
        if "RESOURCE_EXHAUSTED" in str(error):
            raise DoesNotFit(_needed(str(error), where)) from error
        reason = str(error).split("\n")[0]
        raise ConfigError(
            f"the compiler refuses this program for {where.name}; another mesh or exchange may do: {reason}"
        ) from error


def batch_shapes(config: Mapping[str, Any] | ConfigDict) -> dict[str, jax.ShapeDtypeStruct]:
    """What a train step of this config is given, by `moejax.data.make_iterator`'s contract; no data is read."""
    data = parse(config["data"])
    b = data.batch_size

    def shape(dtype: Any, *dims: int) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct((b, *dims), dtype)

    if isinstance(data, TextConfig):
        names = ("tokens", "targets", "segments", "positions", "domain", *(() if data.tokenizer == "bytes" else ("bytes",)))
        return {name: shape(jnp.int32, data.seq_len) for name in names} | {"valid": shape(jnp.bool_, data.seq_len)}
    side, channels = (_size(config["model"], name, data.name) for name in ("image_size", "channels"))
    return {"image": shape(jnp.float32, side, side, channels), "label": shape(jnp.int32), "valid": shape(jnp.bool_)}


def _size(model: Any, name: str, images: str) -> int:
    """The size of a model of images by name, which no model has been built yet to check."""
    if not fits(model.get(name), Count):
        raise ConfigError(
            f"model.{name}={short(model.get(name))} must be {described(Count)}: data.name='{images}' gives images; take a model of "
            "images, such as kind 'vit', or other data"
        )
    return model[name]


def _simulated(name: str, count: str) -> tuple[jax.Device, ...]:
    if not re.fullmatch(r"[1-9]\d*", count):
        raise ConfigError(f"'{name}' names no number of devices; write cpu:8")
    flag = "--xla_force_host_platform_device_count"
    if flag not in os.environ.get("XLA_FLAGS", ""):
        with contextlib.suppress(RuntimeError):  # once JAX has looked for devices, their number is what it is
            jax.config.update("jax_num_cpu_devices", int(count))
    devices = jax.devices("cpu")
    if len(devices) < int(count):
        raise ConfigError(
            f"'{name}' needs {count} simulated devices, and JAX has made {len(devices)}; set XLA_FLAGS={flag}={count}"
        )
    return tuple(devices[: int(count)])


def _needed(message: str, where: Topology) -> str:
    """The compiler's complaint, `... (26.95G) exceeds ...` or `Used 26.95G of 15.75G ...`, as a clause."""
    size = re.search(r"\((\d[\d.]*)G\) exceeds|Used (\d[\d.]*)G of", message)
    needs = f"{float(size[1] or size[2]) * GIB / 1e9:.2f} GB" if size else "more memory"
    return f"it needs {needs} a chip, and {where.kind} has {where.chip.hbm / 1e9:.2f} GB for programs"
