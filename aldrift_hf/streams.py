"""Streams of random numbers by address (run seed, purpose, rung, …): counters instead of a running state.

A rung's draws are the same on one process or eight, and before a crash or after.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

PROPOSE, CORRECT, SHUFFLE, EVALUATE, SAMPLE, DEAL = range(6)
"""What a stream is for: the first number of its address after the run's seed. No two purposes share a stream."""


def stream_seed(*address: int) -> int:
    """A seed for the stream of random numbers at an address."""
    # With its length, because a SeedSequence takes (1,) and (1, 0) for the same.
    return int(np.random.SeedSequence((len(address), *address)).generate_state(1, np.uint64)[0] >> np.uint64(1))


def generator(*address: int) -> torch.Generator:
    """A generator for the stream at an address."""
    return torch.Generator().manual_seed(stream_seed(*address))


def uniforms(address: Sequence[int], rows: range, width: int) -> Tensor:
    """The uniform numbers in [0, 1) by which the rows of a stream are drawn, `[len(rows), width]`, fp64.

    Any range of rows can be computed without those before it, and is the same however the stream is divided.

    Args:
        address: the address of the stream.
        rows: consecutive rows of the stream.
        width: tokens per row; part of the address.
    """
    counters = -(-width // 4)  # Philox yields four numbers per count
    philox = np.random.Philox(key=stream_seed(*address, width)).advance(rows.start * counters)
    return torch.from_numpy(np.random.Generator(philox).random((len(rows), 4 * counters))[:, :width])
