"""Models of earlier rungs, kept as their trained parameters alone: an adapter's, not the model's under it."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping

import torch
from torch import Tensor, nn


def take(model: nn.Module) -> dict[str, Tensor]:
    """Copies of the trainable parameters, on the CPU."""
    return {
        name: parameter.detach().to("cpu", copy=True)
        for name, parameter in model.named_parameters()
        if parameter.requires_grad
    }


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
    with torch.no_grad():
        for name, value in snapshot.items():
            parameters[name].copy_(value)
