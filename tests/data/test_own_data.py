"""Data of one's own: which files are read, how they are divided, what is refused, and what becomes of them when they change."""

import hashlib
import json
import shutil
from collections import Counter
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet
import pytest
import tensorflow_datasets as tfds
from data.test_prepared_data import tiny
from PIL import Image

from configs import base_lm, base_vit
from moejax.core.errors import ConfigError
from moejax.data import info, make_iterator
from moejax.data.__main__ import main
from moejax.train import files, fit

SPLITS = ("train", "validation", "test")


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("MOEJAX_DATA", str(tmp_path / "cache"))


def text(path, **changes):
    return {"name": "text_files", "path": str(path), "batch_size": 1, "seq_len": 64, **changes}


def images(path, **changes):
    return {"name": "image_files", "path": str(path), "batch_size": 2, **changes}


def documents(config, split):
    """Each document of a split, put together from the windows that it was cut into."""
    found = Counter()
    for batch in make_iterator({**config, "seq_len": 8192}, split, num_epochs=1):
        for tokens, segments in zip(batch["tokens"], batch["segments"], strict=True):
            for segment in range(1, segments.max() + 1):
                found[tokens[segments == segment].astype(np.uint8).tobytes()] += 1
    return found


def expected_division(texts):
    """The documented rule: in the order of their hashes, 5 % of the bytes are the test, the next 5 % validation."""
    ordered = sorted(texts, key=lambda t: hashlib.sha256(t).hexdigest())
    total, splits = sum(map(len, texts)), {"test": [], "validation": [], "train": []}
    for each in ordered:
        split = next((s for s in ("test", "validation") if sum(map(len, splits[s])) < 0.05 * total), "train")
        splits[split].append(each)
    return splits


@pytest.fixture
def corpus(tmp_path):
    texts = [f"Document {i} says {'so ' * (5 + i % 7)}and ends.\n".encode() for i in range(60)]
    folder = tmp_path / "corpus"
    for i, each in enumerate(texts):
        file = folder / f"part{i % 3}" / f"{i}.txt"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(each)
    (folder / "notes.pdf").write_bytes(b"%PDF")
    (folder / "part0" / "again.txt").write_bytes(texts[0])  # kept once
    (folder / "part0" / "empty.txt").write_bytes(b"\n")
    return folder, texts


def test_a_folder_of_text_is_divided_by_the_hashes_of_its_documents(corpus):
    folder, texts = corpus
    expected = expected_division(texts)
    for split in SPLITS:
        assert documents(text(folder), split) == Counter(expected[split]), split
    assert dict(info(text(folder)).sizes) == {split: len(expected[split]) for split in SPLITS}


def test_a_pattern_takes_what_it_names(corpus):
    folder, texts = corpus
    config = text(folder / "part1" / "*")
    assert sum((documents(config, split) for split in SPLITS), Counter()) == Counter(texts[1::3])
    assert sum(info(text(folder / "**" / "1*.txt")).sizes.values()) == 11


def test_one_file_may_be_the_whole_corpus(tmp_path):
    lines = [f"line {i} of a long text\n".encode() for i in range(2000)]
    (tmp_path / "all.txt").write_bytes(b"\xef\xbb\xbf" + b"".join(lines))
    config = text(tmp_path / "all.txt")
    sizes = info(config).sizes
    assert 20 <= sum(sizes.values()) <= 25
    found = [documents(config, split) for split in SPLITS]
    assert sorted(line for part in found for piece in part for line in piece.splitlines(keepends=True)) == sorted(lines)


def test_sub_folders_are_the_splits(tmp_path):
    for split, many in (("train", 40), ("test", 2)):
        (tmp_path / "c" / split).mkdir(parents=True)
        for i in range(many):
            (tmp_path / "c" / split / f"{i}.txt").write_text(f"{split} number {i}\n")
    (tmp_path / "c" / "train" / "leak.txt").write_text("test number 0\n")
    config = text(tmp_path / "c")
    assert documents(config, "test") == Counter([b"test number 0\n", b"test number 1\n"])
    train, validation = documents(config, "train"), documents(config, "validation")
    assert len(validation) == 3  # the first 5 % of the bytes of 41 documents, one of which the test has
    assert train + validation == Counter(f"train number {i}\n".encode() for i in range(40))
    assert not train & validation
    shutil.rmtree(tmp_path / "c" / "test")
    with pytest.raises(ConfigError, match="has no split 'test'"):
        make_iterator(config, "test")
    (tmp_path / "c" / "stray.txt").write_text("x")
    with pytest.raises(ConfigError, match=r"stray\.txt lies beside the folders train"):
        info(config)


