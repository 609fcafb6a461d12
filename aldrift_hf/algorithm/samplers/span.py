"""Metropolis-Hastings within texts: chains that redraw a span in the middle and go on from rung to rung."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import ClassVar, NamedTuple, cast

import torch
from torch import Tensor

from ...types import Completions, Proposals, Spans, join_rungs
from .base import Moved, Policy, Redraw, Sampler, SamplerSettings, Selection
from .kept import KeptDraws
from .kernels import metropolis_hastings

MAX_WIDTH = 4
"""W, most tokens that a move removes or inserts. Few, so that a move keeps most of what has made a text good and is
accepted often; more than one, because some texts are joined by no path of single tokens that the prior allows."""


class Cuts(NamedTuple):
    """Where texts are cut for a move, each `[n]`.

    Attributes:
        place: tokens before the span.
        old: tokens of the span.
        new: tokens to be drawn in its place.
    """

    place: Tensor
    old: Tensor
    new: Tensor

    @classmethod
    def drawn(cls, texts: Completions, eos_token_ids: Sequence[int], generator: torch.Generator) -> Cuts:
        """Widths that are uniform on 0, …, W, equal ones half of the time, and a position that is uniform.

        A move that would leave the support, or removes and inserts nothing, is an empty span at the beginning. The
        support: texts that end, of at most the maximum length, and texts that were cut, of exactly that length.
        """
        n, most = texts.ids.shape
        last = texts.ids.gather(1, texts.length[:, None] - 1)[:, 0]
        ended = torch.isin(last, torch.tensor([*eos_token_ids]))
        body = texts.length - ended.long()
        old, new = torch.randint(MAX_WIDTH + 1, (2, n), generator=generator)
        new = torch.where(torch.rand(n, generator=generator) < 0.5, old, new)
        share = torch.rand(n, generator=generator, dtype=torch.float64)
        possible = (old <= body) & (old + new > 0) & torch.where(ended, texts.length - old + new <= most, old == new)
        place = (share * (body - old + 1)).long()
        return cls(*(torch.where(possible, column, 0) for column in (place, old, new)))

    def spans(self, texts: Completions) -> Spans:
        """The texts' parts."""
        rows = list(zip(texts.tokens(), self.place.tolist(), (self.place + self.old).tolist(), strict=True))
        return Spans(
            [tokens[:start] for tokens, start, _ in rows],
            [tokens[start:end] for tokens, start, end in rows],
            [tokens[end:] for tokens, _, end in rows],
            self.new.tolist(),
        )


@dataclass(frozen=True)
class Moves:
    """A move of each chain before its proposal is known.

    Attributes:
        state: the chains' states, `[P, m]`.
        cuts: where they are cut.
        log_u: logarithm of the acceptance variates, `[P, m]`.
        tau: the inverse temperature of the target.
        vocabulary: tokens that spans are drawn from uniformly, `[V]`; `None` where the model draws them.
    """

    state: Proposals
    cuts: Cuts
    log_u: Tensor
    tau: float
    vocabulary: Tensor | None = None

    def spans(self, generator: torch.Generator) -> Spans:
        """The texts' parts; with a vocabulary the new spans are among them, and nothing is left to draw."""
        spans = self.cuts.spans(self.state.completions)
        if self.vocabulary is None:
            return spans
        drawn = torch.randint(len(self.vocabulary), (sum(spans.widths),), generator=generator)
        new = torch.split(self.vocabulary[drawn], spans.widths)
        after = [[*span.tolist(), *rest] for span, rest in zip(new, spans.after, strict=True)]
        return Spans(spans.tokens, [[]] * len(new), after, [0] * len(new))

    def allow(self, proposed: Proposals) -> Tensor:
        """`[P, m]`, whether proposals would be accepted if they had no cost; costs are at least 0."""
        return (self.log_u < self._log_ratio(proposed)) & _differ(self.state, proposed)

    def accept(self, proposed: Proposals) -> Tensor:
        """`[P, m]`, whether proposals are accepted; those without a cost (NaN) are not."""
        ratio = self._log_ratio(proposed) - self.tau * proposed.objective
        return (self.log_u < ratio) & _differ(self.state, proposed)

    def _log_ratio(self, proposed: Proposals) -> Tensor:
        """The logarithm of the acceptance ratio of [`span_chains`] if the proposals had no cost, nats."""
        old = self._log_law(self.state, self.cuts.old)
        new = self._log_law(proposed, self.cuts.new)
        return proposed.log_prior - self.state.log_target(self.tau) + old - new

    def _log_law(self, texts: Proposals, width: Tensor) -> Tensor:
        """The log-probability that spans of texts are drawn with, `[P, m]`, nats."""
        end = self.cuts.place + width
        if self.vocabulary is None:
            table = cast(Tensor, texts.token_log_model)
        else:
            known = torch.isin(texts.completions.ids, self.vocabulary)
            table = torch.where(known, -math.log(len(self.vocabulary)), -math.inf).double()
        at = torch.arange(table.shape[1])
        inside = (at >= self.cuts.place[:, None]) & (at < end[:, None])
        return torch.where(inside, table, 0).sum(-1).view_as(texts.objective)


