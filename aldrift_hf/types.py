"""The data that flows through the package: prompts, completions, proposals, and the samples that a rung learns from."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol, cast

import torch
from torch import Tensor

RESERVED_COLUMNS = ("prompts", "completions", "completion_ids", "self")
"""Arguments of a cost function that are not columns of the data set: what is to be judged, and a method's object."""


SLACK = 1e-9
"""By so much a cost may exceed a threshold because of rounding."""


class Completions(NamedTuple):
    """`n` completions.

    Attributes:
        ids: `[n, max_completion_length]` token ids; those after a completion's end are padding and have no meaning.
        length: `[n]`, number of tokens, including the end-of-text token.
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


class Draws(NamedTuple):
    """`n` completions and the probabilities with which they were drawn.

    Attributes:
        completions: the `n` token sequences, on the CPU.
        token_log_probs: `[n, max_completion_length]`, of each token `log q` of the law that it was drawn from,
            nats, fp64, on the CPU; 0 after a completion's end.
    """

    completions: Completions
    token_log_probs: Tensor

    @property
    def log_probs(self) -> Tensor:
        """`[n]`, `log q` of the completions, nats."""
        return self.token_log_probs.sum(-1)


class Beginnings(NamedTuple):
    """The first tokens of `n` completions, and the probabilities with which they were drawn.

    Attributes:
        tokens: of each completion, fewer than it has at most.
        log_probs: of each token, nats.
    """

    tokens: list[list[int]]
    log_probs: list[list[float]]

    def select(self, rows: range) -> Beginnings:
        """Those of consecutive completions."""
        return Beginnings(self.tokens[rows.start : rows.stop], self.log_probs[rows.start : rows.stop])

    def continued(self, draws: Draws, width: int, pad_token_id: int) -> Draws:
        """Whole completions.

        Args:
            draws: `n`, what was drawn after these tokens.
            width: most tokens of a whole completion.
            pad_token_id: fills rows.
        """
        tokens = [[*before, *rest] for before, rest in zip(self.tokens, draws.completions.tokens(), strict=True)]
        rests = draws.token_log_probs.tolist()
        log_probs = [
            [*before, *rest[: len(row) - len(before)], *[0.0] * (width - len(row))]
            for row, before, rest in zip(tokens, self.log_probs, rests, strict=True)
        ]
        ids = torch.tensor([[*row, *[pad_token_id] * (width - len(row))] for row in tokens])
        length = torch.tensor([len(row) for row in tokens])
        return Draws(Completions(ids, length), torch.tensor(log_probs, dtype=torch.float64))


class Spans(NamedTuple):
    """Spans of `n` completions, which the model is to draw again, and what stands before and after them.

    Attributes:
        tokens: of each completion, those before the span.
        old: those of the span; none of them ends a text.
        after: those after it, with the end-of-text token where there is one.
        widths: how many tokens are to be drawn in the span's place.
    """

    tokens: list[list[int]]
    old: list[list[int]]
    after: list[list[int]]
    widths: list[int]

    def select(self, rows: range) -> Spans:
        """Those of consecutive completions."""
        part = slice(rows.start, rows.stop)
        return Spans(self.tokens[part], self.old[part], self.after[part], self.widths[part])

    def filled(self, draws: Completions, width: int, pad_token_id: int, eos_token_ids: Sequence[int]) -> Completions:
        """Whole completions; as before, where the model ended the text within the span.

        Args:
            draws: `n`, what was drawn after `tokens`: at least `widths`, or up to an end-of-text token.
            width: most tokens of a whole completion.
            pad_token_id: fills rows.
            eos_token_ids: tokens that end a text.
        """
        new = [drawn[:size] for drawn, size in zip(draws.tokens(), self.widths, strict=True)]
        kept = [old if {*eos_token_ids} & {*drawn} else drawn for drawn, old in zip(new, self.old, strict=True)]
        tokens = [[*row[0], *row[1], *row[2]] for row in zip(self.tokens, kept, self.after, strict=True)]
        ids = torch.tensor([[*row, *[pad_token_id] * (width - len(row))] for row in tokens])
        return Completions(ids, torch.tensor([len(row) for row in tokens]))


@dataclass(frozen=True)
class Prompts:
    """The prompts of a run, one per row of the data set.

    Attributes:
        rows: the data set's rows, unchanged: `"prompt"` and the columns that the objective takes.
        token_ids: the tokens of each prompt, at least one.
        keys: a fingerprint of each row's contents, under which its costs are cached.
    """

    rows: list[dict[str, Any]]
    token_ids: list[list[int]]
    keys: list[str]

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def columns(self) -> list[str]:
        """Names of the columns other than `"prompt"`, which are passed to the objective."""
        return [name for name in self.rows[0] if name != "prompt"]


def columns_of(prompts: Prompts, rows: Sequence[int]) -> dict[str, list[Any]]:
    """The objective's extra columns for a batch that repeats prompts in the order `rows`."""
    return {name: [prompts.rows[row][name] for row in rows] for name in prompts.columns}


