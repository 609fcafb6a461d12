"""Accelerate's state belongs to the process: a new `TrainingArguments` resets it, also for trainers that are in use."""

from __future__ import annotations

from accelerate.state import AcceleratorState, PartialState
from transformers import TrainingArguments


def forget(args: TrainingArguments) -> None:
    """Before a trainer is made: its precision is its own, whatever a trainer that was used last has restored."""
    if args.world_size == 1:
        AcceleratorState._reset_state()


class AccelerateState:
    """The state as it is now, that of a trainer which has just been made."""

    def __init__(self) -> None:
        self.accelerator, self.partial = dict(AcceleratorState._shared_state), dict(PartialState._shared_state)

    def restore(self) -> None:
        """Put it back where it has been reset and no other trainer has made its own since."""
        if not AcceleratorState._shared_state.get("_mixed_precision"):
            AcceleratorState._shared_state.clear()  # what was begun by a use without a precision
            AcceleratorState._shared_state.update(self.accelerator)
            PartialState._shared_state.update(self.partial)
