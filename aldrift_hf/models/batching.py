"""How many completions fit on a device at once, found out and remembered."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

import psutil
import torch
from accelerate import PartialState
from accelerate.utils.memory import clear_device_cache, should_reduce_batch_size
from transformers import PreTrainedModel

logger = logging.getLogger(__name__)

Result = TypeVar("Result")

MOST = 1024
"""Rows beyond which a batch gains nothing."""
SHARE = 0.4
"""Of the memory that is free, the part that generation may take for cached keys and values, and for logits."""


@dataclass
class Batches:
    """The most rows to work on at once.

    Attributes:
        size: rows; halved for good whenever a device runs out of memory.
        fixed: whether it was set by hand: then running out is an error.
    """

    size: int
    fixed: bool

    def over(self, rows: range, work: Callable[[range], Result]) -> list[Result]:
        """`work` on one stretch of the rows after the other.

        Accelerate's `find_executable_batch_size`, but going on from where memory ran out, and collecting garbage (tens
        of milliseconds) only then.
        """
        results: list[Result] = []
        while rows:
            try:
                results.append(work(rows[: self.size]))
                rows = rows[self.size :]
            except Exception as error:
                if self.fixed or self.size == 1 or not should_reduce_batch_size(error):
                    raise
                # The traceback holds the tensors of the failed pass.
                error.__traceback__ = None
                clear_device_cache(garbage_collection=True)
                self.size //= 2
                logger.warning(f"out of memory: going on with {self.size} completions at once")
        return results


def fitting(model: PreTrainedModel, tokens: int) -> int:
    """A guess at how many rows of so many tokens can be generated at once: a power of two, by what they need."""
    config = model.config.get_text_config()
    if not hasattr(config, "num_attention_heads"):  # no attention, no cache that grows
        return MOST
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    # The cache is kept in the precision of the computation; take the model's own, which is no smaller.
    row = 2 * config.num_hidden_layers * heads * head_dim * model.dtype.itemsize * tokens
    row += 12 * config.vocab_size  # a step's logits: generate's copy in fp32, and two more to draw by
    rows = int(SHARE * _free_memory(model.device) / row)
    return max(1, min(MOST, 1 << max(0, rows.bit_length() - 1)))


def _free_memory(device: torch.device) -> int:
    """Bytes."""
    if device.type == "cpu":
        return int(psutil.virtual_memory().available // PartialState().num_processes)
    free, _ = torch.get_device_module(device).mem_get_info(device)
    return int(free)
