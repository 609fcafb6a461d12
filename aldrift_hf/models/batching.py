"""How many completions fit on a device at once: guessed from free memory, and lowered where the guess was too high."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

import torch
from accelerate.utils.memory import clear_device_cache, should_reduce_batch_size
from transformers import PreTrainedModel

from .footprint import Footprint, Work
from .memory import GIB, free_memory

logger = logging.getLogger(__name__)

Result = TypeVar("Result")

MAX_BATCH_SIZE = 1024
"""Larger batches are no faster."""
MEMORY_SHARE = 0.5
"""Share of the free memory that drawing and scoring may take; the rest is for updates, and for errors of estimates."""
REMEDY = (
    "Lower max_completion_length or shorten the prompts, load the model in a smaller precision (dtype='bfloat16', or "
    "4 bits), or allow the process more memory."
)


@dataclass
class Batches:
    """The largest number of rows to work on at once.

    Attributes:
        size: number of rows; halved permanently whenever memory runs out.
        fixed: whether the user set it: then running out of memory is an error.
    """

    size: int
    fixed: bool

    def over(self, rows: range, work: Callable[[range], Result], retry: bool = True) -> list[Result]:
        """Call `work` on one range of rows after the other, and return the results.

        Like Accelerate's `find_executable_batch_size`, but it continues where memory ran out instead of starting over,
        and collects garbage (tens of milliseconds) only then.

        Args:
            rows: the rows.
            work: takes some of them.
            retry: whether to go on with fewer rows at once where memory runs out.

        Raises:
            torch.OutOfMemoryError: where the size is fixed, or not even one row fits; with what to change.
        """
        results: list[Result] = []
        while rows:
            try:
                results.append(work(rows[: self.size]))
                rows = rows[self.size :]
            except Exception as error:
                if not _out_of_memory(error):
                    raise
                if self.fixed or not retry:
                    remedy = "lower it, or leave it out" if self.fixed else "set a lower one"
                    raise torch.OutOfMemoryError(
                        f"out of memory with per_device_generation_batch_size={self.size}: {remedy}."
                    ) from error
                if self.size == 1:
                    raise torch.OutOfMemoryError(f"not even one completion fits into memory. {REMEDY}") from error
                # The traceback keeps the tensors of the failed pass alive.
                error.__traceback__ = None
                clear_device_cache(garbage_collection=True)
                self.size //= 2
                logger.warning(f"out of memory: continuing with {self.size} completions at once")
        return results


def _out_of_memory(error: Exception) -> bool:
    """Whether an allocation failed: of a device, of the host (under `ulimit`), or of Python itself."""
    return isinstance(error, MemoryError) or should_reduce_batch_size(error)


def fitting(model: PreTrainedModel, work: Work, present: int | None = None) -> int:
    """A guess at how many completions can be drawn and scored at once, a power of two, from free memory.

    Nothing depends on it but speed, memory, and rounding.

    Args:
        model: the model.
        work: what is drawn and scored.
        present: the size that a run has worked with so far, to which it keeps as long as that fits at all: prompts may
            have become longer, or other programs have taken memory. `None` before the first update.

    Raises:
        MemoryError: where not even one fits, so that a process whose memory is limited would be killed.
    """
    footprint, free = Footprint.of(model), free_memory(model.device)
    if present is None:
        free -= _to_come(model)
    if footprint.needed(1, work) > free:
        raise MemoryError(
            f"a completion of up to {work.completion} tokens after a prompt of {work.prompt} needs about "
            f"{footprint.needed(1, work) / GIB:.2f} GiB beside the model, and {max(0, free) / GIB:.2f} GiB are free. "
            f"{REMEDY} Or set per_device_generation_batch_size=1, if you know that it fits: then nothing is estimated."
        )
    if present is not None and footprint.needed(present, work) <= free:
        return present
    rows = present or MAX_BATCH_SIZE
    while rows > 1 and footprint.needed(rows, work) > MEMORY_SHARE * free:
        rows //= 2
    return rows


def _to_come(model: PreTrainedModel) -> int:
    """Bytes of gradients and of AdamW's two moments, which the first update adds."""
    return sum(3 * parameter.nbytes for parameter in model.parameters() if parameter.requires_grad)
