"""LoRA adapters of the package `peft`, in and out: a folder with adapter_config.json and adapter_model.safetensors.

base = mj.pretrained.load("smollm2-135m")
found = mj.pretrained.load_adapter("my_lora", base)
model = mj.models.network({"model": base.model, "adapters": found.adapters})
params = mj.join_adapters(base.variables["params"], found.params)
mj.pretrained.save_adapter(found, base, "copy_of_my_lora")
"""

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from moejax.core.errors import ConfigError
from moejax.core.files import write_json
from moejax.core.paths import listed
from moejax.layers.adapters.places import PREFIX
from moejax.models.registry import build, network
from moejax.pretrained.convert import Pretrained, by_path, flat, make, trace, tree, write
from moejax.pretrained.family import Family, Settings, families
from moejax.pretrained.safetensors_files import SafetensorsStore
from moejax.pretrained.store import Store
from moejax.pretrained.table import ALONE_TRANSPOSE, EXPERT, TRANSPOSE, Row, check, links

CONFIG, TENSORS = "adapter_config.json", "adapter_model.safetensors"
BASE = "base_model.model."
# What changes what an adapter computes, and the one value of it that is computed here.
_PLAIN = {
    "bias": "none", "use_dora": False, "lora_bias": False, "fan_in_fan_out": False, "modules_to_save": None, "layers_to_transform": None,
    "rank_pattern": {}, "alpha_pattern": {}, "alora_invocation_tokens": None, "trainable_token_indices": None,
}  # fmt: skip


class PeftAdapter(NamedTuple):
    """A LoRA adapter in our words.

    Attributes:
      adapters: `config.adapters`: its name, and the adapter.
      params: its parameters, for `join_adapters`.
    """

    adapters: Mapping[str, Any]
    params: Mapping[str, Any]


def load_adapter(folder: str | Path, base: Pretrained, name: str = "main") -> PeftAdapter:
    """A LoRA adapter that `peft` saved, for a model that `load` gave.

    Args:
      folder: with adapter_config.json and adapter_model.safetensors.
      base: the model that it was trained on.
      name: what it shall be called.

    Raises:
      ConfigError: another kind of adapter, or an option of `peft` that changes what it computes and is not computed here; tensors that are
        missing, left over or of another shape. Names the file and the tensor.
    """
    folder, family = Path(folder), families[base.family]()
    said = _settings(folder)
    store = _Adapter(folder / TENSORS)
    rows = _rows(family, base.model, store)
    rank, alpha = said("r"), said("lora_alpha")
    rooted = said("use_rslora", False)
    adapter = {
        "kind": "rs_lora" if rooted else "lora",
        "rank": rank,
        "scale": float(alpha) if rooted else alpha / rank,
        "dropout": float(said("lora_dropout", 0.0)),
        "targets": tuple(sorted({target for target, _ in rows.values()})),
    }
    shapes = _shapes(base, {name: adapter}, family)
    table = tuple(row for their, (_, our) in rows.items() for row in _factors(their, our, name))
    wanted = {path: leaf.shape for path, leaf in shapes.items()}
    found = links(table, family.stacks(build(base.model)), wanted)
    check(found, store, wanted, lambda key: False)
    ends = by_path(found)
    return PeftAdapter(
        {name: adapter}, tree({path: make(ends[path], store, leaf, None) for path, leaf in shapes.items()})["params"]
    )


def save_adapter(adapter: PeftAdapter, base: Pretrained, folder: str | Path, dtype: Any = np.float32) -> None:
    """Writes an adapter as `peft` loads it.

    Args:
      adapter: one of kind 'lora' or 'rs_lora' around linear maps. `split_adapters` gives its parameters out of a trained tree.
      base: the model that it is for.
      folder: where to; made if need be.
      dtype: of the tensors.

    Raises:
      ConfigError: several adapters, another kind, or one around something that published files do not hold as a linear map.
    """
    if len(adapter.adapters) != 1:
        raise ConfigError(f"a folder of peft holds one adapter, not {len(adapter.adapters)}: {listed(adapter.adapters)}")
    ((name, spec),) = adapter.adapters.items()
    kinds = {"lora": False, "rs_lora": True}
    if spec["kind"] not in kinds:
        raise ConfigError(f"adapters.{name}.kind='{spec['kind']}' cannot be written for peft; known are {', '.join(kinds)}")
    family = families[base.family]()
    shapes = {path: leaf.shape for path, leaf in _shapes(base, {name: spec}, family).items()}
    arrays = flat({"params": adapter.params})
    if {path: x.shape for path, x in arrays.items()} != shapes:
        wrong = sorted(path for path in {*arrays, *shapes} if path not in arrays or arrays[path].shape != shapes.get(path))
        raise ConfigError(f"the adapter's parameters are not those of its config: {listed(wrong)}")
    rows = {their: our for their, our in _linear(family, base.model).items() if _scope(our[1], name) in _modules(shapes)}
    table = tuple(row for their, (_, our) in rows.items() for row in _factors(their, our, name))
    found = links(table, family.stacks(build(base.model)), shapes)
    rank, rooted = spec["rank"], kinds[spec["kind"]]
    settings = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": None,
        "r": rank,
        "lora_alpha": spec["scale"] if rooted else spec["scale"] * rank,
        "use_rslora": rooted,
        "lora_dropout": spec.get("dropout", 0.0),
        "target_modules": sorted({their.removesuffix(".weight").rpartition(".")[2] for their in rows}),
        "bias": "none",
        "inference_mode": True,
    }
    target = Path(folder)
    write(target, found, arrays, dtype, name=TENSORS, shard_bytes=2**62)
    write_json(target / CONFIG, settings, indent=2)