def test_records_are_documents(tmp_path):
    """Of JSON lines, Parquet, and Arrow as `datasets.save_to_disk` writes it (a stream) and as Arrow does (a file)."""
    texts = [f"record {i}" for i in range(40)]
    table = pa.table({"content": texts, "other": list(range(40))})
    folders = {name: tmp_path / name for name in ("jsonl", "parquet", "stream", "file")}
    for folder in folders.values():
        folder.mkdir()
    (folders["jsonl"] / "x.jsonl").write_text("".join(json.dumps({"content": t, "n": 1}) + "\n" for t in texts) + "\n")
    pa.parquet.write_table(table, folders["parquet"] / "x.parquet", row_group_size=7)
    with pa.ipc.new_stream(folders["stream"] / "data-00000-of-00001.arrow", table.schema) as writer:
        writer.write_table(table, max_chunksize=9)
    (folders["stream"] / "state.json").write_text("{}")
    (folders["stream"] / "cache-12ab.arrow").write_text("what `datasets` has computed")
    with pa.ipc.new_file(folders["file"] / "x.arrow", table.schema) as writer:
        writer.write_table(table, max_chunksize=9)
    for name, folder in folders.items():
        config = text(folder, column="content")
        found = sum((documents(config, split) for split in SPLITS), Counter())
        assert found == Counter(t.encode() for t in texts), name
        with pytest.raises(
            ConfigError, match=r"has no 'text', but content, (n|other); say where the text is with data\.column"
        ):
            info(text(folder))


def picture(size, level, mode="RGB"):
    shape = (*size, 3) if mode == "RGB" else size
    return Image.fromarray(np.full(shape, level, np.uint8), mode)


def gallery(folder, size=(8, 8), mode="RGB", many=15):
    for c, name in enumerate(("cats", "dogs")):
        (folder / name).mkdir(parents=True)
        for i in range(many):
            picture(size, 100 * c + i, mode).save(folder / name / f"{i}.png")
    return folder


@pytest.mark.parametrize(("mode", "channels"), [("RGB", 3), ("L", 1)])
def test_folders_of_images_are_classes(tmp_path, mode, channels):
    config = images(gallery(tmp_path / "g", mode=mode))
    described = info(config)
    assert (described.num_classes, described.image_shape) == (2, (8, 8, channels))
    assert dict(described.sizes) == {"train": 24, "validation": 3, "test": 3}
    seen = []
    for split in SPLITS:
        for batch in make_iterator(config, split, num_epochs=1):
            assert np.ptp(batch["image"], axis=(1, 2, 3)).max() == 0
            levels = np.round(batch["image"][:, 0, 0, 0] * 255).astype(int)
            seen += [
                (int(level), int(label)) for level, label, ok in zip(levels, batch["label"], batch["valid"], strict=True) if ok
            ]
    assert sorted(seen) == [(100 * c + i, c) for c in range(2) for i in range(15)]


def test_images_by_sub_folders(tmp_path):
    gallery(tmp_path / "g" / "train")
    gallery(tmp_path / "g" / "validation", many=2)
    assert dict(info(images(tmp_path / "g")).sizes) == {"train": 30, "validation": 4}


def test_images_of_unequal_sizes_are_resized_to_a_size(tmp_path):
    folder = gallery(tmp_path / "g")
    picture((12, 8), 7).save(folder / "cats" / "long.png")
    with pytest.raises(ConfigError, match=r"differ in size \(.* is 8 x 8, .*long\.png 12 x 8\); set data\.image_size"):
        info(images(folder))
    assert info(images(folder, image_size=6)).image_shape == (6, 6, 3)
    assert next(make_iterator(images(folder, image_size=6), "test"))["image"].shape == (2, 6, 6, 3)


def test_a_photograph_on_its_side_is_turned(tmp_path):
    pixels = np.zeros((4, 8, 3), np.uint8)
    pixels[:, :4] = 255
    turned = Image.Exif()
    turned[0x0112] = 6
    for name in ("a", "b"):
        (tmp_path / "g" / name).mkdir(parents=True)
        for i in range(3):
            Image.fromarray(pixels).save(tmp_path / "g" / name / f"{i}.png", exif=turned)
    assert info(images(tmp_path / "g")).image_shape == (8, 4, 3)
    image = next(make_iterator(images(tmp_path / "g"), "train"))["image"][0]
    np.testing.assert_array_equal(image[:4], 1)
    np.testing.assert_array_equal(image[4:], 0)


