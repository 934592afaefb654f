"""GGUF files, small and written here: rows of rotary planes in their order, quantized tensors, the tokenizer, and damage."""

from pathlib import Path

import gguf
import numpy as np
import pytest

import moejax as mj
from moejax.core.errors import ConfigError

HEADS, KV, D, F, V = 4, 2, 32, 64, 96
WORDS = ["<|end|>", "<|start|>", "a", "b", "c", "Ġ", "1", "2", "ab", "Ġc", "Ġ1"]
MERGES = ["a b", "Ġ c", "Ġ 1"]


@pytest.fixture
def tensors(rng: np.random.Generator) -> dict[str, np.ndarray]:
    shapes = {"token_embd.weight": (V, D), "output_norm.weight": (D,)}
    for i in range(2):
        block = {"attn_norm": (D,), "ffn_norm": (D,), "attn_q": (D, D), "attn_k": (D // 2, D), "attn_v": (D // 2, D)}
        block |= {"attn_output": (D, D), "ffn_gate": (F, D), "ffn_up": (F, D), "ffn_down": (D, F)}
        shapes |= {f"blk.{i}.{name}.weight": shape for name, shape in block.items()}
    return {name: rng.normal(size=shape).astype(np.float32) for name, shape in shapes.items()}


def write(path: Path, tensors: dict[str, np.ndarray], architecture: str = "llama", pre: str = "smollm") -> Path:
    """Every matrix in eight bits."""
    file = gguf.GGUFWriter(path, architecture)
    file.add_block_count(2)
    file.add_context_length(48)
    file.add_embedding_length(D)
    file.add_feed_forward_length(F)
    file.add_head_count(HEADS)
    file.add_head_count_kv(KV)
    file.add_rope_freq_base(5e3)
    file.add_layer_norm_rms_eps(1e-5)
    file.add_vocab_size(V)
    file.add_tokenizer_model("gpt2")
    file.add_tokenizer_pre(pre)
    file.add_token_list(WORDS)
    file.add_token_types([3, 3] + [1] * (len(WORDS) - 2))
    file.add_token_merges(MERGES)
    for name, x in tensors.items():
        eight = gguf.GGMLQuantizationType.Q8_0
        if x.ndim == 1:
            file.add_tensor(name, x)
        else:
            file.add_tensor(name, gguf.quants.quantize(x, eight), raw_dtype=eight)
    file.write_header_to_file()
    file.write_kv_data_to_file()
    file.write_tensors_to_file()
    file.close()
    return path


def rounded(x: np.ndarray) -> np.ndarray:
    """To 255 steps of the largest of every 32 neighbours, whose scale is a half float."""
    blocks = x.reshape(-1, 32)
    scale = np.abs(blocks).max(1, keepdims=True) / 127
    return (np.round(blocks / scale) * scale.astype(np.float16).astype(np.float32)).reshape(x.shape)


def test_every_tensor_finds_its_place(tmp_path: Path, tensors: dict[str, np.ndarray]) -> None:
    found = mj.pretrained.load(str(write(tmp_path / "m.gguf", tensors)))
    assert found.model["max_length"] == 48
    assert found.model["norm"] == {"kind": "rms_norm", "epsilon": 1e-5}
    assert found.model["blocks"]["dense"]["mixer"]["rope_base"] == 5e3
    assert found.model["tied"]
    params = found.variables["params"]
    block = params["stack"]["repeats"]["0_dense"]
    assert np.abs(params["embedding"] - rounded(tensors["token_embd.weight"])).max() < 1e-6
    for i in range(2):
        for name, ours in (("ffn_up", block["ffn"]["expert"]["w_up"][i, 0]), ("attn_v", block["mixer"]["v"]["kernel"][i])):
            assert np.abs(ours.T - rounded(tensors[f"blk.{i}.{name}.weight"])).max() < 1e-6
        for name, heads in (("q", HEADS), ("k", KV)):
            stored = rounded(tensors[f"blk.{i}.attn_{name}.weight"])
            ours = block["mixer"][name]["kernel"][i].T
            size = len(stored) // heads
            for row in range(len(stored)):
                head, at = divmod(row, size)
                # Row 2p and 2p + 1 of the file are plane p, whose rows lie half a head apart here.
                place = head * size + at // 2 + (at % 2) * (size // 2)
                assert np.abs(ours[place] - stored[row]).max() < 1e-6
        np.testing.assert_array_equal(block["ffn_norm"]["norm"]["scale"][i], tensors[f"blk.{i}.ffn_norm.weight"])


def test_its_tokenizer(tmp_path: Path, tensors: dict[str, np.ndarray]) -> None:
    """Numbers are cut into digits, and what is special is never made of text."""
    path = str(write(tmp_path / "m.gguf", tensors))
    tokenizer = mj.pretrained.tokenizer_of(path)
    assert tokenizer.encode("abb c 12<|end|>").tokens == ["ab", "b", "Ġc", "Ġ", "1", "2", "<|end|>"]
    other = mj.pretrained.tokenizer_of(str(write(tmp_path / "n.gguf", tensors, pre="gpt-2")))
    assert other.encode(" 1").tokens == ["Ġ1"]
    with pytest.raises(ConfigError, match=r"cuts text into words by the rules 'smolm'; did you mean 'smollm'"):
        mj.pretrained.tokenizer_of(str(write(tmp_path / "o.gguf", tensors, pre="smolm")))
    words = mj.data.tokenizers.load(path)
    ids, sizes = words.encode(b"abb c")
    assert ids.tolist() == [8, 3, 9]
    assert sizes.tolist() == [2, 1, 2]
    assert words.vocab_size == len(WORDS)


def test_damage(tmp_path: Path, tensors: dict[str, np.ndarray]) -> None:
    path = write(tmp_path / "m.gguf", tensors)
    data = path.read_bytes()
    path.write_bytes(data[:-2000])
    with pytest.raises(ConfigError, match=r"m.gguf is cut off in tensor 'blk.1.ffn_down.weight': it has \d+ bytes"):
        mj.pretrained.load(str(path))
    path.write_bytes(data[:300])
    with pytest.raises(ConfigError, match=r"m.gguf is no GGUF file, or is cut off in its metadata"):
        mj.pretrained.load(str(path))
    path.write_bytes(b"PK\3\4" + data[4:])
    with pytest.raises(ConfigError, match=r"m.gguf is no GGUF file"):
        mj.pretrained.load(str(path))
    without = {name: x for name, x in tensors.items() if name != "blk.1.attn_v.weight"}
    with pytest.raises(ConfigError, match=r"m.gguf lacks model.layers.1.self_attn.v_proj.weight for this config"):
        mj.pretrained.load(str(write(path, without)))
    with pytest.raises(ConfigError, match=r"m.gguf has tensors that the model .* has no place for: rope_freqs.weight"):
        mj.pretrained.load(str(write(path, {**tensors, "rope_freqs.weight": np.ones(4, np.float32)})))
    with pytest.raises(ConfigError, match=r"m.gguf is of architecture 'lama'; did you mean 'llama'"):
        mj.pretrained.load(str(write(path, tensors, architecture="lama")))