class _Adapter(SafetensorsStore):
    """The tensors without what `peft` puts before their names."""

    def __init__(self, path: Path):
        super().__init__(path)
        self._entries = {key.removeprefix(BASE): entry for key, entry in self._entries.items()}


def _settings(folder: Path) -> Settings:
    place = folder / CONFIG
    try:
        said = Settings(json.loads(place.read_text()), str(place))
    except FileNotFoundError:
        raise ConfigError(f"{folder} has no {CONFIG}") from None
    except ValueError as error:
        raise ConfigError(f"{place} cannot be read: {error}") from None
    said.only("peft_type", "LORA")
    for key, plain in _PLAIN.items():
        if said(key, plain) != plain and said(key, plain):
            raise ConfigError(f"{place} has {key}={said(key)!r}, which moejax does not compute")
    return said


def _linear(family: Family, model: Mapping[str, Any]) -> dict[str, tuple[str, str]]:
    """Published key of each linear map -> the target that names it here, and our path of it."""
    found = {}
    for row in family.table(model):
        if isinstance(row.theirs, str) and EXPERT not in row.theirs and row.theirs.endswith(".weight"):
            ours = str(row.ours)
            module, _, leaf = ours.rpartition("/")
            if leaf == "kernel":
                found[row.theirs] = (module.replace("stack/{layer}", "*"), ours)
            elif leaf.startswith("w_"):
                found[row.theirs] = (ours.replace("stack/{layer}", "*"), ours)
    return found


def _rows(family: Family, model: Mapping[str, Any], store: Store) -> dict[str, tuple[str, str]]:
    """Those of `_linear` that an adapter has tensors of."""
    known = _linear(family, model)
    names = {re.sub(r"\.\d+\.", ".{layer}.", key, count=1) for key in store.names()}
    adapted = {name.removesuffix(".lora_A.weight") + ".weight" for name in names if name.endswith(".lora_A.weight")}
    if not adapted or adapted - known.keys():
        what = listed(sorted(adapted - known.keys())) or "nothing"
        raise ConfigError(f"{store.place} adapts {what}; known are {listed(sorted(known), 20)}")
    return {name: known[name] for name in sorted(adapted)}


def _factors(theirs: str, ours: str, name: str) -> tuple[Row, Row]:
    """A and B. What the published map has in another order than ours has its outputs so, and B with them."""
    base, scope = theirs.removesuffix(".weight"), _scope(ours, name)
    change = TRANSPOSE if ours.endswith("/kernel") else ALONE_TRANSPOSE
    return Row(f"{base}.lora_A.weight", f"{scope}/a", change), Row(f"{base}.lora_B.weight", f"{scope}/b", change)


def _scope(ours: str, name: str) -> str:
    """Where the adapter's parameters lie, for a matrix of ours."""
    module, _, leaf = ours.rpartition("/")
    return f"{module}/{PREFIX}{name}" if leaf == "kernel" else f"{module}/{PREFIX}{name}/{leaf}"


def _modules(shapes: Mapping[str, Any]) -> set[str]:
    """The scopes that hold parameters, with `{layer}` for the layer."""
    return {re.sub(r"^stack/(repeats|repeat_\d+)/[^/]+", "stack/{layer}", path).rpartition("/")[0] for path in shapes}


def _shapes(base: Pretrained, adapters: Mapping[str, Any], family: Family) -> dict[str, Any]:
    """Of the adapter's parameters alone."""
    found, _ = trace(network({"model": base.model, "adapters": adapters}), family)
    return {path: leaf for path, leaf in found.items() if f"/{PREFIX}" in path}
