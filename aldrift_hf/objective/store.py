"""The costs already evaluated: in memory and, with an output directory, on disk before they are used.

A run that is killed at any moment does not lose a cost. Each process writes to a SQLite file of its own,
`output_dir/_costs/<rank>.sqlite`, in WAL mode: no process waits for the lock of another, no file is opened on two
machines (WAL does not work on a network file system), and every transaction is either complete or absent. All files are
read once, by [`CostStore.load`], and shared among the processes. Commands that draw from a finished run may run on
several machines at once; each machine has a file of its own for them ([`file_of_machine`]). The underscore in the
folder's name keeps it out of what the Trainer pushes to the Hub.
"""

from __future__ import annotations

import contextlib
import json
import math
import platform
import sqlite3
import threading
import zlib
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from accelerate import PartialState
from accelerate.utils import broadcast_object_list, gather_object

from .copied import copied

FOLDER = "_costs"

Key = tuple[str, str]
"""The identity of a prompt row ([`aldrift_hf.types.Prompts.keys`]) and a completion."""

Costs = list[float | None]
"""The cost of one completion under each of the cost functions; `None` under one that does not judge it."""


class Loaded(NamedTuple):
    """What [`CostStore.load`] found on disk.

    Attributes:
        found: number of costs of this objective.
        others: number of costs of other objectives; counted only if this objective has none.
    """

    found: int
    others: int


class CostStore(Mapping[Key, Costs]):
    """A mapping from (prompt row, completion) to costs, the same on all processes.

    Args:
        output_dir: the run's output directory; `None` keeps the costs in memory alone.
        identity: what distinguishes this objective from others whose costs may be in the same directory
            ([`aldrift_hf.objective.identity`]). The first process's is used on all.
        num_functions: number of cost functions, and of costs per key.
        about: what is kept of the objective for whoever reads the files later; while it is `None`, what is evaluated is
            not the run's.
    """

    about: str | None
    first_file: int
    """The number of the first process's file."""

    def __init__(self, output_dir: str | Path | None, identity: str, num_functions: int, about: str = "") -> None:
        self.folder = None if output_dir is None else Path(output_dir) / FOLDER
        self.identity = identity
        self.num_functions, self.about, self.first_file = num_functions, about, 0
        self._shared: dict[Key, Costs] = {}
        self._unshared: list[tuple[Key, Costs]] = []
        self._loaded = False
        self._connection: sqlite3.Connection | None = None
        self._lock = threading.Lock()  # the worker thread adds costs while the main thread may share or close

    def __getitem__(self, key: Key) -> Costs:
        return self._shared[key]

    def __contains__(self, key: object) -> bool:
        return key in self._shared

    def __iter__(self) -> Iterator[Key]:
        return iter(self._shared)

    def __len__(self) -> int:
        return len(self._shared)

    def load(self) -> Loaded | None:
        """Read the costs of earlier starts, once: later calls do nothing and return `None`.

        All processes call this together.

        Raises:
            OSError: for a file that is damaged or cannot be read, on all processes.
            ValueError: for costs of another number of functions under the same identity.
        """
        if self._loaded:
            return None
        self.identity = broadcast_object_list([self.identity])[0]
        self._shared.update(self._read_all(self.identity))
        for values in self._shared.values():
            if len(values) != self.num_functions:
                raise ValueError(
                    f"{self.folder} holds costs of {len(values)} functions for this objective of "
                    f"{self.num_functions}. Choose another objective_cache_key."
                )
        others = 0 if self._shared else sum(gather_object([self._count_others()]))
        self._loaded = True
        return Loaded(len(self._shared), others)

    def sample(self, identity: str, most: int) -> list[tuple[Key, Costs]]:
        """Up to so many costs on disk of an objective of any identity. All processes call this together, and get the
        same."""
        found = self._read_all(identity, most)
        return sorted(found, key=lambda item: item[0])[:: math.ceil(len(found) / most) or 1]

    def add(self, costs: Iterable[tuple[Key, Costs]], rows: Mapping[str, dict[str, Any]] | None = None) -> None:
        """Write costs to disk in one transaction. They are in the mapping after the next [`share`].

        Args:
            costs: by their keys.
            rows: the prompts' rows, by what stands for them in the keys: for whoever reads the files later.

        Raises:
            OSError: if they cannot be written.
        """
        items = list(costs)
        kept = [
            (self.identity, prompt, text.encode("utf-8", "surrogatepass"), json.dumps(values))
            for (prompt, text), values in items
        ]
        with self._lock:
            if self.folder is not None:
                try:
                    with self._open(self.folder) as connection:
                        connection.executemany("INSERT OR REPLACE INTO costs VALUES (?, ?, ?, ?)", kept)
                        # The objective that evaluated last is in the last row.
                        if kept and self.about is not None:
                            objective = (self.identity, self.about)
                            connection.execute("INSERT OR REPLACE INTO objectives VALUES (?, ?)", objective)
                        known = [(key, json.dumps(row, default=str)) for key, row in (rows or {}).items()]
                        connection.executemany("INSERT OR IGNORE INTO prompts VALUES (?, ?)", known)
                except sqlite3.Error as error:
                    raise OSError(
                        f"costs could not be written to {self.folder}: {error}. Free disk space, or choose another "
                        "output_dir. The costs written earlier are intact."
                    ) from error
            self._unshared += items

    def share(self) -> None:
        """Put the costs that all processes have added since the last call in the mapping. All call this together."""
        with self._lock:
            mine, self._unshared = self._unshared, []
        for items in gather_object([mine]):
            self._shared.update(items)

    def close(self) -> None:
        """Close the file. The mapping stays readable, and [`add`] would open the file again."""
        with self._lock:
            if self._connection is not None:
                self._connection.close()
                self._connection = None

    def _open(self, folder: Path) -> sqlite3.Connection:
        if self._connection is None:
            folder.mkdir(parents=True, exist_ok=True)
            self._connection = sqlite3.connect(folder / self._own_file, timeout=60, check_same_thread=False)
            self._connection.execute("PRAGMA journal_mode=WAL")
            self._connection.execute("PRAGMA synchronous=FULL")
            self._connection.execute(
                "CREATE TABLE IF NOT EXISTS costs (objective TEXT, prompt TEXT, completion BLOB, value TEXT, "
                "PRIMARY KEY (objective, prompt, completion)) WITHOUT ROWID"
            )
            self._connection.execute("CREATE TABLE IF NOT EXISTS prompts (key TEXT PRIMARY KEY, row TEXT)")
            self._connection.execute("CREATE TABLE IF NOT EXISTS objectives (identity TEXT PRIMARY KEY, about TEXT)")
        return self._connection

    def _read_all(self, identity: str, most: int = -1) -> list[tuple[Key, Costs]]:
        """An objective's costs in all files, of each file a random sample of `most`, if that is not negative. All
        processes call this together, and get the same."""
        items: list[tuple[Key, Costs]] = []
        error: OSError | None = None
        try:
            with self._files() as paths:
                items = [item for path in paths for item in _read(path, identity, most)]
        except OSError as caught:  # raised on all processes, or the others would wait for this one
            error = caught
        found: list[tuple[Key, Costs]] = []
        for part, message in gather_object([(items, None if error is None else str(error))]):
            if message is not None:
                raise OSError(message) from error
            found += part
        return found

    @property
    def _own_file(self) -> str:
        return f"{self.first_file + PartialState().process_index}.sqlite"

    @contextlib.contextmanager
    def _files(self) -> Iterator[list[Path]]:
        """The files that this process reads: its own, and copies of its share of the rest, which may be another
        machine's."""
        state, folder = PartialState(), self.folder
        if folder is None:
            yield []
            return
        mine = [path for path in files_in(folder) if int(path.stem) % state.num_processes == state.process_index]
        others = [path.name for path in mine if path.name != self._own_file]
        with copied(folder, others) as copies:
            yield [folder / self._own_file] * (len(others) < len(mine)) + copies

    def _count_others(self) -> int:
        """The number of other objectives' costs in this process's files."""
        with self._files() as paths:
            found = [_query(path, "SELECT COUNT(*) FROM costs WHERE objective != ?", self.identity) for path in paths]
        return sum(int(rows[0][0]) for rows in found if rows)


