"""Copies of files of costs, for whoever only reads them: a run may be writing to them, also on another machine."""

from __future__ import annotations

import contextlib
import shutil
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

WAL_HEADER = 32
"""Bytes at the beginning of SQLite's write-ahead log that are others once it begins anew."""
TRIES = 5


@contextlib.contextmanager
def copied(folder: Path, names: list[str]) -> Iterator[list[Path]]:
    """Copies of SQLite files in WAL mode, with what is in their write-ahead logs alone.

    A connection would write beside the original. Where one may not, as in the run of a colleague, it fails; and where
    another machine has the file open, it could damage it, for WAL does not work on a network file system.

    Raises:
        OSError: if a file cannot be copied, or read by then; it names the original.
    """
    with tempfile.TemporaryDirectory() as scratch:
        try:
            yield [_copy(folder / name, Path(scratch, name)) for name in names]
        except OSError as error:
            raise OSError(str(error).replace(scratch, str(folder))) from error


def _copy(path: Path, to: Path) -> Path:
    """Copy the file and then its log. What a log holds that was still there is in the copy of the log, whatever was
    written to the file in between; if the log has begun anew, it may be in neither."""
    log, log_to = path.with_name(f"{path.name}-wal"), to.with_name(f"{to.name}-wal")
    for _ in range(TRIES):
        before = _header(log)
        shutil.copyfile(path, to)
        log_to.write_bytes(b"")
        with contextlib.suppress(FileNotFoundError):  # there is none once the run has closed it
            shutil.copyfile(log, log_to)
        if _header(log_to) == before:
            return to
        time.sleep(0.1)
    raise OSError(f"{path} is written to faster than it can be copied. Try again.")


def _header(log: Path) -> bytes:
    """What tells a log from the next one in the same file; nothing where there is none."""
    try:
        with log.open("rb") as file:
            return file.read(WAL_HEADER)
    except FileNotFoundError:
        return b""
