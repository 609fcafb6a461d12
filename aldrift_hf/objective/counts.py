"""What a run counts of its objective: the completions that it asked for, those that failed, and the lowest cost."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

from .store import Key


class Counts:
    """The counts of one run. They are those of the run by itself, whether or not a cost was known before.

    Attributes:
        asked: the hashes of the distinct (prompt row, completion) pairs that the run has asked for.
        failed: the hashes of those whose evaluation failed.
        best: the lowest cost of a pair that was asked for; infinity before the first.
    """

    def __init__(self) -> None:
        self.asked: set[int] = set()
        self.failed: set[int] = set()
        self.best = math.inf

    @property
    def nothing_evaluated(self) -> bool:
        """Whether every pair asked for has failed."""
        return len(self.asked) == len(self.failed)

    def add(self, hashed: int, cost: float) -> None:
        """Count a pair with its weighted cost."""
        self.asked.add(hashed)
        self.best = min(self.best, cost)

    def add_failures(self, keys: Iterable[Key]) -> None:
        """Count pairs as failed."""
        self.failed.update(map(hash_of, keys))

    def state_dict(self) -> dict[str, Tensor]:
        """`asked` and `failed` (int64, sorted) and `best` (fp64, a scalar)."""
        return {
            "asked": torch.tensor(sorted(self.asked), dtype=torch.int64),
            "failed": torch.tensor(sorted(self.failed), dtype=torch.int64),
            "best": torch.tensor(self.best, dtype=torch.float64),
        }

    @classmethod
    def from_state(cls, state: Mapping[str, Tensor]) -> Counts:
        """The counts that [`state_dict`] was called on."""
        counts = cls()
        counts.asked = set(state["asked"].tolist())
        counts.failed = set(state["failed"].tolist())
        counts.best = state["best"].item()
        return counts


def hash_of(key: Key) -> int:
    """A signed 64-bit hash of a pair, the same in every process. Among a million pairs two collide with probability
    3e-8."""
    digest = hashlib.blake2b("\0".join(key).encode("utf-8", "surrogatepass"), digest_size=8).digest()
    return int.from_bytes(digest, "big", signed=True)
