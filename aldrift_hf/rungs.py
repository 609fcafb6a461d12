"""One rung of the ladder: its proposals, its samples as a data set to learn from, and its record."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset

from . import diagnostics
from .sequences import Completions, join


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

    def measures(self, tau: float, best: float) -> dict[str, float]:
        """Cost, success and the weights' diagnostics at `tau`; means over prompts."""
        log_weight = self.log_weight(tau)
        return {
            "objective_mean": self.objective.mean().item(),
            "objective_best": self.objective.min().item(),
            "success": success_share(self.objective, best),
            "ess": diagnostics.effective_sample_size(log_weight).mean().item(),
            "khat": diagnostics.pareto_khat(log_weight).nanmean().item(),
        }


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


class RungSamples(Dataset[dict[str, list[int]]]):
    """The samples of the rung that is being learnt, as a map-style data set of fixed length.

    Its length is that of a rung's updates, so that the `Trainer`, which asks once, sees every epoch alike; its contents
    are replaced at the beginning of every epoch. The order is the data set's own and part of a checkpoint.
    """

    def __init__(self, length: int, prompts: list[list[int]]) -> None:
        self.length = length
        self.prompts = prompts
        self.load(
            {
                "rows": torch.empty(0, dtype=torch.long),
                "ids": torch.empty((0, 1), dtype=torch.long),
                "length": torch.empty(0, dtype=torch.long),
                "order": torch.empty(0, dtype=torch.long),
            }
        )

    def fill(
        self,
        rows: Tensor,
        completions: Completions,
        generator: torch.Generator,
        densities: Mapping[str, Tensor] | None = None,
    ) -> None:
        """Take new samples and lay out one rung of them: whole random passes, the last one cut.

        Args:
            rows: `[n]`, the prompt of each sample.
            completions: the `n` samples.
            generator: of the order.
            densities: columns of `[n]` floats that the loss needs beside the samples, by name.
        """
        passes = math.ceil(self.length / len(rows))
        order = torch.cat([torch.randperm(len(rows), generator=generator) for _ in range(passes)])[: self.length]
        columns = {"rows": rows, "ids": completions.ids, "length": completions.length, "order": order}
        self.load(columns | dict(densities or {}))

    def tensors(self) -> dict[str, Tensor]:
        """What a checkpoint keeps of it."""
        columns = {"rows": self.rows, "ids": self.completions.ids, "length": self.completions.length}
        return columns | {"order": self.order} | self.densities

    def load(self, tensors: Mapping[str, Tensor]) -> None:
        """The inverse of [`tensors`]."""
        columns = dict(tensors)
        self.rows, self.order = columns.pop("rows"), columns.pop("order")
        self.completions = Completions(columns.pop("ids"), columns.pop("length"))
        self.densities = columns
        self._tokens = self.completions.tokens()

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> dict[str, Any]:
        sample = int(self.order[index])
        tokens = {"prompt": self.prompts[int(self.rows[sample])], "completion": self._tokens[sample]}
        return tokens | {name: column[sample] for name, column in self.densities.items()}


@dataclass
class SampleCollator:
    """Samples to a batch: padded on the right, labels on the completion alone; other columns as fp32 tensors."""

    pad_token_id: int

    def __call__(self, samples: list[dict[str, Any]]) -> dict[str, Tensor]:
        prompts, completions = ([sample[part] for sample in samples] for part in ("prompt", "completion"))
        batch = join(prompts, completions, self.pad_token_id)
        labels = batch.input_ids.masked_fill(~batch.completion_mask, -100)
        others = [name for name in samples[0] if name not in ("prompt", "completion")]
        densities = {name: torch.tensor([sample[name] for sample in samples]).float() for name in others}
        tokens = {"input_ids": batch.input_ids, "attention_mask": batch.attention_mask, "labels": labels}
        return tokens | densities


def success_share(objective: Tensor, best: float) -> float:
    """Share of draws of cost 0 or, where none was ever seen, of the best cost known."""
    return (objective <= max(best, 0.0) + 1e-9).double().mean().item()
