"""Time and peak memory of a block of code, on any device."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

import psutil
import torch


@contextmanager
def timed(device: torch.device, seconds: dict[str, float], name: str) -> Iterator[None]:
    """A context that sets `seconds[name]` to the time until all work queued on the device is done."""
    _wait(device)
    start = time.perf_counter()
    yield
    _wait(device)
    seconds[name] = time.perf_counter() - start


@contextmanager
def peak_memory(device: torch.device, peaks: dict[str, float], name: str) -> Iterator[None]:
    """A context that sets `peaks[name]` to the largest memory (MiB) held within it, beyond that held before.

    On a CPU the resident memory of the process is read every millisecond.
    """
    if device.type != "cpu":
        module = torch.get_device_module(device)
        module.reset_peak_memory_stats()
        before = module.memory_allocated()
        yield
        peaks[name] = (module.max_memory_allocated() - before) / 2**20
        return
    process, done, largest = psutil.Process(), threading.Event(), [0]

    def watch() -> None:
        while not done.wait(0.001):
            largest[0] = max(largest[0], process.memory_info().rss)

    before, watcher = process.memory_info().rss, threading.Thread(target=watch)
    watcher.start()
    try:
        yield
    finally:
        done.set()
        watcher.join()
    peaks[name] = max(0, largest[0] - before) / 2**20


def _wait(device: torch.device) -> None:
    if device.type != "cpu":
        torch.accelerator.synchronize(device)
