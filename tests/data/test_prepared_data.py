"""Preparation (atomic, without TensorFlow, quick) and the reading of standard corpora that TFDS prepared."""

import errno
import io
import json
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import tensorflow_datasets as tfds
from data.oracle import expected_segments, segments_of
from PIL import Image

from moejax.core.errors import ConfigError
from moejax.core.files import Damaged
from moejax.data import info, make_iterator, prepare, storage
from moejax.data.__main__ import main


class _Tiny(tfds.core.GeneratorBasedBuilder, skip_registration=True):
    """A few examples under the name and with the features of a standard data set."""

    VERSION = tfds.core.Version("1.0.0")

    def _info(self):
        return tfds.core.DatasetInfo(builder=self, features=tfds.features.FeaturesDict(self.FEATURES))

    def _split_generators(self, dl_manager):
        return {split: enumerate(examples) for split, examples in self.EXAMPLES.items()}

    def _generate_examples(self):
        raise AssertionError("splits are given as iterables")


def tiny(name, features, examples, folder, version="1.0.0", config=None):
    """Prepares `examples` (split -> list) as data set `name` in `folder`."""
    body = {"name": name, "VERSION": tfds.core.Version(version), "FEATURES": features, "EXAMPLES": examples}
    if config:
        body["BUILDER_CONFIGS"] = [tfds.core.BuilderConfig(name=config)]
    builder = type(name.title(), (_Tiny,), body, skip_registration=True)(data_dir=folder, file_format="array_record")
    builder.download_and_prepare()
    return builder


def png(pixels):
    """A PNG file in memory: TFDS would need TensorFlow to encode an array."""
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, format="png")
    return io.BytesIO(file.getvalue())


@pytest.fixture
def documents():
    return [f"Document {i} says {'so ' * (i % 40)}and ends.".encode() for i in range(200)]


@pytest.mark.parametrize("streaming", [False, True], ids=["in_memory", "streamed"])
def test_a_standard_corpus_is_read_by_its_name(documents, streaming, tmp_path):
    features = {"text": tfds.features.Text()}
    tiny("lm1b", features, {"train": [{"text": d} for d in documents], "test": [{"text": b"One. Two."}]}, tmp_path)
    config = {"name": "lm1b", "batch_size": 4, "seq_len": 32, "data_dir": str(tmp_path), "streaming": streaming}
    described = info(config)
    assert (described.domains, described.kind, described.vocab_size) == (("lm1b",), "text", 256)
    assert dict(described.sizes) == {"train": 198, "validation": 2, "test": 1}
    found = Counter()
    for split in ("train", "validation"):
        batches = list(make_iterator(config, split, num_epochs=1))
        found += segments_of([{k: v[i] for k, v in batch.items()} for batch in batches for i in range(4)])
    # Its validation split is the end of its training data, and the two together are everything.
    assert found == expected_segments([list(d) for d in documents], [0] * 200, 32)


def test_the_default_config_and_the_newest_version_are_taken(tmp_path):
    features = {"text": tfds.features.Text()}
    for version, text in (("3.0.1", b"older"), ("3.1.0", b"newer"), ("3.0.10", b"between")):
        tiny("c4", features, {s: [{"text": text}] for s in ("train", "validation")}, tmp_path, version, config="en")
    tiny("c4", features, {s: [{"text": b"andere"}] for s in ("train", "validation")}, tmp_path, "3.1.0", config="de")

    def text_of(name):
        row = next(make_iterator({"name": name, "batch_size": 1, "seq_len": 8, "data_dir": str(tmp_path)}, "validation"))
        return row["tokens"][row["segments"] > 0].astype(np.uint8).tobytes()

    assert text_of("c4") == b"newer"
    assert text_of("c4/en:3.0.1") == b"older"
    assert text_of("c4/de") == b"andere"


def test_standard_images_are_read_by_their_name(tmp_path, rng):
    pictures = rng.integers(0, 256, (100, 32, 32, 3)).astype(np.uint8)
    features = {"image": tfds.features.Image(shape=(32, 32, 3)), "label": tfds.features.ClassLabel(num_classes=10)}
    examples = [{"image": png(picture), "label": i % 10} for i, picture in enumerate(pictures)]
    tiny("cifar10", features, {"train": examples, "test": [{"image": png(pictures[0]), "label": 0}]}, tmp_path)
    config = {"name": "cifar10", "batch_size": 8, "data_dir": str(tmp_path)}
    described = info(config)
    assert dict(described.sizes) == {"train": 98, "validation": 2, "test": 1}
    assert (described.num_classes, described.image_shape) == (10, (32, 32, 3))
    expected = sorted((picture.tobytes(), i % 10) for i, picture in enumerate(pictures))
    found = [
        (np.round(image * 255).astype(np.uint8).tobytes(), int(label))
        for split in ("train", "validation")
        for batch in make_iterator(config, split, num_epochs=1)
        for image, label, valid in zip(batch["image"], batch["label"], batch["valid"], strict=True)
        if valid
    ]
    assert sorted(found) == expected