def test_what_cannot_be_used_says_why(tmp_path):
    def refused(config, message):
        with pytest.raises(ConfigError, match=message) as caught:
            info(config)
        assert "\n" not in str(caught.value)

    empty = tmp_path / "empty"
    empty.mkdir()
    refused(text(empty), r"data\.path='.*empty' holds no files that end in \.txt, \.jsonl")
    refused(text(tmp_path / "nowhere"), r"data\.path='.*nowhere' is not there; give a folder, a pattern")
    refused(text(tmp_path / "*.txt"), r"holds no files")
    refused(images(empty), r"holds no files that end in \.png")
    (empty / "a.txt").write_text("one")
    refused(text(empty), r"holds 1 documents and so none for the split 'train'; at least 3")
    (empty / "b.txt").write_bytes(b"abc\xe9def")
    refused(text(empty), r"b\.txt is no UTF-8 text \(byte 3 is 0xe9\); convert it \(`iconv")
    (empty / "b.txt").unlink()
    (empty / "c.jsonl").write_text('{"text": "x"}\nnothing\n')
    refused(text(empty), r"line 2 of .*c\.jsonl is no JSON")
    (empty / "c.jsonl").write_text('{"text": 3}\n')
    refused(text(empty), r"'text' in line 1 of .*c\.jsonl is no text but int")
    (empty / "c.jsonl").unlink()
    (empty / "d.parquet").write_text("x")
    refused(text(empty), r"d\.parquet cannot be read as parquet")

    one = gallery(tmp_path / "one")
    shutil.rmtree(one / "dogs")
    refused(images(one), r"has one class only, 'cats'; a classifier needs a folder for each")
    gallery(tmp_path / "more")
    (tmp_path / "more" / "cats" / "broken.png").write_bytes(b"x")
    refused(images(tmp_path / "more"), r"broken\.png cannot be read as an image")
    whole = (tmp_path / "more" / "cats" / "1.png").read_bytes()
    (tmp_path / "more" / "cats" / "broken.png").write_bytes(whole[:48])
    refused(images(tmp_path / "more"), r"broken\.png cannot be read as an image")
    (tmp_path / "more" / "cats" / "broken.png").rename(tmp_path / "more" / "broken.png")
    refused(images(tmp_path / "more"), r"broken\.png lies in no class's folder; .* such as cats/broken\.png")
    Image.fromarray(np.zeros((8, 8), np.uint16)).save(tmp_path / "more" / "cats" / "deep.png")
    (tmp_path / "more" / "broken.png").unlink()
    refused(images(tmp_path / "more"), r"deep\.png is an image of mode 'I;16'; convert it to 8 bits")
    refused({"name": "text_files", "batch_size": 1}, r"data\.name='text_files' needs data\.path")
    refused(
        {"name": "c4", "batch_size": 1, "path": "/x"},
        r"data\.path='/x' does not go with .*'c4'; it is for text_files, tfds_text",
    )
    refused({"name": "c4", "batch_size": 1, "column": "x"}, r"data\.column='x' does not go with")
    refused(text(empty, domains=("code",)), r"unknown domain 'code' .*; it has none, so set data\.domains to None")


def test_prepared_data_are_renewed_when_a_file_changes(corpus, tmp_path):
    folder, texts = corpus
    config = text(folder)
    before = files({"data": config})["data.path"]
    prepared = info(config), sorted((tmp_path / "cache").iterdir())
    assert (info(config), sorted((tmp_path / "cache").iterdir())) == prepared
    moved = Path(shutil.copytree(folder, tmp_path / "copy"))
    assert files({"data": text(moved)})["data.path"] == before
    file = folder / "part0" / "0.txt"
    file.write_bytes(texts[0].replace(b"Document", b"document"))
    (folder / "part0" / "again.txt").unlink()
    assert files({"data": config})["data.path"] != before
    found = sum((documents(config, split) for split in SPLITS), Counter())
    assert found == Counter([texts[0].replace(b"Document", b"document"), *texts[1:]])


