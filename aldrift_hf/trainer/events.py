"""Passes what happens in a run on to the callbacks that want to know."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

from transformers import Trainer

from ..reporting.callbacks import RunCallback
from ..types import Advance


class Events:
    """The [`RunCallback`]s of a trainer, as one.

    Args:
        trainer: with the callbacks, and a `record`.
    """

    def __init__(self, trainer: Trainer) -> None:
        self.trainer = trainer

    @property
    def callbacks(self) -> list[RunCallback]:
        """Those installed now: callbacks can be added and removed at any time."""
        return [each for each in self.trainer.callback_handler.callbacks if isinstance(each, RunCallback)]

    def tell(self, event: str, **facts: Any) -> None:
        """Call an event's method with the run's record and further facts."""
        trainer = self.trainer
        for callback in self.callbacks:
            getattr(callback, event)(trainer.args, trainer.state, trainer.control, record=trainer.record, **facts)

    @contextlib.contextmanager
    def running(self) -> Iterator[None]:
        """The contexts that the callbacks keep open for the time of `train()`."""
        with contextlib.ExitStack() as stack:
            for callback in self.callbacks:
                stack.enter_context(callback.running())
            yield

    @contextlib.contextmanager
    def progress(self, description: str, total: int, done: int = 0) -> Iterator[Advance]:
        """Shows how far a piece of work is, on every callback that can; see [`aldrift_hf.types.Progress`]."""
        with contextlib.ExitStack() as stack:
            shown = [callback.progress(description, total, done) for callback in self.callbacks]
            moves = [stack.enter_context(bar) for bar in shown if bar is not None]

            def advance(steps: int) -> None:
                for move in moves:
                    move(steps)

            yield advance
