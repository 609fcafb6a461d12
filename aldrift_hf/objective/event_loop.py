"""One event loop for all async cost functions of a process, in a thread of its own.

A semaphore, a lock or a client belongs to the event loop in which it is first used. One that a user keeps at module
level is used by every batch, by every trainer of the process and by `check_objective`, so that they need the same loop.
It does not matter then whether a loop is running in the caller's thread, as in a notebook.
"""

from __future__ import annotations

import asyncio
import os
import queue
import threading
import weakref
from collections.abc import Awaitable, Sequence
from concurrent.futures import CancelledError
from contextvars import ContextVar
from typing import Any


class _EventLoop:
    """An event loop in a daemon thread, which does not keep the process alive while a function hangs."""

    def __init__(self) -> None:
        self.loop = asyncio.new_event_loop()
        self.loop.set_task_factory(_new_task)
        self.waiting: dict[int, _Call] = {}
        threading.Thread(target=self._run, name="aldrift-event-loop", daemon=True).start()

    def _run(self) -> None:
        asyncio.set_event_loop(self.loop)
        while True:
            try:
                self.loop.run_forever()
            except (SystemExit, KeyboardInterrupt):  # raised by a function, and in the thread that waits for it too
                continue


_lock = threading.Lock()
_current: _EventLoop | None = None


def _event_loop() -> _EventLoop:
    global _current
    with _lock:
        if _current is None:
            _current = _EventLoop()
        return _current


def _forget() -> None:
    """In a forked process: the thread was not copied, and the lock may have been held."""
    global _lock, _current
    _lock, _current = threading.Lock(), None


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget)


class _Call:
    """Awaitables for whose results a thread waits. It may be cancelled at any moment, also before it has begun."""

    def __init__(self, loop: asyncio.AbstractEventLoop, awaitables: Sequence[Awaitable[Any]]) -> None:
        self.loop, self.awaitables = loop, awaitables
        # Not a future: its lock may stay taken where a KeyboardInterrupt comes at the wrong moment, and stop the loop.
        self._ended: queue.SimpleQueue[asyncio.Task[list[Any]]] = queue.SimpleQueue()
        self._task: asyncio.Task[list[Any]] | None = None
        self.cancelled = False

    def begin(self) -> None:
        """Start, on the loop."""
        self._task = self.loop.create_task(_together(self))
        self._task.add_done_callback(self._ended.put)
        if self.cancelled:
            self._task.cancel()

    def cancel(self) -> None:
        """Cancel, on the loop."""
        self.cancelled = True
        if self._task is not None:
            self._task.cancel()

    def results(self) -> list[Any]:
        """Wait for the results, in another thread."""
        task = self._ended.get()
        if task.cancelled():
            raise CancelledError
        return task.result()


def wait_for(awaitables: Sequence[Awaitable[Any]]) -> list[Any]:
    """Wait for the results of awaitables that run together on the process's event loop.

    If one of them raises, the others are cancelled, with all that they have started, and its exception is raised. An
    exception in the waiting thread, such as KeyboardInterrupt, cancels them all.
    """
    running, thread = _event_loop(), threading.get_ident()
    call = running.waiting[thread] = _Call(running.loop, awaitables)
    try:
        running.loop.call_soon_threadsafe(call.begin)
        return call.results()
    except BaseException:
        running.loop.call_soon_threadsafe(call.cancel)
        raise
    finally:
        del running.waiting[thread]


def cancel(thread: threading.Thread) -> None:
    """Cancel what another thread is waiting for: there, [`wait_for`] raises `CancelledError`."""
    call = None if _current is None or thread.ident is None else _current.waiting.get(thread.ident)
    if call is not None:
        call.loop.call_soon_threadsafe(call.cancel)


def is_foreign(awaitable: Awaitable[Any]) -> bool:
    """Whether an awaitable is bound to another event loop, on which this one cannot wait."""
    return asyncio.isfuture(awaitable) and awaitable.get_loop() is not _event_loop().loop


def is_cancelled() -> bool:
    """Whether the call that the running task belongs to was cancelled, by [`cancel`] or an interrupt."""
    call = _calling.get()
    return call is not None and call.cancelled


async def _together(call: _Call) -> list[Any]:
    started: weakref.WeakSet[asyncio.Task[Any]] = weakref.WeakSet()
    _started.set(started)
    _calling.set(call)
    try:
        return await asyncio.gather(*call.awaitables)
    except BaseException:
        # Also what the functions have started themselves: requests, processes. If nothing fails, they may leave tasks
        # behind, such as those that serve a client.
        unfinished = [task for task in started if not task.done()]
        for task in unfinished:
            task.cancel()
        await asyncio.gather(*unfinished, return_exceptions=True)
        raise


_started: ContextVar[weakref.WeakSet[asyncio.Task[Any]] | None] = ContextVar("started", default=None)
"""The tasks started by the call that a task belongs to; tasks inherit it from those that start them."""
_calling: ContextVar[_Call | None] = ContextVar("calling", default=None)
"""That call itself."""


def _new_task(loop: asyncio.AbstractEventLoop, coroutine: Any, **settings: Any) -> asyncio.Task[Any]:
    task = asyncio.Task(coroutine, loop=loop, **settings)
    started = _started.get()
    if started is not None:
        started.add(task)
    return task
