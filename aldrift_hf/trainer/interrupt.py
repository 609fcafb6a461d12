"""Ctrl-C: the first stops a run at the next safe point, to go on from there; the second stops it at once.

SIGTERM, which clusters send before they take a machine away, does so too, with `enable_jit_checkpoint=True`.
"""

from __future__ import annotations

import contextlib
import logging
import signal
import threading
from collections.abc import Iterator
from types import FrameType

from accelerate.utils import gather_object
from transformers.trainer_jit_checkpoint import JITCheckpointCallback

logger = logging.getLogger(__name__)


class TerminatedError(Exception):
    """A run stopped because of SIGTERM, with a checkpoint."""


class Interrupt:
    """Whether the user, or a cluster, asked for a run to stop."""

    def __init__(self) -> None:
        self._catches = self._asked = False
        self._sigterm: JITCheckpointCallback | None = None

    def take_over(self, callback: JITCheckpointCallback | None) -> None:
        """Keep the Trainer's callback for SIGTERM, which has installed its handler, as what knows of the signal. By
        itself it saves in the middle of an update, and on each process when that one hears of it.

        Args:
            callback: removed from the Trainer's; `None` where SIGTERM is not caught.
        """
        self._sigterm = callback

    @contextlib.contextmanager
    def caught(self) -> Iterator[None]:
        """Catches the first Ctrl-C, or SIGTERM, of a `with` block in the main thread: signals arrive only there.

        What is drawn outside of training is not stopped.
        """
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        before = signal.signal(signal.SIGINT, self._handle)
        self._catches = True
        try:
            yield
        finally:
            signal.signal(signal.SIGINT, before)
            self._catches = self._asked = False
            if manager := self._sigterm and self._sigterm.jit_manager:
                signal.signal(signal.SIGTERM, manager._original_sigterm_handler)
                self._sigterm = None

    def asked(self) -> signal.Signals | None:
        """The signal that has asked any process to stop. All processes call this together, to stop at one point."""
        manager = self._sigterm and self._sigterm.jit_manager if self._catches else None
        terminated = signal.SIGTERM if manager and manager.is_checkpoint_requested else None
        return next(filter(None, gather_object([signal.SIGINT if self._asked else terminated])), None)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self._asked:
            raise KeyboardInterrupt
        self._asked = True
        logger.warning("Ctrl-C: stopping at the next safe point, to go on from there. Press it again to stop at once.")
