"""Models of earlier rungs, kept as their trained parameters alone: an adapter's, not the model's under it."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping

from torch import Tensor, nn

from . import sharding


def take(model: nn.Module) -> dict[str, Tensor]:
    """Copies of the trainable parameters, whole and on the CPU; all processes call it."""
    trained = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    with sharding.writable(list(trained.values())):
        return {name: sharding.whole(parameter) for name, parameter in trained.items()}


@contextlib.contextmanager
def loaded(model: nn.Module, snapshot: Mapping[str, Tensor]) -> Iterator[None]:
    """The model as it was, for the time of a `with` block; exactly as it is, after it."""
    now = take(model)
    _put(model, snapshot)
    try:
        yield
    finally:
        _put(model, now)


def _put(model: nn.Module, snapshot: Mapping[str, Tensor]) -> None:
    parameters = dict(model.named_parameters())
    with sharding.writable([parameters[name] for name in snapshot]):
        for name, value in snapshot.items():
            sharding.put(parameters[name], value)
