"""How different the draws for one prompt are."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

import numpy as np
import torch

from ..types import Proposals

MAX_PAIRS = 2000
"""Pairs of draws that are compared, at most, evenly spaced over all prompts."""


def diversity(proposals: Proposals) -> float:
    """The mean Jaccard distance `1 - |A ∩ B| / |A ∪ B|` between the token pairs A and B of two draws for one prompt.

    Pairs are of neighbouring tokens, the first one's with the start of the text. It is 0 if all draws are the same, and
    1 if no two have a pair in common. A draw is compared with the next one of its prompt; draws are independent, so the
    expectation does not depend on their number. NaN with one draw per prompt.
    """
    prompts, n = proposals.objective.shape
    first = torch.arange(prompts * n).view(prompts, n)[:, :-1].flatten()
    if not len(first):
        return math.nan
    first = first[:: math.ceil(len(first) / MAX_PAIRS)]
    ours, theirs = (proposals.completions.select(first + step).tokens() for step in (0, 1))
    return float(np.mean([_distance(a, b) for a, b in zip(ours, theirs, strict=True)]))


def _distance(one: Sequence[int], other: Sequence[int]) -> float:
    ours, theirs = ({*itertools.pairwise([-1, *tokens])} for tokens in (one, other))
    return 1 - len(ours & theirs) / len(ours | theirs)
