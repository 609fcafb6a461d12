"""How many completions fit on a device at once: guessed from free memory, and lowered where the guess was too high."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

import psutil
import torch
from accelerate import PartialState
from accelerate.utils.memory import clear_device_cache, should_reduce_batch_size
from transformers import PreTrainedConfig, PreTrainedModel

from .configs import numbers, text_config

logger = logging.getLogger(__name__)

Result = TypeVar("Result")

MAX_BATCH_SIZE = 1024
"""Larger batches are no faster."""
MEMORY_SHARE = 0.4
"""Share of the free memory that generation may use for cached keys and values, and for logits."""


@dataclass
class Batches:
    """The largest number of rows to work on at once.

    Attributes:
        size: number of rows; halved permanently whenever a device runs out of memory.
        fixed: whether the user set it: then running out of memory is an error.
    """

    size: int
    fixed: bool

    def over(self, rows: range, work: Callable[[range], Result]) -> list[Result]:
        """Call `work` on one range of rows after the other, and return the results.

        Like Accelerate's `find_executable_batch_size`, but it continues where memory ran out instead of starting over,
        and collects garbage (tens of milliseconds) only then.
        """
        results: list[Result] = []
        while rows:
            try:
                results.append(work(rows[: self.size]))
                rows = rows[self.size :]
            except Exception as error:
                if self.fixed or self.size == 1 or not should_reduce_batch_size(error):
                    raise
                # The traceback keeps the tensors of the failed pass alive.
                error.__traceback__ = None
                clear_device_cache(garbage_collection=True)
                self.size //= 2
                logger.warning(f"out of memory: continuing with {self.size} completions at once")
        return results


def fitting(model: PreTrainedModel, tokens: int) -> int:
    """A guess at how many rows of `tokens` tokens can be generated at once, a power of two, from free memory.

    Nothing depends on it but speed, so that it never fails: what a config does not say is guessed.
    """
    config = text_config(model.config)
    heads = _most(config, "num_attention_heads", 0)
    if not heads:  # no attention, so no cache that grows
        return MAX_BATCH_SIZE
    head_dim = _most(config, "head_dim", 0) or _most(config, "hidden_size", 128 * heads) // heads
    heads = _most(config, "num_key_value_heads", heads)
    # The cache has the precision of the computation; the model's own is at least as large.
    row = 2 * _most(config, "num_hidden_layers", 32) * heads * head_dim * model.dtype.itemsize * tokens
    row += 12 * _most(config, "vocab_size", 2**17)  # a step's logits: generate's copy in fp32, and two more for drawing
    rows = int(MEMORY_SHARE * _free_memory(model.device) / row)
    return max(1, min(MAX_BATCH_SIZE, 1 << max(0, rows.bit_length() - 1)))


def _most(config: PreTrainedConfig, name: str, guess: int) -> int:
    """The largest number that a config has for any layer."""
    return max(numbers(config, name), default=guess)


def _free_memory(device: torch.device) -> int:
    """Bytes. A device that cannot say how much is free is taken to share the host's memory, as Apple's do."""
    # No such function, no such device, or a driver without the query.
    with contextlib.suppress(AttributeError, RuntimeError):
        free, _ = torch.get_device_module(device).mem_get_info(device)
        return int(free)
    return int(psutil.virtual_memory().available // PartialState().num_processes)
