"""ALDRIFT (arXiv 2503.06917), whole: one rung of the ladder is [`run_rung`], and a run repeats it.

Nothing here reads a file, holds a model or knows of a trainer. The model is behind a [`Rollout`], the correction is a
[`Sampler`], the inverse temperature comes from a [`Ladder`], and what the samples carry along for learning is the
[`Loss`]'s. The updates themselves (step 3) are the caller's.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Protocol

import torch
from torch import Tensor

from .. import streams
from ..types import Beginnings, Proposals, Samples, Screen, Spans
from .errors import Influence
from .goals import Goal
from .ladders.base import Ladder, LadderState
from .losses.base import Loss
from .samplers.base import Policy, Sampler, Selection
from .samplers.kernels import systematic_resample


class Rollout(Policy, Protocol):
    """The model that is trained, as a distribution over completions of the run's prompts."""

    def propose(self, rung: int) -> Proposals:
        """A rung's proposals: draws `s ~ q` with `log q(s)`, `log L(s)` and the cost `d(s)`."""
        ...

    def redraw(self, rung: int, step: int, beginnings: Beginnings | Spans, screen: Screen | None = None) -> Proposals:
        """Further draws of a rung, which begin with these tokens: see [`Redraw`]."""
        ...


@dataclass(frozen=True)
class Rung:
    """One rung's results.

    Attributes:
        before: where the ladder stood, for the rung's prompts.
        state: where it stands now, for all prompts of the run.
        influence: of the draws on log Z.
        proposals: the rung's independent draws, `n` per prompt.
        pool: the draws that the samples were chosen from; with the density that they were drawn from, unless the
            sampler moved them.
        selection: which draws of the pool the sampler chose.
        redrawn: draws that the sampler made to move its samples; not independent.
        samples: what is learned from.
    """

    before: LadderState
    state: LadderState
    influence: Influence
    proposals: Proposals
    pool: Proposals
    selection: Selection
    redrawn: tuple[Proposals, ...]
    samples: Samples

    @property
    def after(self) -> LadderState:
        """Where the ladder stands now, for the rung's prompts."""
        return self.state.of(self.proposals.prompts)

    @property
    def drawn(self) -> tuple[Proposals, ...]:
        """All draws of the rung."""
        return (self.proposals, *self.redrawn)


def run_rung(
    state: LadderState,
    rollout: Rollout,
    sampler: Sampler,
    ladder: Ladder,
    loss: Loss,
    goal: Goal | None = None,
    *,
    rows: Callable[[Proposals], int],
    seed: int,
) -> Rung:
    """Steps 1 and 2 of ALDRIFT on the next rung, and the rows for step 3.

    Args:
        state: where the ladder stands.
        rollout: the model that is trained.
        sampler, ladder, loss: the run's.
        goal: what T is chosen for; `None` where it is given.
        rows: how many training rows the rung's updates take in, over all prompts that have draws, after its proposals.
        seed: the run's; the rung's random numbers depend on it and on the rung's index alone.
    """
    rung = len(state.taus)
    proposals = rollout.propose(rung)  # 1. propose: s ~ q
    pool, num_rows = sampler.pool(proposals, rollout), rows(proposals)
    state = state if goal is None else goal.aim(state, pool)
    tau, here = min(ladder.next_tau(state, pool), state.tau_max), state.of(pool.prompts)
    log_z, influence = sampler.log_z(pool, here, tau), sampler.influence(pool, here, tau)
    replayed = sampler.replay()
    size = math.ceil((1 - loss.reference_share) * num_rows / sum(len(part.prompts) for part in (pool, *replayed)))
    chance, shuffle = (streams.generator(seed, purpose, rung) for purpose in (streams.CORRECT, streams.SHUFFLE))
    selection = sampler.select(pool, state.tau, tau, size, chance)  # 2. correct
    moved = sampler.move(pool, selection, tau, partial(rollout.redraw, rung), chance)
    parts = [_rows_of(moved.pool, moved.selection.index, loss, tau, log_z, shuffle)]
    for other in replayed:
        chosen, z = sampler.select(other, tau, tau, size, chance), sampler.log_z(other, state.of(other.prompts), tau)
        parts.append(_rows_of(other, chosen.index, loss, tau, z, shuffle))
    samples = Samples.joined(parts, num_rows, shuffle)
    reached = state.reached(pool.prompts, tau, log_z, influence.error())
    # 3. learn: the loss on the samples
    return Rung(here, reached, influence, proposals, **vars(moved), samples=samples)


def _rows_of(
    pool: Proposals, index: Tensor, loss: Loss, tau: float, log_z: Tensor, generator: torch.Generator
) -> Samples:
    """The draws `index` of a pool, and what the loss wants beside them, with what it needs to know of each."""
    if loss.reference_share:  # as many again of the pool's draws, unweighted
        unweighted = systematic_resample(torch.zeros_like(pool.objective), index.shape[1], generator)
        index = torch.cat([index, unweighted], dim=1)
    columns = {name: column.gather(1, index).flatten() for name, column in loss.columns(pool, tau, log_z).items()}
    chosen = pool.flat(index)
    return Samples(pool.rows[chosen], pool.completions.select(chosen), torch.arange(len(chosen)), columns)
