"""Models of earlier rungs, kept as their trained parameters alone: an adapter's, without the model under it."""

from __future__ import annotations

import contextlib
import os
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path

from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from . import sharding
from .memory import free_host_memory

MEMORY_SHARE = 1 / 32
"""Share of the free memory above which a snapshot is kept on disk: a window of 16 then takes at most half of it."""


def take(model: nn.Module, folder: str | Path | None = None) -> dict[str, Tensor]:
    """Copies of the trainable parameters, whole and on the CPU; all processes call it.

    Args:
        model: the model that is trained.
        folder: where snapshots go that are too large for memory, as those of full fine-tuning are: they are written to
            a file that is memory-mapped, and gone when its tensors are. `None` keeps all in memory.
    """
    trained = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    with sharding.writable(list(trained.values())):
        snapshot = {name: sharding.whole(parameter) for name, parameter in trained.items()}
    size = sum(tensor.nbytes for tensor in snapshot.values())
    return snapshot if folder is None or size < MEMORY_SHARE * free_host_memory() else _mapped(snapshot, Path(folder))


def _mapped(snapshot: Mapping[str, Tensor], folder: Path) -> dict[str, Tensor]:
    folder.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(suffix=".safetensors", dir=folder)
    os.close(handle)
    save_file({name: tensor.contiguous() for name, tensor in snapshot.items()}, name)
    mapped = load_file(name)
    with contextlib.suppress(PermissionError):  # Windows keeps a file that is mapped
        os.unlink(name)
    return mapped


@contextlib.contextmanager
def loaded(model: nn.Module, snapshot: Mapping[str, Tensor]) -> Iterator[None]:
    """Within a `with` block the model is as the snapshot has it; after it, exactly as before."""
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
