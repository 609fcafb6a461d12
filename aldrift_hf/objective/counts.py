"""What a run counts of its objective: the completions that it asked for, and those that failed."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

from .store import Key


class Counts:
    """The counts of one run.

    Attributes:
        asked: the hashes of the distinct (prompt row, completion) pairs asked for, before the run and in it.
        before: the hashes of those that were asked for before the run, such as draws of the untrained model.
        failed: the hashes of those whose evaluation failed in the run.
    """

    def __init__(self, before: Counts | None = None) -> None:
        self.asked: set[int] = set() if before is None else set(before.asked)
        self.before = frozenset(self.asked)
        self.failed: set[int] = set()

    @property
    def calls(self) -> int:
        """Distinct pairs that were first asked for in the run."""
        return len(self.asked) - len(self.before)

    @property
    def nothing_evaluated(self) -> bool:
        """Whether every pair asked for has failed."""
        return len(self.asked) == len(self.failed)

    def add(self, hashed: int) -> None:
        """Count a pair."""
        self.asked.add(hashed)

    def add_failures(self, keys: Iterable[Key]) -> None:
        """Count pairs as failed."""
        self.failed.update(map(hash_of, keys))

    def state_dict(self) -> dict[str, Tensor]:
        """`asked`, `before` and `failed` (int64, sorted)."""
        names = ("asked", "before", "failed")
        return {name: torch.tensor(sorted(getattr(self, name)), dtype=torch.int64) for name in names}

    @classmethod
    def from_state(cls, state: Mapping[str, Tensor]) -> Counts:
        """The counts that [`state_dict`] was called on."""
        counts = cls()
        counts.asked, counts.before = set(state["asked"].tolist()), frozenset(state["before"].tolist())
        counts.failed = set(state["failed"].tolist())
        return counts


def hash_of(key: Key) -> int:
    """A signed 64-bit hash of a pair, the same in every process. Among a million pairs two collide with probability
    3e-8."""
    digest = hashlib.blake2b("\0".join(key).encode("utf-8", "surrogatepass"), digest_size=8).digest()
    return int.from_bytes(digest, "big", signed=True)
