"""Step 2 of ALDRIFT, *correct*, and its alternatives, as pure functions on tensors: from proposals to samples.

Leading dimensions (one per prompt) are batched. All random numbers come from the generator that is passed in.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Chains(NamedTuple):
    """Where a set of independent Metropolis-Hastings chains ended.

    Attributes:
        last: `[..., m]`, for each chain the step (0 to M-1) whose proposal is its last state.
        acceptance_rate: `[..., m]`, the share of the M-1 moves that were accepted; NaN if M = 1 (there are no moves).
    """

    last: Tensor
    acceptance_rate: Tensor


def metropolis_hastings(log_weight: Tensor, generator: torch.Generator) -> Chains:
    """Independence Metropolis-Hastings as a scan over proposals that were all drawn in advance.

    The proposal distribution `q` does not depend on the chain's state, so the whole chain is a function of the
    log-weights `ℓ(s) = log L(s) - τ·d(s) - log q(s)` of its M proposals. The first proposal is the first state; each
    later one, `ŝ`, replaces the state `s` with probability `min(1, exp(ℓ(ŝ) - ℓ(s)))` (the correction step of
    ALDRIFT, arXiv 2503.06917).

    Args:
        log_weight: `[..., m, M]`, nats, up to a constant per chain. `-inf` marks a proposal that the target excludes; a
            chain leaves such a state at the first proposal that is not excluded, and stays there if all are.
        generator: source of the acceptance variates, on the device of `log_weight`.

    Returns:
        [`Chains`] with fields of shape `[..., m]`.

    Raises:
        ValueError: if `log_weight` has fewer than two dimensions, or holds NaN or `+inf`.
    """
    if log_weight.dim() < 2 or log_weight.shape[-1] < 1:
        raise ValueError(f"log_weight must be [..., chains, steps >= 1], got {tuple(log_weight.shape)}")
    _refuse_unusable(log_weight)
    steps = log_weight.shape[-1]
    # rand() may return exactly 0, whose log is -inf: the strict comparison below then still rejects a proposal of
    # weight zero, as it must.
    log_u = torch.rand(log_weight.shape, generator=generator, dtype=log_weight.dtype, device=log_weight.device).log()
    state = torch.zeros(log_weight.shape[:-1], dtype=torch.long, device=log_weight.device)
    state_weight = log_weight[..., 0]
    accepted = torch.zeros_like(state)
    for step in range(1, steps):
        proposal_weight = log_weight[..., step]
        # -inf - -inf is NaN, and every comparison with NaN is false: the chain stays, which is as correct as moving.
        accept = log_u[..., step] < proposal_weight - state_weight
        state = torch.where(accept, step, state)
        state_weight = torch.where(accept, proposal_weight, state_weight)
        accepted += accept
    moves = steps - 1
    rate = accepted / moves if moves else torch.full(state.shape, torch.nan, device=state.device)
    return Chains(state, rate)


def isir(log_weight: Tensor, generator: torch.Generator) -> Chains:
    """One step of iterated sampling importance resampling (i-SIR; Tjelmeland, 2004; Andrieu, Lee and Vihola, 2018).

    The next state is one of the N candidates (the state and N-1 proposals), drawn in proportion to their weights: a
    Markov kernel that leaves the target invariant, for every N. Metropolis-Hastings takes N-1 proposals one after
    another; this takes them at once.

    Args:
        log_weight: `[..., N]`, nats, up to a constant per row: the state's, followed by those of the proposals.
        generator: source of the choice, on the device of `log_weight`.

    Returns:
        [`Chains`] with fields of shape `[...]`; the acceptance rate is 1 where the chain moved, 0 where it stayed, and
        NaN if N = 1.

    Raises:
        ValueError: if a row holds NaN or `+inf`, or only `-inf`.
    """
    chosen = systematic_resample(log_weight, 1, generator)[..., 0]  # with one tooth, a plain draw
    alone = log_weight.shape[-1] == 1
    return Chains(chosen, torch.full_like(chosen, torch.nan, dtype=torch.float) if alone else (chosen > 0).float())


def suffix_move(
    log_weight: Tensor, proposed: Tensor, length: Tensor, proposed_length: Tensor, generator: torch.Generator
) -> Tensor:
    """Whether chains move to completions whose suffix was redrawn: Metropolis-Hastings within a text (QUEST, arXiv
    2406.00049).

    A chain at `s` keeps its tokens before a position that is uniform on the |s| positions, and redraws the others
    from `q`: `ŝ`. The way back begins at the same position, which has probability 1/|ŝ| there, and what was kept has
    the same factors in `L` and `q` of both. So the ratio of the move is `exp(ℓ(ŝ) - ℓ(s))·|s|/|ŝ|` with the log-weights
    `ℓ(s) = log L(s) - τ·d(s) - log q(s)` of whole completions.

    Args:
        log_weight, proposed: of the states and the proposals, nats, any shape.
        length, proposed_length: tokens of the completions, with the end-of-text token.
        generator: source of the acceptance variates.

    Returns:
        Booleans of the same shape.

    Raises:
        ValueError: if a log-weight is NaN or `+inf`.
    """
    _refuse_unusable(log_weight)
    _refuse_unusable(proposed)
    log_u = torch.rand(log_weight.shape, generator=generator, dtype=log_weight.dtype, device=log_weight.device).log()
    # NaN, where both are excluded by the target, compares as false: the chain stays.
    return log_u < proposed - log_weight + length.log() - proposed_length.log()


def top(objective: Tensor, log_prior: Tensor, m: int) -> Tensor:
    """The `m` proposals of lowest cost; ties go to the higher prior (TOPIFT, the paper's heuristic).

    What the prior excludes comes last, whatever it costs.

    Args:
        objective: `[..., n]`, costs.
        log_prior: `[..., n]`, `log L`, nats.
        m: how many to keep, at most `n`.

    Returns:
        `[..., m]` indices into the last dimension, best first.
    """
    if not 1 <= m <= objective.shape[-1]:
        raise ValueError(f"cannot keep the {m} best of {objective.shape[-1]} proposals")
    # A lexicographic sort: by the second key first, then stably by the first.
    objective = torch.where(log_prior > -torch.inf, objective, torch.inf)
    by_prior = log_prior.argsort(dim=-1, descending=True, stable=True)
    by_cost = objective.gather(-1, by_prior).argsort(dim=-1, stable=True)
    return by_prior.gather(-1, by_cost)[..., :m]


def systematic_resample(log_weight: Tensor, m: int, generator: torch.Generator) -> Tensor:
    """`m` draws in proportion to the weights, by systematic resampling.

    One uniform variate per row shifts a regular comb of `m` teeth over the cumulative weights. So the number of draws
    of each proposal differs by less than one from `m` times its normalised weight, which is exactly its mean.

    Args:
        log_weight: `[..., n]`, nats, up to a constant per row.
        m: number of draws.
        generator: source of the variate of each row.

    Returns:
        `[..., m]` indices into the last dimension, in ascending order.

    Raises:
        ValueError: if a row holds NaN or `+inf`, or only `-inf`.
    """
    _refuse_unusable(log_weight)
    if bool((log_weight.amax(dim=-1) == -torch.inf).any()):
        raise ValueError("every weight of a row is zero: nothing can be resampled")
    cumulative = log_weight.double().softmax(dim=-1).cumsum(dim=-1)
    shift = torch.rand((*log_weight.shape[:-1], 1), generator=generator, dtype=torch.float64, device=log_weight.device)
    teeth = (torch.arange(m, dtype=torch.float64, device=log_weight.device) + shift) / m
    # Rounding can leave the last cumulative weight slightly below 1, and then a row's last tooth above it.
    teeth = torch.minimum(teeth, cumulative[..., -1:].nextafter(cumulative.new_zeros(())))
    return torch.searchsorted(cumulative, teeth, right=True)


def _refuse_unusable(log_weight: Tensor) -> None:
    if bool(torch.isnan(log_weight).any()) or bool((log_weight == torch.inf).any()):
        raise ValueError(
            "log_weight holds NaN or +inf: a log-probability or a cost is not a finite number. Check the model's "
            "numerics (try bf16=False) and the objective."
        )
