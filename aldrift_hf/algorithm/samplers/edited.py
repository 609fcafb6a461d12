"""The best texts so far, drawn by the model or edited by a function of the user's: for those who want one good text."""

from __future__ import annotations

import functools
import math
import random
from collections.abc import Iterable, Mapping, Sequence
from typing import ClassVar, Protocol

import torch
from torch import Tensor

from ...types import Proposals, Spans, join_prompts, join_rungs
from .base import Moved, Policy, Redraw, Sampler, Selection
from .kept import KeptDraws, of_prompt
from .kernels import top
from .surrogate import GENERATIONS, Evaluated, Surrogate

GENERATION = 5
"""Edits per prompt that are evaluated together. Few, so that the next ones start from what these have found."""
TOGETHER = 40
"""As many where a surrogate has chosen them, which learns between."""
PARENTS, LEARNED = 0.001, 0.01
"""The text of rank r among n, from 1, is edited, and learned from, in proportion to 1/(r + n times this)."""


class Edit(Protocol):
    """The user's function: new texts out of good ones, such as mutations and crossovers of a genetic algorithm."""

    def __call__(self, texts: list[str], rng: random.Random) -> Iterable[str | None]:
        """New texts, any number; of more than are wanted some are chosen at random. `None` is left out.

        Args:
            texts: `2·GENERATION` texts of one prompt, chosen by rank; a good one may be there several times.
            rng: the only source of randomness, so that a run can be resumed and all processes make the same edits.
        """
        ...


