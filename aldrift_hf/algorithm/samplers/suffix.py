"""Metropolis-Hastings within texts: chains that keep the beginning of their text and redraw the rest."""

from __future__ import annotations

import math
from typing import ClassVar

import torch

from ...types import Proposals
from .base import Moved, Redraw, Selection
from .chains import MetropolisHastings, stand_ins
from .kernels import suffix_move


def suffix_chains(start: Proposals, steps: int, tau: float, redraw: Redraw, generator: torch.Generator) -> Moved:
    """Chains of `M` states, of which each is one [`suffix_move`] away from the one before.

    A token keeps the log-probability with which it was drawn. Where that has rounding of its own, the chain is on pairs
    of a text and its rounding: the target is `p_τ` times the law of the rounding, and the ratio of a move is the same.

    Args:
        start: the first state of each chain, `[P, m]`, with `log q` of the present model, token by token.
        steps: M.
        tau: the inverse temperature of the target `p_τ`.
        redraw: draws from the model.
        generator: the source of the positions and of the acceptance variates.

    Returns:
        The chains' last states (see [`aldrift_hf.algorithm.samplers.chains.stand_ins`]), their acceptance rate (NaN if
        M = 1), and the `M - 1` proposals of each chain.
    """
    state, redrawn, accepted = start, [], []
    for step in range(1, steps):
        length = state.completions.length
        kept = (torch.rand(len(length), generator=generator, dtype=torch.float64) * length).long()
        proposed = redraw(step, state.beginnings(kept))
        moves = suffix_move(
            state.log_weight(tau),
            proposed.log_weight(tau),
            length.view_as(state.objective),
            proposed.completions.length.view_as(state.objective),
            generator,
        )
        state = state.moved(moves, proposed)
        redrawn.append(proposed)
        accepted.append(moves.double().mean().item())
    rate = sum(accepted) / len(accepted) if accepted else math.nan
    # A chain that began at an excluded draw, and has never left it, has no state of its own.
    return Moved(state, Selection(stand_ins(state.log_prior == -math.inf, generator), rate), tuple(redrawn))


class SuffixChains(MetropolisHastings):
    """Chains over a rung's own proposals, as the paper's, which then redraw a suffix of their text M - 1 times.

    Where whole texts are rarely accepted, because their weights vary too much, parts of them still are. Each move is
    one more proposal, of which only the suffix is drawn, and one more call of the objective.

    Args:
        chain_length: M, proposals per chain of either kind.
    """

    redraws: ClassVar[bool] = True

    def __init__(self, chain_length: int) -> None:
        super().__init__(chain_length)
        self._of_whole_texts = math.nan

    def draws_for(self, proposals: int) -> int:
        return 2 * proposals - proposals // self.chain_length

    def move(
        self, pool: Proposals, selection: Selection, tau: float, redraw: Redraw, generator: torch.Generator
    ) -> Moved:
        self._of_whole_texts = selection.acceptance_rate
        return suffix_chains(pool.select(selection.index), self.chain_length, tau, redraw, generator)

    def metrics(self, pool: Proposals, tau: float) -> dict[str, float]:
        return {"acceptance_rate_of_whole_texts": self._of_whole_texts}
