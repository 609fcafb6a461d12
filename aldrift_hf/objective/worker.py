"""A thread in which cost functions run while the caller goes on."""

from __future__ import annotations

import queue
import threading
import weakref
from collections.abc import Callable
from concurrent.futures import Future

from .event_loop import cancel

SECONDS_TO_STOP = 5.0
"""How long [`Worker.stop`] waits for a running job. A function that hangs must not block the caller for longer."""


_Job = tuple["Future[None]", Callable[[], None]]


class Worker:
    """Runs one job after the other in a daemon thread, which ends with [`stop`] or when nobody uses the worker.

    Unlike the threads of an executor, a daemon thread does not keep the process alive while a job hangs.
    """

    def __init__(self) -> None:
        self._jobs: queue.SimpleQueue[_Job | None] = queue.SimpleQueue()
        # The thread knows the queue alone: with the worker, or a job of the past, it would keep these alive for ever.
        self._thread = threading.Thread(target=_run, args=(self._jobs,), name="aldrift-objective", daemon=True)
        self._thread.start()
        weakref.finalize(self, self._jobs.put, None)

    def submit(self, job: Callable[[], None]) -> Future[None]:
        """Put a job, which must not raise, at the end of the queue."""
        future: Future[None] = Future()
        self._jobs.put((future, job))
        return future

    def stop(self) -> None:
        """End the thread after the jobs in the queue; wait for it for up to `SECONDS_TO_STOP`.

        What async functions still do for it is cancelled.
        """
        self._jobs.put(None)
        cancel(self._thread)
        self._thread.join(SECONDS_TO_STOP)


def _run(jobs: queue.SimpleQueue[_Job | None]) -> None:
    while (entry := jobs.get()) is not None:
        future, job = entry
        if future.set_running_or_notify_cancel():
            job()
            future.set_result(None)
        del entry, future, job
