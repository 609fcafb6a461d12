"""Completion spaces that are small enough to enumerate, and how far draws are from a known distribution."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import torch
from scipy import stats
from torch import Tensor

from ..types import Completions

MIN_EXPECTED = 20
"""Approximate number of draws that a cell of a chi-square test expects; rarer events are put into one cell."""


def every_completion(length: int, vocabulary: int, eos: Sequence[int]) -> Completions:
    """All outcomes of drawing a completion: those that end with an end-of-text token, and those that are cut.

    Args:
        length: most tokens of a completion.
        vocabulary: number of tokens.
        eos: tokens that end a completion.
    """
    others = [token for token in range(vocabulary) if token not in eos]
    ended = [[*body, end] for size in range(length) for body in itertools.product(others, repeat=size) for end in eos]
    cut = [list(body) for body in itertools.product(others, repeat=length)]
    return Completions.of(ended + cut, eos[0])


def chi_square_p(counts: Tensor, probabilities: Tensor, ratio: float = 1.0) -> float:
    """p-value of counts under a distribution that is known exactly, or up to a factor.

    If `n` draws come from `π` and are tested against `p`, the chi-square statistic has the noncentrality
    `Σ n(π - p)²/p`, which is at most `n(ratio - 1)²` where every `π/p` lies between `1/ratio` and `ratio`.

    Args:
        counts: `[events]`, or `[samples, events]`.
        probabilities: of the same shape, `p` up to a constant for each sample.
        ratio: the factor, at least 1.
    """
    if counts[probabilities == 0].any():
        return 0.0
    n, samples = int(counts.sum()), counts.numel() // counts.shape[-1]
    expected = probabilities.double() / probabilities.double().sum(-1, keepdim=True) * counts.sum(-1, keepdim=True)
    expected, order = expected.flatten().sort(descending=True)
    counts = counts.flatten()[order]
    # Events in order, cut into cells of MIN_EXPECTED draws; the rest joins the last cell.
    cell = ((expected.cumsum(0) - expected / 2) // MIN_EXPECTED).clamp(max=max(n // MIN_EXPECTED - 1, 0)).long()
    expected, seen = (torch.zeros(n + 1).double().index_add_(0, cell, x.double()) for x in (expected, counts))
    used = expected > 0
    statistic = ((seen - expected)[used] ** 2 / expected[used]).sum().item()
    return float(stats.ncx2.sf(statistic, int(used.sum()) - samples, n * (ratio - 1) ** 2))


def chain_law(log_weight: Tensor, log_q: Tensor, steps: int) -> Tensor:
    """Distribution of the last state of an independence Metropolis-Hastings chain: `q K^(M-1)`, `[events]`.

    `K(s, s') = q(s')·min(1, w(s')/w(s))` for `s' ≠ s`; with the remaining probability the chain stays at `s`.

    Args:
        log_weight: `[events]`, `ℓ(s) = log w(s)`, nats.
        log_q: `[events]`, log-probabilities of the proposals, nats.
        steps: M, proposals per chain, including the first state.
    """
    moves = log_q.softmax(0) * (log_weight[None, :] - log_weight[:, None]).clamp(max=0.0).exp()
    moves.fill_diagonal_(0.0)
    stays = 1 - moves.sum(1)
    law = log_q.softmax(0)
    for _ in range(steps - 1):
        law = law @ moves + law * stays
    return law
