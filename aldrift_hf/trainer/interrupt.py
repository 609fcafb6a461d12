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
from transformers.trainer_jit_checkpoint import CheckpointManager, JITCheckpointCallback

logger = logging.getLogger(__name__)


class TerminatedError(Exception):
    """A run stopped because of SIGTERM, with a checkpoint."""


class Interrupt:
    """Whether the user, or a cluster, asked for a run to stop."""

    def __init__(self) -> None:
        self._catches = self._asked = False
        self._sigterm: CheckpointManager | None = None

    def take_over(self, callback: JITCheckpointCallback | None) -> None:
        """Keep what knows of SIGTERM from the Trainer's callback, which has installed its handler. By itself the
        callback saves in the middle of an update, and on each process when that one hears of it.

        Args:
            callback: removed from the Trainer's; `None` where SIGTERM is not caught.
        """
        self._sigterm = callback and callback.jit_manager

    @contextlib.contextmanager
    def caught(self) -> Iterator[None]:
        """Catches the first Ctrl-C of a `with` block, if it runs in the main thread, and SIGTERM in any.

        What is drawn outside of training is not stopped.
        """
        is_main = threading.current_thread() is threading.main_thread()  # others cannot set handlers
        before = signal.signal(signal.SIGINT, self._handle) if is_main else None
        self._catches = True
        try:
            yield
        finally:
            self._catches = self._asked = False
            if is_main:
                signal.signal(signal.SIGINT, before)
                if self._sigterm is not None:
                    signal.signal(signal.SIGTERM, self._sigterm._original_sigterm_handler)
            self._sigterm = None

    def asked(self) -> signal.Signals | None:
        """The signal that has asked any process to stop. All processes call this together, to stop at one point."""
        terminated = self._catches and self._sigterm is not None and self._sigterm.is_checkpoint_requested
        here = signal.SIGINT if self._asked else signal.SIGTERM if terminated else None
        return next(filter(None, gather_object([here])), None)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self._asked:
            raise KeyboardInterrupt
        self._asked = True
        logger.warning("Ctrl-C: stopping at the next safe point, to go on from there. Press it again to stop at once.")