def file_of_machine() -> int:
    """A [`CostStore.first_file`] that other machines do not have, and no run."""
    return (1 + zlib.crc32(platform.node().encode())) << 16


def files_in(folder: Path) -> list[Path]:
    """The files of costs in a folder, but for those that were moved away under another name."""
    return sorted(path for path in folder.glob("*.sqlite") if path.stem.isdecimal())


def _read(path: Path, identity: str, most: int) -> list[tuple[Key, Costs]]:
    """An objective's costs in one file; a random sample of `most`, if that is not negative."""
    order = "" if most < 0 else f"ORDER BY RANDOM() LIMIT {most}"
    rows = _query(path, f"SELECT prompt, completion, value FROM costs WHERE objective = ? {order}", identity)
    return [((prompt, text.decode("utf-8", "surrogatepass")), json.loads(value)) for prompt, text, value in rows]


def described(path: Path) -> tuple[str, str] | None:
    """The identity of the objective that was last evaluated in a file, and what is kept of it."""
    rows = _query(path, "SELECT identity, about FROM objectives ORDER BY rowid DESC LIMIT 1")
    return rows[0] if rows else None


def rows_of(path: Path, identity: str) -> Iterator[tuple[str, str, Costs]]:
    """An objective's costs in one file, each with its prompt's row (JSON) and completion."""
    for row, text, value in _query(
        path,
        "SELECT prompts.row, completion, value FROM costs JOIN prompts ON costs.prompt = key WHERE objective = ?",
        identity,
    ):
        yield row, text.decode("utf-8", "surrogatepass"), json.loads(value)


def _query(path: Path, statement: str, *values: str) -> list[tuple[Any, ...]]:
    """The rows that a statement selects; none where the table does not exist."""
    try:
        with contextlib.closing(sqlite3.connect(path, timeout=60)) as connection:
            return connection.execute(statement, values).fetchall()
    except sqlite3.OperationalError as error:
        if "no such table" in str(error):  # the process was killed just after it created the file
            return []
        raise OSError(f"{path} cannot be read: {error}") from error
    except sqlite3.DatabaseError as error:
        raise OSError(
            f"{path}, which holds the costs evaluated so far, is damaged: {error}. Move the file away to evaluate them "
            "again."
        ) from error