def test_what_tfds_prepared_is_read_from_its_folder(tmp_path):
    features = {"words": tfds.features.Text()}
    examples = {"train": [{"words": f"Example {i}."} for i in range(100)]}
    tiny("mine", features, examples, tmp_path, "1.0.0")
    config = {"name": "tfds_text", "path": str(tmp_path / "mine"), "column": "words", "batch_size": 1, "seq_len": 64}
    assert dict(info(config).sizes) == {"train": 98, "validation": 2}
    found = documents(config, "train") + documents(config, "validation")
    assert found == Counter(f"Example {i}.".encode() for i in range(100))
    assert info({**config, "path": str(tmp_path / "mine" / "1.0.0")}) == info(config)
    with pytest.raises(ConfigError, match=r"has no feature 'text', but words; say where the text is with data\.column"):
        info({k: v for k, v in config.items() if k != "column"})
    with pytest.raises(ConfigError, match=r"holds no data set of TFDS"):
        info({**config, "path": str(tmp_path)})
    pictures = [{"image": np.full((4, 4, 1), i, np.uint8), "label": i % 3} for i in range(6)]
    features = {
        "image": tfds.features.Tensor(shape=(4, 4, 1), dtype=np.uint8),
        "label": tfds.features.ClassLabel(num_classes=3),
    }
    tiny("drawn", features, dict.fromkeys(("train", "validation"), pictures), tmp_path)
    described = info({"name": "tfds_images", "path": str(tmp_path / "drawn"), "batch_size": 2})
    assert (described.num_classes, described.image_shape, dict(described.sizes)) == (
        3,
        (4, 4, 1),
        {"train": 6, "validation": 6},
    )


def small(config):
    """Two steps of as little as there can be."""
    config.model.num_layers, config.model.d_model, config.train.steps, config.optimizer.warmup_steps = 2, 16, 2, 0
    for block in config.model.blocks.values():
        block.mixer.num_heads, block.mixer.num_kv_heads = 2, 1
    config.eval.every, config.eval.batches, config.checkpoint.every = 0, 1, 0
    config.data.batch_size = 2
    return config


def test_a_language_model_is_trained_on_files(corpus, tmp_path):
    config = small(base_lm.get_config())
    config.data.update(name="text_files", seq_len=16, domains=None)
    config.data.path = str(corpus[0])
    result = fit(config, 0, tmp_path / "run")
    assert np.isfinite(result.metrics["eval/bits_per_byte"])
    # Elsewhere, but the same: the same run. Another text: another one.
    config.data.path = str(shutil.copytree(corpus[0], tmp_path / "copy"))
    assert fit(config, 0, tmp_path / "run").metrics == result.metrics
    (tmp_path / "copy" / "new.txt").write_text("something new")
    with pytest.raises(ConfigError, match=r"holds a run whose data\.path was other data than what is there now"):
        fit(config, 0, tmp_path / "run")


def test_a_vision_model_is_trained_on_folders_of_images(tmp_path):
    config = small(base_vit.get_config())
    config.data.name, config.data.path = "image_files", str(gallery(tmp_path / "g"))
    config.model.image_size, config.model.channels, config.model.patch_size = 8, 3, 4
    result = fit(config, 0, tmp_path / "run")
    assert 0 <= result.metrics["eval/accuracy"] <= 1


def test_a_split_that_there_is_not_is_told_before_anything_is_trained(corpus, tmp_path):
    config = small(base_lm.get_config())
    for name, message in (
        ("embedded_text", r"no split 'valid'; did you mean 'validation'\? \(eval\.split\)"),
        ("text_files", r"no split"),
    ):
        config.data.update(name=name, domains=None, seq_len=16)
        config.data.path = str(corpus[0]) if name == "text_files" else None
        config.eval.split = "valid"
        with pytest.raises(ConfigError, match=message):
            fit(config, 0, tmp_path / name)
        assert not (tmp_path / name / "metrics.jsonl").exists()


def test_the_command_shows_ones_own(corpus, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    assert main(["--name=text_files", f"--path={corpus[0]}"]) == 0
    told = capsys.readouterr().out
    assert "text_files" in told
    assert f"config.data.name = 'text_files', config.data.path = '{corpus[0]}'" in told
    assert main(["--path=/x"]) == 2
    assert "--path needs --name, one of text_files, image_files" in capsys.readouterr().err
    assert main(["--name=text_files"]) == 2
    assert "needs data.path" in capsys.readouterr().err
