"""How far a run is, in a notebook: bars, and a table of the rungs, in one output that is updated."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from dataclasses import dataclass
from html import escape
from typing import Any

from accelerate import PartialState
from transformers import TrainerControl, TrainerState, TrainingArguments

from ..types import Advance
from .callbacks import RunCallback
from .console import line_of
from .inline import rungs_as_html
from .record import RunRecord

SECONDS_BETWEEN_UPDATES = 0.25
"""Each one is a message to the browser."""


@dataclass(eq=False)
class Bar:
    """A piece of work: what it is, how much of it there is, and how much is done."""

    description: str
    total: float | None
    done: float

    def html(self) -> str:
        """A progress bar with its numbers; without a total, one that only says that something goes on."""
        if self.total is None:
            return f"<div><progress></progress> {escape(self.description)}</div>"
        bar = f'<progress value="{self.done:g}" max="{self.total:g}"></progress>'
        return f"<div>{bar} {escape(self.description)}: {self.done:,} of {self.total:,}</div>"


class NotebookProgress(RunCallback):
    """Shows a run in a notebook: its rungs as a table, and below it bars while something goes on.

    `train()` has one output; an evaluation, or drawing samples, has another.
    """

    def __init__(self) -> None:
        self._output: Any = None
        self._clear()

    def _clear(self) -> None:
        self._ladder: Bar | None = None
        self._bars: list[Bar] = []
        self._rungs: list[dict[str, Any]] = []
        self._lines: list[str] = []
        self._updated = 0.0

    @contextlib.contextmanager
    def running(self) -> Iterator[None]:
        """Keep an output, in which bars come and go."""
        if self._output is not None or not PartialState().is_main_process:
            yield
            return
        from IPython.display import HTML, display  # where there is a notebook, there is IPython

        self._clear()
        self._output = display(HTML(""), display_id=True)
        try:
            yield
        finally:
            self._ladder, self._bars = None, []
            self._show(at_once=True)
            self._output = None

    def progress(
        self, description: str, total: int, done: int = 0
    ) -> contextlib.AbstractContextManager[Advance] | None:
        """A bar for a piece of work; `None` on all processes but the first."""
        return self._bar(Bar(description, total, done)) if PartialState().is_main_process else None

    @contextlib.contextmanager
    def _bar(self, bar: Bar) -> Iterator[Advance]:
        def advance(steps: int) -> None:
            bar.done += steps
            self._show()

        with self.running():
            self._bars.append(bar)
            try:
                yield advance
            finally:
                self._bars.remove(bar)

    def _show(self, at_once: bool = False) -> None:
        now = time.monotonic()
        if self._output is None or (now - self._updated < SECONDS_BETWEEN_UPDATES and not at_once):
            return
        from IPython.display import HTML

        self._updated = now
        bars = [bar.html() for bar in (self._ladder, *self._bars) if bar is not None]
        lines = [f"<div>{escape(line)}</div>" for line in self._lines]
        self._output.update(HTML("".join([rungs_as_html(self._rungs), *lines, *bars])))

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
        if num_rungs is None:
            self._ladder = Bar("inverse temperature", tau_max and round(tau_max, 3), round(tau, 3))
        else:
            self._ladder = Bar("rungs", num_rungs, rung)
        self._show(at_once=True)

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        """Add a line to the table, or below it."""
        if logs is None or not state.is_world_process_zero:
            return
        if "rung" in logs:
            self._rungs.append(logs)
        elif line := line_of(logs):
            self._say(line)
        self._show(at_once=True)

    def on_run_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, *, record: RunRecord, **kwargs: Any
    ) -> None:
        if state.is_world_process_zero:
            self._say(record.ended_by)

    def _say(self, line: str) -> None:
        """Below the table or, where nothing goes on, by itself."""
        with self.running():
            self._lines.append(line)
