"""Streams of random numbers by address (run seed, purpose, rung, …): counters instead of a running state.

A rung's draws are the same on one process or eight, before a crash or after.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor


def stream_seed(*key: int) -> int:
    """A seed for one stream of random numbers, by its address (run seed, purpose, rung, …).

    Counters instead of a running state: a rung's draws are the same on one process or eight, before a crash or after.
    """
    # With its length, for a SeedSequence takes (1,) and (1, 0) for the same.
    return int(np.random.SeedSequence((len(key), *key)).generate_state(1, np.uint64)[0] >> np.uint64(1))


def uniforms(address: Sequence[int], rows: range, width: int) -> Tensor:
    """The numbers in [0, 1) that a stream's rows are drawn by, `[len(rows), width]`, fp64.

    Any stretch of rows can be had without those before it, and is the same however the stream is cut.

    Args:
        address: of the stream (run seed, purpose, rung, …).
        rows: consecutive rows of the stream.
        width: tokens a row; part of the address.
    """
    counters = -(-width // 4)  # Philox yields four numbers a count
    generator = np.random.Philox(key=stream_seed(*address, width)).advance(rows.start * counters)
    return torch.from_numpy(np.random.Generator(generator).random((len(rows), 4 * counters))[:, :width])
