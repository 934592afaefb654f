"""Values of the config of a model and its adapters that the training data decide.

Where a config has a mapping with the key `from_data`, it names something to be counted and how:

    router = {'kind': 'hash', 'hash': 'balanced', 'frequencies': {'from_data': 'token_frequencies', 'batches': 64}}

`moejax.train.fit` puts the counted value in its place before it builds the model, so a checkpoint's config has the value itself. It
depends on the data section and the recipe, and not on the run's seed. A model that is built from the recipe can be traced, not
trained: see the parts that take one (`moejax.routing.Hash`).
"""

from collections.abc import Callable, Mapping
from typing import Any

from ml_collections import ConfigDict

from moejax.core.errors import ConfigError, nearest
from moejax.data.frequencies import token_clusters, token_frequencies, token_successors
from moejax.data.iterator import make_iterator

COMPUTED = {
    "token_clusters": token_clusters,
    "token_frequencies": token_frequencies,
    "token_successors": token_successors,
}


def with_computed(config: ConfigDict, make_iterator: Callable[..., Any] = make_iterator) -> ConfigDict:
    """A run's config with the values that its recipes stand for; the same object if it has none.

    Raises:
      ConfigError: an unknown recipe, or arguments that do not fit it.
    """
    found = [name for name in ("model", "adapters") if _has_recipe(config.get(name))]
    if not found:
        return config
    given = {"config": config.data, "vocab_size": config.model.get("vocab_size"), "make_iterator": make_iterator}
    return ConfigDict({**config, **{name: _filled(config[name], name, given) for name in found}})


def is_recipe(value: Any) -> bool:
    """Whether a config's value stands for one that is still to be counted."""
    return isinstance(value, Mapping | ConfigDict) and "from_data" in value


def _has_recipe(value: Any) -> bool:
    return is_recipe(value) or (isinstance(value, Mapping | ConfigDict) and any(map(_has_recipe, value.values())))


def _filled(value: Any, where: str, given: Mapping[str, Any]) -> Any:
    if is_recipe(value):
        arguments = dict(value)
        name = arguments.pop("from_data")
        if name not in COMPUTED:
            raise ConfigError(f"unknown recipe '{name}' in {where}.from_data{nearest(name, COMPUTED)}")
        try:
            return COMPUTED[name](**given, **arguments)
        except TypeError as error:
            raise ConfigError(f"{error} (in {where}, from_data='{name}')") from None
    if isinstance(value, Mapping | ConfigDict):
        return {key: _filled(item, f"{where}.{key}", given) for key, item in value.items()}
    return value