@dataclass
class Proposals:
    """`n` draws for each of `P` prompts with everything that their weights are made of; rows are ordered by prompt.

    Attributes:
        rows: `[P·n]`, the prompt of each draw.
        completions: the `P·n` token sequences.
        objective: `[P, n]`, costs `d(s)`; NaN for a draw that was not evaluated, which [`Screen`] alone leaves out.
        log_prior: `[P, n]`, `log L(s)` under the prior, nats.
        log_model: `[P, n]`, `log q(s)` of the law that they were drawn from, nats.
        texts: the decoded texts; `None` where draws of several rungs are put together.
        as_scored: whether `log_model` is also what the scorer gives for the model that drew them. Otherwise the two
            differ by the rounding of whatever drew them.
        token_log_model: `[P·n, width]`, the part of each token in `log_model`; `None` where it is no longer needed.
        texts_per_draw: how many in a row are one independent draw, of one cost: 2 where its twin is beside each draw.
    """

    rows: Tensor
    completions: Completions
    objective: Tensor
    log_prior: Tensor
    log_model: Tensor
    texts: list[str] | None = None
    as_scored: bool = True
    token_log_model: Tensor | None = None
    texts_per_draw: int = 1

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def prompts(self) -> Tensor:
        """`[P]`, the prompts that were drawn for, as positions among the run's."""
        return self.rows.view(self.objective.shape)[:, 0]

    def log_target(self, tau: float | Tensor) -> Tensor:
        """`log L(s) - τ·d(s)`, `[P, n]`: `log p_τ(s)` up to `log Z_τ`, nats.

        Args:
            tau: the inverse temperature; of each prompt, `[P, 1]`, if they differ.
        """
        return self.log_prior - tau * self.objective

    def log_weight(self, tau: float | Tensor) -> Tensor:
        """`ℓ(s) = log L(s) - τ·d(s) - log q(s)`, `[P, n]`, nats; see [`log_target`]."""
        return self.log_target(tau) - self.log_model

    def successes(self, threshold: float) -> Tensor:
        """`[P, n]`: 1 for a draw that costs at most `threshold`, up to rounding; 0 for another."""
        return (self.objective <= threshold + SLACK).double()

    def flat(self, index: Tensor) -> Tensor:
        """Positions in the flat columns of the draws `index` (`[P, m]`, into each prompt's `n`); `[P·m]`."""
        prompts, n = self.objective.shape
        return (index + n * torch.arange(prompts)[:, None]).flatten()

    def beginnings(self, kept: Tensor) -> Beginnings:
        """The first tokens of each completion; `[P·n]`, how many."""
        ends, log_probs = kept.tolist(), cast(Tensor, self.token_log_model).tolist()
        return Beginnings(
            [tokens[:end] for tokens, end in zip(self.completions.tokens(), ends, strict=True)],
            [parts[:end] for parts, end in zip(log_probs, ends, strict=True)],
        )

    def select(self, index: Tensor) -> Proposals:
        """The draws `index` (`[P, m]`, into each prompt's `n`)."""
        flat = self.flat(index)
        return Proposals(
            rows=self.rows[flat],
            completions=self.completions.select(flat),
            objective=self.objective.gather(1, index),
            log_prior=self.log_prior.gather(1, index),
            log_model=self.log_model.gather(1, index),
            texts=None if self.texts is None else [self.texts[row] for row in flat.tolist()],
            as_scored=self.as_scored,
            token_log_model=None if self.token_log_model is None else self.token_log_model[flat],
        )

    def moved(self, mask: Tensor, other: Proposals) -> Proposals:
        """These draws, with those of `other` where `mask`, `[P, n]`, is true."""
        flat = mask.flatten()
        texts, token_log_model = None, None
        if self.texts is not None and other.texts is not None:
            texts = [
                new if moves else old for moves, new, old in zip(flat.tolist(), other.texts, self.texts, strict=True)
            ]
        if self.token_log_model is not None and other.token_log_model is not None:
            token_log_model = torch.where(flat[:, None], other.token_log_model, self.token_log_model)
        return Proposals(
            rows=self.rows,
            completions=Completions(
                torch.where(flat[:, None], other.completions.ids, self.completions.ids),
                torch.where(flat, other.completions.length, self.completions.length),
            ),
            objective=torch.where(mask, other.objective, self.objective),
            log_prior=torch.where(mask, other.log_prior, self.log_prior),
            log_model=torch.where(mask, other.log_model, self.log_model),
            texts=texts,
            as_scored=self.as_scored and other.as_scored,
            token_log_model=token_log_model,
        )

    def distinct_share(self, flat: Tensor | None = None) -> float:
        """Distinct (prompt, completion) pairs as a share of all, or of those at the `flat` positions."""
        rows, completions = self.rows, self.completions
        if flat is not None:
            rows, completions = rows[flat], completions.select(flat)
        pairs = {(row, *tokens) for row, tokens in zip(rows.tolist(), completions.tokens(), strict=True)}
        return len(pairs) / len(rows)

    def distinct_by_prompt(self) -> Tensor:
        """`[P]`, each prompt's distinct completions as a share of its draws."""
        prompts, n = self.objective.shape
        tokens = [*map(tuple, self.completions.tokens())]
        return torch.tensor(
            [len({*tokens[n * place : n * (place + 1)]}) / n for place in range(prompts)], dtype=torch.float64
        )

    def constant_cost_share(self) -> float:
        """Share of prompts for which all draws have the same cost."""
        return (self.objective.amin(-1) == self.objective.amax(-1)).double().mean().item()


