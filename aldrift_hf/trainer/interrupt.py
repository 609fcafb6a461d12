"""Ctrl-C: the first stops a run at the next safe point, to go on from there; the second stops it at once.

SIGTERM, which clusters send before they take a machine away, is the Trainer's: `enable_jit_checkpoint=True`.
"""

from __future__ import annotations

import contextlib
import logging
import signal
import threading
from collections.abc import Iterator
from types import FrameType

from accelerate.utils import gather_object

logger = logging.getLogger(__name__)


class Interrupt:
    """Whether the user asked for a run to stop."""

    def __init__(self) -> None:
        self._asked = False

    @contextlib.contextmanager
    def caught(self) -> Iterator[None]:
        """Catches the first Ctrl-C of a `with` block, if it runs in the main thread: signals arrive only there."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        before = signal.signal(signal.SIGINT, self._handle)
        try:
            yield
        finally:
            signal.signal(signal.SIGINT, before)
            self._asked = False

    def asked(self) -> bool:
        """Whether Ctrl-C was pressed on any process. All processes call this together, to stop at one point."""
        return any(gather_object([self._asked]))

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self._asked:
            raise KeyboardInterrupt
        self._asked = True
        logger.warning("Ctrl-C: stopping at the next safe point, to go on from there. Press it again to stop at once.")
