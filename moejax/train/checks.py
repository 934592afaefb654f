"""What can be known of a config before anything is read, traced or trained."""

from collections.abc import Mapping
from typing import Any

from ml_collections import ConfigDict

from moejax import models
from moejax.core.errors import ConfigError
from moejax.data.config import check_split, parse
from moejax.optim.base import optimizers
from moejax.parallel import Exchange
from moejax.tasks.base import check_batch
from moejax.train.identity import is_config
from moejax.train.program import build_task
from moejax.train.settings import CheckpointSettings, EvalSettings, TrainSettings, normalized, plain, section
from moejax.train.starts import parse_init
from moejax.train.trainable import parse_rule


def check_config(config: Mapping[str, Any] | ConfigDict, where: str = "") -> None:
    """Builds all that a config describes, and those of the runs that it starts from; `where` is the place of such a one.

    Raises:
      ConfigError: it describes something that is not to be had; names the place and the fix.
    """
    try:
        _check(normalized(config))
    except ConfigError as error:
        raise ConfigError(f"{error} (the config at {where})" if where else str(error)) from None

    def look(value: Any, place: str) -> None:
        if is_config(value):
            check_config(value, place)
        elif isinstance(value, Mapping | ConfigDict):
            for name, part in value.items():
                look(part, f"{place}.{name}")

    for name in ("init", "task"):
        look(config.get(name), f"{where}.{name}".strip("."))


def _check(config: ConfigDict) -> None:
    training, evaluation = section(TrainSettings, config, "train"), section(EvalSettings, config, "eval")
    section(CheckpointSettings, config, "checkpoint"), section(Exchange, config, "exchange")
    spec = plain(config)
    optimizers.build(spec["optimizer"], "optimizer", steps=training.steps)
    models.network(spec)
    parse_init(spec.get("init"))
    for name, rule in (spec.get("trainable") or {}).items():
        parse_rule(name, rule)
    data = parse(config.data)
    kind = spec["model"]["kind"]
    reads = getattr(models.models[kind], "reads", None)
    if reads is not None and reads not in data.gives:
        raise ConfigError(
            f"model.kind='{kind}' reads '{reads}', and batches of data.name='{data.name}' have {', '.join(data.gives)}; take another model or data"
        )
    check_batch(build_task(spec["task"], {}), data.gives)
    for split in ("train", evaluation.split):
        check_split(data, split)
