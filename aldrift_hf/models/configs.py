"""Numbers in a model's config, which may be one for all layers, a list, `None`, or not there at all."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

from transformers import PreTrainedConfig


def text_config(config: PreTrainedConfig) -> PreTrainedConfig:
    """The part of a config that describes the language model; the whole, where there are several such parts."""
    try:
        return config.get_text_config(decoder=True)
    except ValueError:
        return config


def numbers(config: PreTrainedConfig, name: str) -> list[int]:
    """All positive whole numbers that a config has under a name, over its layers; empty where it has none."""
    return [value for value in _flat(_read(config, name)) if type(value) is int and value > 0]


def _read(config: PreTrainedConfig, name: str) -> Any:
    with contextlib.suppress(Exception):  # properties compute from what may not be there
        return getattr(config, name, None)
    with contextlib.suppress(Exception):  # Transformers 5.23 keeps what differs between layers apart
        return [getattr(layer, name, None) for layer in getattr(config, "per_layer_config", ())]
    return None


def _flat(value: Any) -> Iterator[Any]:
    if isinstance(value, dict):
        value = list(value.values())
    if isinstance(value, (list, tuple)):
        for item in value:
            yield from _flat(item)
    else:
        yield value
