"""The sampler's seam: how a rung's proposals become samples (step 2 of ALDRIFT, *correct*)."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar, Protocol

import torch
from torch import Tensor

from ...types import Beginnings, Completions, Proposals, Screen, Spans
from .. import diagnostics
from ..archive import Snapshot
from ..errors import Influence
from ..ladders.base import LadderState


class Policy(Protocol):
    """What a sampler may ask of the model that is trained."""

    @property
    def eos_token_ids(self) -> Sequence[int]:
        """Tokens that end a text."""
        ...

    def decode(self, completions: Completions) -> list[str]:
        """Their texts."""
        ...

    def encode(self, texts: list[str]) -> list[list[int] | None]:
        """The tokens of each text as a complete completion; `None` for one that the tokenizer does not give back as it
        was, or that is too long."""
        ...

    def snapshot(self) -> Snapshot:
        """The model as it is now, to be kept."""
        ...

    def log_prob(self, snapshot: Snapshot | None, proposals: Proposals) -> Tensor:
        """`[P, n]` log-probabilities of draws under a snapshot's model, the prior (`{}`) or the present model (`None`),
        nats."""
        ...

    def token_log_prob(self, proposals: Proposals) -> Tensor:
        """`[P·n, width]` log-probabilities of each token of draws under the present model, nats."""
        ...


class Redraw(Protocol):
    """Draws of the present model that begin with given tokens, scored and evaluated."""

    def __call__(self, step: int, beginnings: Beginnings | Spans, screen: Screen | None = None) -> Proposals:
        """`[P, k]` draws for `P·k` beginnings, ordered by prompt; their `log q` is that of the whole completions.

        Args:
            step: which draws of the rung these are, from 1: part of the address of their random numbers.
            beginnings: of each draw, with the `log q` that its tokens were drawn with. Or the spans that are drawn,
                with what is before and after them: then `log q` is the scorer's, token by token.
            screen: which draws are evaluated, the same on all processes; `None` for all. Others have the cost NaN.
        """
        ...


class SamplerSettings(Protocol):
    """What a sampler may read of a run's settings (`ALDRIFTConfig`)."""

    archive_window: int
    pareto_smoothing: bool

    @property
    def steps_per_chain(self) -> int:
        """M, proposals per chain (or, of samplers without chains, per sample)."""
        ...


@dataclass(frozen=True)
class Selection:
    """Which draws of the pool become samples.

    Attributes:
        index: `[P, k]`, positions among each prompt's `N` draws.
        acceptance_rate: the share of moves that Metropolis-Hastings chains accepted; NaN without chains.
    """

    index: Tensor
    acceptance_rate: float = math.nan


@dataclass(frozen=True)
class Moved:
    """Samples after a sampler has moved them on.

    Attributes:
        pool: the draws that the samples are chosen from. Of moved ones `log_model` is `log q` under the present model,
            and not the density that they have.
        selection: the samples among them.
        redrawn: the proposals that were drawn for it. They depend on the samples, so no weights are made of them.
    """

    pool: Proposals
    selection: Selection
    redrawn: tuple[Proposals, ...] = ()


class Sampler(ABC):
    """Turns proposals into samples of `p_τ`.

    Attributes:
        corrects: whether its samples aim at `p_τ`.
        draws_by_weight: whether it resamples in proportion to the pool's weights, so that its samples are draws of
            `p_τ` whose density is known.
        uses_chains: whether `num_generations` proposals must divide into chains of `chain_length`.
        redraws: whether [`move`] asks the model for draws, and so needs an engine that can continue texts.
    """

    corrects: ClassVar[bool] = True
    draws_by_weight: ClassVar[bool] = False
    uses_chains: ClassVar[bool] = False
    redraws: ClassVar[bool] = False

    @classmethod
    def from_settings(cls, settings: SamplerSettings) -> Sampler:
        """A sampler for a run with these settings."""
        return cls()

    def whole_texts(self, proposals: int) -> int:
        """Draws for [`pool`] among a rung's `proposals` per prompt: fewer where these count [`move`]'s in."""
        return proposals

    def draws_for(self, proposals: int) -> int:
        """Draws per prompt, at most, that such a rung makes: more where [`move`] redraws beside them."""
        return proposals

    def pool(self, proposals: Proposals, policy: Policy) -> Proposals:
        """The draws to choose from, `log_model` being the log-density they were drawn from. Default: the rung's own."""
        return proposals

    def replay(self) -> list[Proposals]:
        """Earlier draws for other prompts than the rung's, with their density, to learn from as well; by groups of
        prompts that were drawn for on the same rungs. Default: none."""
        return []

    @abstractmethod
    def select(
        self, pool: Proposals, tau_before: float, tau: float, size: int, generator: torch.Generator
    ) -> Selection:
        """Choose samples of `p_τ` among the pool's draws.

        Args:
            pool: `N` draws for each of `P` prompts.
            tau_before: the inverse temperature of the rung before.
            tau: the rung's.
            size: samples per prompt that the rung's updates take in. Fewer are learned from several times, and
                of more only as many, by chance.
            generator: the source of all random numbers.
        """

    def move(
        self, pool: Proposals, selection: Selection, tau: float, redraw: Redraw, generator: torch.Generator
    ) -> Moved:
        """Move the samples on by a Markov kernel that leaves `p_τ` as it is. Default: they stay.

        Args:
            pool, selection: as given to and by [`select`].
            tau: the rung's inverse temperature.
            redraw: draws from the model.
            generator: the source of all other random numbers.
        """
        return Moved(pool, selection)

    def log_z(self, pool: Proposals, state: LadderState, tau: float) -> Tensor:
        """`[P]`, the ladder's estimate of `log Z_τ`, nats: by default step by step, from one rung to the next."""
        increment = diagnostics.log_z_increment(pool.log_weight(state.prompt_tau[:, None]), pool.log_weight(tau))
        return state.log_z.to(increment) + increment

    def influence(self, pool: Proposals, state: LadderState, tau: float) -> Influence:
        """The influence of the draws on [`log_z`], for standard errors. A sampler with a `log_z` of its own needs one.

        Args:
            pool, state, tau: as given to [`log_z`].
        """
        own = pool.log_weight(tau).softmax(-1) - pool.log_weight(state.prompt_tau[:, None]).softmax(-1)
        return Influence(own, state.log_z_error.to(own).square())

    def metrics(self, pool: Proposals, tau: float) -> dict[str, float]:
        """Figures of its own for a rung's record."""
        return {}

    def draws(self) -> list[Proposals]:
        """All draws that are kept from rung to rung, with their density, by the groups of prompts that rungs drew for;
        empty where none are kept."""
        return []

    def state_dict(self) -> dict[str, Tensor]:
        """What a checkpoint keeps, as named tensors; empty before the first rung."""
        return {}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Take up what [`state_dict`] gave; an empty state begins a new run.

        Raises:
            NotImplementedError: for a state that a subclass wrote and does not read.
        """
        if state:
            raise NotImplementedError(f"{type(self).__name__} has a state_dict() but no load_state_dict()")
