"""Wrong configurations are told with the value, the place and the way out."""

import ml_collections
import pytest

from moejax.core.errors import ConfigError
from moejax.data import DATASETS, info, make_iterator
from moejax.data.config import ImageConfig, TextConfig, parse

TEXT = {"name": "embedded_text", "batch_size": 8, "seq_len": 32}
IMAGES = {"name": "embedded_digits", "batch_size": 8}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"name": "embeded_text"}, r"'embeded_text' in data\.name; did you mean 'embedded_text'"),
        ({"name": "imagenet"}, r"'imagenet' in data\.name; did you mean 'imagenet2012'"),
        ({"name": None}, r"data\.name is missing; valid names: .*c4.*embedded_text"),
        ({"batch_size": None}, r"data\.batch_size is missing"),
        ({"batch_size": 0}, r"data\.batch_size=0 must be a whole number between 1 and"),
        ({"seq_len": 1}, r"data\.seq_len=1 must be a whole number between 2 and"),
        ({"seq_len": 32.0}, r"data\.seq_len=32\.0 must be a whole number"),
        ({"seqlen": 3}, r"unknown key 'seqlen' in data .*did you mean 'seq_len'"),
        ({"image_size": 8}, r"unknown key 'image_size' in data \(name='embedded_text'\)"),
        ({"domains": ("code", "litrature")}, r"'litrature' in data\.domains.*did you mean 'literature'"),
        ({"domains": "code"}, r"data\.domains='code' must be a tuple"),
        ({"domains": ()}, r"data\.domains=\(\)"),
        ({"domains": ("code", "code")}, r"each domain once"),
        ({"mixture": {"cod": 1.0}}, r"'cod' in data\.mixture; did you mean 'code'"),
        ({"mixture": {"code": 1.0}}, r"data\.mixture has no weight for 'reference'"),
        (
            {"mixture": {"code": 1.0, "reference": 0.0, "literature": 1.0}},
            r"data\.mixture\.reference=0\.0 must be a number above 0",
        ),
        ({"mixture": 0.5}, r"data\.mixture=0\.5 must be a mapping"),
        ({"mixture": dict.fromkeys(("code", "reference", "literature"), 1.0), "streaming": True}, r"streaming=False"),
    ],
)
def test_text_errors(changes, message):
    with pytest.raises(ConfigError, match=message):
        make_iterator({**TEXT, **changes})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"seq_len": 8}, r"unknown key 'seq_len' in data \(name='embedded_digits'\)"),
        ({"shift": -1}, r"data\.shift=-1 .*at least 0"),
        ({"batch_size": True}, r"data\.batch_size=True"),
    ],
)
def test_image_errors(changes, message):
    with pytest.raises(ConfigError, match=message):
        make_iterator({**IMAGES, **changes})


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"split": "valid"}, r"'embedded_text' in data\.name has no split 'valid'; did you mean 'validation'"),
        ({"shard_count": 3}, r"data\.batch_size=8 is not divisible by shard_count=3; take 6"),
        ({"shard_index": 2, "shard_count": 2}, r"shard_index=2 is not a shard of shard_count=2"),
        ({"num_epochs": 0}, r"num_epochs=0 must be at least 1"),
    ],
)
def test_argument_errors(arguments, message):
    with pytest.raises(ConfigError, match=message):
        make_iterator(TEXT, **arguments)


def test_a_corpus_without_a_test_split_says_which_it_has():
    with pytest.raises(ConfigError, match=r"'c4' in data\.name has no split 'test'; .*(train|validation)"):
        make_iterator({"name": "c4", "batch_size": 8}, "test")


def test_config_dicts_and_mappings_mean_the_same():
    mapping = {**TEXT, "domains": ["code", "literature"], "mixture": {"literature": 3, "code": 1}, "data_dir": None}
    config = parse(ml_collections.ConfigDict(mapping))
    assert config == parse(mapping)
    assert config == TextConfig(
        name="embedded_text",
        batch_size=8,
        seq_len=32,
        domains=("code", "literature"),
        mixture=(("code", 1.0), ("literature", 3.0)),
    )
    assert parse(config) is config


def test_every_name_parses_to_its_kind():
    for name, dataset in DATASETS.items():
        config = parse({"name": name, "batch_size": 2, **({"path": "/data"} if dataset.own else {})})
        assert isinstance(config, TextConfig if hasattr(dataset, "text") else ImageConfig)
        assert {"train", "validation"} <= set(dataset.splits)


def test_a_corpus_of_one_domain_is_named_after_itself():
    assert parse({"name": "wikipedia/20230601.de:1.0.0", "batch_size": 2}).domains == ("wikipedia",)
    with pytest.raises(ConfigError, match="not prepared"):
        info({"name": "wikipedia", "batch_size": 2, "data_dir": "/nowhere"})