def test_images_of_different_sizes_need_an_image_size(tmp_path, rng):
    features = {"image": tfds.features.Image(), "label": tfds.features.ClassLabel(num_classes=3)}
    pictures = [rng.integers(0, 256, (6 + i, 9, 3)).astype(np.uint8) for i in range(6)]
    examples = {split: [{"image": png(p), "label": 1} for p in pictures] for split in ("train", "validation")}
    tiny("imagenet2012", features, examples, tmp_path)
    config = {"name": "imagenet2012", "batch_size": 2, "data_dir": str(tmp_path)}
    with pytest.raises(ConfigError, match=r"set data\.image_size"):
        make_iterator(config, "test")
    assert next(make_iterator({**config, "image_size": 4}, "test"))["image"].shape == (2, 4, 4, 3)


def test_a_corpus_that_is_not_prepared_says_how_to_prepare_it(tmp_path):
    with pytest.raises(ConfigError) as error:
        make_iterator({"name": "c4", "batch_size": 8, "data_dir": str(tmp_path)})
    message = str(error.value)
    assert f"tfds build c4/en --file_format=array_record --data_dir={tmp_path}" in message
    assert "data.data_dir" in message
    assert "embedded_text" in message
    assert "\n" not in message


def test_a_corpus_without_random_access_says_how_to_convert_it(tmp_path):
    builder = tiny("pg19", {"book_text": tfds.features.Text()}, {"train": [{"book_text": b"A book."}]}, tmp_path)
    path = os.path.join(builder.data_dir, "dataset_info.json")
    with open(path) as file:
        described = json.load(file)
    described["fileFormat"] = "tfrecord"
    with open(path, "w") as file:
        json.dump(described, file)
    with pytest.raises(ConfigError, match=r"prepared as tfrecord.*tfds convert_format .*--out_file_format=array_record"):
        make_iterator({"name": "pg19", "batch_size": 8, "data_dir": str(tmp_path)})


_FIRST_BATCH = """
import time; start = time.process_time()
import sys
from moejax.data import make_iterator
batch = next(make_iterator(dict(name="embedded_text", batch_size=4, seq_len=64)))
assert batch["tokens"].any()
assert "tensorflow" not in sys.modules, "TensorFlow was imported"
print(time.process_time() - start)
"""


@pytest.mark.slow
def test_two_processes_prepare_at_once_without_tensorflow_and_quickly(tmp_path):
    environment = {**os.environ, "MOEJAX_DATA": str(tmp_path)}
    command = [sys.executable, "-c", _FIRST_BATCH]
    running = [subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE) for _ in range(2)]
    for process in running:
        output, errors = process.communicate(timeout=120)
        assert process.returncode == 0, errors.decode()
        # Processor time, which a busy machine does not lengthen: a program is to start training within 20 s, imports included.
        assert float(output) < 15
    (folder,) = os.listdir(tmp_path)  # one data set, and nothing half-written
    assert folder.startswith("embedded_text-py")


def test_a_second_preparation_changes_nothing(prepared_folder):
    first = prepare("embedded_digits")
    stamp = {path: path.stat().st_mtime_ns for path in first.iterdir()}
    assert prepare("embedded_digits") == first
    assert {path: path.stat().st_mtime_ns for path in first.iterdir()} == stamp
    assert first.is_relative_to(prepared_folder)


def test_a_preparation_that_fails_leaves_nothing(monkeypatch, tmp_path):
    from moejax.data.builders import sources

    def fail():
        raise OSError("disk full")

    monkeypatch.setenv("MOEJAX_DATA", str(tmp_path))
    monkeypatch.setattr(sources, "image_splits", lambda images: fail())
    with pytest.raises(ConfigError, match=r"cannot be prepared .*disk full"):
        prepare("embedded_digits")
    assert os.listdir(tmp_path) == []


def test_other_packages_have_a_folder_of_their_own(monkeypatch):
    from moejax.data.builders import sources

    before = sources.fingerprint("embedded_text")
    monkeypatch.setattr(sources, "_stdlib_files", lambda: [])
    assert sources.fingerprint("embedded_text") != before


