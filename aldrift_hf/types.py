"""The data that flows through the package: prompts, completions, and proposals with all that weights are made of."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor


class Completions(NamedTuple):
    """`n` completions.

    Attributes:
        ids: `[n, max_completion_length]` token ids; what lies behind a completion's end is padding of no meaning.
        length: `[n]`, number of tokens, the end-of-text token included.
    """

    ids: Tensor
    length: Tensor

    def tokens(self) -> list[list[int]]:
        """The token ids of every completion, without padding."""
        return [row[:length] for row, length in zip(self.ids.tolist(), self.length.tolist(), strict=True)]

    def select(self, rows: Tensor) -> Completions:
        """The completions at these positions."""
        return Completions(self.ids[rows], self.length[rows])

    @classmethod
    def of(cls, tokens: Sequence[Sequence[int]], pad_token_id: int) -> Completions:
        """From lists of token ids, padded to the longest."""
        length = torch.tensor([len(row) for row in tokens])
        return cls(pad_right(tokens, pad_token_id), length)


@dataclass(frozen=True)
class Prompts:
    """The prompts of a run, one row each.

    Attributes:
        rows: the data set's rows as they are: `"prompt"` and whatever columns the objective wants.
        token_ids: each prompt's tokens, at least one.
        keys: a fingerprint of each row's contents, under which its objective values are cached.
    """

    rows: list[dict[str, Any]]
    token_ids: list[list[int]]
    keys: list[str]

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def columns(self) -> list[str]:
        """Names of the columns beside `"prompt"`, which are handed to the objective."""
        return [name for name in self.rows[0] if name != "prompt"]


def columns_of(prompts: Prompts, rows: Sequence[int]) -> dict[str, list[Any]]:
    """The objective's extra columns for a batch that repeats prompts in the order `rows`."""
    return {name: [prompts.rows[row][name] for row in rows] for name in prompts.columns}


@dataclass
class Proposals:
    """`n` draws for each of `P` prompts with all that weights are made of; rows are ordered by prompt.

    Attributes:
        rows: `[P·n]`, the prompt of each draw.
        completions: the `P·n` token sequences.
        texts: their decoded texts.
        objective: `[P, n]`, costs `d`.
        log_prior: `[P, n]`, `log L`, nats.
        log_model: `[P, n]`, `log q` of the model that drew them, nats.
    """

    rows: Tensor
    completions: Completions
    texts: list[str]
    objective: Tensor
    log_prior: Tensor
    log_model: Tensor

    def log_target(self, tau: float) -> Tensor:
        """`log L(s) - τ·d(s)`, `[P, n]`: `log p_τ` up to `log Z_τ`, nats."""
        return self.log_prior - tau * self.objective

    def log_weight(self, tau: float) -> Tensor:
        """`ℓ(s) = log L(s) - τ·d(s) - log q(s)`, `[P, n]`, nats."""
        return self.log_target(tau) - self.log_model

    def flat(self, index: Tensor) -> Tensor:
        """Positions in the flat columns of draws `index` (`[P, m]`, into each prompt's `n`); `[P·m]`."""
        prompts, n = self.objective.shape
        return (index + n * torch.arange(prompts)[:, None]).flatten()

    def distinct_share(self, flat: Tensor | None = None) -> float:
        """Distinct (prompt, completion) pairs as a share of all, or of those at the `flat` positions."""
        rows, completions = self.rows, self.completions
        if flat is not None:
            rows, completions = rows[flat], completions.select(flat)
        pairs = {(row, *tokens) for row, tokens in zip(rows.tolist(), completions.tokens(), strict=True)}
        return len(pairs) / len(rows)

    def flat_share(self) -> float:
        """Share of prompts whose draws all cost the same."""
        return (self.objective.amin(-1) == self.objective.amax(-1)).double().mean().item()


def join_rungs(parts: Sequence[Proposals]) -> Proposals:
    """Proposals of several rungs as one set of `N` a prompt, ordered by prompt and, within it, by rung."""
    prompts = parts[0].objective.shape[0]

    def flat(columns: list[Tensor]) -> Tensor:
        return torch.cat([column.view(prompts, -1, *column.shape[1:]) for column in columns], dim=1).flatten(0, 1)

    order = flat([torch.arange(len(part.texts)) + offset for part, offset in zip(parts, _offsets(parts), strict=True)])
    texts = [text for part in parts for text in part.texts]
    return Proposals(
        rows=flat([part.rows for part in parts]),
        completions=Completions(
            flat([part.completions.ids for part in parts]), flat([part.completions.length for part in parts])
        ),
        texts=[texts[index] for index in order.tolist()],
        objective=torch.cat([part.objective for part in parts], dim=1),
        log_prior=torch.cat([part.log_prior for part in parts], dim=1),
        log_model=torch.cat([part.log_model for part in parts], dim=1),
    )


def _offsets(parts: Sequence[Proposals]) -> list[int]:
    return list(itertools.accumulate((len(part.texts) for part in parts[:-1]), initial=0))


def pad_right(rows: Sequence[Sequence[int]], pad_token_id: int) -> Tensor:
    """Token ids as one tensor, `[n, width]`, padded on the right to the longest row."""
    width = max(map(len, rows))
    return torch.tensor([[*row, *[pad_token_id] * (width - len(row))] for row in rows])


Advance = Callable[[int], None]
"""Moves a piece of work on by so many steps."""


class Progress(Protocol):
    """Shows how far a piece of work is: a context manager for the time of the work, which yields [`Advance`]."""

    def __call__(self, description: str, total: int, done: int = 0) -> contextlib.AbstractContextManager[Advance]: ...


@contextlib.contextmanager
def no_progress(description: str, total: int, done: int = 0) -> Iterator[Advance]:
    """A [`Progress`] that shows nothing."""
    yield lambda steps: None
