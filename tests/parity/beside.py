"""A small random model of transformers, the same model here, and how far their numbers lie apart."""

import json
from pathlib import Path
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import numpy as np
import torch
import transformers

import moejax as mj


class Beside(NamedTuple):
    """One model twice: theirs in eval mode and float32, and ours as loaded from what theirs saved."""

    theirs: Any
    model: nn.Module
    found: Any


def make(architecture: str, folder: Path, seed: int = 0, **settings: Any) -> Beside:
    """A model of transformers with every parameter drawn at random, norms and biases too; saved, and loaded here."""
    cls = getattr(transformers, architecture)
    torch.manual_seed(seed)
    config = cls.config_class(**settings)
    config._attn_implementation = "eager"
    theirs = cls(config).eval().float()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, x in [*theirs.named_parameters(), *theirs.named_buffers()]:
            if x.ndim and torch.is_floating_point(x) and "inv_freq" not in name:
                scale = 0.2 if x.ndim == 1 else 1.5 * x.shape[-1] ** -0.5
                noise = torch.empty_like(x).normal_(generator=generator) * scale
                x.copy_(noise + (1.0 if x.ndim == 1 and "norm" in name.lower() and name.endswith("weight") else 0.0))
    theirs.save_pretrained(folder)
    found = mj.pretrained.load(str(folder))
    return Beside(theirs, mj.models.build(found.model), found)


def back(beside: Beside, folder: Path) -> Any:
    """Ours, exported, as transformers loads it: every tensor must be the one that it came from, and none may be missing or left over."""
    mj.pretrained.save(beside.found, folder)
    again, info = type(beside.theirs).from_pretrained(folder, output_loading_info=True, attn_implementation="eager")
    assert not info["missing_keys"], info
    assert not info["unexpected_keys"], info
    state = again.state_dict()
    for name, x in beside.theirs.state_dict().items():
        assert torch.equal(x, state[name]), name
    said = json.loads((folder / "config.json").read_text())
    for key, value in beside.theirs.config.to_diff_dict().items():
        if key in said and key not in ("dtype", "rope_parameters", "architectures", "transformers_version"):
            assert said[key] == value or said[key] == getattr(again.config, key), key
    return again.eval()


def tokens(vocab: int, shape: tuple[int, int] = (2, 13), seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, vocab, shape)


def distance(ours: Any, theirs: Any) -> float:
    """The largest difference, relative to the largest value."""
    ours = np.asarray(ours, np.float32)
    theirs = theirs.detach().float().numpy()
    assert ours.shape == theirs.shape
    return float(np.abs(ours - theirs).max() / np.abs(theirs).max())


def blocks_of(beside: Beside, *inputs: Any, path: str = "stack") -> list[np.ndarray]:
    """What every block gives, in the order of the layers."""

    def asked(module: nn.Module, method: str) -> bool:
        return (
            module.scope is not None and len(module.path) >= 2 and module.path[-2].startswith("repeat") and method == "__call__"
        )

    _, seen = jax.jit(
        lambda variables, *args: beside.model.apply(variables, *args, capture_intermediates=asked, mutable=["intermediates"])
    )(beside.found.variables, *inputs)
    inside = seen["intermediates"][path]["repeats"]
    names = sorted(inside, key=lambda name: int(name.partition("_")[0]))
    given = [inside[name]["__call__"][0] for name in names]
    repeats = given[0].shape[0]
    return [np.asarray(given[i][repeat]) for repeat in range(repeats) for i in range(len(given))]