class EditedTop(Sampler):
    """TOPIFT, the paper's heuristic, over all rungs, with evolutionary search beside the model.

    A rung's n proposals are draws of the model and, for each of them, a number of edits: the best texts so far, of
    either origin, are changed by the user's function, a few at a time, and take their place among the best. What a rung
    learns from is chosen among these by rank. Nothing is corrected: the model does not become `p_T`, but it writes what
    the search has found, and the search goes on from what it writes.

    Where a call of the objective costs more than many edits do, a `surrogate` is worth its time: a model of the cost,
    which learns from all texts that were evaluated. The search is made on its predictions, through several generations
    of edits of edits, and those of lowest predicted cost are evaluated.

    Args:
        edit: makes new texts out of good ones.
        edits_per_draw: edits for each of the model's draws.
        remembered: best texts per prompt that are kept. With more the search is slower, and its texts differ more.
        newest_first: how texts of equal cost are ranked: by the time when they were met, newest first, so that a search
            on a plateau drifts on; otherwise by the prior. Take it for costs of few values.
        surrogate: predicts costs; `None` to evaluate edits as they come.
        edits_per_evaluation: with a surrogate, how many times as often `edit` is called.

    Raises:
        ValueError: if there would be no edits, or nothing would be kept; on the first rung, if no edit is a text that
            the tokenizer can write within the longest completion; and on any, if predictions are no numbers.
        RuntimeError, TypeError: on any rung, if a function raises an exception, or `edit` returns what is no text.
    """

    corrects: ClassVar[bool] = False
    redraws: ClassVar[bool] = True

    def __init__(
        self,
        edit: Edit,
        edits_per_draw: int = 5,
        remembered: int = 100,
        newest_first: bool = False,
        surrogate: Surrogate | None = None,
        edits_per_evaluation: int = 10,
    ) -> None:
        if edits_per_draw < 1 or remembered < 1:
            raise ValueError("EditedTop: edits_per_draw and remembered must be at least 1; without edits use Top")
        if edits_per_evaluation < 1:
            raise ValueError("EditedTop: edits_per_evaluation must be at least 1")
        self.edit, self.edits_per_draw, self.remembered = edit, edits_per_draw, remembered
        self.newest_first, self.edits_per_evaluation = newest_first, edits_per_evaluation
        self._evaluated = None if surrogate is None else Evaluated(surrogate)
        self._best = KeptDraws("best")
        self._size, self._usable = 0, 0.0

    def whole_texts(self, proposals: int) -> int:
        return max(1, proposals // (1 + self.edits_per_draw))

    def draws_for(self, proposals: int) -> int:
        return self.whole_texts(proposals) * (1 + self.edits_per_draw)

    def pool(self, proposals: Proposals, policy: Policy) -> Proposals:
        self._policy = policy
        return proposals

    def select(
        self, pool: Proposals, tau_before: float, tau: float, size: int, generator: torch.Generator
    ) -> Selection:
        self._size = size  # there will be more to choose from: see `move`
        return Selection(top(pool.objective, pool.log_prior, 1))

    def move(
        self, pool: Proposals, selection: Selection, tau: float, redraw: Redraw, generator: torch.Generator
    ) -> Moved:
        prompts = pool.prompts.tolist()
        before = [self._best.of(prompt) for prompt in prompts]
        best = self._met(before, pool)
        rng = random.Random(int(torch.randint(2**53, (1,), generator=generator)))
        edits, redrawn, usable = self.edits_per_draw * pool.objective.shape[1], list[Proposals](), 0
        together = GENERATION if self._evaluated is None else TOGETHER
        for step, done in enumerate(range(0, edits, together), start=1):
            texts, good = self._edited(prompts, best, min(together, edits - done), rng)
            empty: list[list[int]] = [[]] * len(texts)
            redrawn.append(redraw(step, Spans(empty, empty, texts, [0] * len(texts))))
            best = self._met(best, redrawn[-1])
            usable += good
        self._usable = usable / len(prompts)
        if not usable and None in before:
            raise ValueError(
                "EditedTop: of no text that edit() returned can the tokenizer write every character within "
                f"max_completion_length={pool.completions.ids.shape[1]} tokens, or it returned none. Check it with "
                "the texts of a few draws."
            )
        return self._chosen(best, redrawn, generator)

    def metrics(self, pool: Proposals, tau: float) -> dict[str, float]:
        return {"edits": self._usable}

    def state_dict(self) -> dict[str, Tensor]:
        return self._best.state_dict() | ({} if self._evaluated is None else self._evaluated.state_dict())

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        self._best.load_state_dict(state)
        if self._evaluated is not None:
            self._evaluated.load_state_dict(state)

    def _met(self, best: Sequence[Proposals | None], new: Proposals) -> list[Proposals]:
        """The best texts of each prompt after new ones were evaluated."""
        of_prompts = [of_prompt(new, place) for place in range(len(best))]
        if self._evaluated is not None:  # the best, too: a run may have begun without a surrogate
            for draws in filter(None, (*best, *of_prompts)):
                texts = self._policy.decode(draws.completions)
                self._evaluated.add(int(draws.rows[0]), texts, _costs(draws))
        return [self._ranked(old, draws) for old, draws in zip(best, of_prompts, strict=True)]

    def _ranked(self, old: Proposals | None, new: Proposals) -> Proposals:
        """`[1, m]`, the distinct texts of one prompt, best first; what the prior excludes comes last."""
        every, known = (new, 0) if old is None else (join_rungs([old, new]), len(old))
        cost = _costs(every)
        if self.newest_first:  # what is kept is in this order already
            behind = [float(row if row < known else -row) for row in range(len(cost))]
        else:
            behind = (-every.log_prior[0]).tolist()
        first: dict[tuple[int, ...], int] = {}  # a text is as old as its first row
        for row, tokens in enumerate(every.completions.tokens()):
            first.setdefault(tuple(tokens), row)
        order = sorted(first.values(), key=lambda row: (cost[row], behind[row]))
        return every.select(torch.tensor([order[: self.remembered]]))

    def _edited(
        self, prompts: Sequence[int], best: Sequence[Proposals], count: int, rng: random.Random
    ) -> tuple[list[list[int]], int]:
        """The tokens of `count` edits for each prompt, and how many are edits: the best text fills what is missing."""
        texts = list[list[int]]()
        usable = 0
        for prompt, ranked in zip(prompts, best, strict=True):
            if self._evaluated is None:
                rows = torch.tensor(_parents(len(ranked), rng))
                # A set has another order in each process.
                new = sorted(self._edits(self._policy.decode(ranked.completions.select(rows)), rng))
                rng.shuffle(new)
            else:
                calls = max(1, count * self.edits_per_evaluation // (GENERATIONS * GENERATION))
                of = functools.partial(self._generation, rng=rng, calls=calls)
                parents = self._policy.decode(ranked.completions)
                new = self._evaluated.promising(prompt, parents, self.remembered, of, rng)
            tokens = [row for row in self._policy.encode(new) if row is not None][:count]
            usable += len(tokens)
            texts += [*tokens, *ranked.completions.tokens()[:1] * (count - len(tokens))]
        return texts, usable

    def _generation(self, ranked: list[str], rng: random.Random, calls: int) -> set[str]:
        """What the user's function makes of texts, best first, in several calls."""
        made = set[str]()
        for _ in range(calls):
            made |= self._edits([ranked[row] for row in _parents(len(ranked), rng)], rng)
        return made

    def _edits(self, parents: list[str], rng: random.Random) -> set[str]:
        """What the user's function makes of texts."""
        try:
            returned = self.edit(parents, rng)
            made = set() if isinstance(returned, str) else {text for text in returned if text is not None}
        except Exception as error:
            raise RuntimeError(
                f"EditedTop: edit() raised {type(error).__name__}: {error}. It is called as edit(texts, rng), and what "
                "it cannot edit it can leave out."
            ) from error
        if isinstance(returned, str):
            raise TypeError(f"EditedTop: edit() returned the text {returned!r:.100}. Return a list of texts.")
        if wrong := [text for text in made if not isinstance(text, str)]:
            raise TypeError(f"EditedTop: edit() returned {wrong[0]!r}, which is no text.")
        return made

    def _chosen(self, best: list[Proposals], redrawn: list[Proposals], generator: torch.Generator) -> Moved:
        """Keep the best, and choose what is learned from among them."""
        for ranked in best:
            self._best.put(ranked)
        if self._evaluated is not None:
            self._evaluated.settle()
        most = torch.arange(max(map(len, best)))
        # The last text of a prompt that has fewer is repeated, and not chosen there.
        pool = join_prompts([ranked.select(most.clamp(max=len(ranked) - 1)[None]) for ranked in best])
        chosen = [
            torch.multinomial(_by_rank(len(ranked), LEARNED), self._size, replacement=True, generator=generator)
            for ranked in best
        ]
        return Moved(pool, Selection(torch.stack(chosen)), tuple(redrawn))


def _costs(draws: Proposals) -> list[float]:
    """Of the draws for one prompt; infinite for what the prior excludes."""
    return torch.where(draws.log_prior.isfinite(), draws.objective, math.inf)[0].tolist()


def _parents(n: int, rng: random.Random) -> list[int]:
    """Which of n texts, best first, are edited."""
    return rng.choices(range(n), _by_rank(n, PARENTS).tolist(), k=2 * GENERATION)


def _by_rank(n: int, flatness: float) -> Tensor:
    """`[n]`, in what proportion texts are chosen, best first."""
    return 1 / (torch.arange(1, n + 1, dtype=torch.float64) + flatness * n)
