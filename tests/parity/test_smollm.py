"""SmolLM2-135M as it was published: the same numbers and the same words as in transformers, on real text."""

import copy
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
import torch
import transformers
from parity import beside

import moejax as mj

LENGTH, NEW = 128, 64
TEXTS = ("LICENSE", "docs/path_of_a_token.md")


@pytest.fixture(scope="module")
def both() -> Any:
    """Theirs, read by transformers from the same file, and ours."""
    file = mj.pretrained.find("smollm2-135m")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(
        file.parent, gguf_file=file.name, dtype=torch.float32, attn_implementation="eager"
    ).eval()
    theirs.generation_config.eos_token_id = None  # which ends a text early, and None as an argument says nothing
    found = mj.pretrained.load("smollm2-135m")
    return beside.Beside(theirs, mj.models.build({**found.model, "max_length": LENGTH}), found)


@pytest.fixture(scope="module")
def ids() -> np.ndarray:
    tokenizer = mj.pretrained.tokenizer_of("smollm2-135m")
    return np.array([tokenizer.encode(Path(text).read_text()).ids[10 : 10 + LENGTH] for text in TEXTS])


def test_logits_and_hidden_states(both: beside.Beside, ids: np.ndarray) -> None:
    with torch.no_grad():
        theirs = both.theirs(torch.tensor(ids), output_hidden_states=True)
    logits = np.asarray(jax.jit(both.model.apply)(both.found.variables, ids))
    assert beside.distance(logits, theirs.logits) < 1e-4
    for ours, hidden in zip(beside.blocks_of(both, ids)[:-1], theirs.hidden_states[1:-1], strict=True):
        assert beside.distance(ours, hidden) < 1e-4


def test_the_best_token_in_bfloat16(both: beside.Beside, ids: np.ndarray) -> None:
    """Of all positions 97.7 % keep float32's best token, and 96.5 % in theirs: 99 % of all is not reached.

    The lead of 0.2 was chosen after looking at these texts, so what is asked past it guards against change and proves nothing more.
    """
    logits = np.asarray(jax.jit(both.model.apply)(both.found.variables, ids))
    half = mj.models.build({**both.found.model, "dtype": "bfloat16"})
    ours = np.asarray(jax.jit(half.apply)(both.found.variables, ids)).argmax(-1)
    with torch.no_grad():
        theirs = copy.deepcopy(both.theirs).to(torch.bfloat16)(torch.tensor(ids)).logits.argmax(-1).numpy()
    best, (second, first) = logits.argmax(-1), np.moveaxis(np.sort(logits, -1)[..., -2:], -1, 0)
    assert (ours == best).mean() >= (theirs == best).mean() - 0.01
    clear = first - second > 0.2
    assert clear.mean() > 0.8
    assert (ours == best)[clear].mean() >= 0.99


@pytest.mark.parametrize("side", ["left", "right"])
def test_greedy_generation_with_padding(both: beside.Beside, ids: np.ndarray, side: str) -> None:
    """Prompts of two lengths. Where transformers wants padding on the left, the same prompts go there; each row alone is its own oracle."""
    lengths = np.array([21, 34])
    prompt = np.zeros((2, 34), np.int64)
    for i, n in enumerate(lengths):
        prompt[i, :n] = ids[i, :n]
    ours = mj.serve.generate(both.model, both.found.variables, prompt.astype(np.int32), lengths, NEW)
    settings = {"max_new_tokens": NEW, "do_sample": False, "use_cache": True, "pad_token_id": 0}
    with torch.no_grad():
        if side == "left":
            left = np.stack([np.roll(row, len(row) - n) for row, n in zip(prompt, lengths, strict=True)])
            mask = np.arange(34) >= 34 - lengths[:, None]
            theirs = both.theirs.generate(torch.tensor(left), attention_mask=torch.tensor(mask).long(), **settings)[:, 34:]
            expected = theirs.numpy()
        else:
            rows = [torch.tensor(prompt[i : i + 1, :n]) for i, n in enumerate(lengths)]
            expected = np.concatenate([both.theirs.generate(row, **settings)[:, row.shape[1] :].numpy() for row in rows])
    np.testing.assert_array_equal(np.asarray(ours.tokens), expected)


def test_export_loads_in_transformers(both: beside.Beside, ids: np.ndarray, tmp_path: Path) -> None:
    """And comes back exactly."""
    mj.pretrained.save(both.found, tmp_path, shard_bytes=10**8)
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, attn_implementation="eager").eval()
    for name, x in both.theirs.state_dict().items():
        assert torch.equal(x, again.state_dict()[name]), name
    jax.tree.map(np.testing.assert_array_equal, both.found.variables, mj.pretrained.load(str(tmp_path)).variables)
    assert {**mj.pretrained.config_of(str(tmp_path))} == dict(both.found.model)


def test_tokens() -> None:
    """Of text without digits, which transformers cuts otherwise when it reads a GGUF file: this family cuts numbers into digits."""
    file = mj.pretrained.find("smollm2-135m")
    theirs = transformers.AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
    ours = mj.pretrained.tokenizer_of("smollm2-135m")
    text = "".join(c for path in TEXTS for c in Path(path).read_text() if not c.isdigit())
    text += " <|im_start|>user\nhé, 日本 \t\t x<|im_end|>\n"
    assert ours.encode(text).ids == theirs(text).input_ids
    assert ours.decode(ours.encode(text).ids, skip_special_tokens=False) == text
    assert ours.encode(" 1984").tokens == ["Ġ", "1", "9", "8", "4"]
