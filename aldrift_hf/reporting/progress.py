"""Progress bars over rungs and, inside a rung, over proposals, costs and updates; lines where there is no terminal."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator

from rich.console import Console
from rich.progress import (
    BarColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

SECONDS_BETWEEN_LINES = 30.0
"""Without a terminal a phase is silent for so long, and tells how far it is as often."""


class Bars:
    """The bars of one process.

    Args:
        shown: whether anything is; `False` on all processes but the first, and with `disable_tqdm`.

    Attributes:
        console: where everything is printed, above the bars.
    """

    def __init__(self, shown: bool) -> None:
        self.shown = shown
        self.console = Console()
        self._display: Progress | None = None
        self._ladder: TaskID | None = None

    @contextlib.contextmanager
    def live(self) -> Iterator[None]:
        """Keeps bars in view for a block, so that those of its tasks come and go in one place."""
        if self._display is not None or not self.shown or not self.console.is_terminal:
            yield
            return
        self._display = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            TextColumn("{task.completed:,} of {task.total:,}"),
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

    @contextlib.contextmanager
    def task(self, description: str, total: int, done: int = 0) -> Iterator[Callable[[int], None]]:
        """A bar for a block, which is handed a function that moves it on by so many of `total`."""
        with self.live():
            display = self._display
            if display is None:
                yield self._lines(description, total, done) if self.shown else lambda more: None
                return
            bar = display.add_task(description, total=total, completed=done)
            try:
                yield lambda more: display.advance(bar, more)
            finally:
                display.remove_task(bar)

    def ladder(self, description: str, total: float, done: float) -> None:
        """Says how far up the ladder the run is; seen only within [`live`]."""
        if self._display is None:
            return
        if self._ladder is None:
            self._ladder = self._display.add_task(description)
        self._display.update(self._ladder, description=description, total=total, completed=done)

    def _lines(self, description: str, total: int, done: int) -> Callable[[int], None]:
        began = spoke = time.monotonic()
        first = done

        def advance(more: int) -> None:
            nonlocal spoke, done
            done, now = done + more, time.monotonic()
            if done < total and now - spoke >= SECONDS_BETWEEN_LINES:
                spoke = now
                left = (now - began) * (total - done) / (done - first)
                self.console.print(f"  {description}: {done:,} of {total:,}, about {left:,.0f} s left", highlight=False)

        return advance
