"""How much memory this process may still take before an allocation fails or the kernel ends the process.

The machine's free memory is not all of it: a container's limit (cgroups, version 1 and 2, each nested in others) is
enforced by killing a process, and `ulimit -v` by refusing memory to it.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import NamedTuple

import psutil
import torch
from accelerate import PartialState

GIB = 2**30
ROOT = Path("/")


class _Files(NamedTuple):
    """Names of a version's files: limits, usage, and what of the usage is files that can be dropped from memory."""

    limits: tuple[str, ...]
    used: str
    dropped: str


_VERSION_1 = _Files(("memory.limit_in_bytes",), "memory.usage_in_bytes", "total_inactive_file")
_VERSION_2 = _Files(("memory.max", "memory.high"), "memory.current", "inactive_file")


def free_memory(device: torch.device) -> int:
    """Bytes that can still be taken on a device; of the host where the device cannot say, as Apple's share its memory.

    What several processes share is divided among those of this launch on this machine.
    """
    # No such function, no such device, or a driver without the query.
    with contextlib.suppress(AttributeError, RuntimeError):
        module = torch.get_device_module(device)
        free, _ = module.mem_get_info(device)
        return int(free + module.memory_reserved(device) - module.memory_allocated(device))
    return free_host_memory()


def free_host_memory(root: Path = ROOT) -> int:
    """Bytes of the host's memory that can still be taken; `root` is that of the file system, for tests."""
    processes = int(os.environ.get("LOCAL_WORLD_SIZE", PartialState().num_processes))
    shared = min([psutil.virtual_memory().available, *_left_in_groups(root)]) // max(1, processes)
    return max(0, min([int(shared), *_left_to_process()]))


def _left_to_process() -> Iterator[int]:
    """What `ulimit -v` and `ulimit -d` leave, where they are set."""
    process = psutil.Process()
    if not hasattr(process, "rlimit"):  # not on Linux
        return
    used = process.memory_info()
    for resource, taken in ((psutil.RLIMIT_AS, used.vms), (psutil.RLIMIT_DATA, used.data)):
        limit, _ = process.rlimit(resource)
        if limit != psutil.RLIM_INFINITY:
            yield limit - taken


def _left_in_groups(root: Path) -> Iterator[int]:
    """What this process's group, and each of those around it, still allows: all of them hold."""
    for files, mount, folder in _groups(root):
        for group in (folder, *folder.parents):
            yield from _left_in(group, files)
            if group == mount:
                break


def _left_in(group: Path, files: _Files) -> Iterator[int]:
    with contextlib.suppress(OSError, ValueError, KeyError):  # a group without a limit has no such file, or "max" in it
        used = int((group / files.used).read_text())
        stat = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
        used -= int(stat[files.dropped])
        for name in files.limits:
            with contextlib.suppress(OSError, ValueError):
                yield int((group / name).read_text()) - used


def _groups(root: Path) -> Iterator[tuple[_Files, Path, Path]]:
    """For each version in use: its files, where its hierarchy is mounted, and this process's group below that."""
    with contextlib.suppress(OSError):  # not on Linux
        own = [line.split(":", 2) for line in (root / "proc/self/cgroup").read_text().splitlines()]
        for line in (root / "proc/self/mountinfo").read_text().splitlines():
            first, _, last = line.partition(" - ")
            start, point = first.split()[3:5]
            kind, *_, options = last.split()
            for number, controllers, path in own:
                version_2 = kind == "cgroup2" and number == "0"
                version_1 = kind == "cgroup" and "memory" in options.split(",") and "memory" in controllers.split(",")
                if version_1 or version_2:
                    mount = root / point.lstrip("/")
                    yield _VERSION_2 if version_2 else _VERSION_1, mount, _below(mount, start, path)


def _below(mount: Path, start: str, path: str) -> Path:
    """The folder of the group `path` where the group `start` is mounted; the mount itself where that cannot be told.

    A container may see its own group alone, mounted as if it were the root, and its path as it is called outside.
    """
    with contextlib.suppress(ValueError):
        relative = PurePosixPath(path).relative_to(start)
        if ".." not in relative.parts and (mount / relative).is_dir():
            return mount / relative
    return mount