def test_the_command_prepares_and_tells(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    assert main(["--name=embedded_text"]) == 0
    told = capsys.readouterr().out
    for word in ("code", "reference", "literature", "train", "validation", "test", "Ready in", "config.data.name"):
        assert word in told
    assert main(["--name=embedded_txt"]) == 2
    assert "did you mean 'embedded_text'" in capsys.readouterr().err


@pytest.fixture
def corpus(tmp_path):
    """A prepared standard corpus: its config, and the folder that describes it."""
    builder = tiny("lm1b", {"text": tfds.features.Text()}, {s: [{"text": b"One."}] * 100 for s in ("train", "test")}, tmp_path)
    return {"name": "lm1b", "batch_size": 1, "data_dir": str(tmp_path)}, Path(builder.data_dir)


IMPORTS = {
    "a class": lambda found, name: found | {"pythonClassName": name},
    "inside": lambda found, name: json.loads(
        json.dumps(found).replace("tensorflow_datasets.core.features.text_feature.Text", name)
    ),
    "older form": lambda found, name: {"type": name, "content": {}},
    "as a string": lambda found, name: {**found, "json": {"json": json.dumps({"f": {"type": name}})}},
}


@pytest.mark.parametrize("file", ["features.json", "dataset_info.json"])
@pytest.mark.parametrize("change", IMPORTS.values(), ids=IMPORTS)
@pytest.mark.parametrize(
    "prefix", ["", "tensorflow_datasets.core.features.", "tensorflow_datasets.core.features.text_feature.x."]
)
def test_no_module_is_imported_for_a_name_in_prepared_data(corpus, tmp_path, monkeypatch, file, change, prefix):
    config, folder = corpus
    (tmp_path / "evil.py").write_text("raise SystemExit('imported')")
    monkeypatch.syspath_prepend(tmp_path)
    features = json.loads((folder / "features.json").read_text())
    found = change(features, f"{prefix}evil.Feature")
    found = found if file == "features.json" else {**json.loads((folder / file).read_text()), "features": found}
    (folder / file).write_text(json.dumps(found))
    with pytest.raises(ConfigError, match=rf"{file} asks to import '{prefix}evil.Feature', which is no feature of TFDS"):
        info(config)


@pytest.mark.parametrize("text", ["", "{", "[]", '{"name": 3}', "null"])
@pytest.mark.parametrize("file", ["features.json", "dataset_info.json"])
def test_a_damaged_description_is_one_line(corpus, file, text):
    config, folder = corpus
    (folder / file).write_text(text)
    with pytest.raises(ConfigError, match=r"(cannot be read|no data set that TFDS can read) \(.*prepare"):
        info(config)


def test_damaged_embedded_data_are_prepared_anew(tmp_path, monkeypatch):
    monkeypatch.setenv("MOEJAX_DATA", str(tmp_path))
    config = {"name": "embedded_digits", "batch_size": 8}
    before = next(make_iterator(config))
    (root,) = tmp_path.glob("embedded_digits-*")
    for victim in (*root.rglob("*train*"), root / "checksums.json", *root.rglob("features.json")):
        content = bytearray(victim.read_bytes())
        content[len(content) // 2] ^= 1
        victim.write_bytes(content)
        storage._damage.cache_clear()  # as in another process
        with pytest.warns(Damaged, match=r"prepared data \S+ is damaged \(.*\.corrupt\S*, prepared anew"):
            again = next(make_iterator(config))
        np.testing.assert_array_equal(again["image"], before["image"])
    assert len(list(tmp_path.glob("*.corrupt*"))) == 3


@pytest.mark.parametrize("place", ["file", "file/below"])
def test_a_data_folder_that_cannot_be_used_is_one_line(tmp_path, monkeypatch, place):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("MOEJAX_DATA", str(tmp_path / place))
    with pytest.raises(ConfigError, match=r"cannot be prepared in \S+ \((File exists|Not a directory)\); set MOEJAX_DATA"):
        prepare("embedded_digits")
    with pytest.raises(ConfigError, match=r"lm1b.* is not prepared in|data_dir=.* cannot be read"):
        info({"name": "lm1b", "batch_size": 1, "data_dir": str(tmp_path / place)})


def test_a_full_disk_is_one_line_and_leaves_nothing(tmp_path, monkeypatch):
    monkeypatch.setenv("MOEJAX_DATA", str(tmp_path))
    monkeypatch.setattr(storage, "write_sealed", full)
    with pytest.raises(ConfigError, match=r"cannot be prepared in \S+ \(No space left on device\); set MOEJAX_DATA"):
        prepare("embedded_digits")
    assert list(tmp_path.iterdir()) == []


def full(*args, **kwargs):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
