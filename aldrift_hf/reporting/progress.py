"""Progress bars for rungs and, within a rung, for proposals, costs and updates; plain lines without a terminal."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from typing import Any

from accelerate import PartialState
from rich.console import Console
from rich.progress import (
    BarColumn,
    Progress,
    ProgressColumn,
    Task,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.text import Text
from transformers import TrainerControl, TrainerState, TrainingArguments

from ..types import Advance
from .callbacks import RunCallback

SECONDS_BETWEEN_LINES = 30.0
"""Without a terminal, a piece of work prints how far it is after this time, and then as often."""


class Done(ProgressColumn):
    """How much of a piece of work is done, and of how much where that is known: T may be yet to be found."""

    def render(self, task: Task) -> Text:
        """The numbers, as text."""
        return Text(f"{task.completed:,}" if task.total is None else f"{task.completed:,} of {task.total:,}")


class ProgressBars(RunCallback):
    """Shows how far a run is. The bars of `train()` stay in one place, below what is printed to the same console.

    Args:
        console: the console to draw on.
    """

    def __init__(self, console: Console) -> None:
        self.console = console
        self._display: Progress | None = None
        self._ladder: TaskID | None = None

    @contextlib.contextmanager
    def running(self) -> Iterator[None]:
        """Keep a display open, in which bars come and go; only on a terminal."""
        if self._display is not None or not self.console.is_terminal or not PartialState().is_main_process:
            yield
            return
        self._display = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            Done(),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            console=self.console,
            transient=True,
        )
        try:
            with self._display:
                yield
        finally:
            self._display = self._ladder = None

    def progress(
        self, description: str, total: int, done: int = 0
    ) -> contextlib.AbstractContextManager[Advance] | None:
        """A bar, or lines, for a piece of work; `None` on all processes but the first."""
        return self._bar(description, total, done) if PartialState().is_main_process else None

    @contextlib.contextmanager
    def _bar(self, description: str, total: int, done: int) -> Iterator[Advance]:
        with self.running():
            display = self._display
            if display is None:
                yield self._lines(description, total, done)
                return
            bar = display.add_task(description, total=total, completed=done)
            try:
                yield lambda steps: display.advance(bar, steps)
            finally:
                display.remove_task(bar)

    def _lines(self, description: str, total: int, done: int) -> Advance:
        start = printed = time.monotonic()
        done_before = done

        def advance(steps: int) -> None:
            nonlocal printed, done
            done, now = done + steps, time.monotonic()
            if done < total and now - printed >= SECONDS_BETWEEN_LINES:
                printed = now
                left = (now - start) * (total - done) / (done - done_before)
                self.console.print(f"  {description}: {done:,} of {total:,}, about {left:,.0f} s left", highlight=False)

        return advance

    def on_rung_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        *,
        rung: int,
        num_rungs: int | None,
        tau: float,
        tau_max: float | None,
        **kwargs: Any,
    ) -> None:
        """Move the ladder's bar on: in rungs or, if their number is not known, in inverse temperature."""
        if self._display is None:
            return
        if num_rungs is None:
            description, done = f"rung {rung}, inverse temperature", round(tau, 3)
            total = tau_max and round(tau_max, 3)
        else:
            description, total, done = "rungs", num_rungs, rung
        if self._ladder is None:
            self._ladder = self._display.add_task(description, total=total)  # update() takes None for no change
        self._display.update(self._ladder, description=description, total=total, completed=done)
