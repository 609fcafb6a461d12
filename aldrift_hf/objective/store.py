"""Every cost that was paid for, on disk before it is used: a run that is killed pays for none of them twice.

Each process writes to a SQLite file of its own, `output_dir/_costs/<rank>.sqlite`, in WAL mode: no process waits for
another's lock, a file is never opened from two machines (which WAL does not survive on a network file system), and a
kill at any instant leaves whole transactions. All files are read once, when the first completions come, and shared.
The underscore keeps the folder out of what the Trainer pushes to the Hub.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import inspect
import json
import logging
import sqlite3
import threading
import tokenize
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from accelerate import PartialState
from accelerate.utils import gather_object
from datasets.fingerprint import Hasher
from torch import nn

FOLDER = "_costs"

Key = tuple[str, str]
"""A prompt row's identity and a completion."""

logger = logging.getLogger(__name__)


class Journal:
    """The costs of one objective in one output directory.

    Args:
        output_dir: the run's.
        functions: the cost functions; costs of others, or of an earlier text of theirs, are not taken for theirs.
    """

    def __init__(self, output_dir: str | Path, functions: Sequence[Callable[..., Any]]) -> None:
        self.folder = Path(output_dir) / FOLDER
        self.identity = hashlib.sha256("\n".join(map(identity, functions)).encode()).hexdigest()
        self._connection: sqlite3.Connection | None = None
        self._lock = threading.Lock()  # the objective's thread writes, and the main thread opens

    def read(self) -> dict[Key, list[float]]:
        """All costs there are, the same on all processes, which call this together.

        Raises:
            OSError: for a file that is damaged.
        """
        state = PartialState()
        paths = sorted(self.folder.glob("*.sqlite"))
        # Every process its own, and the first one those of more processes than there are now.
        mine = [path for path in paths if int(path.stem) % state.num_processes == state.process_index]
        found: dict[Key, list[float]] = {}
        for part in gather_object([[item for path in mine for item in self._items(path)]]):
            found.update(part)
        return found

    def write(self, costs: Iterable[tuple[Key, list[float]]]) -> None:
        """Add costs, in one transaction; on return they are on disk.

        Raises:
            OSError: if they cannot be written.
        """
        rows = [
            (self.identity, prompt, text.encode("utf-8", "surrogatepass"), json.dumps(values))
            for (prompt, text), values in costs
        ]
        with self._lock:
            try:
                with self._open() as connection:
                    connection.executemany("INSERT OR REPLACE INTO costs VALUES (?, ?, ?, ?)", rows)
            except sqlite3.Error as error:
                raise OSError(
                    f"costs could not be written to {self.folder}: {error}. Make room, or choose another output_dir; "
                    "nothing that was there before is lost."
                ) from error

    def _open(self) -> sqlite3.Connection:
        if self._connection is None:
            self.folder.mkdir(parents=True, exist_ok=True)
            path = self.folder / f"{PartialState().process_index}.sqlite"
            self._connection = sqlite3.connect(path, timeout=60, check_same_thread=False)
            self._connection.execute("PRAGMA journal_mode=WAL")
            self._connection.execute("PRAGMA synchronous=FULL")
            self._connection.execute(
                "CREATE TABLE IF NOT EXISTS costs (objective TEXT, prompt TEXT, completion BLOB, value TEXT, "
                "PRIMARY KEY (objective, prompt, completion)) WITHOUT ROWID"
            )
        return self._connection

    def _items(self, path: Path) -> list[tuple[Key, list[float]]]:
        try:
            connection = sqlite3.connect(path, timeout=60)
            try:
                rows = connection.execute(
                    "SELECT prompt, completion, value FROM costs WHERE objective = ?", (self.identity,)
                ).fetchall()
            finally:
                connection.close()
        except sqlite3.OperationalError as error:
            if "no such table" in str(error):  # killed as the file was made
                return []
            raise OSError(f"{path} cannot be read: {error}") from error
        except sqlite3.DatabaseError as error:
            raise OSError(
                f"{path}, the record of costs paid for, is damaged: {error}. Move it away to evaluate them anew."
            ) from error
        return [((prompt, text.decode("utf-8", "surrogatepass")), json.loads(value)) for prompt, text, value in rows]


def identity(function: Callable[..., Any], seen: frozenset[int] = frozenset()) -> str:
    """What tells a cost function from others: its name, the text of its file, and what it is bound to or closes over.

    What it reads elsewhere (a file, a service, a model) is not seen: whoever changes that removes the folder.
    """
    if id(function) in seen:  # a function that closes over itself
        return ""
    seen = seen | {id(function)}
    state: list[Any] = []
    while isinstance(function, functools.partial):
        state += [function.args, function.keywords]
        function = function.func
    function = inspect.unwrap(function)
    if inspect.ismethod(function):
        state.append(function.__self__)
        function = function.__func__
    elif not inspect.isroutine(function):  # an object that can be called
        state.append(function)
        function = type(function).__call__
    inner = []
    for cell in getattr(function, "__closure__", None) or ():
        with contextlib.suppress(ValueError):  # empty as yet
            inner.append(cell.cell_contents)
    names = [getattr(function, "__qualname__", repr(function)), _text(function)]
    names += [identity(part, seen) if inspect.isroutine(part) else _fingerprint(part) for part in (*state, *inner)]
    return hashlib.sha256("\n".join(names).encode()).hexdigest()


def _text(function: Callable[..., Any]) -> str:
    """The text of the function's file or, in a notebook, of the function."""
    try:
        return Path(inspect.getsourcefile(function) or "").read_text(encoding="utf-8")
    except (OSError, TypeError):
        pass
    try:
        return inspect.getsource(function)
    except (OSError, TypeError, SyntaxError, tokenize.TokenError):
        return repr(getattr(getattr(function, "__code__", None), "co_code", ""))


def _fingerprint(value: Any, depth: int = 3) -> str:
    """Of data that a function is bound to; of a model, a lock, a connection and the like, their type's name alone."""
    parts = getattr(value, "__dict__", {})
    if not any(isinstance(part, nn.Module) for part in (value, *parts.values())):
        with contextlib.suppress(Exception):  # whatever pickling raises
            return str(Hasher.hash(value))
    names = [type(value).__qualname__]
    if depth and not isinstance(value, nn.Module):  # something in it cannot be pickled: part by part
        names += [f"{name} {_fingerprint(parts[name], depth - 1)}" for name in sorted(parts)]
    return hashlib.sha256("\n".join(names).encode()).hexdigest()
