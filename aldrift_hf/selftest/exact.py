"""Spaces of completions small enough to write all of them down, and how far draws are from their law."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import torch
from scipy import stats
from torch import Tensor

from ..types import Completions

LEAST = 20
"""Draws that a cell of a chi-square test is expected to have, about; rarer events share one."""


def every_completion(length: int, vocabulary: int, eos: Sequence[int]) -> Completions:
    """All events of the completion space: those that end with an end-of-text token, and those that are cut.

    Args:
        length: most tokens of a completion.
        vocabulary: tokens.
        eos: those that end a completion.
    """
    others = [token for token in range(vocabulary) if token not in eos]
    ended = [[*body, end] for size in range(length) for body in itertools.product(others, repeat=size) for end in eos]
    cut = [list(body) for body in itertools.product(others, repeat=length)]
    return Completions.of(ended + cut, eos[0])


def chi_square_p(counts: Tensor, probabilities: Tensor, ratio: float = 1.0) -> float:
    """p-value of counts under a law known exactly, or to within a factor.

    The chi-square statistic of `n` draws from `π` against `p` is noncentral by `Σ n(π - p)²/p`, which is at most
    `n(ratio - 1)²` where every `π/p` is within the factor.

    Args:
        counts: `[events]`, or `[samples, events]`.
        probabilities: alike, `p` up to a constant of each sample.
        ratio: the factor, at least 1.
    """
    if counts[probabilities == 0].any():
        return 0.0
    n, samples = int(counts.sum()), counts.numel() // counts.shape[-1]
    expected = probabilities.double() / probabilities.double().sum(-1, keepdim=True) * counts.sum(-1, keepdim=True)
    expected, order = expected.flatten().sort(descending=True)
    counts = counts.flatten()[order]
    # Laid end to end, events fall into stretches of LEAST draws; what is left over joins the last.
    cell = ((expected.cumsum(0) - expected / 2) // LEAST).clamp(max=max(n // LEAST - 1, 0)).long()
    expected, seen = (torch.zeros(n + 1).double().index_add_(0, cell, x.double()) for x in (expected, counts))
    used = expected > 0
    statistic = ((seen - expected)[used] ** 2 / expected[used]).sum().item()
    return float(stats.ncx2.sf(statistic, int(used.sum()) - samples, n * (ratio - 1) ** 2))


def chain_law(log_weight: Tensor, log_q: Tensor, steps: int) -> Tensor:
    """Where an independence Metropolis-Hastings chain of `steps` proposals ends: `q K^(steps-1)`, `[events]`.

    `K(s, s') = q(s')·min(1, w(s')/w(s))` for `s' ≠ s`; what is left of a row stays where it is.

    Args:
        log_weight: `[events]`, `ℓ(s)`, nats.
        log_q: `[events]`, what proposals are drawn from.
        steps: M, the first state included.
    """
    moves = log_q.softmax(0) * (log_weight[None, :] - log_weight[:, None]).clamp(max=0.0).exp()
    moves.fill_diagonal_(0.0)
    stays = 1 - moves.sum(1)
    law = log_q.softmax(0)
    for _ in range(steps - 1):
        law = law @ moves + law * stays
    return law