def span_chains(
    start: Proposals,
    steps: int,
    tau: float,
    eos_token_ids: Sequence[int],
    redraw: Redraw,
    generator: torch.Generator,
    vocabulary: Tensor | None = None,
) -> tuple[list[Proposals], list[Proposals], float]:
    """Chains of `M` states, each one move away from the one before.

    A move at a text `s` with `b` tokens before its end draws widths `w, w'` from 0, …, W with a probability `h(w, w') =
    h(w', w)`: half of the time `w' = w`, for many costs ask for a length; otherwise both are uniform. It draws a
    position `i` uniformly from 0, …, b - w; it removes the `w` tokens `o` after the first `i`, draws `w'` tokens `v`
    from `q(·|s_<i)` in their place, and keeps what was after. It stays where it is if the model ends the text within
    the span, if the new text `ŝ` is not in the support, or if `w > b`.

    Detailed balance: the flow from `s` to `ŝ` by `(w, w', i, v)` is `p_τ(s) · q(v|s_<i) · a · h(w, w') / (b - w + 1)`.
    The only way back that this one is paired with is `(w', w, i, o)`, with the flow `p_τ(ŝ) · q(o|s_<i) · â · h(w', w)
    / (b̂ - w' + 1)`. Here `b̂ - w' = b - w`, for what is kept is the same, so that both are equal with `a = min(1, r)`,
    `â = min(1, 1/r)` and `r = p_τ(ŝ) q(o|s_<i) / (p_τ(s) q(v|s_<i))`. Neither `o` nor `v` ends a text, and the tokens
    before them are the same, so both ways exist or none does. Any other law of `v` that does not depend on `o` may take
    the place of `q(·|s_<i)`: with a vocabulary it is the uniform one, and a span with another token is not removed.

    The acceptance variate is drawn first: a proposal that it would reject even without a cost is not evaluated.

    Args:
        start: the first state of each chain, `[P, m]`, with `log q` of the present model, token by token.
        steps: M.
        tau: the inverse temperature of the target `p_τ`.
        eos_token_ids: tokens that end a text.
        redraw: draws from the model.
        generator: the source of widths, positions and acceptance variates, and of tokens from the vocabulary.
        vocabulary: tokens that spans are drawn from uniformly; `None` for draws of the model.

    Returns:
        The `M` states of the chains, the `M - 1` proposals of each, and the acceptance rate (NaN if M = 1).
    """
    states, redrawn, accepted = [start], [], []
    for step in range(1, steps):
        state = states[-1]
        cuts = Cuts.drawn(state.completions, eos_token_ids, generator)
        log_u = torch.rand(state.objective.shape, generator=generator, dtype=torch.float64).log()
        moves = Moves(state, cuts, log_u, tau, vocabulary)
        proposed = redraw(step, moves.spans(generator), moves.allow)
        moved = moves.accept(proposed)
        states.append(state.moved(moved, proposed))
        redrawn.append(proposed)
        accepted.append(moved.double().mean().item())
    return states, redrawn, sum(accepted) / len(accepted) if accepted else math.nan