Screen = Callable[[Proposals], Tensor]
"""Which of some draws, `[P, n]`, are to be evaluated at all; their costs, not known yet, are NaN."""


def join_rungs(parts: Sequence[Proposals]) -> Proposals:
    """Proposals of several rungs as one set of `N` per prompt, ordered by prompt and, for each prompt, by rung."""
    prompts = parts[0].objective.shape[0]

    def flat(columns: list[Tensor]) -> Tensor:
        return torch.cat([column.view(prompts, -1, *column.shape[1:]) for column in columns], dim=1).flatten(0, 1)

    return Proposals(
        rows=flat([part.rows for part in parts]),
        completions=Completions(
            flat([part.completions.ids for part in parts]), flat([part.completions.length for part in parts])
        ),
        objective=torch.cat([part.objective for part in parts], dim=1),
        log_prior=torch.cat([part.log_prior for part in parts], dim=1),
        log_model=torch.cat([part.log_model for part in parts], dim=1),
    )


def join_prompts(parts: Sequence[Proposals]) -> Proposals:
    """Proposals for different prompts, as many for each, as one set ordered by prompt; without texts."""
    order = torch.cat([part.prompts for part in parts]).argsort()
    rows = torch.cat([part.rows for part in parts])
    flat = rows.argsort(stable=True)

    def by_prompt(columns: list[Tensor]) -> Tensor:
        return torch.cat(columns)[order]

    return Proposals(
        rows=rows[flat],
        completions=Completions(
            torch.cat([part.completions.ids for part in parts])[flat],
            torch.cat([part.completions.length for part in parts])[flat],
        ),
        objective=by_prompt([part.objective for part in parts]),
        log_prior=by_prompt([part.log_prior for part in parts]),
        log_model=by_prompt([part.log_model for part in parts]),
    )


@dataclass
class Samples:
    """The samples that a rung learns from, and the order in which its updates see them.

    Attributes:
        rows: `[n]`, the prompt of each sample.
        completions: the `n` token sequences.
        order: `[length]`, the sample of each training row of the rung.
        columns: what the loss needs beside the tokens, by name, each `[n]`.
    """

    rows: Tensor
    completions: Completions
    order: Tensor
    columns: dict[str, Tensor] = field(default_factory=dict)

    @classmethod
    def joined(cls, parts: Sequence[Samples], length: int, generator: torch.Generator) -> Samples:
        """All of them, in whole random passes, the last one cut to `length` training rows.

        Args:
            parts: samples with the same columns.
            length: training rows.
            generator: the source of the order.
        """
        rows = torch.cat([part.rows for part in parts])
        passes = math.ceil(length / len(rows))
        order = torch.cat([torch.randperm(len(rows), generator=generator) for _ in range(passes)])[:length]
        ids, lengths = (torch.cat(column) for column in zip(*(part.completions for part in parts), strict=True))
        columns = {name: torch.cat([part.columns[name] for part in parts]) for name in parts[0].columns}
        return cls(rows, Completions(ids, lengths), order, columns)

    def state_dict(self) -> dict[str, Tensor]:
        """As named tensors, for a checkpoint."""
        named = {"rows": self.rows, "ids": self.completions.ids, "length": self.completions.length, "order": self.order}
        return named | {f"columns.{name}": column for name, column in self.columns.items()}

    @classmethod
    def from_state_dict(cls, tensors: Mapping[str, Tensor]) -> Samples:
        """The inverse of [`state_dict`]."""
        prefix = "columns."
        columns = {name.removeprefix(prefix): tensors[name] for name in tensors if name.startswith(prefix)}
        completions = Completions(tensors["ids"], tensors["length"])
        return cls(tensors["rows"], completions, tensors["order"], columns)


def pad_right(rows: Sequence[Sequence[int]], pad_token_id: int) -> Tensor:
    """Token ids as one tensor `[n, width]`, padded on the right to the longest row."""
    width = max(map(len, rows))
    return torch.tensor([[*row, *[pad_token_id] * (width - len(row))] for row in rows])


Advance = Callable[[int], None]
"""Moves a piece of work on by a number of steps."""


class Progress(Protocol):
    """Shows how far a piece of work is: a context manager for the time of the work, which yields [`Advance`]."""

    def __call__(self, description: str, total: int, done: int = 0) -> contextlib.AbstractContextManager[Advance]: ...


@contextlib.contextmanager
def no_progress(description: str, total: int, done: int = 0) -> Iterator[Advance]:
    """A [`Progress`] that shows nothing."""
    yield lambda steps: None
