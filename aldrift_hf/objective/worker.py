"""A thread in which cost functions run while the caller goes on, and how processes wait for each other's."""

from __future__ import annotations

import queue
import threading
import time
import weakref
from collections.abc import Callable, Sequence
from concurrent.futures import Future, wait

from accelerate import PartialState
from accelerate.utils import gather_object

from .event_loop import cancel

SECONDS_TO_STOP = 5.0
"""How long [`Worker.stop`] waits for a running job. A function that hangs must not block the caller for longer."""

MEET_EVERY = 60.0
"""Seconds after which processes that wait for each other's jobs meet, so that no time-out ends the wait."""

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


def finish_all(jobs: Sequence[Future[None] | Callable[[], None]], advance: Callable[[int], None]) -> None:
    """Wait for the jobs of all processes, which call this together.

    A process may be done long before another, and a collective waits no longer than `ddp_timeout`. So they meet again
    and again; a single job that is called here, and not in a thread, is not interrupted for that.

    Args:
        jobs: this process's: those of [`Worker.submit`], or functions to call.
        advance: called with 1 for each job that is done.
    """
    done, alone = 0, PartialState().num_processes == 1
    while True:
        until = time.monotonic() + MEET_EVERY
        while done < len(jobs) and (alone or time.monotonic() < until):
            job = jobs[done]
            if not isinstance(job, Future):
                job()
            elif wait([job], None if alone else max(0.0, until - time.monotonic())).done:
                job.result()
            else:
                break
            done += 1
            advance(1)
        if alone or not any(gather_object([done < len(jobs)])):
            return


def _run(jobs: queue.SimpleQueue[_Job | None]) -> None:
    while (entry := jobs.get()) is not None:
        future, job = entry
        if future.set_running_or_notify_cancel():
            job()
            future.set_result(None)
        del entry, future, job