class SpanChains(Sampler):
    """Chains that go on from rung to rung by moves that redraw a span.

    For local search with an exact target: few chains, each of which changes a part of its text and keeps what is before
    and after it. Of a rung's n proposals n/M are whole texts, one for each chain: on the first rung the chain begins
    there, and on a later one it is offered that text in place of its own. Then it makes M - 1 moves. All of its M
    states are samples.

    Args:
        chain_length: M, proposals per chain and rung of either kind.
        vocabulary: ids of tokens that spans are drawn from uniformly, none of which ends a text; `None` for draws of
            the model. For alphabets of some dozens, where a move is to try what is rare as often as what is frequent.

    Raises:
        ValueError: for a chain without a move, or if the vocabulary is empty; and on the first rung, if a token of it
            ends a text, or if `log q` as drawn is not the scorer's (fp32 and `engine="transformers"` are needed).
    """

    uses_chains: ClassVar[bool] = True
    redraws: ClassVar[bool] = True

    def __init__(self, chain_length: int, vocabulary: Sequence[int] | None = None) -> None:
        if chain_length < 2:
            raise ValueError(f"SpanChains({chain_length}) makes no move: a chain needs at least 2 proposals per rung")
        if vocabulary is not None and not len(vocabulary):
            raise ValueError("SpanChains(vocabulary=[]) has no token to draw: name some, or leave it out")
        self.chain_length = chain_length
        self.vocabulary = None if vocabulary is None else torch.tensor(sorted({*vocabulary}))
        self._states = KeptDraws("chains")
        self._eos_token_ids: Sequence[int] = ()
        self._start: Proposals | None = None
        self._figures: dict[str, float] = {}

    @classmethod
    def from_settings(cls, settings: SamplerSettings) -> SpanChains:
        return cls(settings.steps_per_chain)

    def whole_texts(self, proposals: int) -> int:
        return proposals // self.chain_length

    def pool(self, proposals: Proposals, policy: Policy) -> Proposals:
        if not proposals.as_scored:
            raise ValueError(
                "sampler='span' compares the model's log-probability of old and new spans, and those of the engine are "
                "not the scorer's: it rounds differently. Use engine='transformers' in fp32 (bf16=False, "
                "dtype='float32'), or another sampler."
            )
        if self.vocabulary is not None and {*policy.eos_token_ids} & {*self.vocabulary.tolist()}:
            raise ValueError(f"SpanChains(vocabulary=…) has a token that ends a text: leave out {policy.eos_token_ids}")
        self._eos_token_ids = policy.eos_token_ids
        self._start = self._states.first(proposals.prompts.tolist(), proposals.objective.shape[1])
        if self._start is not None:  # the model has learned since
            token_log_model = policy.token_log_prob(self._start)
            log_model = token_log_model.sum(-1).view_as(self._start.objective)
            self._start = replace(self._start, token_log_model=token_log_model, log_model=log_model)
        return proposals

    def select(
        self, pool: Proposals, tau_before: float, tau: float, size: int, generator: torch.Generator
    ) -> Selection:
        every = torch.arange(pool.objective.shape[1]).expand(pool.objective.shape)
        if self._start is None:
            # A text that the prior excludes is no state of a chain: another draw for the prompt takes its place.
            allowed = pool.log_prior.isfinite()
            others = torch.multinomial(allowed.double(), every.shape[1], replacement=True, generator=generator)
            self._start = pool.select(torch.where(allowed, every, others))
            return Selection(every)
        weights = torch.stack([self._start.log_weight(tau), pool.log_weight(tau)], dim=-1)
        chains = metropolis_hastings(weights, generator)
        self._start = self._start.moved(chains.last > 0, pool)
        return Selection(every, chains.acceptance_rate.mean().item())

    def move(
        self, pool: Proposals, selection: Selection, tau: float, redraw: Redraw, generator: torch.Generator
    ) -> Moved:
        start = cast(Proposals, self._start)
        states, redrawn, rate = span_chains(
            start, self.chain_length, tau, self._eos_token_ids, redraw, generator, self.vocabulary
        )
        prompts, chains = start.objective.shape
        self._states.put(states[-1])
        evaluated = [proposed.objective.isfinite().double().mean().item() for proposed in redrawn]
        self._figures = {"evaluated_moves": sum(evaluated) / len(evaluated)}
        if math.isfinite(selection.acceptance_rate):  # on the first rung no chain had a text before
            self._figures["acceptance_rate_of_whole_texts"] = selection.acceptance_rate
        everything = torch.arange(chains * len(states)).expand(prompts, -1)
        return Moved(join_rungs(states), Selection(everything, rate), tuple(redrawn))

    def metrics(self, pool: Proposals, tau: float) -> dict[str, float]:
        return self._figures

    def state_dict(self) -> dict[str, Tensor]:
        return self._states.state_dict()

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        self._states.load_state_dict(state)


def _differ(state: Proposals, proposed: Proposals) -> Tensor:
    """`[P, n]`, whether texts differ."""
    pairs = zip(state.completions.tokens(), proposed.completions.tokens(), strict=True)
    return torch.tensor([old != new for old, new in pairs]).view_as(state.objective)
